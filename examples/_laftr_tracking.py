"""Experiment R1 of the LAFTR reproduction: estimates against the true distance, while a second task is learned."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ext._resources import load_script
from lightning_ext.data import ContinualDataModule
from lightning_ext.functional import fold_in, gated_distance, row_correlation
from lightning_ext.nn import MLP, FunctionSpaceEstimator, function_space_estimator

training = load_script(Path(__file__).with_name("_laftr_training.py"))

EPOCHS, MORE_EPOCHS, BATCH, EVERY, SAMPLES, STORED = 30, 6, 32, 4, 400, 20
POOLED = {"class_conditional": False}
DRAWN = {"num_samples": SAMPLES}
ESTIMATORS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "L2 of weights": ("l2", {}),
    "EWC": ("ewc", {}),
    "K-FAC": ("kfac", {}),
    "NTK, all data": ("ntk", {"size": None}),
    "NTK, stored": ("ntk", {"size": STORED}),
    "exact, stored": ("coreset", {"size": STORED}),
    "laftr-relu": ("laftr-relu", {**DRAWN, **POOLED}),
    "laftr-relu by class": ("laftr-relu", DRAWN),
    "laftr-sample": ("laftr-sample", {**DRAWN, **POOLED}),
    "laftr-sample by class": ("laftr-sample", DRAWN),
    "laftr-moments": ("laftr-moments", POOLED),
    "laftr-moments by class": ("laftr-moments", {}),
    "official formula": ("laftr-moments", {**POOLED, "variant": "official"}),
    "official by class": ("laftr-moments", {"variant": "official"}),
    "laftr-mean": ("laftr-mean", POOLED),
    "laftr-mean by class": ("laftr-mean", {}),
}
FROZEN = "frozen gates, all data"  # what LAFTR would be if the inputs were known exactly
NAMES = (*ESTIMATORS, FROZEN)


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """Distances along a training.

    Attributes:
        steps: ``(K,)``, steps of the second task.
        true: ``(K,)``, on the first task's training set.
        estimates: ``(K,)`` each, by the names in ``NAMES``.
    """

    steps: Tensor
    true: Tensor
    estimates: Mapping[str, Tensor]

    def log_ratio(self, name: str) -> float:
        """Mean of the absolute logarithms of estimate over truth; infinite for an estimate that is not positive."""
        ratio = (self.estimates[name] / self.true).clamp(min=0)
        return float(ratio.log().abs().mean())

    def median_ratio(self, name: str) -> float:
        """Below 1 where the estimate is too small."""
        return float((self.estimates[name] / self.true).median())

    def pearson(self, name: str) -> float:
        """Correlation along the way."""
        return float(row_correlation(self.estimates[name], self.true, "pearson"))


def train(
    network: nn.Module, data: tuple[Tensor, Tensor], heads: slice, epochs: int, seed: int,
    every_step: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Adam with cross-entropy on the outputs of a task."""
    x, t = data
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    order, step = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows])[:, heads], t[rows] - heads.start).backward()
            optimizer.step()
            step += 1
            if every_step is not None:
                every_step(step)


def _frozen(network: nn.Module, reference: Mapping[str, Tensor], x: Tensor, heads: slice) -> float:
    def forward(values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(network, dict(values), (inputs,))
        return outputs

    current = dict(network.named_parameters())
    return float(gated_distance(forward, reference, current, x, divergence="mse", heads=heads))


@functools.cache
def tracked(seed: int) -> Track:
    """Train on the digits 0 to 4, keep what each estimator keeps, and measure while 5 to 9 are learned."""
    with training.told(f"R1, seed {seed}"), training.one_thread(), torch.random.fork_rng(devices=[]):
        return _tracked(seed)


def _tracked(seed: int) -> Track:
    tasks = ContinualDataModule.split(*training.digits(), classes=5)
    first, second = (part.tensors for part in tasks.train_sets)
    heads, others = tasks.heads(0), tasks.heads(1)
    torch.manual_seed(seed)
    network = MLP([64, 64, 64, 10])
    train(network, first, heads, EPOCHS, fold_in(seed, 0))
    exact = function_space_estimator("full", divergence="mse")
    built = {
        name: function_space_estimator(kind, divergence="mse", seed=seed, **options)
        for name, (kind, options) in ESTIMATORS.items()
    }
    for estimator in (exact, *built.values()):
        estimator.fit(network, [first], heads=heads)
    reference = {name: value.detach().clone() for name, value in network.named_parameters()}
    steps: list[int] = []
    found: dict[str, list[float]] = {name: [] for name in ("true", *NAMES)}

    @torch.no_grad()
    def measure(step: int) -> None:
        if step % EVERY:
            return
        steps.append(step)
        estimators: dict[str, FunctionSpaceEstimator] = {"true": exact, **built}
        for name, estimator in estimators.items():
            found[name].append(float(estimator.distance(network)))
        found[FROZEN].append(_frozen(network, reference, first[0], heads))

    train(network, second, others, MORE_EPOCHS, fold_in(seed, 1), measure)
    series = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
    true = series.pop("true")
    return Track(torch.tensor(steps), true, series)
