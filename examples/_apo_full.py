"""Experiment F of the APO reproduction (``--full --data DIR``): CIFAR-10 and 100, and the MNIST autoencoder, for a GPU.

``DIR`` holds the data as they are published: ``cifar-10-batches-bin`` and ``cifar-100-binary``, unpacked from the
binary versions, and the four MNIST files.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ext._resources import UserError, load_script
from lightning_ext.callbacks import APOLearningRate
from lightning_ext.data import CIFAR10, CIFAR100, CIFARImages, MNISTDataModule, read_cifar
from lightning_ext.functional import squared_error
from lightning_ext.reproduce import Claim, Outcome

training = load_script(Path(__file__).with_name("_apo_training.py"))
precondition = load_script(Path(__file__).with_name("_apo_precondition.py"))

FIXED_RATES = (1.0, 0.3, 0.1, 0.03, 0.01)
APO_STARTS = (0.1, 1e-3)
MNIST_SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def claims(seeds: Sequence[int], folder: Path | None, budget: Any) -> Iterator[Claim]:
    """The claims; the data are read before anything runs.

    Raises:
        UserError: A file is missing or is not what its name says.
    """
    if folder is None:
        raise UserError(
            "--full needs --data DIR, a folder with cifar-10-batches-bin and cifar-100-binary (the binary versions of "
            "both, unpacked) and the four MNIST files."
        )
    mnist = MNISTDataModule(str(folder), binarize=None, shape="flat", num_val=0)
    try:
        data = {layout.classes: read_cifar(folder, layout) for layout in (CIFAR10, CIFAR100)}
        mnist.prepare_data()
        mnist.setup()
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--full: {error}") from error
    for i, (classes, images) in enumerate(data.items()):
        yield from cifar_claims(2 * i + 1, classes, images, seeds, budget.cifar_epochs)
    yield from mnist_claims(mnist.train_set.images.flatten(1).float() / 255, seeds, budget.mnist_epochs)


# -- CIFAR ----------------------------------------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Whole batches at once, normalised; with ``augment`` shifted by up to four pixels and mirrored at random."""

    def __init__(self, images: Tensor, labels: Tensor, statistics_of: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        sample = statistics_of[:10000].float().div(255)
        self.mean, self.std = (stat.view(1, 3, 1, 1) for stat in (sample.mean((0, 2, 3)), sample.std((0, 2, 3))))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch."""
        x = (self.images[indices].float() / 255 - self.mean) / self.std
        if self.augment:
            shift = torch.randint(0, 9, (2, len(x), 1))
            rows, columns = (torch.arange(32) + offset for offset in shift)
            mirrored = torch.rand(len(x), 1) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            each = torch.arange(len(x)).view(-1, 1, 1)
            x = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
            x = x.permute(0, 3, 1, 2).contiguous()
        return x, self.labels[indices]


class Cifar(pl.LightningDataModule):
    """Batches of 128 for training, in an order that depends on the seed."""

    def __init__(self, images: CIFARImages, seed: int) -> None:
        super().__init__()
        self.images, self.seed = images, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled and augmented."""
        data = Augmented(*self.images.train, self.images.train[0], augment=True)
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(data, 128, shuffle=True, generator=order, collate_fn=_as_is)

    def test_dataloader(self) -> DataLoader[Any]:
        """As they are."""
        data = Augmented(*self.images.test, self.images.train[0], augment=False)
        return DataLoader(data, 1000, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(classes: int, width: int = 64) -> nn.Sequential:
    """The ResNet-18 that is usual on 32 x 32 images: a 3 x 3 stem without pooling (He et al. 2016)."""
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    stages = [
        nn.Sequential(Block(a, b, 1 if i == 0 else 2), Block(b, b, 1))
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))


class Classifier(pl.LightningModule):
    """SGD with momentum and weight decay, with a step decay where one is asked for."""

    def __init__(self, network: nn.Module, lr: float, decay_epochs: int = 0) -> None:
        super().__init__()
        self.network, self.lr, self.decay_epochs = network, lr, decay_epochs

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy in percent."""
        x, y = batch
        self.log("accuracy", 100 * (self(x).argmax(1) == y).float().mean(), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """As usual on CIFAR."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        if not self.decay_epochs:
            return optimizer
        milestones = [int(share * self.decay_epochs) for share in (0.3, 0.6, 0.8)]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.2)]


NETWORK: Callable[[int], nn.Module] = resnet18


def cifar_accuracy(
    images: CIFARImages, classes: int, kind: str, lr: float, seed: int, epochs: int, progress: Any
) -> float:
    """Test accuracy after training, percent."""
    torch.manual_seed(seed)
    model = Classifier(NETWORK(classes), lr, epochs if kind == "decay" else 0)
    callbacks = [progress, APOLearningRate()] if kind == "apo" else [progress]
    data = Cifar(images, seed)
    trainer = training.fit(model, data, epochs, callbacks, accelerator="auto")
    with training.quiet():
        (logged,) = trainer.test(model, datamodule=data, verbose=False)
    return logged["accuracy"]


def cifar_claims(number: int, classes: int, images: CIFARImages, seeds: Sequence[int], epochs: int) -> Iterator[Claim]:
    """Learning rates on one of the two sets."""
    plan = {"fixed": FIXED_RATES, "decay": (0.1,), "apo": APO_STARTS}

    @functools.cache
    def found() -> dict[str, dict[float, float]]:
        steps = epochs * -(-len(images.train[0]) // 128)
        progress = training.Progress(f"F, CIFAR-{classes}", steps * len(seeds) * sum(map(len, plan.values())))
        means: dict[str, dict[float, float]] = {}
        for kind, rates in plan.items():
            for rate in rates:
                with progress.run(f"{kind} {rate:g}"):
                    runs = [cifar_accuracy(images, classes, kind, rate, seed, epochs, progress) for seed in seeds]
                means.setdefault(kind, {})[rate] = statistics.fmean(runs)
        progress.close()
        return means

    def against(kind: str) -> Outcome:
        means = found()
        worst, best = min(means["apo"].values()), max(means[kind].values())
        return Outcome(f"{worst:.2f} / {best:.2f} %", holds(means, kind), seeds=seeds)

    paper = "abstract: beats the best fixed rate, competitive with manual decay; no figure at hand"
    starts = " and ".join(f"{start:g}" for start in APO_STARTS)
    yield Claim(
        f"F{number} CIFAR-{classes}, ResNet-18, {epochs} epochs: above the best of five fixed rates (ours / best)",
        paper,
        f"mean test accuracy above it, from {starts}", functools.partial(against, "fixed"),
    )  # fmt: skip
    yield Claim(
        f"F{number + 1} CIFAR-{classes}: competitive with a step decay (ours / decay)",
        paper,
        f"mean test accuracy at most 1 point below it, from {starts}", functools.partial(against, "decay"),
    )  # fmt: skip


def holds(means: Mapping[str, Mapping[float, float]], kind: str) -> bool:
    """From the worse start, above the best fixed rate, or within a point of the decay."""
    worst, best = min(means["apo"].values()), max(means[kind].values())
    return worst > best if kind == "fixed" else worst >= best - 1.0


# -- MNIST ----------------------------------------------------------------------------------------------------------


def synchronised() -> float:
    """Seconds, once everything that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def mnist_problem(x: Tensor, seed: int) -> Any:
    """The deep autoencoder, batches of 1000; B' is the batch before."""
    torch.manual_seed(seed)
    model = precondition.perceptron(MNIST_SIZES, nn.Tanh).to(x.device)

    def loss(inputs: Tensor) -> Tensor:
        return squared_error(model(inputs), inputs)

    size = min(1000, len(x))
    chosen = (torch.randint(len(x), (size,), device=x.device) for _ in itertools.count())
    batches = ((x[new], x[old]) for old, new in itertools.pairwise(chosen))
    probe = x[:10000]
    return precondition.Problem(model, loss, model, squared_error, batches, lambda: float(loss(probe)))


def mnist_claims(images: Tensor, seeds: Sequence[int], epochs: int) -> Iterator[Claim]:
    """The preconditioner on the MNIST autoencoder."""
    steps = epochs * -(-len(images) // 1000)
    every = max(steps // 60, 1)

    @functools.cache
    def found() -> Any:
        x = images.to("cuda" if torch.cuda.is_available() else "cpu")
        methods = {**precondition.AUTOENCODER, **precondition.soap(3e-3, 1e-2, 3e-2)}
        problem = functools.partial(mnist_problem, x)
        return precondition.compare("F, MNIST", methods, problem, seeds, steps, every, synchronised)

    def by_steps() -> Outcome:
        run = found()
        ours, adam = run.at("APO-P, K = 10", steps), run.at("Adam", steps)
        figures = load_script(Path(__file__).with_name("_apo_figures.py"))
        figure = figures.autoencoder(run, "MNIST autoencoder, batches of 1000")
        return Outcome(f"{ours:.3g} / {adam:.3g}", ours <= 1.1 * adam, seeds=seeds, figures={"mnist": figure})

    def by_seconds() -> Outcome:
        run = found()
        adam = run.runs["Adam"][run.best("Adam", steps)]
        limit = statistics.median(curve.seconds[-1] for curve in adam)
        ours = run.runs["APO-P, K = 10"][run.best("APO-P, K = 10", steps)]
        losses = [statistics.median(curve.after(limit) for curve in curves) for curves in (ours, adam)]
        return Outcome("{:.3g} / {:.3g}".format(*losses), losses[0] <= losses[1], f"after {limit:.1f} s", seeds)

    paper = "abstract: competitive with second-order methods; no figure at hand"
    yield Claim(
        f"F5 MNIST autoencoder, {epochs} epochs: APO-P, K = 10, keeps up with Adam (ours / Adam)", paper,
        "median loss at most 1.1 x that of Adam, each at its best of three settings", by_steps,
    )  # fmt: skip
    yield Claim(
        "F6 the same, at equal time (ours / Adam)", paper,
        "median loss at most that of Adam in the seconds that Adam took", by_seconds,
    )  # fmt: skip
