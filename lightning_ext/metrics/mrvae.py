"""Rate-distortion curves, streamed over batches and ranks."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ext.functional import (
    active_units,
    hypervolume,
    merge_moments,
    moments_variance,
    rate_distortion_auc,
    slope_error,
    update_moments,
)
from lightning_ext.metrics._precise import PreciseMetric, check_pair
from lightning_ext.metrics.mrvae_plot import plot_rate_distortion

__all__ = ["RateDistortionCurve"]


class RateDistortionCurve(PreciseMetric):
    r"""Rate and distortion at each beta of a grid, and what the curve amounts to.

    .. math::
        R_k = \frac{1}{n_k} \sum_{i \in k} R_i, \qquad D_k = \frac{1}{n_k} \sum_{i \in k} D_i, \qquad
        L_k = D_k + \beta_k R_k, \qquad \mathrm{ELBO}_k = -(D_k + R_k),

    with per-sample rates and distortions in nats, summed over latents and pixels. The ELBO always has weight 1,
    whatever beta trained the model.

    ``update(index, rate, distortion, mu=None)`` takes

    - ``index``: the position in the grid at which the samples were evaluated: an int for the whole batch, or an integer
      tensor ``(B,)``;
    - ``rate``, ``distortion``: per-sample values in nats, ``(B,)``;
    - ``mu``: posterior means ``(B, latent_dim)``, needed exactly when ``latent_dim`` is set.

    ``compute()`` returns a dict of tensors:

    - per beta, ``(K,)``: ``beta``, ``rate``, ``distortion``, ``elbo``, ``loss``, ``count``, and with ``latent_dim``
      also ``active_units`` (see :func:`~lightning_ext.functional.active_units`);
    - for the curve: ``auc`` (:func:`~lightning_ext.functional.rate_distortion_auc`), ``slope_error``
      (:func:`~lightning_ext.functional.slope_error`), ``monotone`` (bool: the rate never rises and the distortion never
      falls as beta grows) and, with ``reference_point``, ``hypervolume``
      (:func:`~lightning_ext.functional.hypervolume`).

    A beta that saw no sample, or a sum that is not finite, gives NaN at that beta, and the numbers for the curve come
    from the rest; one warning names them. A number that cannot be had (no slope on a collapsed curve) is NaN, with its
    reason in the same warning.

    Args:
        betas: KL weights of the grid, positive and ascending.
        latent_dim: Number of latents; needed for active units. Default: no active units.
        reference_point: ``(rate, distortion)`` worse than any of interest, the corner of the hypervolume. Default: no
            hypervolume, as a corner taken from the data would make its values incomparable.
        rate_interval: ``(low, high)`` in nats, over which ``auc`` is taken. Two curves compare over one common interval
            only. Default: the measured range of rates.
        active_unit_threshold: Variance of a posterior mean from which a latent counts as active.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On a malformed grid or input; the message names the argument.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Bae et al. 2023 (arXiv 2212.03905), section 5; active units: Burda et al. 2016 (arXiv 1509.00519).

    Note:
        Sums are kept in float64 (float32 on devices without it) even inside a half-precision module. States of ranks
        add, posterior moments merge, and a rank that saw nothing changes nothing. Results carry no gradient. A
        distributed sampler that repeats samples to fill the last batch counts them twice.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import RateDistortionCurve
        >>> curve = RateDistortionCurve(betas=[0.1, 0.5, 2.0], reference_point=(5.0, 5.0))
        >>> index = torch.tensor([0, 1, 2, 2])
        >>> curve.update(index, rate=torch.tensor([4.0, 2.0, 0.5, 1.5]), distortion=torch.tensor([1.0, 2.0, 3.0, 5.0]))
        >>> value = curve.compute()
        >>> value["rate"].tolist(), value["distortion"].tolist(), value["hypervolume"].item()
        ([4.0, 2.0, 1.0], [1.0, 2.0, 4.0], 11.0)
    """

    higher_is_better: bool | None = None  # a dict of quantities of both kinds

    sum_rate: Tensor
    sum_distortion: Tensor
    count: Tensor
    moments: Tensor

    def __init__(
        self,
        betas: Sequence[float],
        latent_dim: int | None = None,
        reference_point: Sequence[float] | None = None,
        rate_interval: Sequence[float] | None = None,
        active_unit_threshold: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.betas = _check_betas(betas)
        if latent_dim is not None and latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, or None for no active units, got {latent_dim}.")
        self.latent_dim = latent_dim
        self.reference_point = check_pair("reference_point", reference_point)
        self.rate_interval = check_pair("rate_interval", rate_interval)
        if self.rate_interval and self.rate_interval[0] > self.rate_interval[1]:
            raise ValueError(f"rate_interval must be (low, high) with low <= high, got {self.rate_interval}.")
        self.active_unit_threshold = active_unit_threshold
        k = len(self.betas)
        self.add_state("sum_rate", self.float_state(k), dist_reduce_fx="sum")
        self.add_state("sum_distortion", self.float_state(k), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(k, dtype=torch.long, device=self.device), dist_reduce_fx="sum")
        if latent_dim is not None:
            self.add_state("moments", self.float_state(k, latent_dim, 3), dist_reduce_fx=merge_moments)

    def update(self, index: int | Tensor, rate: Tensor, distortion: Tensor, mu: Tensor | None = None) -> None:
        """Add samples that were evaluated at ``betas[index]``; see the class for the arguments."""
        if rate.ndim != 1 or rate.shape != distortion.shape:
            raise ValueError(
                "rate and distortion must be per-sample vectors of one length (B,), got shapes "
                f"{tuple(rate.shape)} and {tuple(distortion.shape)}."
            )
        position = self._check_index(index, rate)
        self._check_mu(mu, rate)
        self.sum_rate = self.sum_rate.index_add(0, position, rate.detach().to(self.sum_rate.dtype))
        self.sum_distortion = self.sum_distortion.index_add(0, position, distortion.detach().to(self.sum_rate.dtype))
        self.count = self.count + torch.bincount(position, minlength=len(self.betas))
        if mu is not None:
            self.moments = update_moments(self.moments, position, mu.detach())

    def compute(self) -> dict[str, Tensor]:
        """The curve so far, over all ranks; see the class for the keys."""
        if not bool(self.count.any()):
            raise RuntimeError("RateDistortionCurve has seen no sample on any rank; call update before compute.")
        beta = torch.tensor(self.betas, dtype=self.sum_rate.dtype, device=self.sum_rate.device)
        rate, distortion = self.sum_rate / self.count, self.sum_distortion / self.count
        finite = rate.isfinite() & distortion.isfinite()
        rate, distortion = (torch.where(finite, x, torch.nan) for x in (rate, distortion))
        curve = {
            "beta": beta,
            "rate": rate,
            "distortion": distortion,
            "elbo": -(rate + distortion),
            "loss": distortion + beta * rate,
            "count": self.count,
        }
        problems = self._gaps(self.count == 0, "no sample at") + self._gaps(
            ~finite & (self.count > 0), "the rates or distortions are not finite at"
        )
        if self.latent_dim is not None:
            variance = moments_variance(self.moments)
            known = variance.isfinite().all(-1)
            units = active_units(variance, self.active_unit_threshold).to(beta.dtype)
            curve["active_units"] = torch.where(known, units, torch.nan)
            problems += self._gaps(~known & (self.count > 0), "no variance of mu (one sample, or not finite) at")
        summary, reasons = self._summaries(beta[finite], rate[finite], distortion[finite])
        self.warn_of(problems + reasons)
        return curve | summary

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the data of another curve over the same betas, or of its states, to this one."""
        if isinstance(incoming_state, RateDistortionCurve) and incoming_state.betas != self.betas:
            raise ValueError(f"Only curves over equal betas merge, got {incoming_state.betas} into {self.betas}.")
        super().merge_state(incoming_state)

    def plot(
        self,
        val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
        ax: Any = None,
        baselines: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> tuple[Any, Any]:
        """Draw distortion against rate, each point coloured by its beta.

        Args:
            val: What :meth:`compute` returned, or a sequence of such, the last drawn in colour and the earlier ones
                pale behind it. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.
            baselines: Other models' points, ``{label: (rate, distortion)}``, numbers or sequences.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value = self.compute() if val is None else val
        return plot_rate_distortion([value] if isinstance(value, Mapping) else list(value), ax, baselines)

    def _summaries(self, beta: Tensor, rate: Tensor, distortion: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        rises, falls = rate.diff() > 0, distortion.diff() < 0
        summary = {"monotone": ~(rises | falls).any()}
        wanted: dict[str, Callable[[], Tensor]] = {
            "auc": lambda: rate_distortion_auc(rate, distortion, self.rate_interval),
            "slope_error": lambda: slope_error(rate, distortion, beta),
        }
        corner = self.reference_point
        if corner is not None:
            wanted["hypervolume"] = lambda: hypervolume(rate, distortion, corner)
        reasons = []
        for name, value in wanted.items():
            try:
                summary[name] = value()
            except ValueError as error:
                summary[name] = beta.new_tensor(math.nan)
                reasons.append(f"{name} is NaN: {error}")
        return summary, reasons

    def _gaps(self, missing: Tensor, reason: str) -> list[str]:
        betas = [f"{b:g}" for b, gone in zip(self.betas, missing.tolist(), strict=True) if gone]
        return [f"{reason} beta {', '.join(betas)}, where the curve is NaN."] if betas else []

    def _check_index(self, index: int | Tensor, rate: Tensor) -> Tensor:
        position = torch.as_tensor(index, device=rate.device)
        if position.is_floating_point() or position.is_complex() or position.dtype == torch.bool:
            raise ValueError(f"index must be integers, positions in the grid of betas, got {position.dtype}.")
        if position.ndim == 0:
            position = position.expand(rate.shape)
        if position.shape != rate.shape:
            raise ValueError(f"index must be an int or match rate {tuple(rate.shape)}, got {tuple(position.shape)}.")
        if bool(((position < 0) | (position >= len(self.betas))).any()):
            raise ValueError(
                f"index must lie in [0, {len(self.betas) - 1}], the positions in the grid of betas, got values from "
                f"{position.min().item()} to {position.max().item()}."
            )
        return position.long()

    def _check_mu(self, mu: Tensor | None, rate: Tensor) -> None:
        if self.latent_dim is None and mu is not None:
            raise ValueError("mu was given, but latent_dim is not set; build RateDistortionCurve(..., latent_dim=...).")
        if self.latent_dim is not None and mu is None:
            raise ValueError("latent_dim is set, so update needs mu, the posterior means (B, latent_dim).")
        if mu is not None and mu.shape != (len(rate), self.latent_dim):
            raise ValueError(f"mu must have shape {(len(rate), self.latent_dim)}, got {tuple(mu.shape)}.")


def _check_betas(betas: Sequence[float]) -> list[float]:
    grid = [float(b) for b in betas]
    if not grid or not all(0 < b < math.inf for b in grid):
        raise ValueError(f"betas must be a non-empty sequence of positive, finite numbers, got {grid}.")
    if any(b >= c for b, c in itertools.pairwise(grid)):
        raise ValueError(f"betas must be in ascending order without duplicates, got {grid}; pass sorted(set(betas)).")
    return grid
