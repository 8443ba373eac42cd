"""Experiments E7 and E8 of the influence reproduction: removing what helps most, and training on halves of the data."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ext._resources import load_script
from lightning_ext.data import IndexedDataset
from lightning_ext.functional import InfluenceObjective, random_subsets
from lightning_ext.metrics import LinearDatamodelingScore
from lightning_ext.modules import InfluenceModule, ResponseModule

gaps = load_script(Path(__file__).with_name("_influence_gaps.py"))
training = gaps.training

SHARES = (0.05, 0.1, 0.2, 0.3)
RETRAININGS = 5
SUBSETS, INITIALISATIONS = 50, 2
RANKINGS = ("influence", "gradient dot", "self-influence", "random")
SOLVERS = {"influence": "auto", "EK-FAC": "ekfac", "TRAK": "trak", "gradient dot": "identity"}


def influence(base: Any, objective: InfluenceObjective, solver: str) -> InfluenceModule:
    """Influence on the test set, at the damping of E1."""
    decay = base.task.weight_decay
    return InfluenceModule(
        base.network, objective, [base.test[:]], solver=solver, damping=gaps.DAMPING, weight_decay=decay
    )


def retrained_on(base: Any, objective: InfluenceObjective, keep: Tensor, seeds: Sequence[int]) -> Tensor:
    """Measurements ``(G, Q)`` on the test set of networks trained afresh on parts ``(G, N)`` of the training set."""
    task = base.task
    module = ResponseModule(
        base.network, objective, "cold", keep=keep, weight_decay=task.weight_decay, lr=task.lr, seed=seeds
    )
    loader = training.in_batches(IndexedDataset(base.train), task.batch_size, order=400 + base.seed)
    training.fit(module, loader, task.epochs)
    return module.measure([base.test[:]])


# -- E7 -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Removed:
    """By how much the mean test loss rises, ``(retrainings,)`` for each ranking and share removed."""

    increase: Mapping[tuple[str, float], Tensor]


def without_top(scores: Tensor, share: float) -> Tensor:
    """A mask without this share of the samples, those of the largest scores."""
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True)[: round(share * len(scores))]] = False
    return keep


@functools.cache
def removed(name: str, seed: int) -> Removed:
    """Remove what each ranking puts first and train afresh, from the same initial weights as with all samples."""
    with training.told(f"E7, {name}, seed {seed}"):
        base = training.trained(gaps.BASES[name], seed)
        objective, size = base.task.objective, len(base.train)
        exact = influence(base, objective, "auto")
        scores = {
            "influence": exact.scores(base.whole).mean(0),
            "gradient dot": influence(base, objective, "identity").scores(base.whole).mean(0),
            "self-influence": exact.self_influence(base.whole),
        }
        draws = torch.Generator().manual_seed(seed)
        cells = [(ranking, share) for ranking in RANKINGS for share in SHARES]
        masks = [torch.ones(size, dtype=torch.bool)] * RETRAININGS
        for ranking, share in cells:
            for _ in range(RETRAININGS):
                score = scores[ranking] if ranking in scores else torch.rand(size, generator=draws)
                masks.append(without_top(score, share))
        seeds = [1000 * seed + 500 + i for i in range(RETRAININGS)] * (1 + len(cells))
        losses = retrained_on(base, objective, torch.stack(masks), seeds).mean(1).view(-1, RETRAININGS)
        return Removed(dict(zip(cells, losses[1:] - losses[0], strict=True)))


def beyond_random(results: Sequence[Removed], ranking: str, share: float) -> tuple[float, float]:
    """Mean of the increase beyond that of random removal, over all retrainings, and its standard error."""
    pairs = [one.increase[ranking, share] - one.increase["random", share] for one in results]
    difference = torch.cat(pairs)
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


# -- E8 -------------------------------------------------------------------------------------------------------------


@functools.cache
def datamodeling(seed: int) -> dict[str, float]:
    """Linear datamodeling scores on digits of what ``SOLVERS`` says, measured by the margin."""
    with training.told(f"E8, seed {seed}"):
        base = training.trained(gaps.BASES["digits"], seed)
        objective = InfluenceObjective(base.task.loss, measurement="margin")
        masks = random_subsets(SUBSETS, len(base.train), seed=seed)
        seeds = [1000 * seed + 700 + i for i in range(INITIALISATIONS) for _ in range(SUBSETS)]
        measured = retrained_on(base, objective, masks.repeat(INITIALISATIONS, 1), seeds)
        outcomes = measured.view(INITIALISATIONS, SUBSETS, -1).mean(0)
        return {name: score(base, objective, solver, masks, outcomes) for name, solver in SOLVERS.items()}


def score(base: Any, objective: InfluenceObjective, solver: str, masks: Tensor, outcomes: Tensor) -> float:
    """The linear datamodeling score of one solver."""
    metric = LinearDatamodelingScore(masks)
    metric.update(influence(base, objective, solver).scores(base.whole), outcomes)
    return float(metric.compute()["lds"])
