"""What the experiments of the influence reproduction share: data, networks, and a Trainer that says little."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ext.functional import InfluenceObjective

LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and what it is trained on: the defaults are the specification's base A.

    Attributes:
        data: ``"digits"`` or ``"diabetes"``, as scikit-learn ships them.
        num_train: Training samples.
        num_test: Test samples, where the measurement is taken.
        hidden: Widths of the hidden layers, tanh.
        epochs: Epochs of SGD with momentum 0.9.
        lr: Learning rate.
        weight_decay: L2 coefficient.
        batch_size: Samples per step.
        flipped: Share of the training labels that are replaced by another class.
    """

    data: str = "digits"
    num_train: int = 400
    num_test: int = 200
    hidden: tuple[int, ...] = (32,)
    epochs: int = 50
    lr: float = 0.1
    weight_decay: float = 1e-3
    batch_size: int = 50
    flipped: float = 0.0

    @property
    def loss(self) -> str:
        """The training loss by the name that an InfluenceObjective knows."""
        return "cross_entropy" if self.data == "digits" else "mse"

    @property
    def objective(self) -> InfluenceObjective:
        """The training loss, measured by itself."""
        return InfluenceObjective(self.loss)


class Arrays(TensorDataset):
    """Indexed once per batch."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """A batch."""
        return tuple(tensor[indices] for tensor in self.tensors)


def as_is(batch: Any) -> Any:
    """What a loader does with batches that are batches already."""
    return batch


def in_batches(data: Dataset[Any], batch_size: int, order: int | None = None) -> DataLoader[Any]:
    """A loader; ``order`` seeds the shuffling, None keeps the data's own order."""
    generator = None if order is None else torch.Generator().manual_seed(order)
    return DataLoader(data, batch_size, shuffle=order is not None, generator=generator, collate_fn=as_is)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained network with its data.

    Attributes:
        task: What was asked for.
        seed: Of the split, the initial weights and the order.
        network: In evaluation mode.
        train: Training samples.
        test: Test samples.
        is_flipped: ``(N,)``, whose label was replaced.
    """

    task: Task
    seed: int
    network: nn.Sequential
    train: Arrays
    test: Arrays
    is_flipped: Tensor

    @property
    def whole(self) -> DataLoader[Any]:
        """All training samples in one batch."""
        return in_batches(self.train, len(self.train))

    def removals(self, count: int, size: int = 1) -> list[list[int]]:
        """Random groups of training samples; groups of one are all different."""
        draws = torch.Generator().manual_seed(1000 + self.seed)
        if size == 1:
            return torch.randperm(len(self.train), generator=draws)[:count, None].tolist()
        return [torch.randperm(len(self.train), generator=draws)[:size].tolist() for _ in range(count)]


def read(name: str) -> tuple[Tensor, Tensor]:
    """All samples of a data set that scikit-learn ships."""
    from sklearn import datasets

    x, t = {"digits": datasets.load_digits, "diabetes": datasets.load_diabetes}[name](return_X_y=True)
    inputs = torch.tensor(x, dtype=torch.float32)
    return (
        (inputs / 16, torch.tensor(t)) if name == "digits" else (inputs, torch.tensor(t, dtype=torch.float32)[:, None])
    )


def split(task: Task, seed: int) -> tuple[Arrays, Arrays, Tensor]:
    """Training and test samples, and whose label was replaced."""
    x, t = read(task.data)
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=draws)
    train, test = order[: task.num_train], order[task.num_train : task.num_train + task.num_test]
    if task.loss == "mse":
        x, t = ((values - values[train].mean(0)) / values[train].std(0) for values in (x, t))
    given, wrong = t[train], torch.zeros(task.num_train, dtype=torch.bool)
    if task.flipped:
        wrong[torch.randperm(task.num_train, generator=draws)[: round(task.flipped * task.num_train)]] = True
        given = torch.where(wrong, (given + torch.randint(1, 10, given.shape, generator=draws)) % 10, given)
    return Arrays(x[train], given), Arrays(x[test], t[test]), wrong


def perceptron(sizes: tuple[int, ...], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Plain(pl.LightningModule):
    """SGD with momentum 0.9 and weight decay, as people train."""

    def __init__(self, network: nn.Module, loss: str, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.network, self.loss, self.lr, self.weight_decay = network, LOSSES[loss], lr, weight_decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss."""
        x, t = batch
        return self.loss(self.network(x), t)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As usual."""
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay)


@functools.cache
def trained(task: Task, seed: int) -> Trained:
    """Train the network of a task once."""
    train, test, wrong = split(task, seed)
    outputs = 10 if task.loss == "cross_entropy" else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = perceptron((train.tensors[0].shape[1], *task.hidden, outputs))
    module = Plain(network, task.loss, task.lr, task.weight_decay)
    fit(module, in_batches(train, task.batch_size, order=seed), task.epochs)
    return Trained(task, seed, copy.deepcopy(network).eval(), train, test, wrong)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes about devices, loggers and loader workers out of hundreds of short runs."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*GPU available but not used")
            warnings.filterwarnings("ignore", message=".*but have no `val(idation_step|_dataloader)`")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing them out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


SILENT = {
    "devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False,
}  # fmt: skip


def fit(module: pl.LightningModule, loader: DataLoader[Any], epochs: int, accelerator: str = "cpu") -> None:
    """Train with an ordinary Trainer."""
    with quiet(), one_thread():
        pl.Trainer(max_epochs=epochs, accelerator=accelerator, **SILENT).fit(module, loader)


def predict(module: pl.LightningModule, loader: DataLoader[Any]) -> Any:
    """Predict with an ordinary Trainer, on whatever is there."""
    with quiet(), one_thread():
        return pl.Trainer(accelerator="auto", **SILENT).predict(module, loader)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say what was done and how long it took."""
    start = time.perf_counter()
    yield
    print(f"  {what}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
