"""Experiment E3 of the influence reproduction: how the gaps respond to training, damping, decay, width and number."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ext._resources import load_script

gaps = load_script(Path(__file__).with_name("_influence_gaps.py"))
training = gaps.training

SWEEP = training.Task(num_train=300, hidden=(16,), epochs=40)
REMOVALS = 10
SIZES = (1, 5, 25, 75)
FACTORS: dict[str, dict[float, dict[str, Any]]] = {
    "epochs": {value: {"epochs": value} for value in (5, 20, 80, 320)},
    "damping": {value: {} for value in (1e-3, 1e-2, 1e-1, 1.0)},
    "weight decay": {value: {"weight_decay": value} for value in (0.0, 1e-4, 1e-3, 1e-2)},
    "width": {value: {"hidden": (value,)} for value in (4, 16, 64)},
    "samples removed": {value: {} for value in SIZES},
}


@functools.cache
def _point(task: Any, damping: float, seed: int) -> list[Mapping[str, float]]:
    """The output gaps for each size of the groups; the point that all factors share has the larger groups, too."""
    sizes = SIZES if task == SWEEP and damping == gaps.DAMPING else SIZES[:1]
    named = f"{task.epochs} epochs, weight decay {task.weight_decay:g}, width {task.hidden[0]}, damping {damping:g}"
    with training.told(f"E3, {named}, seed {seed}"):
        base = training.trained(task, seed)
        groups = [group for size in sizes for group in base.removals(REMOVALS, size)]
        found = gaps.decomposed(task, seed, groups, damping).output_gaps
    parts = [slice(i * REMOVALS, (i + 1) * REMOVALS) for i in range(len(sizes))]
    return [{name: float(gap[part].mean()) for name, gap in found.items()} for part in parts]


def at(factor: str, value: float, seed: int) -> Mapping[str, float]:
    """Output gaps, mean over the removals, at one value of a factor, all else as in ``SWEEP``."""
    task = dataclasses.replace(SWEEP, **FACTORS[factor][value])
    point = _point(task, value if factor == "damping" else gaps.DAMPING, seed)
    return point[SIZES.index(int(value)) if factor == "samples removed" else 0]


def curve(factor: str, gap: str, seeds: Sequence[int]) -> list[float]:
    """A gap over the values of a factor, mean over the seeds."""
    return [statistics.fmean(at(factor, value, seed)[gap] for seed in seeds) for value in FACTORS[factor]]


def moves(values: Sequence[float], direction: str) -> bool:
    """Whether each value is below (``"falls"``) or above (``"grows"``) the one before."""
    pairs = itertools.pairwise(values)
    return all(b < a for a, b in pairs) if direction == "falls" else all(b > a for a, b in pairs)
