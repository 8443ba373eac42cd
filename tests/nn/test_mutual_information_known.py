"""Models in which everything is known agree with the closed forms of their information."""

import math

import pytest
import torch

from lightning_ext.functional import finite_joint_information, linear_gaussian_information
from lightning_ext.nn import FiniteModel, LinearGaussianModel

F64 = torch.float64


def test_the_information_of_a_linear_model_is_the_mean_log_ratio():
    generator = torch.Generator().manual_seed(1)
    model = LinearGaussianModel(torch.randn(6, 3, generator=generator, dtype=F64), torch.zeros(6, dtype=F64), 0.5)
    x, z = model.simulate(50_000, generator)
    values = model.posterior(x).log_prob(z) - model.prior(z)
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(linear_gaussian_information(model.weight, 0.5).item(), abs=4 * error)


def test_the_information_of_a_table_is_the_mean_log_ratio():
    model = FiniteModel(torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64))
    x, z = model.simulate(200_000, torch.Generator().manual_seed(0))
    values = model.log_likelihood(x, z) - model.joint.sum(1).log()[x[:, 0]]
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(finite_joint_information(model.joint).item(), abs=4 * error)
    assert model.discrete
