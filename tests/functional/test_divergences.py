"""Divergences are the Bregman divergences of their losses, with the losses' reductions."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_ext.functional import (
    bernoulli_kl,
    divergence_named,
    mean_squared_error,
    softmax_kl,
    softmax_squared_error,
    squared_error,
)

EVERY = [squared_error, mean_squared_error, softmax_kl, softmax_squared_error, bernoulli_kl]
WEIGHTED = [squared_error, softmax_kl, softmax_squared_error]


def pair(*shape, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    new = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return new.to(dtype), (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def test_softmax_kl_is_old_against_new_averaged_over_positions():
    new, old = pair(5, 7, 4)
    expected = F.kl_div(new.log_softmax(-1), old.softmax(-1), reduction="none").sum(-1).mean()
    assert softmax_kl(new, old).item() == pytest.approx(expected.item(), rel=1e-13)
    assert softmax_kl(new, old).item() != pytest.approx(softmax_kl(old, new).item(), rel=1e-2)


def test_softmax_kl_takes_its_classes_along_any_dimension():
    new, old = pair(3, 4, 2, 5)
    moved = softmax_kl(new.movedim(1, -1), old.movedim(1, -1))
    assert softmax_kl(new, old, dim=1).item() == pytest.approx(moved.item(), rel=1e-13)
    assert softmax_kl(new, old, dim=1).item() != pytest.approx(softmax_kl(new, old).item(), rel=1e-2)


def test_softmax_kl_is_what_cross_entropy_adds_to_its_least_value():
    new, old = pair(6, 5)
    target = old.softmax(-1)
    expected = F.cross_entropy(new, target) - F.cross_entropy(old, target)
    assert softmax_kl(new, old).item() == pytest.approx(expected.item(), rel=1e-12)


def test_bernoulli_kl_is_what_binary_cross_entropy_adds_to_its_least_value():
    new, old = pair(6, 5)
    target = old.sigmoid()
    loss = F.binary_cross_entropy_with_logits
    assert bernoulli_kl(new, old).item() == pytest.approx((loss(new, target) - loss(old, target)).item(), rel=1e-12)


def test_bernoulli_kl_is_softmax_kl_of_two_classes():
    new, old = pair(8)
    two = [torch.stack([z, torch.zeros_like(z)], -1) for z in (new, old)]
    assert bernoulli_kl(new, old).item() == pytest.approx(softmax_kl(*two).item(), rel=1e-12)


def test_squared_errors_have_the_reductions_of_their_losses():
    new, old = pair(6, 5, 2)
    assert mean_squared_error(new, old).item() == pytest.approx(F.mse_loss(new, old).item(), rel=1e-14)
    assert squared_error(new, old).item() == pytest.approx(5 * F.mse_loss(new, old).item(), rel=1e-13)


@pytest.mark.parametrize(
    ("divergence", "hessian"),
    [
        (softmax_kl, lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0))),
        (squared_error, lambda z: torch.eye(5, dtype=torch.float64)),
        (mean_squared_error, lambda z: 2 / 5 * torch.eye(5, dtype=torch.float64)),
        (bernoulli_kl, lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid())) / 5),
    ],
)
def test_to_second_order_a_divergence_is_the_curvature_of_its_loss(divergence, hessian):
    """The error of the ratio falls by ten with the step, as a first-order error must."""
    direction, z = (t[0] for t in pair(1, 5))
    curvature = direction @ hessian(z) @ direction / 2
    errors = []
    for e in (1e-2, 1e-3):
        moved = divergence((z + e * direction)[None], z[None])
        errors.append(abs(moved.item() / (e**2 * curvature.item()) - 1))
    assert errors[0] < 2e-2
    assert errors[1] < errors[0] / 8 or errors[0] < 1e-9, "squared errors have no third order"


@pytest.mark.parametrize("divergence", EVERY)
def test_a_divergence_is_zero_at_the_old_outputs_and_positive_elsewhere(divergence):
    new, old = pair(4, 3)
    assert divergence(old, old).item() == pytest.approx(0.0, abs=1e-15)
    assert divergence(new, old) > 1e-3
    at_old = old.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence(at_old, old), at_old)
    assert slope.abs().max() < 1e-15, "it does not rise in any direction at first order"


@pytest.mark.parametrize("divergence", EVERY)
def test_the_old_output_is_a_constant_and_the_new_one_has_a_right_gradient(divergence):
    new, old = (t.requires_grad_() for t in pair(4, 3))
    divergence(new, old).backward()
    assert old.grad is None
    assert torch.autograd.gradcheck(lambda t: divergence(t, old), (new,))


@pytest.mark.parametrize("divergence", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_evaluated_in_float32(divergence, dtype):
    new, old = pair(64, 3, dtype=dtype)
    value = divergence(new, old)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(new.float(), old.float()), rtol=0, atol=0)
    assert divergence(new, old.double()).dtype == torch.float64


@pytest.mark.parametrize("divergence", [softmax_kl, bernoulli_kl])
def test_extreme_logits_stay_finite(divergence):
    new, old = torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([[-200.0, 200.0, 0.0]])
    assert divergence(new, old).isfinite()
    assert divergence(old, old).item() == 0.0


def test_a_masked_class_adds_nothing():
    old = torch.tensor([[0.0, 1.0, -math.inf]])
    new = torch.tensor([[0.5, 0.2, -math.inf]], requires_grad=True)
    value = softmax_kl(new, old)
    assert value.item() == pytest.approx(softmax_kl(new[:, :2], old[:, :2]).item(), rel=1e-6)
    value.backward()
    torch.testing.assert_close(new.grad[:, :2], (new.softmax(-1) - old.softmax(-1)).detach()[:, :2])


@pytest.mark.parametrize("divergence", EVERY)
def test_shapes_must_agree_and_hold_something(divergence):
    with pytest.raises(ValueError, match=r"one shape; got \(2, 3\) and \(3,\)"):
        divergence(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="empty"):
        divergence(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("shape", [(4, 1), (1,), (5,), ()])
@pytest.mark.parametrize("divergence", [softmax_kl, softmax_squared_error])
def test_one_class_is_refused_with_the_way_out(divergence, shape):
    with pytest.raises(ValueError, match=rf"{divergence.__name__} needs .* two classes.*bernoulli_kl"):
        divergence(torch.zeros(shape), torch.zeros(shape))


def test_softmax_squared_error_is_the_squared_error_of_the_probabilities():
    new, old = pair(5, 7, 4)
    expected = 0.5 * (new.softmax(-1) - old.softmax(-1)).square().sum(-1).mean()
    assert softmax_squared_error(new, old).item() == pytest.approx(expected.item(), rel=1e-13)
    moved = softmax_squared_error(new.movedim(-1, 1), old.movedim(-1, 1), dim=1)
    assert moved.item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("divergence", WEIGHTED)
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4)])
def test_weights_take_the_place_of_the_mean_over_examples(divergence, shape):
    new, old = pair(*shape)
    weights = torch.tensor([0.3, 0.0, 0.1, 0.2, 0.35, 0.05])
    rows = torch.stack([divergence(z[None], z0[None]) for z, z0 in zip(new, old, strict=True)])
    assert divergence(new, old, weights=weights).item() == pytest.approx((weights.double() @ rows).item(), rel=1e-12)
    assert divergence(new, old).item() == pytest.approx(rows.mean().item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"weights must have shape \(6,\).*got \(3,\)"):
        divergence(new, old, weights=weights[:3])


def test_names():
    named = {"mse": mean_squared_error, "squared_error": squared_error, "kl": softmax_kl, "bernoulli_kl": bernoulli_kl}
    assert {name: divergence_named(name) for name in named} == named
    with pytest.raises(ValueError, match=r"'mse', 'squared_error', 'kl', 'bernoulli_kl', or a function; got 'l1'"):
        divergence_named("l1")
