"""Does a callback only look? :func:`assert_observer`."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_ext._lightning import Callback, LightningModule
from lightning_ext._testing.bitwise import (
    Trace,
    first_difference,
    fit,
    module_state,
    quiet_trainer,
    rng_state,
    seeded,
)

__all__ = ["assert_observer"]


def assert_observer(
    callback_factory: Callable[[], Callback],
    module_factory: Callable[[], LightningModule],
    data_factory: Callable[[], Any],
    *,
    seed: int = 0,
    **trainer_kwargs: Any,
) -> None:
    """Assert that a callback only looks: training with and without it is the same to the last bit.

    Two trainings start from the same seed. Compared at every hook: parameters, buffers, ``.grad``, train/eval modes,
    optimiser state, the training losses and the global random states of Python, NumPy and torch. Compared at the end:
    all of these, hooks left on submodules, and every metric that the training without the callback logged.

    Args:
        callback_factory: builds the callback under test; called after the module and the data have been built.
        module_factory: builds the module; a net with BatchNorm and Dropout shows the most.
        data_factory: builds a training loader, a ``(train, val)`` tuple or a data module.
        seed: seed of both trainings; default 0.
        **trainer_kwargs: Trainer arguments; default two quiet epochs on one CPU.

    Raises:
        AssertionError: naming the first thing that differs and the hook after which it was seen.

    Note:
        Two trainings. The caller's global random states are left as they were. An observer that needs random numbers
        carries its own ``torch.Generator``.
    """
    plain, plain_end = _observed(None, module_factory, data_factory, seed, trainer_kwargs)
    watched, watched_end = _observed(callback_factory, module_factory, data_factory, seed, trainer_kwargs)
    if not plain.entries:
        raise AssertionError("assert_observer: no training step ran, so nothing was compared.")
    logged = plain_end["metric"]
    watched_end["metric"] = {key: value for key, value in watched_end["metric"].items() if key in logged}
    found = plain.first_difference(watched) or first_difference(plain_end, watched_end)
    if found:
        raise AssertionError(f"assert_observer: the callback changes training. First difference: {found}.")


def _observed(
    callback_factory: Callable[[], Callback] | None,
    module_factory: Callable[[], LightningModule],
    data_factory: Callable[[], Any],
    seed: int,
    trainer_kwargs: Mapping[str, Any],
) -> tuple[Trace, dict[str, Any]]:
    trace = Trace()
    with seeded(seed):
        module, data = module_factory(), data_factory()
        callbacks = [] if callback_factory is None else [callback_factory()]
        trainer = quiet_trainer([*callbacks, trace], trainer_kwargs)
        fit(trainer, module, data)
        end: dict[str, Any] = {"after the fit": module_state(module), "global random state": rng_state()}
        end["optimizer"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
        end["metric"] = dict(trainer.callback_metrics)
    return trace, end
