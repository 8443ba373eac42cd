"""Statistics that stream over batches and merge over ranks: moments per group, and information from counts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MIGResult", "merge_moments", "moments_variance", "mutual_information_gap", "update_moments"]


class MIGResult(NamedTuple):
    """What :func:`mutual_information_gap` returns."""

    mig: Tensor
    """Mean gap over the factors that vary, scalar in [0, 1]."""
    gap: Tensor
    """Gap of each factor, ``(F,)``; NaN for a factor that takes one value only."""
    mutual_information: Tensor
    """Nats, ``(latents, F)``."""
    entropy: Tensor
    """Nats, ``(F,)``."""


def merge_moments(moments: Tensor) -> Tensor:
    r"""Merge the counts, means and sums of squared deviations of disjoint samples.

    .. math::
        n = \sum_w n_w, \qquad \mu = \frac1n \sum_w n_w \mu_w, \qquad
        M_2 = \sum_w \big[ M_{2,w} + n_w (\mu_w - \mu)^2 \big].

    Args:
        moments: Shape ``(parts, ..., 3)`` with ``(count, mean, M2)`` last. Parts with count 0 add nothing.

    Returns:
        Shape ``(..., 3)``.

    Source: Chan, Golub and LeVeque 1983, for any number of parts.

    Note:
        Fit as the reduction of a metric's state over ranks. Stable for means far from zero.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import merge_moments
        >>> merge_moments(torch.tensor([[2.0, 0.0, 2.0], [2.0, 4.0, 2.0]]))  # {-1, 1} and {3, 5}
        tensor([ 4.,  2., 20.])
    """
    counts, means, squares = moments.unbind(-1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp(min=1)
    return torch.stack([total, mean, (squares + counts * (means - mean).square()).sum(0)], -1)


def update_moments(moments: Tensor, group: Tensor, values: Tensor) -> Tensor:
    """Add a batch to the moments of several groups.

    Args:
        moments: Shape ``(K, d, 3)`` with ``(count, mean, M2)`` last, zeros to begin with; float64 recommended.
        group: The group of each sample, int64 in [0, K), shape ``(B,)``.
        values: Samples, shape ``(B, d)``.

    Returns:
        New moments, shape ``(K, d, 3)``. A NaN stays within its own group and column.

    Raises:
        ValueError: If the shapes do not fit together.

    Source: Chan, Golub and LeVeque 1983.

    Note:
        Two passes over the batch, no matter how the groups are mixed. Merge over ranks by :func:`merge_moments`.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import update_moments
        >>> update_moments(torch.zeros(2, 1, 3), torch.tensor([1, 1]), torch.tensor([[3.0], [5.0]]))[1]
        tensor([[2., 4., 2.]])
    """
    if moments.ndim != 3 or moments.shape[-1] != 3 or values.shape != (len(group), moments.shape[1]):
        raise ValueError(
            "moments (K, d, 3), group (B,) and values (B, d) do not fit: got "
            f"{tuple(moments.shape)}, {tuple(group.shape)}, {tuple(values.shape)}."
        )
    values = values.to(moments.dtype)
    empty = torch.zeros_like(moments[..., 0])
    count = empty.index_add(0, group, torch.ones_like(values))
    mean = empty.index_add(0, group, values) / count.clamp(min=1)
    squares = empty.index_add(0, group, (values - mean[group]).square())
    return merge_moments(torch.stack([moments, torch.stack([count, mean, squares], -1)]))


def moments_variance(moments: Tensor) -> Tensor:
    """Unbiased variance from ``(count, mean, M2)``.

    Args:
        moments: Shape ``(..., 3)``.

    Returns:
        Shape ``(...)``; NaN where fewer than two samples were seen, as in ``torch.var``.

    Note:
        Costs nothing; merge over ranks first.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import moments_variance
        >>> moments_variance(torch.tensor([3.0, 7.0, 8.0]))
        tensor(4.)
    """
    count, _, squares = moments.unbind(-1)
    return torch.where(count > 1, squares / (count - 1).clamp(min=1), torch.nan)


def mutual_information_gap(joint_counts: Tensor, factor_sizes: Sequence[int]) -> MIGResult:
    r"""Mutual information gap from histograms of latents against known factors.

    .. math::
        \mathrm{MIG} = \frac1F \sum_f \frac{I(z_{(1)}; v_f) - I(z_{(2)}; v_f)}{H(v_f)},

    where :math:`z_{(1)}, z_{(2)}` are the two latents that tell most about the factor :math:`v_f`; entropies are those
    of the counts, without a correction for bias.

    Args:
        joint_counts: ``joint_counts[j, b, c]`` is how often latent j fell in bin b together with column c, where the
            columns are the values of all factors, one factor after the other: shape ``(latents, bins, sum of sizes)``
            with at least two latents.
        factor_sizes: Number of values of each factor.

    Returns:
        :class:`MIGResult`; information in nats, gaps without unit. A factor that took one value only has no gap (NaN)
        and is left out of the mean.

    Raises:
        ValueError: If the shapes do not fit, a count is negative, nothing was counted, or no factor varies.

    Source: Chen et al. 2018 (arXiv 1802.04942), Eq. 6.

    Note:
        Counts of several ranks simply add. With few samples per cell information is overestimated.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import mutual_information_gap
        >>> told, silent = torch.tensor([[5, 0], [0, 5]]), torch.tensor([[5, 5], [0, 0]])
        >>> mutual_information_gap(torch.stack([told, silent]), [2]).mig
        tensor(1., dtype=torch.float64)
    """
    if joint_counts.ndim != 3 or len(joint_counts) < 2 or joint_counts.shape[-1] != sum(factor_sizes):
        raise ValueError(
            f"joint_counts must have shape (at least 2 latents, bins, {sum(factor_sizes)}) for factor_sizes "
            f"{list(factor_sizes)}, got {tuple(joint_counts.shape)}."
        )
    if bool((joint_counts < 0).any()) or not bool(joint_counts.any()):
        raise ValueError("joint_counts must be non-negative with at least one positive entry.")
    precise = torch.float32 if joint_counts.device.type == "mps" else torch.float64
    blocks = torch.split(joint_counts.to(precise), list(factor_sizes), dim=-1)
    pairs = [_information_and_entropy(block) for block in blocks]
    information = torch.stack([i for i, _ in pairs], -1)
    entropy = torch.stack([h for _, h in pairs])
    if not bool((entropy > 0).any()):
        raise ValueError("Every factor took a single value: the gap needs factors that vary.")
    top = information.topk(2, dim=0).values
    gap = torch.where(entropy > 0, (top[0] - top[1]) / entropy, torch.nan)
    return MIGResult(gap.nanmean(), gap, information, entropy)


def _information_and_entropy(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Information between the last two axes for each latent, and the entropy of the last axis."""
    total = counts.sum((-2, -1), keepdim=True)
    joint, bins, values = counts / total, counts.sum(-1) / total[..., 0], counts.sum(-2) / total[..., 0]
    information = torch.special.entr(bins).sum(-1) + torch.special.entr(values).sum(-1)
    information = information - torch.special.entr(joint).sum((-2, -1))
    return information.clamp(min=0), torch.special.entr(values[0]).sum()
