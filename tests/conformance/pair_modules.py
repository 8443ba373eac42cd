"""Modules that learn from pairs (x, z), of three and two numbers."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_ext import modules, nn
from lightning_ext.data import IndexedDataset

X, Z = 3, 2
SGD = functools.partial(torch.optim.SGD, lr=0.1)  # Adam makes steps of gradients that are nothing but rounding
CHAINS = {"num_transitions": 2, "num_leapfrog": 2, "num_chains": 2, "num_steps": 3}


def pairs() -> TensorDataset:
    """Twelve pairs that depend on each other."""
    z = torch.randn(12, Z, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(12, X, generator=torch.Generator().manual_seed(2))
    return TensorDataset(z @ torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]) + 0.5 * noise, z)


def indexed_pairs() -> IndexedDataset:
    """The same, each with its place."""
    return IndexedDataset(pairs())


def proposal() -> nn.GaussianProposal:
    return nn.GaussianProposal(nn.MLP([X, 5, 2 * Z], "tanh"))


def critic() -> nn.ConcatenatedCritic:
    return nn.ConcatenatedCritic(X, Z, [5])


def generative() -> nn.GaussianDecoderModel:
    return nn.GaussianDecoderModel(torch.nn.Linear(Z, X), -1.0, latent_dim=Z)


def barber_agakov() -> modules.BarberAgakovModule:
    return modules.BarberAgakovModule(proposal(), proposal(), generative())


def separable() -> nn.SeparableCritic:
    return nn.SeparableCritic(nn.MLP([X, 4]), nn.MLP([Z, 4]))


def scores(critic: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return critic(*inputs), critic.matrix(*inputs)
