"""Scores of training samples that arrive in pieces: put in order, freed of repetitions, cut to the extremes."""

import torch
from torch import Tensor

__all__ = ["keep_largest", "ordered_scores"]

_TOLERANCE = 1e-4  # of the largest score: what batching and summation order change in float32, with room


def ordered_scores(scores: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Columns in ascending order of their sample's index, each index once.

    A distributed sampler repeats samples to fill its last batch; the repetitions agree up to rounding and one is kept.

    Args:
        scores: ``(Q, M)``, finite.
        indices: ``(M,)``, integers, the training sample of each column.

    Returns:
        Scores ``(Q, N)`` and indices ``(N,)``, ascending.

    Raises:
        ValueError: One index with scores that differ by more than rounding.

    >>> ordered_scores(torch.tensor([[3.0, 1.0, 3.0]]), torch.tensor([7, 2, 7]))
    (tensor([[1., 3.]]), tensor([2, 7]))
    """
    indices, order = indices.sort(stable=True)
    scores = scores[:, order]
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[1:] = indices[1:] == indices[:-1]
    if not bool(repeated.any()):
        return scores, indices
    after = repeated.nonzero()[:, 0]
    _check_repetitions(scores[:, after], scores[:, after - 1], indices[after].expand(len(scores), -1), scores)
    return scores[:, ~repeated], indices[~repeated]


def keep_largest(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, each index once; of equal values those of lower index.

    The result does not depend on the order of the columns, nor on whether parts were cut to their k largest before
    they were put together: what a state that merges over batches and ranks needs.

    Args:
        values: ``(..., M)``, finite or -inf for a slot that is empty.
        indices: ``(..., M)``, integers, -1 in empty slots.
        k: at least 1.

    Returns:
        Values and indices ``(..., k)``, descending, padded by empty slots.

    Raises:
        ValueError: One index with values that differ by more than rounding.

    Note:
        Of a repeated index the largest value counts. Three sorts of the candidates.

    >>> keep_largest(torch.tensor([[5.0, 9.0, 5.0, 1.0, 9.0]]), torch.tensor([[4, 8, 3, 0, 8]]), k=2)
    (tensor([[9., 5.]]), tensor([[8, 3]]))
    """
    if values.shape[-1] < k:
        missing = (0, k - values.shape[-1])
        values = torch.nn.functional.pad(values, missing, value=-torch.inf)
        indices = torch.nn.functional.pad(indices, missing, value=-1)
    values, indices = _take(values, indices, values.argsort(dim=-1, descending=True, stable=True))
    values, indices = _take(values, indices, indices.argsort(dim=-1, stable=True))
    repeated = indices[..., 1:] == indices[..., :-1]
    if bool(repeated.any()):
        known = values.where(values.isfinite(), torch.zeros_like(values))
        later, earlier = known[..., 1:], known[..., :-1]
        _check_repetitions(later.where(repeated, earlier), earlier, indices[..., 1:], known)
        values[..., 1:] = values[..., 1:].masked_fill(repeated, -torch.inf)
        indices[..., 1:] = indices[..., 1:].masked_fill(repeated, -1)
    values, indices = _take(values, indices, values.argsort(dim=-1, descending=True, stable=True))
    return values[..., :k], indices[..., :k]


def _take(values: Tensor, indices: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return values.gather(-1, order), indices.gather(-1, order)


def _check_repetitions(again: Tensor, before: Tensor, indices: Tensor, scores: Tensor) -> None:
    room = max(_TOLERANCE, 8 * torch.finfo(scores.dtype).eps) * scores.abs().amax(-1, keepdim=True)
    wrong = (again - before).abs() > room
    if bool(wrong.any()):
        row = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"indices holds sample {int(indices[row])} more than once with different scores, {before[row].item():.6g} "
            f"and {again[row].item():.6g}. Score each sample once with one model, and give every sample its own index."
        )
