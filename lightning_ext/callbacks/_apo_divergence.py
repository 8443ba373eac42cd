"""Which divergence belongs to the loss that a module trains with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.functional import bernoulli_kl, divergence_named, softmax_kl, squared_error

Divergence = Callable[[Tensor, Tensor], Tensor]


def class_dims(outputs: Tensor, labels: Tensor) -> list[int]:
    """The dimensions that can be the classes', where integer ``labels`` fit ``outputs``."""
    if outputs.ndim < 2:
        return []
    last = outputs.shape[:-1] == labels.shape or (outputs.ndim == 2 and len(outputs) == labels.numel())
    second = outputs.ndim > 2 and outputs.shape[:1] + outputs.shape[2:] == labels.shape
    return [1] * second + [-1] * last


def _targets(batch: Any) -> list[Tensor]:
    if isinstance(batch, dict):
        return [part for part in batch.values() if isinstance(part, Tensor)]
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    return [part for part in parts[:2] if isinstance(part, Tensor)][::-1]


def _candidates(outputs: Tensor, batch: Any) -> list[tuple[str, Divergence, Tensor]]:
    """Name, divergence and value of every common loss that the shapes allow."""
    found: list[tuple[str, Divergence, Tensor]] = []
    z = outputs.detach().float()
    for target in _targets(batch):
        for dim in [] if target.is_floating_point() else class_dims(z, target):
            classes = z.movedim(dim, -1).reshape(-1, z.shape[dim])
            counted = target[target != -100]  # cross-entropy leaves out what is marked so
            if counted.numel() and counted.min() >= 0 and counted.max() < z.shape[dim]:
                loss = F.cross_entropy(classes, target.reshape(-1).long())
                found.append(("kl", partial(softmax_kl, dim=dim), loss))
        if target.numel() == z.numel():
            wanted = target.reshape(z.shape).float()
            found.append(("mse", divergence_named("mse"), F.mse_loss(z, wanted)))
            found.append(("squared_error", squared_error, squared_error(z, wanted)))
            if wanted.min() >= 0 and wanted.max() <= 1:
                loss = F.binary_cross_entropy_with_logits(z, wanted)
                found.append(("bernoulli_kl", bernoulli_kl, loss))
    return found


class Recognised(NamedTuple):
    """What :func:`recognise` found: the divergence by name, its factor, and both as one function."""

    name: str
    factor: float
    divergence: Divergence

    def __str__(self) -> str:
        """Say it to the user."""
        if self.factor == 1.0:
            return f"divergence={self.name!r}, which belongs to the loss"
        return (
            f"{self.factor:.3g} times divergence={self.name!r}, the only one that fits the shapes: the loss has "
            "another value than its own. Pass divergence=... if that is not what you want"
        )


def scaled(new: Tensor, old: Tensor, *, factor: float, divergence: Divergence) -> Tensor:
    """``factor`` times a divergence."""
    return factor * divergence(new, old)


def recognise(outputs: Tensor, batch: Any, loss: Tensor, who: str = "APOLearningRate") -> Recognised:
    """Find the divergence of the loss whose value on this batch is ``loss``; else the only one that fits the shapes.

    Where it is found by the shapes alone it is multiplied by the ratio of the values, so that a loss that is summed, or
    weighted, weighs the change of the outputs alike.

    Raises:
        MisconfigurationException: If nothing fits, or several do and none has the value.
    """
    candidates = _candidates(outputs, batch)
    value = float(loss)
    for name, divergence, own in candidates:
        if math.isclose(float(own), value, rel_tol=2e-2 if loss.dtype != torch.float32 else 1e-3, abs_tol=1e-6):
            return Recognised(name, 1.0, divergence)
    names = {name for name, _, _ in candidates}
    by_shape = names - {"squared_error"} if "mse" in names else names
    if len(by_shape) == 1:
        name, divergence, own = next(c for c in candidates if c[0] in by_shape)
        factor = value / float(own) if own > 0 and value > 0 else 1.0
        return Recognised(name, factor, partial(scaled, factor=factor, divergence=divergence))
    found = f"{' and '.join(sorted(names))} are possible" if names else "no divergence fits the batch"
    raise MisconfigurationException(
        f"{who}: divergence='auto' cannot tell which divergence belongs to this loss: for outputs of shape "
        f"{tuple(outputs.shape)} {found}. Pass divergence='kl' (logits, classes last), 'bernoulli_kl' (logits), 'mse', "
        "'squared_error', or a function (new, old) -> scalar."
    )
