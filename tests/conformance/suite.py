"""What the checks share: their register, comparison of components, and a training that must have taken place."""

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_ext._testing.bitwise import first_difference, fit, seeded
from tests.conformance.entry import Entry, new_trainer

TRAINS = ("callback-observer", "callback-method", "module", "data")
CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Entry], None]]] = {}


def check(*kinds: str) -> Callable[[Callable[[Entry], None]], Callable[[Entry], None]]:
    """Register a check for components of these kinds."""

    def register(function: Callable[[Entry], None]) -> Callable[[Entry], None]:
        CHECKS[function.__name__] = (kinds, function)
        return function

    return register


def state_of(component: Any) -> Any:
    """What two equal components have in common: their state dict and their plain attributes."""
    plain = (bool, int, float, str, bytes, type(None))
    attributes = {k: v for k, v in vars(component).items() if isinstance(v, plain)}
    state = component.state_dict() if hasattr(component, "state_dict") else {}
    return {"class": type(component).__name__, "state": dict(state), "attributes": attributes}


def assert_same(ours: Any, theirs: Any, what: str) -> None:
    found = first_difference(ours, theirs)
    assert found is None, f"{what}: {found}"


def assert_finite(values: Any, what: str) -> None:
    def finite(tensor: Tensor) -> None:
        assert tensor.isfinite().all(), f"{what} is not finite: {tensor}"

    apply_to_collection(values, Tensor, finite)


def finite_metrics(entry: Entry, trainer: Any) -> dict[str, Tensor]:
    """What was logged, less what the component's documentation allows to be infinite or NaN."""
    return {key: value for key, value in trainer.callback_metrics.items() if key not in entry.not_finite}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def train(entry: Entry, module: Any = None, data: Any = None, **kwargs: Any) -> Any:
    """Train the component and return the Trainer, having made sure that training took place."""
    extra = kwargs.pop("callbacks", [])
    with seeded(0):
        module = module or entry.new_module()
        before = weights(module)
        trainer = new_trainer([*entry.new_callbacks(), *extra], **kwargs)
        fit(trainer, module, entry.new_data() if data is None else data)
    assert trainer.global_step > 0, "no optimiser step was made"
    assert first_difference(before, weights(module)) is not None, "training left every weight as it was"
    assert trainer.callback_metrics, "nothing was logged"
    assert_finite(finite_metrics(entry, trainer), "a logged metric")
    assert_finite(weights(module), "a weight")
    return trainer


def total_of(output: Any) -> Tensor:
    total: list[Tensor] = []
    apply_to_collection(output, Tensor, lambda t: total.append(t.float().square().sum()))
    return torch.stack(total).sum()
