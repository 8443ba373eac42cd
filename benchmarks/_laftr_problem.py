"""What the LAFTR benchmark trains on: permuted digits, one task after the other, in a loop that all methods share."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ext.data import ContinualDataModule
from lightning_ext.functional import average_accuracy, backward_transfer
from lightning_ext.nn import FunctionSpaceEstimator, function_space_estimator

BATCH, EPOCHS, TASKS = 32, 10, 5
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Images ``(N, 64)`` and labels, to train on and to test on."""

    train: Pair
    test: Pair


def mlp(seed: int = 0, units: int = 64) -> nn.Sequential:
    """Two hidden layers of ReLU units."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((64, units, units, 10)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(seed: int = 0) -> nn.Sequential:
    """Three convolutions on the 8 x 8 digits: 25,962 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


@cache
def tasks(number: int = TASKS) -> tuple[Task, ...]:
    """The digits, standardised as a whole, with their pixels in another order in each task; the labels stay."""
    data = ContinualDataModule.permuted("digits", num_tasks=number)
    pairs = (
        [(images.flatten(1), labels) for images, labels in (part.tensors for part in parts)]
        for parts in zip(data.train_sets, data.test_sets, strict=True)
    )
    return tuple(Task(*pair) for pair in pairs)


# -- methods -----------------------------------------------------------------------------------------------------------


class Learner:
    """Plain fine-tuning, which every method changes.

    Attributes:
        keeps_optimizer: whether the optimizer's state goes on from task to task.
        max_norm: where the gradient's norm is cut, or None.
    """

    keeps_optimizer = True
    max_norm: float | None = None

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a step minimises."""
        return cross_entropy(model(x), y)

    def end_task(self, model: nn.Module, data: Pair) -> None:
        """Keep what the next tasks need."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept from one task to the next, besides the network."""
        return 0


class Penalized(Learner):
    """The loss plus the weighted mean of the distances to all past tasks, by any estimator of ours."""

    def __init__(self, estimator: str, weight: float, **options: object) -> None:
        self.estimator, self.weight, self.options = estimator, weight, options
        self.past: list[FunctionSpaceEstimator] = []

    def penalty(self, model: nn.Module) -> Tensor:
        return self.weight * torch.stack([estimator.distance(model) for estimator in self.past]).mean()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(model, x, y)
        return loss + self.penalty(model) if self.past else loss

    def end_task(self, model: nn.Module, data: Pair) -> None:
        estimator = function_space_estimator(self.estimator, seed=len(self.past), **self.options)
        self.past.append(estimator.fit(model, batches(data)))

    @property
    def nbytes(self) -> int:
        return sum(estimator.nbytes for estimator in self.past)


# -- training ----------------------------------------------------------------------------------------------------------


def batches(data: Pair, size: int = 256) -> list[Pair]:
    """In order."""
    return list(zip(*(part.split(size) for part in data), strict=True))


def training_step(learner: Learner, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Pair) -> None:
    optimizer.zero_grad()
    learner.loss(model, *batch).backward()
    if learner.max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), learner.max_norm)
    optimizer.step()


def train(
    learner: Learner, model: nn.Module, optimizer: torch.optim.Optimizer, data: Pair, epochs: int = EPOCHS
) -> float:
    """The task's epochs in shuffled batches; returns CPU seconds of a step."""
    x, y = data
    model.train()
    steps, start = 0, time.process_time()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(BATCH):
            training_step(learner, model, optimizer, (x[index], y[index]))
            steps += 1
    return (time.process_time() - start) / steps


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    x, y = data
    return float((model.eval()(x).argmax(1) == y).double().mean())


@dataclass(frozen=True)
class Outcome:
    """How a method came through all tasks.

    Attributes:
        accuracy: over all tasks at the end.
        transfer: what later tasks did to earlier ones (BWT).
        nbytes: kept at the end, besides the network.
        seconds: CPU seconds of a step of the last task.
    """

    accuracy: float
    transfer: float
    nbytes: int
    seconds: float


def learn(learner: Learner, seed: int, number: int = TASKS, epochs: int = EPOCHS) -> Outcome:
    """All tasks in a row; what is seen after the last task is not kept any more, but counted as the others."""
    model, row = mlp(seed), tasks(number)
    optimizer = adam(model)
    found = torch.full((number, number), torch.nan, dtype=torch.float64)
    for position, task in enumerate(row):
        optimizer = optimizer if learner.keeps_optimizer else adam(model)
        seconds = train(learner, model, optimizer, task.train, epochs)
        learner.end_task(model.eval(), task.train)
        for earlier in range(position + 1):
            found[position, earlier] = accuracy(model, row[earlier].test)
    return Outcome(float(average_accuracy(found)), float(backward_transfer(found)), learner.nbytes, seconds)


def average(outcomes: Sequence[Outcome]) -> Outcome:
    columns = ([getattr(outcome, name) for outcome in outcomes] for name in Outcome.__dataclass_fields__)
    return Outcome(*(sum(column) / len(outcomes) for column in columns))


@cache
def trained(network: Callable[[int], nn.Module] = mlp, epochs: int = EPOCHS) -> nn.Module:
    """After the first task; copy it before use."""
    model = network(0)
    train(Learner(), model, adam(model), tasks()[0].train, epochs)
    return model.eval()


def moved(model: nn.Module, epochs: int = 1) -> nn.Module:
    """A copy that has begun the second task: where a penalty is not zero."""
    model = copy.deepcopy(model)
    train(Learner(), model, adam(model), tasks()[1].train, epochs)
    return model.eval()
