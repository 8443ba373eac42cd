"""Experiment E5 of the influence reproduction: logistic regression, where retraining has one answer."""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_ext._resources import load_script
from lightning_ext.functional import InfluenceObjective
from lightning_ext.metrics import LOOCorrelation
from lightning_ext.modules import InfluenceModule

training = load_script(Path(__file__).with_name("_influence_training.py"))

NUM_TRAIN, WEIGHT_DECAY = 400, 1e-2


def newton(x: Tensor, t: Tensor, kept: Tensor, weight_decay: float, steps: int = 30) -> Tensor:
    """Minimise the decayed logistic loss of the kept samples exactly.

    Args:
        x: ``(N, D)``.
        t: ``(N,)``, zeros and ones.
        kept: ``(G, N)``, one row of zeros and ones per problem. What a problem minimises is divided by N, whatever it
            keeps.
        weight_decay: L2 coefficient.
        steps: Of Newton.

    Returns:
        ``(G, D)``.
    """
    theta = x.new_zeros(len(kept), x.shape[1])
    decay = weight_decay * torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(steps):
        p = torch.sigmoid(theta @ x.mT)
        gradient = (kept * (p - t)) @ x / len(x) + weight_decay * theta
        curvature = torch.einsum("gn,ni,nj->gij", kept * p * (1 - p) / len(x), x, x) + decay
        theta = theta - torch.linalg.solve(curvature, gradient)
    return theta


@functools.cache
def correlations(seed: int) -> tuple[float, float]:
    """Influence and rescaled influence against leaving out each training sample: mean Pearson over test points."""
    from sklearn.datasets import load_breast_cancer

    with training.told(f"E5, logistic regression, seed {seed}"):
        data, labels = (torch.tensor(values, dtype=torch.float64) for values in load_breast_cancer(return_X_y=True))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
        x = (data - data[train].mean(0)) / data[train].std(0)
        theta, *others = newton(
            torch.nn.functional.pad(x[train], (0, 1), value=1.0), labels[train],
            torch.cat([torch.ones(1, NUM_TRAIN), 1 - torch.eye(NUM_TRAIN)]).double(), WEIGHT_DECAY,
        )  # fmt: skip
        actual = _losses(torch.stack(others), x[test], labels[test]) - _losses(theta[None], x[test], labels[test])
        model = nn.Linear(x.shape[1], 1).double().eval()
        model.weight.data, model.bias.data = theta[None, :-1].clone(), theta[-1:].clone()
        found = []
        for rescale in (False, True):
            influence = InfluenceModule(
                model, InfluenceObjective("bce"), queries=[(x[test], labels[test, None])], solver="direct",
                damping=0.0, weight_decay=WEIGHT_DECAY, rescale=rescale,
            )  # fmt: skip
            scores = influence.scores(training.in_batches(training.Arrays(x[train], labels[train, None]), NUM_TRAIN))
            metric = LOOCorrelation()
            metric.update(scores, actual)
            found.append(float(metric.compute()["correlation"]))
        return found[0], found[1]


def _losses(theta: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Test losses ``(Q, G)`` of weights with the bias last, ``(G, D)``."""
    logits = theta[:, :-1] @ x.mT + theta[:, -1:]
    target = t.expand_as(logits)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mT
