r"""How good training-data attributions are: against retraining, against planted label errors, against each other.

Scores are removal effects throughout: :math:`\tau(m, z)` is the change of the measurement m when training sample z is
removed, positive for a helpful sample where m is a loss.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MislabelResult",
    "average_ranks",
    "linear_datamodeling_scores",
    "mislabel_detection",
    "random_subsets",
    "row_correlation",
    "topk_overlap",
]


class MislabelResult(NamedTuple):
    """What :func:`mislabel_detection` returns."""

    auc: Tensor
    """Area under the ROC curve, scalar in [0, 1]; 1/2 for a random order. NaN if all or none are flipped."""
    recall: Tensor
    """Share of the flipped samples among the fraction that was inspected, scalar in [0, 1]."""
    average_precision: Tensor
    """Scalar in [0, 1]; near the prevalence for a random order."""
    prevalence: Tensor
    """Share of flipped samples, scalar in [0, 1]."""
    inspected: Tensor
    """Fractions of all samples, from 0 to 1, one for each distinct suspicion and 0 in front, ``(J,)``."""
    found: Tensor
    """Fractions of the flipped samples found by then, ``(J,)``."""


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of their ranks.

    Args:
        values: ``(..., N)``.

    Returns:
        ``(..., N)``, float64 (float32 on devices without it).

    >>> average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [3.5, 1.0, 3.5, 2.0]
    """
    if values.shape[-1] == 0:
        return _widened(values)
    ascending, order = values.sort(dim=-1)
    group = torch.zeros_like(order)
    group[..., 1:] = (ascending[..., 1:] != ascending[..., :-1]).cumsum(-1)
    sizes = torch.zeros_like(order).scatter_add_(-1, group, torch.ones_like(order))
    shared = _widened(sizes.cumsum(-1)) - _widened(sizes - 1) / 2
    return torch.empty_like(shared).scatter_(-1, order, shared.gather(-1, group))


def row_correlation(x: Tensor, y: Tensor, kind: Literal["pearson", "spearman"] = "pearson") -> Tensor:
    r"""Correlation of each row of x with the same row of y.

    .. math:: r = \frac{\sum_i (x_i - \bar x)(y_i - \bar y)}{\lVert x - \bar x \rVert\, \lVert y - \bar y \rVert},

    of the values (Pearson) or of their average ranks (Spearman).

    Args:
        x: ``(..., N)``, finite.
        y: ``(..., N)``, finite.
        kind: ``"pearson"`` or ``"spearman"``.

    Returns:
        ``(...)`` in [-1, 1], float64 (float32 on devices without it). NaN where a row is constant or shorter than 2:
        there is no correlation, and 0 would claim that there is.

    Raises:
        ValueError: Shapes that differ, values that are not finite, or another kind.

    Note:
        No constant is added to the denominator: scores of any scale correlate alike.

    >>> x, y = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), torch.tensor([[1.0, 2.0, 9.0]] * 2)
    >>> row_correlation(x, y, "spearman")
    tensor([1., nan], dtype=torch.float64)
    """
    if x.shape != y.shape or x.ndim == 0:
        raise ValueError(f"x and y must be rows of one shape (..., N), got {tuple(x.shape)} and {tuple(y.shape)}.")
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind must be 'pearson' or 'spearman', got {kind!r}.")
    check_finite(x=x, y=y)
    transform = average_ranks if kind == "spearman" else _widened
    (a, a_varies), (b, b_varies) = (_centred(transform(rows)) for rows in (x, y))
    lengths = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(a_varies & b_varies, ((a * b).sum(-1) / lengths).clamp(-1, 1), torch.nan)


def random_subsets(num_subsets: int, num_samples: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Random subsets of the training set, all of one size: what a linear datamodelling score retrains on.

    Args:
        num_subsets: M, at least 1. 100 is customary.
        num_samples: N, at least 2.
        fraction: share of the samples in each subset, in (0, 1).
        seed: determines the subsets alone; no global random state is used or changed.

    Returns:
        ``(M, N)`` bool; each row has ``round(fraction * N)`` members, at least 1 and at most N - 1.

    Raises:
        ValueError: An argument out of range.

    Source: Park et al. 2023, TRAK (arXiv:2303.14186, section 4.1).

    >>> random_subsets(3, 10, fraction=0.3).sum(1).tolist()
    [3, 3, 3]
    """
    if num_subsets < 1 or num_samples < 2:
        raise ValueError(f"num_subsets must be at least 1 and num_samples 2, got {num_subsets} and {num_samples}.")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}.")
    size = min(max(round(fraction * num_samples), 1), num_samples - 1)
    draws = torch.rand(num_subsets, num_samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    members = draws.argsort(dim=1)[:, :size]
    return torch.zeros(num_subsets, num_samples, dtype=torch.bool).scatter_(1, members, True)


def linear_datamodeling_scores(scores: Tensor, subset_masks: Tensor, outcomes: Tensor) -> Tensor:
    r"""Rank correlation of predicted with true measurements of models trained on subsets.

    .. math:: \mathrm{LDS}_q = \mathrm{Spearman}_j \Bigl( \sum_{z \notin S_j} \tau(m_q, z),\; m_q(\theta_{S_j}) \Bigr).

    Orientation: :math:`\tau` is the change of :math:`m` when z is removed, so that
    :math:`m(\theta_S) \approx m(\theta) + \sum_{z \notin S} \tau(z) = \mathrm{const} - \sum_{z \in S} \tau(z)`.
    Removing helpful samples raises a loss; perfect scores give +1 whatever is measured, as long as scores and outcomes
    are of the same measurement. Scores of the opposite sign (how much adding z raises m) have to be negated first.

    Args:
        scores: ``(Q, N)``, removal effects on Q measurements.
        subset_masks: ``(M, N)`` bool, True for the members of each subset.
        outcomes: ``(M, Q)``, the measurements of the models trained on each subset, averaged over seeds if there are
            several.

    Returns:
        ``(Q,)`` in [-1, 1]; NaN for a query whose predictions or outcomes do not vary over the subsets.

    Raises:
        ValueError: Shapes that do not fit, masks that are not bool, values that are not finite.

    Source: Ilyas et al. 2022 (arXiv:2202.00622); Park et al. 2023 (arXiv:2303.14186, definition 4.1).

    >>> masks = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    >>> scores = torch.tensor([[1.0, 2.0, 4.0]])  # leaving out the third sample raises the loss most
    >>> linear_datamodeling_scores(scores, masks, outcomes=torch.tensor([[4.1], [2.2], [1.1]]))
    tensor([1.], dtype=torch.float64)
    """
    if subset_masks.dtype != torch.bool or subset_masks.ndim != 2:
        raise ValueError(
            f"subset_masks must be a bool tensor (M, N), got {subset_masks.dtype} {tuple(subset_masks.shape)}."
        )
    subsets, samples = subset_masks.shape
    if scores.ndim != 2 or scores.shape[1] != samples:
        raise ValueError(f"scores must be (Q, {samples}), a column per sample of subset_masks, got {_shape(scores)}.")
    if outcomes.shape != (subsets, len(scores)):
        raise ValueError(
            f"outcomes must be (M, Q) = {(subsets, len(scores))}, a row per subset and a column per row of scores, "
            f"got {_shape(outcomes)}."
        )
    check_finite(scores=scores, outcomes=outcomes)
    predicted = _widened(scores) @ _widened(~subset_masks).mT
    return row_correlation(predicted, _widened(outcomes).mT, "spearman")


def mislabel_detection(suspicion: Tensor, is_flipped: Tensor, fraction: float = 0.2) -> MislabelResult:
    r"""How well a score finds planted label errors, when the most suspicious samples are inspected first.

    With :math:`f(u)` the share of the flipped samples found after a share u of all samples was inspected, and p the
    share of flipped samples: a random order has :math:`f(u) = u`, a perfect one :math:`\min(u / p, 1)`. The recall is
    f at ``fraction``. Samples of equal suspicion are taken in random order and counted in expectation: the curve is a
    straight line across them (one step for the average precision), and nothing depends on the order of the samples.

    Args:
        suspicion: ``(N,)``, finite, larger for samples to inspect earlier: self-influence, or the training loss.
        is_flipped: ``(N,)`` bool, or zeros and ones.
        fraction: share of the samples inspected, in (0, 1].

    Returns:
        :class:`MislabelResult`; what cannot be had is NaN (``auc`` if all or none are flipped, all but ``prevalence``
        and ``inspected`` if none are).

    Raises:
        ValueError: Shapes that differ, values that are not finite or not 0 and 1, a fraction out of range.

    Source: the detection test of Koh and Liang 2017 (arXiv:1703.04730, section 5.4).

    >>> mislabel_detection(torch.tensor([0.9, 0.1, 0.8, 0.3]), torch.tensor([1, 0, 0, 1]), fraction=0.5)[:2]
    (tensor(0.7500, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    check_suspicion(suspicion, is_flipped)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")
    values, order = suspicion.sort(descending=True)
    hits = _widened(is_flipped)[order].cumsum(0)
    last_of_group = torch.cat([values[1:] != values[:-1], values.new_ones(min(len(values), 1), dtype=torch.bool)])
    inspected = torch.nn.functional.pad(_widened(last_of_group.nonzero()[:, 0] + 1), (1, 0))
    found = torch.nn.functional.pad(hits[last_of_group], (1, 0))
    total, flipped = inspected[-1], found[-1]
    false = inspected - found
    precision = found[1:] / inspected[1:]
    return MislabelResult(
        auc=torch.trapezoid(found, false) / (flipped * (total - flipped)),
        recall=_interpolated(inspected, found, fraction * total) / flipped,
        average_precision=(found.diff() * precision).sum() / flipped,
        prevalence=flipped / total,
        inspected=inspected / total,
        found=found / flipped,
    )


def topk_overlap(scores: Tensor, reference: Tensor, k: int) -> Tensor:
    """Share of the k largest entries of each row that two score matrices have in common.

    Args:
        scores: ``(Q, N)``, finite.
        reference: ``(Q, N)``, finite.
        k: 1 to N. Negate both for the most harmful samples, take absolute values for the most influential ones.

    Returns:
        ``(Q,)`` in [0, 1]; k / N is what random scores reach. Of equal scores, those of lower index count as larger.

    Raises:
        ValueError: Shapes that differ, values that are not finite, k out of range.

    >>> topk_overlap(torch.tensor([[9.0, 8.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.5, 0.7, 0.0]]), k=2)
    tensor([0.5000], dtype=torch.float64)
    """
    if scores.ndim != 2 or scores.shape != reference.shape:
        raise ValueError(
            f"scores and reference must have one shape (Q, N), got {_shape(scores)} and {_shape(reference)}."
        )
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must lie in [1, {scores.shape[1]}], the number of samples, got {k}.")
    check_finite(scores=scores, reference=reference)
    members = [
        torch.zeros_like(rows, dtype=torch.bool).scatter_(
            1, rows.argsort(dim=1, descending=True, stable=True)[:, :k], True
        )
        for rows in (scores, reference)
    ]
    return _widened((members[0] & members[1]).sum(1)) / k


def check_finite(**tensors: Tensor) -> None:
    """Raise a ValueError that names the first argument with a NaN or an infinity, and where it is."""
    for name, tensor in tensors.items():
        wrong = ~tensor.isfinite()
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite, got {tensor[place].item()} at {place}, one of {int(wrong.sum())} such values."
            )


def check_suspicion(suspicion: Tensor, is_flipped: Tensor) -> None:
    """Raise a ValueError unless both are ``(B,)``, the first finite and the second zeros and ones."""
    if suspicion.ndim != 1 or suspicion.shape != is_flipped.shape:
        raise ValueError(
            f"suspicion and is_flipped must have one shape (B,), got {_shape(suspicion)} and {_shape(is_flipped)}."
        )
    check_finite(suspicion=suspicion)
    if not bool(((is_flipped == 0) | (is_flipped == 1)).all()):
        raise ValueError("is_flipped must be True where a label was flipped and False elsewhere (or 1 and 0).")


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows of largest entry 1, as squares of tiny scores underflow, and which rows vary."""
    if rows.shape[-1] == 0:
        return rows, torch.zeros(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    varies = (rows != rows[..., :1]).any(-1)
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / centred.abs().amax(-1, keepdim=True), varies


def _interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The piecewise linear curve through ascending x, at one place within."""
    right = torch.searchsorted(x, at).clamp(1, max(len(x) - 1, 1))
    if len(x) < 2:
        return y[0]
    slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + slope * (at - x[right - 1])


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
