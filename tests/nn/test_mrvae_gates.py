"""Layers that rescale features by beta: initial values, numerics, and the closed-form linear VAE in their weights."""

import math

import pytest
import torch
from torch import nn

from lightning_ext.functional import joint_exact_gates, linear_vae_optimum
from lightning_ext.functional.mrvae import gate_activation
from lightning_ext.nn import (
    GatedFiLM,
    LogUniformBeta,
    LogVarianceGate,
    PosteriorGate,
    RateConditioner,
    RateContext,
    RateFiLM,
    RateGate,
)
from lightning_ext.nn.mrvae_gates import apply_conditioner

F64 = torch.float64
SQRT3 = math.sqrt(3)
BETAS = (0.01, 0.05, 0.3, 1.0, 4.0, 10.0)


def context():
    return RateContext(LogUniformBeta(0.01, 10.0))


def moved(conditioner, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conditioner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return conditioner


CONDITIONERS = {
    "sigmoid": lambda **k: RateGate(4, context(), -1, activation="sigmoid", **k),
    "sqrt": lambda **k: RateGate(4, context(), -1, activation="sqrt", **k),
    "two_sigmoid": lambda **k: RateGate(4, context(), -1, activation="two_sigmoid", **k),
    "film": lambda **k: RateFiLM(4, context(), -1, hidden=5, **k),
    "log_variance": lambda **k: LogVarianceGate(4, context(), **k),
}
conditioners = pytest.mark.parametrize("name", CONDITIONERS)


# -- initial values ---------------------------------------------------------------------------------------------------


@conditioners
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_identity_is_exact_at_every_beta(name, dtype):
    conditioner = CONDITIONERS[name](init="identity").to(dtype)
    features = torch.randn(6, 4, dtype=dtype)
    with conditioner.context.at(torch.tensor(BETAS)):
        assert torch.equal(conditioner(features), features)


@conditioners
def test_identity_gates_can_move(name):
    conditioner = CONDITIONERS[name](init="identity")
    with conditioner.context.at(0.05):
        conditioner(torch.randn(3, 4)).square().sum().backward()
    # FiLM starts with its last layers at zero, so only they see a gradient, and only where their inputs are positive.
    moving = [p.grad != 0 for n, p in conditioner.named_parameters() if name != "film" or ".2." in n]
    assert all(moves.any() if name == "film" else moves.all() for moves in moving)


def test_paper_initialisation_switches_channels_off_for_ever():
    torch.manual_seed(0)
    channels = 200_000
    gate = RateGate(channels, context(), activation="sqrt", init="paper")
    t = torch.linspace(-SQRT3, SQRT3, 25)[:, None]
    values = torch.cat([gate.coefficients(row[None])[0].detach() for row in t])
    # A line in t is non-negative on the whole range exactly when it is so at both ends.
    off = (values == 0).all(0)
    assert off.double().mean().item() == pytest.approx(1 / (4 * SQRT3), abs=0.005)
    uniform = 2 * SQRT3 * torch.rand(64, 1) - SQRT3
    drawn = torch.cat([gate.coefficients(row[None])[0].detach() for row in uniform]).double()
    assert (drawn == 0).double().mean().item() == pytest.approx(0.501, abs=0.02)
    assert drawn.mean().item() == pytest.approx(0.312, abs=0.015)
    sigmoid = RateGate(channels, context(), activation="sigmoid", init="paper")
    assert sigmoid.coefficients(torch.zeros(1, 1))[0].mean().item() == pytest.approx(0.500, abs=0.002)


def test_a_channel_that_is_off_has_no_gradient():
    gate = RateGate(1, context(), -1, activation="sqrt")
    with torch.no_grad():
        gate.weight.fill_(0.5)
        gate.bias.fill_(1.0)
    with gate.context.at(torch.tensor(BETAS)):
        out = gate(torch.ones(6, 1))
    out.sum().backward()
    assert out.abs().max() == 0
    assert gate.weight.grad.item() == gate.bias.grad.item() == 0.0


def test_reset_draws_again():
    gate = RateGate(50, context(), init="paper")
    before = gate.weight.clone()
    gate.reset_parameters()
    assert not torch.equal(gate.weight, before)
    assert gate.weight.abs().max() <= 1
    assert gate.bias.abs().max() <= 1


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sigmoid", "sqrt", "two_sigmoid"])
def test_gate_is_the_activation_of_an_affine_function_of_t(activation):
    gate = moved(RateGate(5, context(), -1, activation=activation, init="paper").double())
    betas = torch.tensor(BETAS, dtype=F64)
    t = gate.context.prior.standardize(betas).float()[:, None]
    expected = gate_activation(gate.weight * t + gate.bias, activation)
    with gate.context.at(betas):
        torch.testing.assert_close(gate(torch.ones(6, 5, dtype=F64)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("activation", "start"), [("sigmoid", 2.0), ("sqrt", -2.0)])
def test_identity_gate_is_relative_to_where_it_starts(activation, start):
    gate = RateGate(1, context(), -1, activation=activation).double()
    with torch.no_grad():
        gate.weight.fill_(0.4)
    expected = gate_activation(torch.tensor([0.4 * SQRT3 + start], dtype=F64), activation)
    expected = expected / gate_activation(torch.tensor([start], dtype=F64), activation)
    with gate.context.at(10.0):
        assert gate(torch.ones(1, 1, dtype=F64)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_film_scales_and_shifts():
    film = moved(RateFiLM(3, context(), 1, hidden=4).double())
    features = torch.randn(2, 3, 5, dtype=F64)
    with film.context.at(0.3) as here:
        t = here.t.double()
        expected = (1 + film.scale(t)).view(1, 3, 1) * features + film.shift(t).view(1, 3, 1)
        torch.testing.assert_close(film(features), expected)


def test_log_variance_gate_subtracts_a_soft_ramp():
    gate = moved(LogVarianceGate(3, context()).double())
    with gate.context.at(4.0) as here:
        ramp = nn.functional.softplus(gate.bias - gate.weight * here.t.double()) - math.log(2)
        torch.testing.assert_close(gate(torch.zeros(1, 3, dtype=F64)), -ramp)


def test_posterior_gate_treats_the_halves_apart():
    here = context()
    mean, variance = moved(RateGate(2, here, -1)), moved(LogVarianceGate(2, here), seed=1)
    features = torch.randn(3, 4)
    with here.at(torch.tensor([0.02, 0.5, 7.0])):
        both = torch.cat([mean(features[:, :2]), variance(features[:, 2:])], 1)
        torch.testing.assert_close(PosteriorGate(mean, variance)(features), both)
        only = torch.cat([features[:, :2], both[:, 2:]], 1)
        torch.testing.assert_close(PosteriorGate(None, variance)(features), only)
        only = torch.cat([both[:, :2], features[:, 2:]], 1)
        torch.testing.assert_close(PosteriorGate(mean, None)(features), only)
    with pytest.raises(ValueError, match="needs a conditioner for mean or log_variance"):
        PosteriorGate(None, None)


def test_gated_film_is_the_gate_of_the_affine_map():
    here = context()
    gate, film = moved(RateGate(4, here)), moved(RateFiLM(4, here, hidden=3), seed=1)
    features = torch.randn(3, 4, 2, 2)
    with here.at(torch.tensor([0.02, 0.5, 7.0])):
        torch.testing.assert_close(GatedFiLM(gate, film)(features), gate(film(features)))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2), (3, 4, 2, 2, 2)])
def test_channels_and_samples_are_found_in_every_shape(shape):
    gate = moved(RateGate(4, context(), 1))
    features, betas = torch.randn(shape), torch.tensor([0.02, 0.5, 7.0])
    with gate.context.at(betas) as here:
        scale = gate.coefficients(here.t)[0]
        expected = torch.stack([features[i] * scale[i].view(-1, *[1] * (len(shape) - 2)) for i in range(3)])
        torch.testing.assert_close(gate(features), expected)
    last = moved(RateGate(shape[-1], gate.context, -1))
    with gate.context.at(betas) as here:
        scale = last.coefficients(here.t)[0]
        torch.testing.assert_close(last(features), torch.stack([features[i] * scale[i] for i in range(3)]))


def test_each_sample_is_decoded_several_times():
    gate = moved(RateGate(2, context(), -1))
    with gate.context.at(torch.tensor([0.02, 7.0])):
        alone = gate(torch.ones(2, 2))
    with gate.context.at(torch.tensor([0.02, 7.0]), num_samples=3):
        assert torch.equal(gate(torch.ones(6, 2)), alone.repeat_interleave(3, 0))


# -- precision --------------------------------------------------------------------------------------------------------


@conditioners
def test_gate_arithmetic_is_float32_under_autocast(name):
    conditioner = moved(CONDITIONERS[name](init="paper"))
    features = torch.randn(6, 4)
    with conditioner.context.at(torch.tensor(BETAS)) as here:
        plain, exact = conditioner(features), conditioner.coefficients(here.t)
        with torch.autocast("cpu", torch.bfloat16):
            same = conditioner.coefficients(here.t)
            lower = conditioner(features.bfloat16())
    for value, expected in zip(same, exact, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.dtype == torch.float32
            assert torch.equal(value, expected), "not a bit may differ"
    torch.testing.assert_close(lower.float(), plain, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sigmoid", "sqrt", "two_sigmoid", "log_variance"])
def test_gate_arithmetic_is_float32_in_a_half_precision_model(name, dtype):
    conditioner = moved(CONDITIONERS[name](init="paper")).to(dtype)
    with conditioner.context.at(torch.tensor(BETAS)) as here:
        half = next(v for v in conditioner.coefficients(here.t) if v is not None)
        whole = next(v for v in conditioner.float().coefficients(here.t) if v is not None)
        assert half.dtype == torch.float32
        assert torch.equal(half, whole)
        assert conditioner.to(dtype)(torch.randn(6, 4, dtype=dtype)).dtype == dtype


def test_a_gate_takes_vmap_and_forward_mode():
    gate = moved(RateGate(4, context(), -1, activation="sqrt"))
    features, tangent = torch.randn(3, 4), torch.randn(3, 4)
    with gate.context.at(0.3):
        _, forward = torch.func.jvp(gate, (features,), (tangent,))
        torch.testing.assert_close(forward, gate(tangent))
        torch.testing.assert_close(torch.func.vmap(gate)(features[None]), gate(features)[None])


# -- the linear VAE that is optimal at every beta ---------------------------------------------------------------------


def test_rate_gates_hold_the_jointly_exact_linear_vae():
    """Weights by formula in RateGate reproduce E*, C* and D* of the closed form at every beta."""
    factor = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    covariance = factor @ factor.T / 6
    formula = joint_exact_gates(covariance, 4, 0.01, 10.0)
    here = context()

    def gate(layer):
        result = RateGate(len(layer.gate_weight), here, -1, layer.activation, init="paper").double()
        with torch.no_grad():
            result.weight.copy_(layer.gate_weight)
            result.bias.copy_(layer.gate_bias)
        return result

    (encoder,), (first, last) = formula.encoder, formula.decoder
    encoder_gate, decoder_gate = gate(encoder), gate(first)
    active = set()
    for beta in here.prior.grid(25):
        optimum = linear_vae_optimum(covariance, 4, beta)
        # at() hands the gates float32; here the formula itself is on trial
        t = here.prior.standardize(torch.tensor([[beta]], dtype=F64))
        with here.at_standardized(t):
            E = encoder_gate(torch.eye(6, dtype=F64) @ encoder.weight.T).T
            D = (decoder_gate(torch.eye(4, dtype=F64) @ first.weight.T) @ last.weight.T).T
        on = int((optimum.variance < 1).sum())
        active.add(on)
        torch.testing.assert_close(D @ D.T, optimum.decoder @ optimum.decoder.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(D @ E, optimum.decoder @ optimum.encoder, rtol=0, atol=1e-12)
        torch.testing.assert_close(E @ E.T, optimum.encoder @ optimum.encoder.T, rtol=0, atol=1e-12)
        ramp = formula.variance[0]
        variance = torch.exp(-torch.relu(ramp.gate_weight * t[0] + ramp.gate_bias))
        torch.testing.assert_close(variance, optimum.variance, rtol=0, atol=1e-12)
    assert len(active) >= 3, "the grid must cross several eigenvalues"


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="activation must be one of sigmoid, sqrt, two_sigmoid; got 'relu'"):
        RateGate(2, context(), activation="relu")
    with pytest.raises(ValueError, match="init must be 'identity' or 'paper'; got 'zeros'"):
        RateGate(2, context(), init="zeros")
    with pytest.raises(NotImplementedError, match=r"Mine must implement coefficients\(t\)"):
        type("Mine", (RateConditioner,), {})(2, context()).coefficients(torch.zeros(1, 1))


@pytest.mark.parametrize("kind", [RateFiLM, LogVarianceGate])
def test_an_unknown_initialisation_is_named_everywhere(kind):
    with pytest.raises(ValueError, match="init must be 'identity' or 'paper'; got 'zeros'"):
        kind(2, context(), init="zeros")


@conditioners
def test_without_a_beta_a_gate_refuses(name):
    with pytest.raises(RuntimeError, match="no beta is set"):
        CONDITIONERS[name]()(torch.ones(2, 4))


@conditioners
def test_betas_of_another_batch_are_refused(name):
    conditioner = CONDITIONERS[name]()
    message = r"beta has shape \(2,\) but the layer sees a batch of 3"
    with conditioner.context.at(torch.tensor([0.1, 1.0])), pytest.raises(ValueError, match=message):
        conditioner(torch.ones(3, 4))


# -- convolutions ------------------------------------------------------------------------------------------------------


def _convolution(activation, dtype=torch.float64):
    torch.manual_seed(0)
    gate_context = context()
    layer = torch.nn.Conv2d(2, 3, 3, padding=1).to(dtype)
    gate = RateGate(3, gate_context, activation=activation, init="paper").to(dtype)
    layer.add_module("rate_gate", gate)
    return layer, gate, gate_context


def test_func_transforms_reach_a_gated_convolution():
    layer, _, gate_context = _convolution("sqrt")
    layer.register_forward_hook(apply_conditioner)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def loss(weights, sample):
        return torch.func.functional_call(layer, weights, (sample[None],)).square().sum()

    with gate_context.at(0.5):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        layer(x).square().sum().backward()
    torch.testing.assert_close({k: v.sum(0) for k, v in each.items()}, {k: p.grad for k, p in layer.named_parameters()})


@pytest.mark.parametrize("after", [torch.nn.ReLU(inplace=True), torch.nn.Hardtanh(inplace=True)])
def test_a_layer_may_be_followed_by_an_operation_in_place(after):
    layer, _, gate_context = _convolution("sigmoid")
    layer.register_forward_hook(apply_conditioner)
    kept = []
    layer.register_forward_hook(lambda module, inputs, output: kept.append(output.detach().clone()))
    with gate_context.at(0.5):
        after(layer(torch.randn(2, 2, 4, 4, dtype=torch.float64))).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_features_of_another_shape_are_refused():
    gate = RateGate(3, context())
    with gate.context.at(1.0), pytest.raises(ValueError, match=r"3 channels in dimension 1; got shape \(1, 6, 6\)"):
        gate(torch.zeros(1, 6, 6))


def test_film_computes_in_float32_in_a_half_precision_model():
    film = RateFiLM(2, context(), init="paper").to(torch.bfloat16)
    with film.context.at(0.3):
        scale, shift = film.coefficients(film.context.t)
    assert scale.dtype == shift.dtype == torch.float32
