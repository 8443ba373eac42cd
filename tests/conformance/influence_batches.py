"""Batches for the metrics of influence scores, and what plain Python makes of them."""

from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from lightning_ext.functional import random_subsets

MASKS = random_subsets(9, 6)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored_samples() -> list[tuple[Tensor, Tensor]]:
    """Two queries' scores of nine samples, many of them equal, three of them seen in two batches."""
    scores = _normal(2, 9, seed=1).round()
    return [(scores[:, columns], columns) for columns in map(torch.tensor, ([7, 2, 0, 5], [8, 0, 1], [2, 6, 3, 4, 8]))]


def _score_of(batches: Sequence[Any]) -> list[dict[int, float]]:
    """The score of each sample that was seen, by query."""
    pairs = [(scores[:, i].tolist(), int(name)) for scores, names in batches for i, name in enumerate(names)]
    return [{name: row[q] for row, name in pairs} for q in range(2)]


def ordered_reference(batches: Sequence[Any]) -> dict[str, Tensor]:
    """All scores by sample."""
    queries = _score_of(batches)
    names = sorted(queries[0])
    return {"indices": torch.tensor(names), "scores": torch.tensor([[row[name] for name in names] for row in queries])}


def extremes_reference(batches: Sequence[Any]) -> dict[str, Tensor]:
    """The two most helpful and most harmful samples by a sort of pairs."""
    queries = [[(value, name) for name, value in row.items()] for row in _score_of(batches)]
    helpful = [sorted(row, key=lambda pair: (-pair[0], pair[1]))[:2] for row in queries]
    harmful = [sorted(row)[:2] for row in queries]
    return {
        f"{end}_{part}": torch.tensor([[pair[place] for pair in row] for row in rows])
        for end, rows in (("helpful", helpful), ("harmful", harmful))
        for place, part in enumerate(("values", "indices"))
    }


def retrained_subsets() -> list[tuple[Tensor, Tensor]]:
    """Scores of unequal numbers of queries, with noisy outcomes of nine subsets."""
    batches = []
    for queries in (3, 2, 4):
        scores = _normal(queries, 6, seed=queries)
        batches.append((scores, _normal(9, queries, seed=10 + queries) - 2 * MASKS.float() @ scores.mT))
    return batches


def _mean_of(name: str, values: list[float]) -> dict[str, Any]:
    return {name: sum(values) / len(values), "standard_error": stats.sem(values), "num_queries": len(values)}


def subsets_reference(batches: Sequence[Any]) -> dict[str, Any]:
    """One query after the other, by the sum within the subset."""
    return _mean_of(
        "lds",
        [
            float(stats.spearmanr([-scores[q, mask].sum() for mask in MASKS], outcomes[:, q]).statistic)
            for scores, outcomes in batches
            for q in range(len(scores))
        ],
    )


def removals() -> list[tuple[Tensor, Tensor]]:
    """Predicted and actual effects of nine removals on three queries."""
    return [(_normal(3, n, seed=n), _normal(3, n, seed=9 + n)) for n in (4, 2, 3)]


def removals_reference(batches: Sequence[Any]) -> dict[str, Any]:
    """One query after the other."""
    predicted, actual = (torch.cat(part, dim=1) for part in zip(*batches, strict=True))
    values = [float(stats.spearmanr(p, a).statistic) for p, a in zip(predicted, actual, strict=True)]
    return {**_mean_of("correlation", values), "per_query": torch.tensor(values)}


def two_scores() -> list[tuple[Tensor, Tensor]]:
    """Scores of seven samples by two methods, for unequal numbers of queries."""
    return [(_normal(n, 7, seed=n), _normal(n, 7, seed=9 + n)) for n in (4, 2, 5)]


def overlap_reference(batches: Sequence[Any]) -> dict[str, Any]:
    """The harmful three of each query, as sets."""

    def lowest(row: Tensor) -> set[int]:
        return set(row.topk(3, largest=False).indices.tolist())

    return _mean_of("overlap", [len(lowest(a) & lowest(b)) / 3 for s, r in batches for a, b in zip(s, r, strict=True)])


def suspicions() -> list[tuple[Tensor, Tensor]]:
    """Rounded suspicions, higher for flipped labels."""
    batches = []
    for n in (9, 5, 12):
        flipped = torch.arange(n) % 4 == 1
        batches.append(((2 * _normal(n, seed=n) + 2 * flipped).round(), flipped))
    return batches


def detection_reference(batches: Sequence[Any]) -> dict[str, Any]:
    """All pairs of a flipped and a clean sample; and the share found by each number of samples inspected."""
    suspicion, flipped = (torch.cat(part) for part in zip(*batches, strict=True))
    ahead = suspicion[flipped][:, None] - suspicion[~flipped]
    return {
        "auc": ((ahead > 0).double() + (ahead == 0).double() / 2).mean(),
        "prevalence": flipped.double().mean(),
        "found": torch.stack([flipped[suspicion >= s].sum() / flipped.sum() for s in _thresholds(suspicion)]),
        "inspected": torch.stack([(suspicion >= s).double().mean() for s in _thresholds(suspicion)]),
    }


def _thresholds(suspicion: Tensor) -> list[float]:
    return [float("inf"), *sorted(set(suspicion.tolist()), reverse=True)]
