"""Bit-exact comparison of two trainings: what was touched, where, and when. Serves :mod:`lightning_ext.testing`."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ext._lightning import Callback, LightningDataModule, LightningModule, Trainer

__all__ = ["Trace", "first_difference", "fit", "module_state", "quiet_trainer", "rng_state", "seeded"]

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def rng_state() -> dict[str, Any]:
    """The global random number generators that a component can disturb."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside the block and put their former state back afterwards."""
    before = rng_state()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before["python"])
        np.random.set_state(before["numpy"])  # noqa: NPY002
        torch.set_rng_state(before["torch"])


def quiet_trainer(callbacks: Sequence[Callback], trainer_kwargs: Mapping[str, Any]) -> Trainer:
    """A Trainer for tests: one CPU process, two epochs, nothing printed, nothing written unless asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **trainer_kwargs})


def fit(trainer: Trainer, module: LightningModule, data: Any, **kwargs: Any) -> None:
    """``trainer.fit`` on a data module, a ``(train, val)`` tuple or a training loader."""
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data, **kwargs)
    elif isinstance(data, tuple):
        trainer.fit(module, *data, **kwargs)
    else:
        trainer.fit(module, data, **kwargs)


def module_state(module: nn.Module, *, hooks: bool = True) -> dict[str, Any]:
    """Everything an observer must leave alone: parameters, buffers, gradients, train/eval modes, registered hooks."""
    state: dict[str, Any] = {f"parameter {name!r}": value for name, value in module.named_parameters()}
    state |= {f"buffer {name!r}": value for name, value in module.named_buffers()}
    state |= {f"gradient of {name!r}": value.grad for name, value in module.named_parameters()}
    for name, child in module.named_modules():
        state[f"training mode of {name or 'the module'!r}"] = child.training
        if hooks:
            state[f"number of hooks on {name or 'the module'!r}"] = sum(len(getattr(child, t)) for t in _HOOK_TABLES)
    return state


def _unequal_tensors(ours: Tensor, theirs: Tensor) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} of shape {tuple(ours.shape)} against {theirs.dtype} of shape {tuple(theirs.shape)}"
    a, b = ours.detach().cpu(), theirs.detach().cpu()
    if torch.equal(a, b) or _digest(a) == _digest(b):  # the digest settles NaN, which is unequal to itself
        return None
    gap = (a.double() - b.double()).abs().max().item() if not a.is_complex() else (a - b).abs().max().item()
    return f"largest absolute difference {gap:.3g}"


def first_difference(ours: Any, theirs: Any, name: str = "") -> str | None:
    """Where two nested structures of tensors and plain values first differ, or None.

    Floating-point values must agree to the last bit; two NaNs of the same bits agree.
    """
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        gap = _unequal_tensors(ours, theirs)
        return None if gap is None else f"{name} ({gap})"
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if list(ours) != list(theirs):
            odd = [key for key in (*ours, *theirs) if (key in ours) != (key in theirs)]
            return f"{name} (keys {odd} are only on one side)" if odd else f"{name} (order of keys)"
        pairs = ((f"{name}[{key!r}]" if name else str(key), ours[key], theirs[key]) for key in ours)
        return next((found for key, a, b in pairs if (found := first_difference(a, b, key))), None)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return f"{name} (length {len(ours)} against {len(theirs)})"
        items = ((f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return next((found for key, a, b in items if (found := first_difference(a, b, key))), None)
    if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
        return None if np.array_equal(ours, theirs) else name
    same = type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))
    return None if same else f"{name} ({_short(ours)} against {_short(theirs)})"


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _digest(value: Any) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    _feed(hasher.update, value)
    return hasher.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        update(f"{value.dtype}{tuple(value.shape)}".encode())
        update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(repr(key).encode())
            _feed(update, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(update, item)
    elif isinstance(value, np.ndarray):
        update(value.tobytes())
    else:
        update(repr(value).encode())


class Trace(Callback):
    """Writes down fingerprints of the training state at every hook where a callback could have disturbed it.

    Placed after the callback under test, it sees in each hook what that callback has left behind.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []

    def _record(self, hook: str, trainer: Trainer, pl_module: LightningModule, **extra: Any) -> None:
        if trainer.sanity_checking:
            return
        state = {f"global {kind} random state": value for kind, value in rng_state().items()} | extra
        state |= module_state(pl_module, hooks=False)
        state["optimizer state"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
        place = f"{hook} of epoch {trainer.current_epoch}, step {trainer.global_step}"
        self.entries.append((place, {name: _digest(value) for name, value in state.items()}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the callback's set-up has left behind."""
        self._record("on_train_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the state in which the training step will run."""
        self._record("on_train_batch_start", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the gradients that the optimiser will use."""
        self._record("on_before_optimizer_step", trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the training loss and the state after the step."""
        self._record("on_train_batch_end", trainer, pl_module, **{"training loss": outputs})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the validation hooks have left behind."""
        self._record("on_validation_end", trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the epoch-end hooks have left behind."""
        self._record("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the last hook has left behind."""
        self._record("on_train_end", trainer, pl_module)

    def first_difference(self, other: "Trace") -> str | None:
        """The earliest hook and name at which two trainings part, or None."""
        for (place, ours), (other_place, theirs) in zip(self.entries, other.entries, strict=False):
            if place != other_place:
                return f"the course of training: {place} against {other_place}"
            names = [*ours, *(name for name in theirs if name not in ours)]
            for name in names:
                if ours.get(name) != theirs.get(name):
                    return f"{name}, at {place}"
        if len(self.entries) != len(other.entries):
            return f"the number of hooks run: {len(self.entries)} against {len(other.entries)}"
        return None
