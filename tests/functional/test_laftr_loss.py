"""The curvature of a divergence at rest: against torch.func's Hessian of the divergence itself."""

import pytest
import torch
from torch.func import hessian

from lightning_ext.functional import DivergenceLoss, output_divergence

NAMES = ("kl", "mse", "softmax_l2")
SHAPES = ((4, 3), (4, 2, 3))


def outputs(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = 0.2 + torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64), weights


def dense(name, y, weights):
    """(B, K, K): each sample's weighted Hessian at the reference."""
    each = [
        hessian(lambda new, b=b: output_divergence(new.view(1, *y.shape[1:]), y[b : b + 1], name))(y[b].flatten())
        for b in range(len(y))
    ]
    return torch.stack(each) * weights[:, None, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_and_roots_are_those_of_the_hessian(name, shape):
    y, weights = outputs(shape)
    loss, wanted = DivergenceLoss(name), dense(name, y, weights)
    u = torch.randn(5, *shape, dtype=torch.float64)
    product = loss.hessian_product(y, weights, u)
    torch.testing.assert_close(product.flatten(2), torch.einsum("bjk,rbk->rbj", wanted, u.flatten(2)))
    columns = loss.hessian_sqrt(y, weights).flatten(2)
    torch.testing.assert_close(torch.einsum("sbj,sbk->bjk", columns, columns), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_drawn_vectors_have_the_hessian_as_second_moment(name, shape):
    y, weights = outputs(shape)
    wanted, generator = dense(name, y, weights), torch.Generator().manual_seed(1)
    many = y.repeat(40_000, *[1] * (y.ndim - 1))
    drawn = DivergenceLoss(name).sample_gradient(many, weights.repeat(40_000), generator).flatten(1).view(-1, *y.shape)
    drawn = drawn.flatten(2)
    found = torch.einsum("nbj,nbk->bjk", drawn, drawn) / len(drawn)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.03 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_divergence_is_the_weighted_one(name, shape):
    y, weights = outputs(shape)
    new = outputs(shape, seed=3)[0]
    loss = DivergenceLoss(name)
    torch.testing.assert_close(loss.bregman(new, y, weights).sum(), output_divergence(new, y, name, weights=weights))
    torch.testing.assert_close(loss.bregman(new, y).mean(), output_divergence(new, y, name))


def test_at_rest_there_is_neither_value_nor_gradient():
    y, weights = outputs((4, 3))
    loss = DivergenceLoss("kl")
    assert not loss.value(y, weights).any()
    assert not loss.gradient(y, weights).any()
    assert loss.convex


def test_without_weights_each_sample_counts_once():
    y, _ = outputs((4, 3))
    ones = torch.ones(4, dtype=torch.float64)
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        DivergenceLoss("kl").hessian_product(y, None, u), DivergenceLoss("kl").hessian_product(y, ones, u)
    )


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="divergence must be one of 'kl', 'mse', 'softmax_l2'; got 'js'"):
        DivergenceLoss("js")
