"""Summaries of measured rate-distortion curves. Rates and distortions are in nats and may come in any order."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "active_units",
    "beta_for_distortion",
    "beta_for_rate",
    "hypervolume",
    "pareto_front",
    "rate_at",
    "rate_distortion_auc",
    "slope_error",
]


def pareto_front(rate: Tensor, distortion: Tensor) -> Tensor:
    """Indices of the points that no other point beats in both rate and distortion.

    Args:
        rate: Rates, shape ``(n,)``, finite.
        distortion: Distortions, shape ``(n,)``, finite.

    Returns:
        Indices by ascending rate and descending distortion; of equal points the first is kept.

    Raises:
        ValueError: If the inputs are not two finite vectors of one length.

    Note:
        O(n log n).

    Example:
        >>> import torch
        >>> from lightning_ext.functional import pareto_front
        >>> pareto_front(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([2.0, 4.0, 3.0]))  # (3, 3) is beaten by (2, 2)
        tensor([1, 0])
    """
    _check_points(rate, distortion)
    order = torch.argsort(distortion, stable=True)
    order = order[torch.argsort(rate[order], stable=True)]
    best = distortion[order].cummin(0).values
    improves = torch.ones_like(order, dtype=torch.bool)
    improves[1:] = best[1:] < best[:-1]
    return order[improves]


def hypervolume(rate: Tensor, distortion: Tensor, reference: Sequence[float] | Tensor) -> Tensor:
    r"""Area between the points and a reference point: what is at least as large as some point in both coordinates.

    .. math:: \mathrm{HV} = \lambda\Big( \bigcup_i [R_i, r_1] \times [D_i, r_2] \Big).

    Larger is better. Dominated points and points beyond the reference add nothing. The area grows with the number of
    points on a curve: compare equal grids only.

    Args:
        rate: Rates, shape ``(n,)``, finite.
        distortion: Distortions, shape ``(n,)``, finite.
        reference: ``(r_1, r_2)``: a rate and a distortion worse than any of interest.

    Returns:
        A scalar in nats squared.

    Raises:
        ValueError: If the inputs are not two finite vectors of one length, or the reference is not two finite numbers.

    Source: Zitzler and Thiele 1998 (the S-metric), in two dimensions.

    Note:
        O(n log n).

    Example:
        >>> import torch
        >>> from lightning_ext.functional import hypervolume
        >>> hypervolume(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([4.0, 2.0, 1.0]), (5.0, 5.0))
        tensor(11.)
    """
    corner = torch.as_tensor(reference, dtype=rate.dtype, device=rate.device)
    if corner.shape != (2,) or not bool(corner.isfinite().all()):
        raise ValueError(f"reference must be two finite numbers (rate, distortion), got {reference}.")
    front = pareto_front(rate, distortion)
    left = rate[front].minimum(corner[0])
    widths = torch.cat([left[1:], corner[:1]]) - left
    return (widths * (corner[1] - distortion[front]).clamp(min=0)).sum()


def rate_distortion_auc(rate: Tensor, distortion: Tensor, interval: Sequence[float] | None = None) -> Tensor:
    r"""Mean distortion over an interval of rates: the length-normalised area under the curve.

    .. math:: \mathrm{AUC} = \frac{1}{b - a} \int_a^b D(R)\, dR,

    where :math:`D(R)` joins the points of the Pareto front by straight lines and stays flat beyond the last of them:
    the distortion that a budget of :math:`R` nats buys. Smaller is better. Dominated points, such as the overfitted end
    of a curve on test data, add nothing. Two curves compare over one common interval only.

    Args:
        rate: Rates, shape ``(n,)``, finite, in any order.
        distortion: Distortions, shape ``(n,)``, finite.
        interval: ``(a, b)`` with a <= b, inside the measured rates. Default: from the smallest to the largest rate.
            An interval of one point gives :math:`D(a)`.

    Returns:
        A scalar in nats; exact for a straight line.

    Raises:
        ValueError: If the interval is empty or leaves the measured rates, or the points are not finite vectors.

    Source: Bae et al. 2023 (arXiv 2212.03905) compare curves by eye; the normalisation is ours.

    Note:
        O(n log n).

    Example:
        >>> import torch
        >>> from lightning_ext.functional import rate_distortion_auc
        >>> rate_distortion_auc(torch.tensor([0.0, 4.0]), torch.tensor([10.0, 2.0]), (1.0, 2.0))
        tensor(7.)
    """
    front = pareto_front(rate, distortion)
    low, high = (rate.min(), rate.max()) if interval is None else _as_interval(interval, rate)
    knots, heights = rate[front], distortion[front]
    inside = (knots > low) & (knots < high)
    x = torch.cat([low[None], knots[inside], high[None]])
    y = torch.cat([_interpolate(low[None], knots, heights), heights[inside], _interpolate(high[None], knots, heights)])
    length = high - low
    if not bool(length > 0):
        return y[0]
    return torch.trapezoid(y, x) / length


def slope_error(rate: Tensor, distortion: Tensor, beta: Tensor, flat_rate: float = 1e-3) -> Tensor:
    r"""Largest distance, in log beta, between the slope of a curve and the beta that should have made it.

    At any optimum :math:`-dD/dR = \beta`, so without labels or baselines

    .. math:: \max_k \Big| \log\Big({-\frac{dD}{dR}}\Big)_k - \log\beta_k \Big|

    over the inner points of the grid tells how far training is from its goal: 0.1 says that the slope is 10 % off. The
    derivatives are central differences, of :math:`D` in :math:`\beta` and of :math:`R` in :math:`\log\beta`, in which
    the optimum of a linear VAE is piecewise linear; there the error is zero between the collapses of latents.

    Points around which the rate moves by at most ``flat_rate`` (all latents collapsed, or a network that ignores
    beta) carry no slope and are left out. Where the distortion does not fall as the rate rises, as on overfitted test
    data, no positive beta fits and the error is infinite.

    Args:
        rate: Rates, shape ``(n,)``, finite.
        distortion: Distortions, shape ``(n,)``, finite.
        beta: The KL weight of each point, shape ``(n,)``, positive, distinct, in any order.
        flat_rate: Change of rate in nats, across the two neighbours, up to which a point is left out.

    Returns:
        A scalar, at least 0, without unit.

    Raises:
        ValueError: If there are fewer than three points, betas repeat or are not positive, or the rate is flat at
            every inner point.

    Source: the envelope theorem applied to the loss of Bae et al. 2023 (arXiv 2212.03905); the diagnostic is ours.

    Note:
        O(n log n). Sensitive to sampling noise of the rate: evaluate all betas on the same data.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import reverse_waterfilling, slope_error
        >>> betas = torch.logspace(-2, 0, 9, dtype=torch.float64)
        >>> rate, distortion = reverse_waterfilling(torch.tensor([6.0, 3.0], dtype=torch.float64), betas)
        >>> round(slope_error(rate, distortion, betas).item(), 6)
        0.0
    """
    _check_points(rate, distortion)
    beta, rate, distortion = _by_beta(beta, rate, distortion)
    if len(rate) < 3:
        raise ValueError(f"The slope needs at least three betas, got {len(rate)}.")
    moves = (rate[2:] - rate[:-2]).abs() > flat_rate
    if not bool(moves.any()):
        raise ValueError(
            f"The rate moves by at most {flat_rate:g} nats around every inner beta: the curve has no slope. "
            "Either every latent has collapsed or the network ignores beta."
        )
    by_beta = torch.gradient(distortion, spacing=(beta,))[0][1:-1][moves]
    by_log_beta = -torch.gradient(rate, spacing=(beta.log(),))[0][1:-1][moves]
    valid = (by_beta > 0) & (by_log_beta > 0) | (by_beta < 0) & (by_log_beta < 0)
    error = (by_beta.abs() / by_log_beta.abs()).log().abs()
    return torch.where(valid, error, math.inf).max()


def rate_at(betas: Tensor, rate: Tensor, beta: float | Tensor) -> Tensor:
    """Rate of a curve at a beta between its grid points, linear in log beta.

    Args:
        betas: KL weights of the grid, shape ``(n,)``, positive and distinct, in any order.
        rate: Rates, shape ``(n,)``, finite. Where they rise with beta, which no optimum does, the running minimum
            counts.
        beta: Where to evaluate, a number or a tensor of any shape, inside the grid.

    Returns:
        Rates in nats, of the shape of ``beta``.

    Raises:
        ValueError: If ``beta`` leaves the grid or the grid is malformed.

    Note:
        O(n log n). The same interpolant that :func:`beta_for_rate` inverts.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import rate_at
        >>> rate_at(torch.tensor([0.01, 1.0]), torch.tensor([8.0, 2.0]), 0.1)
        tensor(5.)
    """
    betas, rate = _by_beta(betas, rate)
    where = torch.as_tensor(beta, dtype=betas.dtype, device=betas.device)
    _check_inside("beta", where, betas[0], betas[-1], "the grid of betas")
    return _interpolate(where.log(), betas.log(), rate.cummin(0).values)


def beta_for_rate(betas: Tensor, rate: Tensor, target: float | Tensor) -> Tensor:
    """The beta at which a curve has a wanted rate, by monotone interpolation linear in log beta.

    Args:
        betas: KL weights of the grid, shape ``(n,)``, positive and distinct, in any order.
        rate: Rates, shape ``(n,)``, finite. Where they rise with beta, which no optimum does, the running minimum
            counts.
        target: Wanted rates in nats, a number or a tensor of any shape, between the least and the largest rate.

    Returns:
        Betas of the shape of ``target``; where the curve is flat the smallest beta, which has the least distortion.

    Raises:
        ValueError: If the target lies outside the curve, with the range that can be had, or the grid is malformed.

    Note:
        O(n log n).

    Example:
        >>> import torch
        >>> from lightning_ext.functional import beta_for_rate
        >>> beta_for_rate(torch.tensor([0.01, 1.0]), torch.tensor([8.0, 2.0]), 5.0)
        tensor(0.1000)
    """
    betas, rate = _by_beta(betas, rate)
    return _invert_falling("rate", betas, rate.cummin(0).values, target)


def beta_for_distortion(betas: Tensor, distortion: Tensor, target: float | Tensor) -> Tensor:
    """The beta at which a curve has a wanted distortion, by monotone interpolation linear in log beta.

    Args:
        betas: KL weights of the grid, shape ``(n,)``, positive and distinct, in any order.
        distortion: Distortions, shape ``(n,)``, finite. Where they fall as beta grows, as on overfitted test data, the
            least distortion of all larger betas counts: it costs less rate.
        target: Wanted distortions in nats, a number or a tensor of any shape, inside the curve.

    Returns:
        Betas of the shape of ``target``; where the curve is flat the largest beta, which has the least rate.

    Raises:
        ValueError: If the target lies outside the curve, with the range that can be had, or the grid is malformed.

    Note:
        O(n log n).

    Example:
        >>> import torch
        >>> from lightning_ext.functional import beta_for_distortion
        >>> beta_for_distortion(torch.tensor([0.01, 1.0]), torch.tensor([20.0, 40.0]), 30.0)
        tensor(0.1000)
    """
    betas, distortion = _by_beta(betas, distortion)
    # read from the largest beta down, the distortion falls
    return _invert_falling("distortion", betas.flip(0), distortion.flip(0).cummin(0).values, target)


def active_units(variance: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Number of latents in use: :math:`\#\{j : \mathrm{Var}_x(\mu_j) \ge \tau\}`.

    Args:
        variance: Variance over the data of each latent's posterior mean, shape ``(..., k)``.
        threshold: :math:`\tau`, default 0.01 as in the literature.

    Returns:
        Counts of shape ``(...)``.

    Source: Burda et al. 2016 (arXiv 1509.00519), section 5.2.

    Note:
        Unbiased variances are expected; a NaN variance counts as inactive.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import active_units
        >>> active_units(torch.tensor([0.9, 0.01, 0.009]))
        tensor(2)
    """
    return (variance >= threshold).sum(-1)


def _check_points(rate: Tensor, distortion: Tensor) -> None:
    if rate.ndim != 1 or rate.shape != distortion.shape or rate.numel() == 0:
        raise ValueError(
            "rate and distortion must be two non-empty vectors of one length, got shapes "
            f"{tuple(rate.shape)} and {tuple(distortion.shape)}."
        )
    if not bool(rate.isfinite().all() & distortion.isfinite().all()):
        raise ValueError("rate and distortion must be finite; leave out the points that are not.")


def _by_beta(beta: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Check a grid of betas and sort it, and the values with it."""
    if beta.ndim != 1 or beta.numel() == 0 or any(v.shape != beta.shape for v in values):
        raise ValueError(
            f"betas and the curve must be non-empty vectors of one length, got shapes "
            f"{[tuple(v.shape) for v in (beta, *values)]}."
        )
    if not all(bool(v.isfinite().all()) for v in (beta, *values)):
        raise ValueError("betas and the curve must be finite; leave out the points that are not.")
    order = torch.argsort(beta)
    ascending = beta[order].to(values[0].dtype)
    if not bool((ascending > 0).all()) or not bool((ascending.diff() > 0).all()):
        raise ValueError(f"betas must be positive and distinct, got {ascending.tolist()}.")
    return (ascending, *(v[order] for v in values))


def _invert_falling(name: str, betas: Tensor, falling: Tensor, target: float | Tensor) -> Tensor:
    """The first beta, in the order given, at which a falling curve reaches the target."""
    wanted = torch.as_tensor(target, dtype=falling.dtype, device=falling.device)
    _check_inside(name, wanted, falling[-1], falling[0], f"the curve's {name}s")
    first = torch.ones_like(falling, dtype=torch.bool)
    first[1:] = falling[1:] < falling[:-1]
    return _interpolate(wanted, falling[first].flip(0), betas[first].log().flip(0)).exp()


def _check_inside(name: str, value: Tensor, low: Tensor, high: Tensor, where: str) -> None:
    slack = 1e-6  # a bound that went through float32 or exp(log(...)) still counts as inside
    if not bool(((value >= low - slack * low.abs()) & (value <= high + slack * high.abs())).all()):
        raise ValueError(f"{name} {value.tolist()} lies outside {where}, [{low.item():g}, {high.item():g}].")


def _as_interval(interval: Sequence[float], rate: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.as_tensor(interval, dtype=rate.dtype, device=rate.device)
    if ends.shape != (2,) or not bool(ends[0] <= ends[1]):
        raise ValueError(f"interval must be (low, high) with low <= high, got {interval}.")
    _check_inside("interval", ends, rate.min(), rate.max(), "the measured rates")
    return ends[0], ends[1]


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise-linear through ascending knots, constant beyond the ends."""
    if len(knots) == 1:
        return values[0].expand(x.shape)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    weight = ((x - knots[left]) / (knots[right] - knots[left])).clamp(0, 1)
    return torch.lerp(values[left], values[right], weight)
