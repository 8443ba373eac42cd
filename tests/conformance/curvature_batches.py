"""A network with factored and diagonal parameters, and what curvature metrics are updated with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext import metrics
from lightning_ext.functional import InfluenceObjective, kronecker_curvature

OBJECTIVE = InfluenceObjective("half_squared_error")


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


NETWORK = _network()


def updates() -> list[tuple[nn.Module, tuple[Tensor, Tensor]]]:
    """The network with batches of three sizes."""
    generator = torch.Generator().manual_seed(4)
    return [(NETWORK, (torch.randn(n, 3, generator=generator), torch.zeros(n, 2))) for n in (5, 2, 6)]


def factors_reference(batches: Sequence[Any]) -> dict[str, Tensor]:
    """The first layer's inputs, and the last layer's pseudo-gradients: the identity for half the squared error."""
    x = torch.cat([inputs for _, (inputs, _) in batches]).double()
    a = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return {"0.A": (a.T @ a / len(a))[None], "3.S": torch.eye(2, dtype=torch.float64)[None]}


def correction() -> metrics.EigenCorrection:
    """In the eigenvectors of all the batches."""
    data = [batch for _, batch in updates()]
    kfac = kronecker_curvature(NETWORK, OBJECTIVE, data, corrected=False)
    return metrics.EigenCorrection(NETWORK, OBJECTIVE, kfac)


def numbered_updates() -> list[tuple[nn.Module, tuple[Tensor, Tensor], Tensor]]:
    """The same with the positions of the samples."""
    numbers = torch.randperm(13, generator=torch.Generator().manual_seed(5)).split([5, 2, 6])
    return [(module, batch, index) for (module, batch), index in zip(updates(), numbers, strict=True)]


def self_influence_reference(batches: Sequence[Any]) -> dict[str, Tensor]:
    """Squared gradient norms, one backward pass per sample, over the damping of 0.5."""
    found = {}
    for module, (x, t), numbers in batches:
        for i, number in enumerate(numbers.tolist()):
            loss = 0.5 * (module(x[i : i + 1]) - t[i : i + 1]).square().sum()
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            found[number] = sum(g.double().square().sum() for g in gradients) / 0.5
    numbers = sorted(found)
    return {"values": torch.stack([found[n] for n in numbers]), "indices": torch.tensor(numbers)}
