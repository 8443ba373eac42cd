"""Which divergence belongs to the loss that a module trains with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext._lightning import MisconfigurationException
from lightning_ext.functional import bernoulli_kl, divergence_named, softmax_kl, squared_error

Divergence = Callable[[Tensor, Tensor], Tensor]


def class_dim(outputs: Tensor, labels: Tensor) -> int | None:
    """The dimension of the classes where integer ``labels`` fit ``outputs``, or ``None``."""
    if outputs.ndim < 2:
        return None
    if outputs.shape[:-1] == labels.shape or (outputs.ndim == 2 and len(outputs) == labels.numel()):
        return -1
    if outputs.shape[:1] + outputs.shape[2:] == labels.shape:
        return 1
    return None


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
        if not target.is_floating_point() and (dim := class_dim(z, target)) is not None:
            classes = z.movedim(dim, -1).reshape(-1, z.shape[dim])
            if target.min() >= 0 and target.max() < z.shape[dim]:
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


def recognise(outputs: Tensor, batch: Any, loss: Tensor) -> tuple[str, Divergence]:
    """Find the divergence of the loss whose value on this batch is ``loss``; else the only one that fits the shapes.

    Raises:
        MisconfigurationException: If nothing fits, or several do and none has the value.
    """
    candidates = _candidates(outputs, batch)
    value = float(loss)
    for name, divergence, own in candidates:
        if math.isclose(float(own), value, rel_tol=2e-2 if loss.dtype != torch.float32 else 1e-3, abs_tol=1e-6):
            return name, divergence
    names = {name for name, _, _ in candidates}
    by_shape = names - {"squared_error"} if "mse" in names else names
    if len(by_shape) == 1:
        chosen = by_shape.pop()
        return chosen, next(divergence for name, divergence, _ in candidates if name == chosen)
    raise MisconfigurationException(
        f"divergence='auto' cannot tell which divergence belongs to this loss: the outputs have shape "
        f"{tuple(outputs.shape)}, and {'no' if not names else ' and '.join(sorted(names))} divergence fits the batch. "
        "Pass divergence='kl' (logits, classes last), 'bernoulli_kl' (logits), 'mse', 'squared_error', or a function "
        "(new, old) -> scalar."
    )
