"""The guards under which a callback runs a module's own code on the side."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_ext._lightning import LightningModule, Trainer, submodule
from lightning_ext.functional import evaluating


def _muted(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict``."""


@contextlib.contextmanager
def quietly(pl_module: LightningModule) -> Iterator[None]:
    """Mute ``log`` and ``log_dict`` and put every random state (torch, CUDA, NumPy, Python) back afterwards."""
    own: dict[str, Any] = {name: vars(pl_module)[name] for name in ("log", "log_dict") if name in vars(pl_module)}
    failed: BaseException | None = None
    with submodule("utilities.seed").isolate_rng():
        pl_module.log = pl_module.log_dict = _muted  # type: ignore[method-assign]
        try:
            yield
        except BaseException as error:  # raised again below: isolate_rng restores only where nothing is raised in it
            failed = error
        finally:
            del pl_module.log, pl_module.log_dict
            vars(pl_module).update(own)
    if failed is not None:
        raise failed


@contextlib.contextmanager
def undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """As :func:`quietly`, and put buffers, train and eval modes, and the states of metrics back afterwards.

    For passes in train mode: running statistics move in them, and a ``training_step`` updates its metrics. ``.grad``
    needs no guard as long as gradients are taken with ``torch.autograd.grad``. Plain attributes that a module counts up
    by itself are not covered.
    """
    modules = list(pl_module.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer) for module in modules for name, buffer in module._buffers.items() if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}
    for module, name, buffer in buffers:  # work on copies: a graph built here may need them after the guard
        module._buffers[name] = copies[id(buffer)]
    metrics = [(module, _attributes(module)) for module in modules if isinstance(module, Metric)]
    try:
        with quietly(pl_module):
            yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for metric, attributes in metrics:
            vars(metric).update(attributes)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextlib.contextmanager
def beside(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Read data and run the module in eval mode without a trace; batch hooks see a trainer that validates."""
    stage = trainer.state.stage
    with undisturbed(pl_module), evaluating(pl_module):
        trainer.validating = True  # hooks that augment while training leave these batches as they are
        try:
            yield
        finally:
            trainer.state.stage = stage


def _attributes(metric: Metric) -> dict[str, Any]:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return list(value) if isinstance(value, list) else value

    return {name: copied(value) for name, value in vars(metric).items()}
