"""The mutual information gap, streamed over batches and ranks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional import mutual_information_gap, widest_float
from lightning_ext.metrics._precise import PreciseMetric, check_pair
from lightning_ext.metrics.mrvae_plot import plot_information

__all__ = ["MutualInformationGap"]


class MutualInformationGap(PreciseMetric):
    r"""How far each known factor of variation is captured by one latent only.

    .. math:: \mathrm{MIG} = \frac1F \sum_f \frac{I(z_{(1)}; v_f) - I(z_{(2)}; v_f)}{H(v_f)} \in [0, 1],

    with the two latents that tell most about factor :math:`v_f`. Latents are cut into ``num_bins`` bins of equal width
    over ``z_range``, the outer two open-ended, so that nothing but counts has to be kept.

    ``update(z, factors)`` takes samples (not means) of the latents, ``(B, latent_dim)``, and the integer value of each
    factor, ``(B, F)``, from 0 up to its size. ``compute()`` returns a dict of tensors: ``mig``, ``gap`` of each factor
    ``(F,)``, and ``mutual_information`` ``(latent_dim, F)`` in nats. A factor that took a single value has no gap: it
    is NaN, left out of ``mig``, and named in a warning.

    Args:
        factor_sizes: Number of values of each factor, each at least 1.
        latent_dim: Number of latents, at least 2.
        num_bins: Bins per latent, at least 2.
        z_range: Where the equal-width bins lie; the default holds a standard normal prior.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Chen et al. 2018 (arXiv 1802.04942), Eq. 6. As there, use factors that are independent; categorical ones
    without order, such as dSprites' shape, are usually left out.

    Note:
        The plug-in estimate overestimates information when cells hold few samples: 10,000 samples are customary.
        Integer counts add up exactly over batches and ranks.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import MutualInformationGap
        >>> mig = MutualInformationGap(factor_sizes=[2], latent_dim=2)
        >>> factor = torch.tensor([0, 1] * 8)
        >>> z = torch.stack([2.0 * factor - 1, torch.zeros(16)], dim=1)
        >>> mig.update(z, factor[:, None])
        >>> mig.compute()["mig"].item()
        1.0
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    counts: Tensor

    def __init__(
        self,
        factor_sizes: Sequence[int],
        latent_dim: int,
        num_bins: int = 20,
        z_range: Sequence[float] = (-4.0, 4.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if len(factor_sizes) == 0 or any(size < 1 for size in factor_sizes):
            raise ValueError(f"factor_sizes must be a non-empty sequence of positive sizes, got {list(factor_sizes)}.")
        if latent_dim < 2 or num_bins < 2:
            raise ValueError(f"latent_dim and num_bins must be at least 2, got {latent_dim} and {num_bins}.")
        span = check_pair("z_range", z_range)
        if span is None or span[0] >= span[1]:
            raise ValueError(f"z_range must be (low, high) with low < high, got {z_range}.")
        self.factor_sizes, self.latent_dim, self.num_bins, self.z_range = list(factor_sizes), latent_dim, num_bins, span
        shape = (latent_dim, num_bins, sum(factor_sizes))
        self.add_state("counts", torch.zeros(shape, dtype=torch.long, device=self.device), dist_reduce_fx="sum")

    def update(self, z: Tensor, factors: Tensor) -> None:
        """Count samples; see the class for the arguments."""
        self._check_input(z, factors)
        sizes = torch.tensor(self.factor_sizes, device=factors.device)
        if bool(((factors < 0) | (factors >= sizes)).any()):
            worst = int(((factors < 0) | (factors >= sizes)).any(0).nonzero()[0])
            values = factors[:, worst]
            raise ValueError(
                f"factors[:, {worst}] must lie in [0, {self.factor_sizes[worst] - 1}], got values from "
                f"{values.min().item()} to {values.max().item()}."
            )
        low, high = self.z_range
        # float64: a value on an edge falls into the same bin whatever precision the model runs in
        place = (z.detach().to(widest_float(z.device)) - low) * (self.num_bins / (high - low))
        bins = place.clamp(0, self.num_bins - 1).long()
        latents = torch.arange(self.latent_dim, device=z.device)
        columns = factors.long() + sizes.cumsum(0) - sizes
        cells = (latents * self.num_bins + bins).unsqueeze(2) * self.counts.shape[-1] + columns.unsqueeze(1)
        self.counts = self.counts + torch.bincount(cells.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """The gap so far, over all ranks; see the class for the keys."""
        if not bool(self.counts.any()):
            raise RuntimeError("MutualInformationGap has seen no sample on any rank; call update before compute.")
        columns = torch.split(self.counts[0].sum(0), self.factor_sizes)
        constant = [f for f, column in enumerate(columns) if int((column > 0).sum()) < 2]
        if constant:
            self.warn_of([f"factor {f} took a single value, its gap is NaN and not part of mig." for f in constant])
        if len(constant) == len(self.factor_sizes):
            nan = self.float_state(len(constant)) * math.nan
            return {"mig": nan[0], "gap": nan, "mutual_information": self.float_state(self.latent_dim, len(constant))}
        result = mutual_information_gap(self.counts, self.factor_sizes)
        return {"mig": result.mig, "gap": result.gap, "mutual_information": result.mutual_information}

    def plot(
        self, val: Mapping[str, Tensor] | None = None, ax: Any = None, factor_names: Sequence[str] | None = None
    ) -> tuple[Any, Any]:
        """Draw the mutual information of every latent and factor as a heat map.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.
            factor_names: Labels of the factors. Default: their numbers.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        return plot_information(self.compute() if val is None else val, ax, factor_names)

    def _check_input(self, z: Tensor, factors: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape (B, {self.latent_dim}), got {tuple(z.shape)}.")
        if factors.shape != (len(z), len(self.factor_sizes)):
            raise ValueError(
                f"factors must have shape {(len(z), len(self.factor_sizes))}, one column per factor, got "
                f"{tuple(factors.shape)}."
            )
        if factors.is_floating_point() or factors.is_complex() or factors.dtype == torch.bool:
            raise ValueError(f"factors must be integers from 0 to size - 1, got {factors.dtype}; pass factors.long().")
        if not bool(z.isfinite().all()):
            raise ValueError("z has values that are not finite; mask them out before update.")
