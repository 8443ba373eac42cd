"""Batches for the metrics of mutual information, and what plain Python makes of them, pair by pair."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SIZES = (4, 1, 6)
K = 3


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draws(**shapes: str) -> list[dict[str, Tensor]]:
    """Uneven batches of named arguments; "B" stands for a number per pair, "KB" for K of them."""
    return [
        {
            name: _normal(*(K if axis == "K" else size for axis in shape), seed=100 * size + place)
            for place, (name, shape) in enumerate(shapes.items())
        }
        for size in SIZES
    ]


def square_scores() -> list[tuple[Tensor]]:
    """All x against all z of uneven batches."""
    return [(_normal(size, size, seed=size),) for size in SIZES]


def sample_pairs() -> list[tuple[Tensor, Tensor]]:
    """Uneven batches of pairs (x, z), of two numbers and one."""
    return [(_normal(size, 2, seed=size), _normal(size, 1, seed=50 + size)) for size in (5, 2, 6)]


def _log_mean(values: Sequence[float]) -> float:
    return math.log(sum(math.exp(value) for value in values) / len(values))


def _pairs(batches: Sequence[Any]) -> list[dict[str, Any]]:
    """One dict per pair: a number, or the list of its K numbers, by name."""
    return [
        {name: (tensor[:, b] if tensor.ndim == 2 else tensor[b]).double().tolist() for name, tensor in batch.items()}
        for batch in batches
        for b in range(next(iter(batch.values())).shape[-1])
    ]


def _means(**columns: Sequence[float]) -> dict[str, Any]:
    result: dict[str, Any] = {name: statistics.fmean(values) for name, values in columns.items()}
    for name, values in columns.items():
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        result["stderr" if len(columns) == 1 else f"{name}_stderr"] = error
    return {**result, "count": len(next(iter(columns.values())))}


def reference(**values: Callable[[dict[str, Any]], float]) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Means and standard errors of numbers that are given pair by pair, and of the gap where there are both sides."""

    def of(batches: Sequence[Any]) -> dict[str, Any]:
        columns = {name: [value(pair) for pair in _pairs(batches)] for name, value in values.items()}
        if len(columns) == 2:
            columns["gap"] = [u - low for u, low in zip(columns["upper"], columns["lower"], strict=True)]
        return _means(**columns)

    return of


barber_agakov = reference(
    lower=lambda p: p["log_q"] - p["log_prior"], upper=lambda p: p["log_likelihood"] - p["log_weight"]
)
iwae = reference(
    lower=lambda p: p["log_likelihood"] - _log_mean([p["posterior_log_weight"], *p["log_weights"][1:]]),
    upper=lambda p: p["log_likelihood"] - _log_mean(p["log_weights"]),
)
iwae_lower = reference(lower=lambda p: p["log_likelihood"] - _log_mean(p["log_weights"]))
structured_infonce = reference(
    lower=lambda p: p["log_likelihood"] - _log_mean([p["log_likelihood"], *p["scores"][1:]]),
    upper=lambda p: p["log_likelihood"] - _log_mean(p["scores"]),
)
ais_default = reference(
    lower=lambda p: p["log_likelihood"] + _log_mean([-w for w in p["reverse"]]),
    upper=lambda p: p["log_likelihood"] - _log_mean(p["forward"]),
)
ais_mixed = reference(
    lower=lambda p: p["log_likelihood"] - _log_mean([p["reverse"][0], *p["forward"][1:]]),
    upper=lambda p: p["log_likelihood"] + _log_mean([-p["forward"][0], *(-w for w in p["reverse"][1:])]),
)
ibal_certified = reference(lower=lambda p: p["ba_term"] + p["t_joint"] + _log_mean([-w for w in p["log_weights"]]))
ibal_forward = reference(estimate=lambda p: p["ba_term"] + p["t_joint"] - _log_mean(p["log_weights"]))
nwj = reference(
    lower=lambda p: p["ba_term"] + p["t_joint"] + 1 - statistics.fmean(math.exp(t) for t in p["t_marginal"])
)
slots = reference(lower=lambda p: p["scores"][0] - _log_mean(p["scores"]))


def _giwae_upper(pair: dict[str, Any]) -> float:
    total = sum(math.exp(t) for t in pair["critic"])
    chosen = [math.exp(t) / total for t in pair["critic"]]
    terms = zip(chosen, pair["log_weights"], strict=True)
    return float(pair["log_likelihood"] - sum(c * (w - math.log(K * c)) for c, w in terms))


giwae = reference(
    lower=lambda p: (
        p["log_q"] - p["log_prior"] + p["posterior_critic"] - _log_mean([p["posterior_critic"], *p["critic"][1:]])
    ),
    upper=_giwae_upper,
)


def in_batch(batches: Sequence[Any]) -> dict[str, Any]:
    """Each row's own score against all of the row."""
    rows = [(i, row) for (scores,) in batches for i, row in enumerate(scores.double().tolist())]
    return _means(lower=[row[i] - _log_mean(row) for i, row in rows])


def donsker_varadhan(batches: Sequence[Any]) -> dict[str, Any]:
    """Means over all batches, and the delta method."""
    pairs = _pairs(batches)
    joint = [p["t_joint"] + p["ba_term"] for p in pairs]
    marginal = [statistics.fmean(math.exp(t) for t in p["t_marginal"]) for p in pairs]
    z, n = statistics.fmean(marginal), len(pairs)
    spread = statistics.variance(joint) + statistics.variance(marginal) / z**2 if n > 1 else math.nan
    return {"estimate": statistics.fmean(joint) - math.log(z), "stderr": math.sqrt(spread / n), "count": n}


METRICS = [  # name, arguments, reference, shapes of what update takes
    (
        "BarberAgakovBound",
        ("both",),
        "barber_agakov",
        {"log_q": "B", "log_prior": "B", "log_likelihood": "B", "log_weight": "B"},
    ),
    ("IWAEBound", ("both",), "iwae", {"log_likelihood": "B", "log_weights": "KB", "posterior_log_weight": "B"}),
    ("IWAEBound", ("lower",), "iwae_lower", {"log_likelihood": "B", "log_weights": "KB"}),
    ("StructuredInfoNCE", ("both",), "structured_infonce", {"scores": "KB", "log_likelihood": "B"}),
    (
        "GIWAEBound",
        ("both",),
        "giwae",
        {
            "log_q": "B",
            "log_prior": "B",
            "critic": "KB",
            "log_likelihood": "B",
            "log_weights": "KB",
            "posterior_critic": "B",
        },
    ),
    ("AISBound", (), "ais_default", {"log_likelihood": "B", "forward": "KB", "reverse": "KB"}),
    (
        "AISBound",
        ("both", ("independent_reverse", "independent")),
        "ais_mixed",
        {"log_likelihood": "B", "forward": "KB", "reverse": "KB"},
    ),
    ("InfoNCE", ("slots",), "slots", {"scores": "KB"}),
    ("DonskerVaradhanEstimate", (), "donsker_varadhan", {"t_joint": "B", "t_marginal": "KB", "ba_term": "B"}),
    ("NWJEstimate", (), "nwj", {"t_joint": "B", "t_marginal": "KB", "ba_term": "B"}),
    ("IBALEstimate", ("certified",), "ibal_certified", {"t_joint": "B", "ba_term": "B", "log_weights": "KB"}),
    ("IBALEstimate", ("forward",), "ibal_forward", {"t_joint": "B", "ba_term": "B", "log_weights": "KB"}),
]
