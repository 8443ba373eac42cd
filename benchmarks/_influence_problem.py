"""What the influence benchmark asks: networks, digits, the exact answer, and how close a method comes to it."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset

DAMPING = 0.01
MLP = (64, 128, 128, 10)
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """The influence of each training sample on the loss of each query."""

    model: nn.Module
    train: Pair
    queries: Pair

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def double(self) -> "Problem":
        widths = [m.in_features for m in self.model if isinstance(m, nn.Linear)] + [self.model[-1].out_features]
        model = mlp(tuple(widths)).double()
        model.load_state_dict(self.model.state_dict())
        return Problem(model, *((images.double(), labels) for images, labels in (self.train, self.queries)))


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Tanh units and linear logits."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Two convolutions on 28 x 28 images: 9,098 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 10),
    )  # fmt: skip


@cache
def digits(seed: int = 0) -> Pair:
    """The 1,797 digits in a random order, pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def samples(start: int, number: int) -> Pair:
    """``number`` digits from ``start`` on; beyond the last they begin again, with a little noise."""
    images, labels = digits()
    index = torch.arange(start, start + number)
    noise = 0.05 * torch.randn(number, images.shape[1], generator=torch.Generator().manual_seed(start))
    again = (index >= len(images))[:, None]
    index = index % len(images)
    return images[index] + noise * again, labels[index]


@cache
def trained(widths: tuple[int, ...], train: int = 1000, epochs: int = 30) -> nn.Sequential:
    """SGD with momentum and weight decay on the first digits."""
    torch.manual_seed(0)
    model = mlp(widths)
    images, labels = samples(0, train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(train).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    return model.eval()


def digits_problem(widths: tuple[int, ...] = MLP, train: int = 1000, queries: int = 100) -> Problem:
    """Queries are digits that the model was not trained on."""
    return Problem(trained(widths), samples(0, train), samples(1000, queries))


def small_problem() -> Problem:
    """A moment's work, which brings in what a package imports late."""
    return Problem(trained((64, 8, 10), 100, 1), samples(0, 40), samples(1000, 4))


def loader(data: Pair, batch: int | None = None) -> DataLoader:
    return DataLoader(TensorDataset(*data), batch or len(data[0]), shuffle=False)


def gradients(model: nn.Module, data: Pair, chunk: int | None = None) -> Tensor:
    """Gradients of the losses, one row per sample, by vmap."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)(parameters, *data)
    return torch.cat([row.flatten(1) for row in rows.values()], 1)


def exact_scores(problem: Problem, tol: float = 1e-8) -> Tensor:
    r"""The answer, :math:`g_q^\top (G + \lambda I)^{-1} g_z`, in float64: plain conjugate gradients, in torch.func."""
    problem = problem.double()
    model, (images, _) = problem.model, problem.train
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in parameters.values()]
    outputs, pull = vjp(lambda p: functional_call(model, p, (images,)), parameters)
    probabilities = outputs.softmax(1)

    def named(row: Tensor) -> dict[str, Tensor]:
        parts = zip(parameters.items(), row.split(sizes), strict=True)
        return {name: part.view_as(parameter) for (name, parameter), part in parts}

    def product(row: Tensor) -> Tensor:
        tangent = jvp(lambda p: functional_call(model, p, (images,)), (parameters,), (named(row),))[1]
        weighted = probabilities * tangent
        weighted = weighted - probabilities * weighted.sum(1, keepdim=True)
        (pulled,) = pull(weighted)
        return torch.cat([part.flatten() for part in pulled.values()]) / len(images) + DAMPING * row

    rhs = gradients(model, problem.queries)
    x, residual = torch.zeros_like(rhs), rhs.clone()
    direction, square = residual.clone(), residual.square().sum(1)
    while bool((square.sqrt() > tol * rhs.norm(dim=1)).any()):
        moved = vmap(product, chunk_size=25)(direction)
        step = (square / (direction * moved).sum(1)).nan_to_num(0.0)[:, None]  # 0 / 0 in a row that is solved
        x, residual = x + step * direction, residual - step * moved
        before, square = square, residual.square().sum(1)
        direction = residual + (square / before).nan_to_num(0.0)[:, None] * direction
    return x @ gradients(model, problem.train, 250).mT


def correlation(scores: Tensor, reference: Tensor) -> float:
    """Pearson's correlation in each row, averaged: does a query rank the training samples alike?"""
    a, b = (rows - rows.mean(1, keepdim=True) for rows in (scores.double(), reference.double()))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """The slope of time over size in logarithms, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
