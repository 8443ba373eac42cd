"""Experiments R4 and R5 of the LAFTR reproduction: wrong labels and removed samples, without the training data."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._resources import load_script
from lightning_ext.functional import InfluenceObjective, ParameterView, SampleGradients, fold_in, row_correlation
from lightning_ext.metrics import MislabelDetection
from lightning_ext.modules import InfluenceModule, LAFTRInfluence, PBRFModule
from lightning_ext.nn import FunctionSpaceEstimator, function_space_estimator

training = load_script(Path(__file__).with_name("_laftr_training.py"))

DAMPING, DRAWS = 1e-2, 1000
Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A network and how it is trained: SGD with momentum 0.9 and weight decay 1e-3."""

    widths: tuple[int, ...]
    num_train: int
    epochs: int
    lr: float
    batch_size: int = 50


MISLABELLED = Plan((64, 32, 10), 1000, 30, 0.1)
REMOVED = Plan((10, 12, 8, 1), 300, 100, 0.03)  # as experiment E2 of the influence reproduction trains
FLIPPED, REMOVALS, PBRF_STEPS, PBRF_RATE = 0.1, 25, 600, 3e-3


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    """ReLU units."""
    layers: list[nn.Module] = []
    for pair in itertools.pairwise(widths):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(plan: Plan, data: Pair, loss: str, seed: int) -> nn.Sequential:
    """A plain loop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = perceptron(plan.widths)
    optimizer = torch.optim.SGD(network.parameters(), plan.lr, momentum=0.9, weight_decay=1e-3)
    function = F.cross_entropy if loss == "cross_entropy" else F.mse_loss
    order = torch.Generator().manual_seed(fold_in(seed, 0))
    for _ in range(plan.epochs):
        for rows in torch.randperm(len(data[0]), generator=order).split(plan.batch_size):
            optimizer.zero_grad()
            function(network(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    return network.eval()


def whole(data: Pair) -> DataLoader[Any]:
    """One batch."""
    return DataLoader(TensorDataset(*data), batch_size=len(data[0]))


# -- R4 -------------------------------------------------------------------------------------------------------------

EXACT, LOSS, NORM = "exact Gauss-Newton", "training loss", "gradient norm"
SUSPICIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "laftr-relu by class": ("laftr-relu", {"num_samples": DRAWS}),
    "laftr-sample by class": ("laftr-sample", {"num_samples": DRAWS}),
    "diagonal Gauss-Newton": ("ewc", {}),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Scores of suspicion, the higher the more suspicious.

    Attributes:
        scores: ``(N,)`` each.
        wrong: ``(N,)``, whose label was replaced.
    """

    scores: Mapping[str, Tensor]
    wrong: Tensor

    def recall(self, name: str, share: float) -> float:
        """Share of the wrong labels among the most suspicious ``share`` of the samples."""
        return float(self.detection(name, share)["recall"])

    def detection(self, name: str, share: float = 0.2) -> dict[str, Tensor]:
        """The whole curve."""
        metric = MislabelDetection(fraction=share)
        metric.update(self.scores[name], self.wrong)
        return metric.compute()

    def agreement(self, name: str) -> float:
        """Spearman with the exact scores."""
        return float(row_correlation(self.scores[name], self.scores[EXACT], "spearman"))


@functools.cache
def mislabelled(seed: int) -> Found:
    """Digits of which a tenth got another label before training."""
    with training.told(f"R4, seed {seed}"), training.one_thread():
        return _mislabelled(seed)


def _mislabelled(seed: int) -> Found:
    draws = torch.Generator().manual_seed(seed)
    (x, true), _ = training.digits()
    rows = torch.randperm(len(x), generator=draws)[: MISLABELLED.num_train]
    x, t = x[rows], true[rows].clone()
    wrong = torch.zeros(len(t), dtype=torch.bool)
    wrong[torch.randperm(len(t), generator=draws)[: round(FLIPPED * len(t))]] = True
    t[wrong] = (t[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=draws)) % 10
    network = train(MISLABELLED, (x, t), "cross_entropy", seed)
    data, objective = whole((x, t)), InfluenceObjective("cross_entropy")
    scores = {EXACT: InfluenceModule(network, objective, damping=DAMPING, solver="direct").self_influence(data)}
    for name, (kind, options) in SUSPICIONS.items():
        estimator = function_space_estimator(kind, seed=seed, **options).fit(network, data)
        influence = LAFTRInfluence(network, estimator, objective, damping=DAMPING, solver="direct", num_train=len(t))
        scores[name] = influence.self_influence(data)
    gradients = SampleGradients(network, objective, ParameterView(network)).explicit((x, t))
    with torch.no_grad():
        scores |= {NORM: gradients.norm(dim=1), LOSS: objective.losses(network(x), t)}
    return Found(scores, wrong)


# -- R5 -------------------------------------------------------------------------------------------------------------

REGRESSION: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "laftr-relu": ("laftr-relu", {"class_conditional": False, "num_samples": DRAWS, "fixed_draws": True}),
    "laftr-moments": ("laftr-moments", {"class_conditional": False}),
    "official formula": ("laftr-moments", {"class_conditional": False, "variant": "official"}),
}
DIAGONAL = "influence, diagonal"
PREDICTIONS = (
    "PBRF, laftr-relu", "PBRF, laftr-moments", "PBRF, official formula", "influence, exact", "influence, laftr-relu",
    DIAGONAL,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Removed:
    """Change of the mean test loss when a sample leaves.

    Attributes:
        actual: ``(M,)``, by the PBRF on the training data.
        predicted: ``(M,)`` each, by the names in ``PREDICTIONS``.
    """

    actual: Tensor
    predicted: Mapping[str, Tensor]

    def correlation(self, name: str, kind: str = "spearman") -> float:
        """With the actual changes, over removals."""
        return float(row_correlation(self.predicted[name], self.actual, kind))


@functools.cache
def removed(seed: int) -> Removed:
    """Diabetes, one sample at a time."""
    with training.told(f"R5, seed {seed}"), training.one_thread():
        return _removed(seed)


def _diabetes(seed: int) -> tuple[Pair, Pair]:
    from sklearn import datasets

    x, t = (torch.as_tensor(values, dtype=torch.float64) for values in datasets.load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, rest = order[: REMOVED.num_train], order[REMOVED.num_train :]
    x, t = (((values - values[first].mean(0)) / values[first].std(0)).float() for values in (x, t[:, None]))
    return (x[first], t[first]), (x[rest], t[rest])


def _removed(seed: int) -> Removed:
    train_set, test_set = _diabetes(seed)
    network = train(REMOVED, train_set, "mse", seed).double()
    train_set, test_set = ((x.double(), t.double()) for x, t in (train_set, test_set))
    data, queries = whole(train_set), [test_set]
    objective = InfluenceObjective("half_squared_error")
    chosen = torch.randperm(len(train_set[0]), generator=torch.Generator().manual_seed(fold_in(seed, 1)))
    groups = [[row] for row in chosen[:REMOVALS].tolist()]
    settings: dict[str, Any] = {"damping": DAMPING, "solver": "direct"}

    def module(kind: str, options: Mapping[str, Any]) -> LAFTRInfluence:
        estimator: FunctionSpaceEstimator = function_space_estimator(kind, divergence="mse", seed=seed, **options)
        estimator.fit(network, data)
        return LAFTRInfluence(network, estimator, objective, queries, num_train=len(train_set[0]), **settings)

    pbrf = PBRFModule(network, objective, groups, DAMPING, optimizer="adam", lr=PBRF_RATE, tolerance=None)
    training.fit(pbrf, data, PBRF_STEPS)
    actual = pbrf.measure(queries).mean(1)
    predicted = {}
    for name, (kind, options) in REGRESSION.items():
        influence = module(kind, options)
        predicted[f"PBRF, {name}"] = influence.pbrf(groups, data).mean(0)
        if name == "laftr-relu":
            predicted["influence, laftr-relu"] = influence.leave_out(groups, data).mean(0)
    exact = InfluenceModule(network, objective, queries, **settings)
    predicted["influence, exact"] = exact.leave_out(groups, data).mean(0)
    predicted[DIAGONAL] = module("ewc", {}).leave_out(groups, data).mean(0)
    return Removed(actual, predicted)
