"""Experiments E1 and E2 of the influence reproduction: the five gaps between retraining and an influence estimate."""

import functools
from pathlib import Path
from typing import Any

from lightning_ext._resources import load_script
from lightning_ext.modules import InfluenceGapAnalyzer, InfluenceGaps

training = load_script(Path(__file__).with_name("_influence_training.py"))
Task = training.Task

BASES = {"digits": Task(), "diabetes": Task("diabetes", 300, 142, (32, 32), epochs=100, lr=0.03)}
DAMPING, REMOVALS, PBRF_STEPS = 1e-2, 20, 60


def decomposed(task: Any, seed: int, groups: list[list[int]], damping: float) -> InfluenceGaps:
    """Remove these groups from a trained network, all side by side; LiSSA takes as many steps as training samples."""
    base = training.trained(task, seed)
    analyzer = InfluenceGapAnalyzer(
        base.network, task.objective, groups, damping, task.weight_decay, epochs=task.epochs,
        batch_size=task.batch_size, lr=task.lr, seed=100 + seed, depth=task.num_train, collate_fn=training.as_is,
        pbrf_epochs=PBRF_STEPS, trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )  # fmt: skip
    with training.quiet(), training.one_thread():
        return analyzer.run(base.train, [base.test[:]])


@functools.cache
def on_base(name: str, seed: int) -> InfluenceGaps:
    """E1 and E2."""
    with training.told(f"E{1 + list(BASES).index(name)}, {name}, seed {seed}"):
        groups = training.trained(BASES[name], seed).removals(REMOVALS)
        return decomposed(BASES[name], seed, groups, DAMPING)


def correlation(found: InfluenceGaps, response: str) -> float:
    """Mean over test points of the Pearson correlation, over removals, of influence with an actual effect."""
    return found.correlations[response]["pearson"]
