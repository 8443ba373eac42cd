"""Experiment F of the LAFTR reproduction (``--full --data DIR``): the official code's configurations, for a GPU.

``DIR`` holds the data as they are published: MNIST's four files, plain or as ``.gz``, there or in ``MNIST/raw``, and
``cifar-10-batches-bin`` and ``cifar-100-binary``, unpacked from the binary versions. Tables of the paper were not at
hand; what stands beside ours are the figures of FROMP (Pan et al. 2020) on the same tasks, from its repository.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ext._resources import UserError, load_script
from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.data import CIFAR10, CIFAR100, ContinualDataModule, MNISTDataModule, read_cifar
from lightning_ext.metrics import ContinualMetrics
from lightning_ext.modules import Classifier
from lightning_ext.nn import MLP
from lightning_ext.reproduce import Claim, Outcome

training = load_script(Path(__file__).with_name("_laftr_training.py"))

Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of tasks and how it is learned.

    Attributes:
        data: Folder and batch size to tasks.
        network: Builds it.
        lr: Of Adam, whose state goes on from task to task.
        batch_size: Samples per step.
        epochs: Of the first task and of the others.
        weight: Of the penalty.
        options: Of the estimator, ``laftr-relu``.
        fromp: Average accuracy of FROMP.
    """

    data: Callable[[Path, int], ContinualDataModule]
    network: Callable[[], nn.Module]
    lr: float
    batch_size: int
    epochs: tuple[int, int]
    weight: float
    options: Mapping[str, Any]
    fromp: float


# -- data and networks ----------------------------------------------------------------------------------------------


@functools.cache
def read_mnist(folder: Path) -> tuple[Pair, Pair]:
    """All training and test images, ``(N, 784)`` in [0, 1], and labels."""
    data = MNISTDataModule(str(folder), binarize=None, shape="flat", num_val=0)
    data.prepare_data()
    data.setup()
    train, test = ((part.images.float() / 255, part.targets) for part in (data.train_set, data.test_set))
    return train, test


def split_mnist(folder: Path, batch_size: int) -> ContinualDataModule:
    """Five pairs of classes, each with its own two of ten outputs."""
    return ContinualDataModule.split(*read_mnist(folder), classes=2, batch_size=batch_size, seed=0)


def permuted_mnist(folder: Path, batch_size: int) -> ContinualDataModule:
    """Ten orders of the pixels."""
    return ContinualDataModule.permuted(*read_mnist(folder), num_tasks=10, batch_size=batch_size, seed=0)


def split_cifar(folder: Path, batch_size: int) -> ContinualDataModule:
    """CIFAR-10, then five times ten classes of CIFAR-100; each task has its own ten of sixty outputs."""
    ten, hundred = read_cifar(folder, CIFAR10), read_cifar(folder, CIFAR100)
    rest = [[_classes(pair, first) for pair in (hundred.train, hundred.test)] for first in range(0, 50, 10)]
    tasks, numbered = [[ten.train, ten.test], *rest], []
    for place, parts in enumerate(tasks):
        train, test = ((images.float() / 255, labels + 10 * place) for images, labels in parts)
        numbered.append((train, test, slice(10 * place, 10 * place + 10)))
    return ContinualDataModule(numbered, batch_size=batch_size, seed=0)


def _classes(pair: Pair, first: int) -> Pair:
    images, labels = pair
    chosen = (labels >= first) & (labels < first + 10)
    return images[chosen], labels[chosen] - first


def convolutional() -> nn.Module:
    """Two pairs of convolutions with pooling and dropout, and two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(2304, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 60),
    )  # fmt: skip


def perceptron() -> nn.Module:
    """Two hidden layers of 512."""
    return MLP([784, 512, 512, 10])


MNIST_OPTIONS = {"num_samples": 40, "divergence": "softmax_l2"}
RECIPES = {
    "Split MNIST": Recipe(
        split_mnist, perceptron, 1e-3, 32, (15, 15), 1.0, {**MNIST_OPTIONS, "class_conditional": False}, 0.993
    ),
    "Permuted MNIST": Recipe(permuted_mnist, perceptron, 1e-4, 128, (15, 15), 1.0, MNIST_OPTIONS, 0.948),
    "Split CIFAR": Recipe(
        split_cifar, convolutional, 1e-3, 512, (200, 50), 5.0, {"num_samples": 200, "class_conditional": False}, 0.762
    ),
}

# -- the experiment -------------------------------------------------------------------------------------------------


class Headed(Classifier):
    """Cross-entropy among the outputs of the current task."""

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """The loss."""
        heads = self.trainer.datamodule.heads(self.trainer.datamodule.task)
        logits, labels = self(batch[0]), batch[1]
        if heads is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits[:, heads], labels - heads.start)


class Kept:
    """Builds Adam once, and gives the same one to every fit."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.optimizer: torch.optim.Optimizer | None = None

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer with its state."""
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(parameters, self.lr)
        return self.optimizer


def learned(recipe: Recipe, folder: Path, seed: int, regularized: bool) -> dict[str, Tensor]:
    """One fit after the other; what the accuracy matrix says."""
    pl.seed_everything(seed, verbose=False)
    data = recipe.data(folder, recipe.batch_size)
    model, metric = Headed(recipe.network(), Kept(recipe.lr)), ContinualMetrics(data.num_tasks)
    kept = FunctionSpaceRegularizer(
        "laftr-relu", recipe.weight, heads=data.heads, estimator_options=dict(recipe.options), seed=seed
    )
    for task in range(data.num_tasks):
        data.set_task(task)
        with training.quiet():
            pl.Trainer(
                max_epochs=recipe.epochs[min(task, 1)], callbacks=[kept] if regularized else [], limit_val_batches=0,
                accelerator="auto", **training.SILENT,
            ).fit(model, data)  # fmt: skip
        _test(model.eval(), data, metric, task)
        model.train()
    return metric.compute()


@torch.no_grad()
def _test(model: Headed, data: ContinualDataModule, metric: ContinualMetrics, seen: int) -> None:
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for task in range(seen + 1):
        for x, t in data.dataloader_of(task):
            metric.update(model(x.to(model.device)).cpu(), t, seen=seen, task=task, heads=data.heads(task))


# -- claims ---------------------------------------------------------------------------------------------------------


def claims(seeds: Sequence[int], folder: Path | None) -> Iterator[Claim]:
    """The claims; the data are read before anything runs.

    Raises:
        UserError: A file is missing or is not what its name says.
    """
    if folder is None:
        raise UserError(
            "--full needs --data DIR, a folder with the MNIST files, cifar-10-batches-bin and cifar-100-binary (the "
            "binary versions, unpacked)."
        )
    try:
        for recipe in RECIPES.values():
            recipe.data(folder, recipe.batch_size)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--full: {error}") from error
    for number, name in enumerate(RECIPES, 1):
        yield _claim(number, name, folder, seeds)


def _claim(number: int, name: str, folder: Path, seeds: Sequence[int]) -> Claim:
    recipe = RECIPES[name]

    def measure() -> Outcome:
        found = {True: [], False: []}
        for seed in seeds:
            for regularized, results in found.items():
                with training.told(f"F{number}, {name}, {'LAFTR' if regularized else 'fine-tuning'}, seed {seed}"):
                    results.append(learned(recipe, folder, seed, regularized))
        ours, plain = ([float(one["cl/avg_acc"]) for one in found[kind]] for kind in (True, False))
        transfer = statistics.fmean(float(one["cl/bwt"]) for one in found[True])
        told = f"{statistics.fmean(ours):.3f} (BWT {transfer:+.3f}), {statistics.fmean(plain):.3f} fine-tuning"
        return Outcome(told, holds(ours, plain, recipe.fromp), seeds=seeds)

    return Claim(
        f"F{number} {name}: LAFTR is competitive with FROMP, which stores data",
        f"abstract: competitive; no figure at hand. FROMP's own: {recipe.fromp:.3f}",
        "average accuracy at least FROMP's - 0.02 and above fine-tuning, means over seeds", measure,
    )  # fmt: skip


def holds(ours: Sequence[float], plain: Sequence[float], fromp: float) -> bool:
    """Whether the criterion does."""
    return statistics.fmean(ours) >= fromp - 0.02 and statistics.fmean(ours) > statistics.fmean(plain)
