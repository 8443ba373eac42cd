"""The nearest-neighbour estimate of mutual information: no network, no density, a look at the order of magnitude."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from lightning_ext.metrics._precise import ConcatenatingMetric
from lightning_ext.metrics.mutual_information_plot import plot_bounds

__all__ = ["KSGEstimate"]

_NPEET = RequirementCache("npeet-plus")


class KSGEstimate(ConcatenatingMetric):
    r"""Kraskov-Stoegbauer-Grassberger **estimate** from samples alone: a check of few dimensions and few nats.

    .. math:: \hat I = \psi(k) + \psi(N) - \frac1N \sum_{i=1}^{N} \bigl[ \psi(n_x(i) + 1) + \psi(n_z(i) + 1) \bigr]

    where :math:`n_x(i)` counts the points nearer to :math:`x_i` than its k-th neighbour in the joint space, in the
    largest coordinate, and :math:`\psi` is the digamma function. It is no bound. In more dimensions, and beyond a few
    nats, it is far too low: five dimensions of correlation 0.9 share 4.15 nats, and 2,000 pairs give 2.8. Scale
    coordinates alike before.

    ``update(x, z)`` takes ``(B, *event)`` each.

    ``compute()`` returns a dict of scalars: ``estimate`` in nats and ``count``, the number of pairs.

    Args:
        k: Neighbours, at least 1. The fewer, the less bias and the more variance.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ModuleNotFoundError: If npeet-plus is missing, with the line that installs it.
        ValueError: From ``update``, on pairs that do not match, another number of dimensions than before, and numbers
            that are not finite; from the constructor, on k below 1.
        RuntimeError: From ``compute``, with k pairs or fewer.

    Source: Kraskov, Stoegbauer & Grassberger 2004 (Phys. Rev. E 69, 066138), first algorithm, by npeet-plus.

    Note:
        All pairs are kept; ranks are joined. Neighbours are found on the CPU, in about :math:`N \log N`.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import KSGEstimate
        >>> x, noise = torch.randn(2, 2000, 1, generator=torch.Generator().manual_seed(0))
        >>> estimate = KSGEstimate()
        >>> estimate.update(x, 0.9 * x + 0.19**0.5 * noise)
        >>> abs(estimate.compute()["estimate"].item() - 0.8304) < 0.1
        True
    """

    higher_is_better: bool | None = None
    widths: Tensor

    def __init__(self, k: int = 3, **kwargs: Any) -> None:
        if not _NPEET:
            raise ModuleNotFoundError("KSGEstimate needs npeet-plus: pip install 'lightning-ext[ksg]'.")
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}.")
        super().__init__(**kwargs)
        self.k = k
        self.add_pieces("x", torch.float64)
        self.add_pieces("z", torch.float64)
        self.add_state("widths", torch.zeros(2, dtype=torch.long), dist_reduce_fx="max")

    def update(self, x: Tensor, z: Tensor) -> None:
        """Add pairs; see the class for the arguments."""
        x, z = x.flatten(1), z.flatten(1)
        if len(x) != len(z) or not len(x):
            raise ValueError(f"there must be one z for each x, and a pair; got {len(x)} x and {len(z)} z.")
        widths = torch.tensor([x.shape[1], z.shape[1]], device=self.device)
        if bool(self.widths.any()) and not torch.equal(widths, self.widths):
            raise ValueError(f"x and z must have the widths of before, {self.widths.tolist()}; got {widths.tolist()}.")
        for name, values in (("x", x), ("z", z)):
            if not bool(values.isfinite().all()):
                raise ValueError(f"{name} has {int((~values.isfinite()).sum())} numbers that are not finite.")
        self.widths = widths
        self.append(x=x, z=z)

    def compute(self) -> dict[str, Tensor]:
        """The estimate of all pairs so far, over all ranks."""
        wide, deep = self.widths.tolist()
        count = self.joined("x").numel() // max(1, wide)
        if count <= self.k:
            raise RuntimeError(f"KSGEstimate has seen {count} pairs; it needs more than k = {self.k}.")
        value = _npeet(self.joined("x").view(-1, wide), self.joined("z").view(-1, deep), self.k)
        return {
            "estimate": torch.tensor(value, device=self.device, dtype=torch.get_default_dtype()),
            "count": torch.tensor(count, device=self.device),
        }

    def plot(
        self, val: Mapping[str, Tensor] | None = None, ax: Any = None, truth: float | None = None
    ) -> tuple[Any, Any]:
        """Draw a row with the estimate.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: a new figure's.
            truth: The mutual information where it is known, in nats, drawn as a line.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value = dict(self.compute() if val is None else val)
        return plot_bounds({"KSGEstimate": {**value, "stderr": torch.tensor(torch.nan)}}, ax, truth)


def _npeet(x: Tensor, z: Tensor, k: int) -> float:
    """By the library, whose noise on ties depends on the order of pairs and moves NumPy's generator."""
    import npeet_plus
    import numpy as np

    pairs = torch.cat([x, z], 1).double().cpu().numpy()
    pairs = pairs[np.lexsort(pairs.T)]
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(0)  # noqa: NPY002
        return float(npeet_plus.mi(pairs[:, : x.shape[1]], pairs[:, x.shape[1] :], k=k, base=math.e))
    finally:
        np.random.set_state(state)  # noqa: NPY002
