"""Experiment F of the influence reproduction (``--full --data DIR``): the recipe of Grosse et al. 2023, for a GPU.

``DIR`` holds the data as they are published: ``concrete.csv`` and ``energy.csv``, which are UCI's ``data.csv`` of the
data sets 165 and 242; MNIST's four files, plain or as ``.gz``, there or in ``MNIST/raw``; FashionMNIST's in
``FashionMNIST/raw``, where torchvision puts them; and ``cifar-10-batches-bin``, unpacked from the binary version.
"""

import copy
import csv
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ext._resources import UserError, load_script
from lightning_ext.data import MNISTDataModule, read_cifar
from lightning_ext.functional import InfluenceObjective, fold_in
from lightning_ext.metrics import InfluenceScores, LOOCorrelation
from lightning_ext.modules import InfluenceModule, PBRFModule
from lightning_ext.reproduce import Claim, Outcome

training = load_script(Path(__file__).with_name("_influence_training.py"))

DAMPING = 1e-2
QUERIES, REMOVALS = 10, 500
BATCH, PBRF_BATCH, PBRF_STEPS = 128, 512, 1500
RATES, DECAYS = (0.3, 0.1, 0.03, 0.01), (1e-3, 1e-4, 1e-5)
SOLVERS = {"EK-FAC": "ekfac", "LiSSA": "lissa", "gradient dot": "identity"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is read and learned.

    Attributes:
        read: Folder to inputs, as numbers or bytes, and targets; all samples, before they are split.
        network: Input shape to a network.
        loss: By the name of an InfluenceObjective.
        epochs: Of training.
        chunk_size: Copies of the network that are trained at once on the PBRF.
    """

    read: Callable[[Path], tuple[Tensor, Tensor]]
    network: Callable[[tuple[int, ...]], nn.Module]
    loss: str
    epochs: int
    chunk_size: int


# -- data -----------------------------------------------------------------------------------------------------------

UCI = {"concrete": (165, 8, 1), "energy": (242, 8, 2)}  # number of the data set, columns of inputs and of targets


def read_uci(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Read UCI's table; the first column of targets is the one to predict.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a header and rows of that many numbers.
    """
    number, inputs, targets = UCI[name]
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: save https://archive.ics.uci.edu/static/public/{number}/data.csv under that name."
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if any(row)][1:]
    try:
        table = torch.tensor([[float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise ValueError(f"{path} is not a table of numbers under one line of names: {error}.") from error
    if table.ndim != 2 or table.shape[1] != inputs + targets:
        raise ValueError(f"{path} must have {inputs + targets} columns; its table has shape {tuple(table.shape)}.")
    return table[:, :inputs], table[:, inputs : inputs + 1]


def read_idx(subfolder: str, folder: Path) -> tuple[Tensor, Tensor]:
    """All images, ``(N, 784)`` bytes, and labels of MNIST or of FashionMNIST, whose files have the same names."""
    data = MNISTDataModule(str(folder / subfolder), binarize=None, shape="flat", num_val=0)
    data.prepare_data()
    data.setup()
    parts = (data.train_set, data.test_set)
    return torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts])


def read_cifar10(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, ``(N, 3, 32, 32)`` bytes, and labels."""
    images = read_cifar(folder)
    return torch.cat([images.train[0], images.test[0]]), torch.cat([images.train[1], images.test[1]])


class Standardised(Dataset[Any]):
    """Whole batches; numbers less their mean over their standard deviation: of each column, or of each channel."""

    def __init__(self, x: Tensor, t: Tensor, reference: "Standardised | None" = None) -> None:
        self.x, self.t = x, t
        if reference is None:
            some = x[:10000].float()
            over = (0, 2, 3) if x.ndim == 4 else (0,) if x.dtype == torch.float32 else (0, 1)
            self.mean, std = some.mean(over, keepdim=True), some.std(over, keepdim=True)
            self.std = std.where(std > 0, torch.ones_like(std))
        else:
            self.mean, self.std = reference.mean, reference.std

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        x, t = self.__getitems__([index])
        return x[0], t[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch."""
        return (self.x[indices].float() - self.mean) / self.std, self.t[indices]


def split(x: Tensor, t: Tensor, seed: int) -> tuple[Standardised, Standardised, Standardised]:
    """70 % for training, 20 % for validation, 10 % for testing."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, val, test = order.tensor_split([7 * len(x) // 10, 9 * len(x) // 10])
    if t.is_floating_point():
        t = (t - t[train].mean(0)) / t[train].std(0)
    first = Standardised(x[train], t[train])
    return first, Standardised(x[val], t[val], first), Standardised(x[test], t[test], first)


# -- networks -------------------------------------------------------------------------------------------------------


def regressor(shape: tuple[int, ...]) -> nn.Module:
    """Two hidden layers of 128, tanh."""
    return training.perceptron((*shape, 128, 128, 1))


def classifier(shape: tuple[int, ...]) -> nn.Module:
    """Two hidden layers of 256, ReLU."""
    return training.perceptron((*shape, 256, 256, 10), nn.ReLU)


class Block(nn.Module):
    """Two convolutions around a shortcut without parameters, which fills new channels with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.new = outputs - inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return F.relu(self.body(x) + shortcut)


def resnet20(shape: tuple[int, ...]) -> nn.Module:
    """The residual network of 20 layers for small images (He et al. 2016)."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    stem = (nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Block(a, b) for a, b in itertools.pairwise(widths))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


RECIPES = {
    "Concrete": Recipe(functools.partial(read_uci, "concrete"), regressor, "mse", 200, 500),
    "Energy": Recipe(functools.partial(read_uci, "energy"), regressor, "mse", 200, 500),
    "MNIST": Recipe(functools.partial(read_idx, ""), classifier, "cross_entropy", 20, 50),
    "FashionMNIST": Recipe(functools.partial(read_idx, "FashionMNIST/raw"), classifier, "cross_entropy", 20, 50),
    "CIFAR-10": Recipe(read_cifar10, resnet20, "cross_entropy", 60, 10),
}

# -- the experiment -------------------------------------------------------------------------------------------------


def loader(data: Dataset[Any], batch_size: int, seed: int | None = None) -> DataLoader[Any]:
    """Batches of tensors, shuffled with a seed or in order."""
    return training.in_batches(data, batch_size, order=seed)


def train(recipe: Recipe, data: Dataset[Any], shape: tuple[int, ...], lr: float, decay: float, seed: int) -> nn.Module:
    """Train once with an ordinary Trainer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = recipe.network(shape)
    module = training.Plain(network, recipe.loss, lr, decay)
    training.fit(module, loader(data, BATCH, seed), recipe.epochs, accelerator="auto")
    return network.eval()


@torch.no_grad()
def mean_loss(network: nn.Module, data: Dataset[Any], loss: str) -> float:
    """Over a whole data set; infinite for a network that broke down."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = copy.deepcopy(network).to(device)
    objective, total = InfluenceObjective(loss), 0.0
    for x, t in loader(data, 1000):
        total += float(objective.losses(network(x.to(device)), t.to(device)).sum())
    mean = total / len(data)  # type: ignore[arg-type]
    return mean if mean == mean else float("inf")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well each solver's influence agrees with the PBRF: mean over test points of Pearson over removals."""

    pearson: Mapping[str, float]
    lr: float
    weight_decay: float


def agreement(recipe: Recipe, x: Tensor, t: Tensor, seed: int) -> Agreement:
    """One seed: choose learning rate and decay on validation, then compare influence with the PBRF of 500 samples."""
    data, val, test = split(x, t, seed)
    shape = tuple(data[0][0].shape)
    settings = [(lr, decay) for lr in RATES for decay in DECAYS]
    networks = [train(recipe, data, shape, lr, decay, seed) for lr, decay in settings]
    losses = [mean_loss(network, val, recipe.loss) for network in networks]
    best = losses.index(min(losses))
    network, (lr, decay) = networks[best], settings[best]
    objective = InfluenceObjective(recipe.loss)
    draws = torch.Generator().manual_seed(fold_in(seed, 1))
    chosen = torch.randperm(len(data), generator=draws)[:REMOVALS].tolist()
    points = torch.randperm(len(test), generator=draws)[:QUERIES].tolist()
    queries = [test.__getitems__(points)]
    actual = bregman(recipe, network, objective, data, chosen, decay, seed).measure(queries).mT
    found = {
        name: correlation(influence(network, objective, data, queries, solver, decay)[:, chosen], actual)
        for name, solver in SOLVERS.items()
    }
    return Agreement(found, lr, decay)


def bregman(
    recipe: Recipe, network: nn.Module, objective: InfluenceObjective, data: Standardised, chosen: list[int],
    decay: float, seed: int,
) -> PBRFModule:  # fmt: skip
    """Adam on batches of 512."""
    module = PBRFModule(
        network, objective, chosen, damping=DAMPING, weight_decay=decay, chunk_size=min(recipe.chunk_size, len(chosen))
    )
    epochs = -(-PBRF_STEPS // -(-len(data) // PBRF_BATCH))
    training.fit(module, loader(data, PBRF_BATCH, fold_in(seed, 2)), epochs, accelerator="auto")
    return module


def influence(
    network: nn.Module, objective: InfluenceObjective, data: Standardised, queries: list[Any], solver: str, decay: float
) -> Tensor:
    """Scores of all training samples; LiSSA takes as many steps as there are."""
    module = InfluenceModule(
        network, objective, queries, solver=solver, damping=DAMPING, weight_decay=decay, max_iterations=len(data)
    )
    return InfluenceScores.gather(training.predict(module, loader(data, BATCH)))


def correlation(predicted: Tensor, actual: Tensor) -> float:
    """Mean Pearson over test points."""
    metric = LOOCorrelation()
    metric.update(predicted, actual)
    return float(metric.compute()["correlation"])


# -- claims ---------------------------------------------------------------------------------------------------------


def claims(seeds: Sequence[int], folder: Path | None) -> Iterator[Claim]:
    """The claims; the data are read before anything runs.

    Raises:
        UserError: A file is missing or is not what its name says.
    """
    if folder is None:
        raise UserError(
            "--full needs --data DIR, a folder with concrete.csv and energy.csv (UCI's data.csv of 165 and 242), the "
            "MNIST files, FashionMNIST/raw, and cifar-10-batches-bin (the binary version, unpacked)."
        )
    try:
        data = {name: recipe.read(folder) for name, recipe in RECIPES.items()}
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--full: {error}") from error
    for number, (name, (x, t)) in enumerate(data.items(), 1):
        yield from _claims_of(number, name, x, t, seeds)


def _claims_of(number: int, name: str, x: Tensor, t: Tensor, seeds: Sequence[int]) -> Iterator[Claim]:
    def measure() -> Outcome:
        found = []
        for seed in seeds:
            with training.told(f"F{number}, {name}, seed {seed}"):
                found.append(agreement(RECIPES[name], x, t, seed))
        means = {solver: statistics.fmean(one.pearson[solver] for one in found) for solver in SOLVERS}
        told = ", ".join(f"{mean:.3f} {solver}" for solver, mean in means.items())
        settings = "; ".join(f"lr {one.lr:g}, weight decay {one.weight_decay:g}" for one in found)
        return Outcome(told, holds(means), settings, seeds)

    yield Claim(
        f"F{number} {name}: influence with curvature predicts the PBRF better than gradient dot",
        "arXiv 2308.03296, figure: EK-FAC near LiSSA, both above gradient dot",
        f"Pearson over {REMOVALS} removals, mean over {QUERIES} test points and seeds: EK-FAC and LiSSA above it",
        measure,
    )


def holds(means: Mapping[str, float]) -> bool:
    """Whether both are above gradient dot."""
    return min(means["EK-FAC"], means["LiSSA"]) > means["gradient dot"]
