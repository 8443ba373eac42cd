"""Networks, data and changes of weights for the tests of estimators."""

import copy

import torch
from torch import nn
from torch.func import functional_call

from lightning_ext.nn import function_space_estimator

NAMES = (
    "laftr", "laftr-sample", "laftr-moments", "laftr-mean", "ntk", "coreset", "full", "ewc", "online-ewc", "kfac", "l2",
)  # fmt: skip
SHIFT = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)


def network(seed=1):
    """4-8-6-3 in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def images(seed=1):
    """A residual network of convolutions with running statistics, with dropout, in training mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(3, 3),
    ).double()  # fmt: skip
    net(2 * torch.randn(30, 4, dtype=torch.float64) + 1)
    return net


def table(n=90, seed=5):
    """Inputs whose mean depends on the class, and the classes, of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2, 2, 1, 2]).repeat(-(-n // 6))[:n]
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return means[labels] + torch.randn(n, 4, generator=generator, dtype=torch.float64), labels


def batches(size=25, n=90):
    """The table in batches, the last one smaller."""
    x, labels = table(n)
    return list(zip(x.split(size), labels.split(size), strict=True))


def moved(module, scale=0.3, seed=7):
    """A copy with other parameters."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return other


def shifted(module, by=SHIFT):
    """A copy with another bias of the last layer."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[-1].bias += by.to(other[-1].bias)
    return other


def fitted(name, module=None, data=None, heads=None, **options):
    """An estimator that knows the network and the table."""
    return function_space_estimator(name, **options).fit(
        network() if module is None else module, batches() if data is None else data, heads=heads
    )


def outputs(module, x):
    """In evaluation mode, differentiable in nothing."""
    with torch.no_grad():
        return functional_call(copy.deepcopy(module).eval(), {}, (x,))
