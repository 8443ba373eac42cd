"""Experiment E4 of the influence reproduction: finding labels that were changed."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ext._resources import load_script
from lightning_ext.functional import ParameterView, SampleGradients, row_correlation
from lightning_ext.metrics import MislabelDetection
from lightning_ext.modules import InfluenceModule, PBRFModule

training = load_script(Path(__file__).with_name("_influence_training.py"))

TASK = training.Task(num_train=300, hidden=(16,), epochs=15, flipped=0.1)
DAMPING = 1e-2
PBRF_STEPS = 60
NAMES = ("self-influence", "PBRF", "training loss", "gradient norm", "random")


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a score of suspicion found; the keys are those of ``NAMES``.

    Attributes:
        scores: ``(N,)`` each, in the order of the training samples.
        detection: What :class:`~lightning_ext.metrics.MislabelDetection` says of each.
    """

    scores: dict[str, Tensor]
    detection: dict[str, dict[str, Tensor]]

    def auc(self, name: str) -> float:
        """Area under the ROC curve."""
        return float(self.detection[name]["auc"])

    @property
    def agreement(self) -> float:
        """Rank correlation of influence with the PBRF."""
        return float(row_correlation(self.scores["self-influence"], self.scores["PBRF"], "spearman"))


def own_loss_without(base: Any) -> Tensor:
    """By how much each sample's own loss rises in the PBRF to its removal, ``(N,)``; all are trained side by side."""
    everyone = list(range(len(base.train)))
    module = PBRFModule(
        base.network, base.task.objective, remove=everyone, damping=DAMPING, weight_decay=base.task.weight_decay,
        optimizer="newton",
    )  # fmt: skip
    training.fit(module, base.whole, PBRF_STEPS)
    return module.measure([base.train[:]]).diagonal()


@functools.cache
def found(seed: int) -> Found:
    """All scores on one training run with flipped labels."""
    with training.told(f"E4, seed {seed}"):
        base = training.trained(TASK, seed)
        objective, batch = TASK.objective, base.train[:]
        influence = InfluenceModule(base.network, objective, damping=DAMPING, weight_decay=TASK.weight_decay)
        with torch.no_grad():
            losses = objective.losses(base.network(batch[0]), batch[1])
        gradients = SampleGradients(base.network, objective, ParameterView(base.network)).explicit(batch)
        draws = torch.Generator().manual_seed(seed)
        values = (
            influence.self_influence(base.whole), own_loss_without(base), losses, gradients.norm(dim=1),
            torch.rand(len(losses), generator=draws),
        )  # fmt: skip
        scores = dict(zip(NAMES, values, strict=True))
        return Found(scores, {name: detected(score, base.is_flipped) for name, score in scores.items()})


def detected(suspicion: Tensor, is_flipped: Tensor) -> dict[str, Tensor]:
    """The detection curve and its area."""
    metric = MislabelDetection(fraction=0.2)
    metric.update(suspicion, is_flipped)
    return metric.compute()
