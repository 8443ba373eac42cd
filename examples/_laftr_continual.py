"""Experiments R2 and R6 of the LAFTR reproduction: permuted digits, five tasks and ten, by many methods."""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_ext._resources import load_script
from lightning_ext.data import ContinualDataModule
from lightning_ext.nn import MLP

training = load_script(Path(__file__).with_name("_laftr_training.py"))
Method = training.Method

POINTS = 40  # drawn for each penalty, or stored for each task
TUNING_SEED = 99
MSE, POOLED, DRAWN = {"divergence": "mse"}, {"class_conditional": False}, {"num_samples": POINTS}
STORED = {"size": POINTS}

FINETUNE = Method("fine-tuning")
EWC = Method("EWC", "ewc", 100.0)
ONLINE = Method("online EWC", "online-ewc", 100.0, consolidate="merge")
KFAC = Method("K-FAC", "kfac", 10.0)
EXACT = Method("exact, 40 stored", "coreset", 10.0, options=STORED, keeps_reference=False)
FULL = Method("exact, all data", "full", 10.0, keeps_reference=False)
RELU = Method("laftr-relu", "laftr-relu", 10.0, options={**DRAWN, **POOLED})
RELU_BY_CLASS = Method("laftr-relu by class", "laftr-relu", 10.0, options=DRAWN)
MOMENTS = Method("laftr-moments", "laftr-moments", 0.1, options={**MSE, **POOLED})


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Tasks in a row, and who learns them.

    Attributes:
        number: In the claims.
        tasks: How many.
        epochs: Per task.
        methods: With the weights of the specification, which a prototype chose.
        hidden: Widths of the network.
    """

    number: str
    tasks: int
    epochs: int
    methods: Sequence[Any]
    hidden: tuple[int, ...] = (64, 64)


BENCHMARKS = {
    "five": Benchmark(
        "R2", 5, 10,
        (
            FINETUNE,
            Method("L2 of weights", "l2", 0.01),
            EWC,
            Method("NTK, 40 stored", "ntk", 10.0, options=STORED),
            Method("official formula", "laftr-moments", 0.1, options={**MSE, **POOLED, "variant": "official"}),
            Method("laftr-sample", "laftr-sample", 10.0, options={**DRAWN, **POOLED}),
            Method("laftr-sample by class", "laftr-sample", 10.0, options=DRAWN),
            EXACT, MOMENTS, RELU, RELU_BY_CLASS, FULL,
        ),
    ),
    "ten": Benchmark(
        "R6", 10, 3,
        (
            FINETUNE, EWC, ONLINE, KFAC, EXACT, MOMENTS, RELU_BY_CLASS,
            dataclasses.replace(RELU_BY_CLASS, name="the same, last", consolidate="last"),
            dataclasses.replace(RELU_BY_CLASS, name="the same, merge", consolidate="merge"),
            FULL,
        ),
    ),
}  # fmt: skip
WEIGHTS = {"K-FAC": (10.0, 100.0)}  # the specification names none


def names(benchmark: str) -> list[str]:
    """Of the methods, in order."""
    return [method.name for method in BENCHMARKS[benchmark].methods]


@functools.cache
def _data(tasks: int, seed: int) -> ContinualDataModule:
    return ContinualDataModule.permuted(*training.digits(), num_tasks=tasks, batch_size=32, seed=seed)


@functools.cache
def learned(benchmark: str, name: str, seed: int, weight: float | None = None) -> Any:
    """One training run over all tasks; ``weight`` in place of the method's own."""
    plan = BENCHMARKS[benchmark]
    [method] = [each for each in plan.methods if each.name == name]
    if weight is None and name in WEIGHTS:
        weight = chosen_weight(benchmark, name)
    method = method if weight is None else dataclasses.replace(method, weight=weight)
    with training.told(f"{plan.number}, {name}, weight {method.weight:g}, seed {seed}"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MLP([64, *plan.hidden, 10])
        return training.learn(method, _data(plan.tasks, seed), network, plan.epochs, seed)


@functools.cache
def chosen_weight(benchmark: str, name: str) -> float:
    """The best on a seed that is not reported."""
    return max(WEIGHTS[name], key=lambda weight: learned(benchmark, name, TUNING_SEED, weight).accuracy)


def accuracy(benchmark: str, name: str, seeds: Sequence[int]) -> float:
    """Average accuracy at the end, mean over seeds."""
    return statistics.fmean(learned(benchmark, name, seed).accuracy for seed in seeds)


def transfer(benchmark: str, name: str, seeds: Sequence[int]) -> float:
    """Backward transfer, mean over seeds."""
    return statistics.fmean(learned(benchmark, name, seed).transfer for seed in seeds)


def one_task_bytes(name: str) -> int:
    """What the method of ``ten`` keeps after a single task."""
    plan = BENCHMARKS["ten"]
    [method] = [each for each in plan.methods if each.name == name]
    return int(training.learn(method, _data(1, 0), MLP([64, *plan.hidden, 10]), 1, 0).nbytes)


def table(benchmark: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each method."""
    rows = []
    for name in names(benchmark):
        runs = [learned(benchmark, name, seed) for seed in seeds]
        values = [run.accuracy for run in runs]
        rows.append({
            "method": name,
            "accuracy": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "bwt": statistics.fmean(run.transfer for run in runs),
            "bytes": runs[0].nbytes,
            "seconds": statistics.fmean(run.seconds for run in runs),
        })  # fmt: skip
    return rows
