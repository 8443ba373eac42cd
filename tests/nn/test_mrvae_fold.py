"""The folded network is the gated one at its beta, for every layer and conditioner, with the ordinary keys."""

import copy

import pytest
import torch
from torch import nn

from lightning_ext.nn import (
    GatedFiLM,
    LogUniformBeta,
    LogVarianceGate,
    PosteriorGate,
    RateContext,
    RateFiLM,
    RateGate,
    convert_to_multirate,
    fold,
)
from lightning_ext.nn.mrvae_gates import apply_conditioner

F64 = torch.float64
BETAS = (0.01, 0.4, 10.0)

LAYERS = {
    "linear": (lambda **k: nn.Linear(4, 6, **k), (4,)),
    "linear-sequence": (lambda **k: nn.Linear(4, 6, **k), (3, 4)),
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, **k), (4, 7)),
    "conv2d-groups": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), (4, 5, 5)),
    "conv3d": (lambda **k: nn.Conv3d(4, 6, 2, **k), (4, 3, 4, 3)),
    "convT1d": (lambda **k: nn.ConvTranspose1d(4, 6, 3, **k), (4, 4)),
    "convT2d": (lambda **k: nn.ConvTranspose2d(4, 6, 3, stride=2, **k), (4, 3, 3)),
    "convT2d-groups": (lambda **k: nn.ConvTranspose2d(4, 6, 3, groups=2, **k), (4, 3, 3)),
    "convT3d": (lambda **k: nn.ConvTranspose3d(4, 6, 2, **k), (4, 2, 3, 2)),
    "batch-norm": (lambda bias: nn.BatchNorm2d(6), (6, 3, 3)),
    "group-norm": (lambda bias: nn.GroupNorm(3, 6), (6, 3, 3)),
    "layer-norm": (lambda bias: nn.LayerNorm(6, bias=bias), (4, 6)),
}
CONDITIONERS = {
    "sigmoid": lambda context, dim: RateGate(6, context, dim, "sigmoid"),
    "sqrt": lambda context, dim: RateGate(6, context, dim, "sqrt"),
    "film": lambda context, dim: RateFiLM(6, context, dim, hidden=3),
    "log-variance": lambda context, dim: LogVarianceGate(6, context, dim),
    "posterior": lambda context, dim: PosteriorGate(RateGate(3, context, dim), LogVarianceGate(3, context, dim)),
    "posterior-half": lambda context, dim: PosteriorGate(None, LogVarianceGate(3, context, dim)),
    "gated-film": lambda context, dim: GatedFiLM(RateGate(6, context, dim), RateFiLM(6, context, dim, hidden=3)),
}


def new_context():
    return RateContext(LogUniformBeta(0.01, 10.0))


def moved(network):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "rate_gate" in name:
                parameter += torch.randn(parameter.shape, generator=generator, dtype=F64) / 2
    return network


@pytest.mark.parametrize("conditioner", CONDITIONERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_folding_gives_the_same_output_at_every_beta(name, bias, conditioner):
    build, shape = LAYERS[name]
    layer = build(bias=bias).double().eval()
    if "norm" in name:
        nn.init.uniform_(layer.weight, 0.5, 2)
    context, x = new_context(), torch.randn(3, *shape, dtype=F64)
    plain = layer(x)
    dim = -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1
    layer.add_module("rate_gate", CONDITIONERS[conditioner](context, dim).double())
    layer.register_forward_hook(apply_conditioner)
    moved(layer)
    for beta in BETAS:
        with context.at(beta):
            expected = layer(x)
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(fold(layer, beta)(x), expected, rtol=1e-12, atol=1e-12)


class Encoder(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()
        )
        self.mu, self.logvar = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, x):
        return self.mu(self.body(x)), self.logvar(self.body(x))


def pair():
    decoder = nn.Sequential(
        nn.Linear(2, 8),
        nn.Unflatten(1, (2, 2, 2)),
        nn.ConvTranspose2d(2, 3, 4, 2, 1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 4, 2, 1),
    )
    return Encoder().double().eval(), decoder.double().eval()


WAYS = {
    "paper": {},
    "public": {"layout": "public"},
    "table1": {"layout": "table1"},
    "film": {"conditioning": "film"},
    "film-public": {"conditioning": "film", "layout": "public"},
    "film-table1": {"conditioning": "film", "layout": "table1"},
    "add": {"log_variance": "add", "encoder_activation": "sqrt"},
    "paper-init": {"init": "paper", "gate_output": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_folded_networks_are_ordinary_ones(way):
    encoder, decoder = pair()
    base_encoder, base_decoder = copy.deepcopy(encoder), copy.deepcopy(decoder)
    context, x = new_context(), torch.rand(3, 1, 8, 8, dtype=F64)
    convert_to_multirate(encoder, decoder, context, x, **WAYS[way])
    moved(encoder)
    moved(decoder)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    for beta in BETAS:
        plain = fold(encoder, beta), fold(decoder, beta)
        for ours, base in zip(plain, (base_encoder, base_decoder), strict=True):
            added = set(ours.state_dict()) - set(base.state_dict())
            assert not set(base.state_dict()) - set(ours.state_dict())
            assert added <= {"body.0.bias"}, "a shift needs a bias"
            assert bool(added) == (way == "film" and ours is plain[0])
            assert not any(module._forward_hooks for module in ours.modules())
        with context.at(beta):
            mu, logvar = encoder(x)
            picture = decoder(mu)
        torch.testing.assert_close(plain[0](x), (mu, logvar), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(plain[1](mu), picture, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items()), "a copy is folded"
    with context.at(0.1):
        encoder(x)


def test_two_folds_stand_on_their_own():
    encoder, decoder = pair()
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8))
    moved(encoder)
    low, high = fold(encoder, 0.01), fold(encoder, 10.0)
    assert not torch.equal(low.mu.weight, high.mu.weight)
    assert torch.equal(fold(encoder, 0.01).mu.weight, low.mu.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_precision_of_the_network(dtype):
    encoder, decoder = (network.to(dtype) for network in pair())
    context, x = new_context(), torch.rand(3, 1, 8, 8, dtype=dtype)
    convert_to_multirate(encoder, decoder, context, x, layout="public")
    moved(encoder)
    plain = fold(encoder, 0.3)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    with context.at(0.3):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(plain(x), encoder(x), rtol=tolerance, atol=tolerance)


def test_folded_networks_train():
    encoder, decoder = pair()
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8), conditioning="film")
    plain = fold(moved(encoder), 0.3).train()
    plain(torch.rand(4, 1, 8, 8, dtype=F64))[0].sum().backward()
    assert plain.body[0].bias.grad is not None
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())


def test_bad_input_is_named():
    encoder, decoder = pair()
    with pytest.raises(ValueError, match="the network has no gates to fold; convert it with convert_to_multirate"):
        fold(encoder, 1.0)
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"beta=20 is outside the trained range \[0.01, 10\]"):
        fold(encoder, 20.0)
    fold(encoder, 20.0, extrapolate=True)
    for beta in (0.0, float("nan")):
        with pytest.raises(ValueError, match="beta must be positive and finite"):
            fold(encoder, beta, extrapolate=True)


def test_a_vector_of_betas_does_not_fold():
    encoder, decoder = pair()
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="one number"):
        fold(moved(encoder), torch.tensor([0.01, 10.0]))


@pytest.mark.parametrize("case", ["norm without weight", "parametrised weight"])
def test_what_cannot_absorb_a_gate_is_named(case):
    encoder, decoder = pair()
    if case == "norm without weight":
        encoder.body[1] = nn.BatchNorm2d(4, affine=False).double()
    else:
        nn.utils.parametrizations.weight_norm(encoder.body[0])
    layout = "public" if case == "norm without weight" else "paper"
    convert_to_multirate(encoder, decoder, new_context(), torch.zeros(2, 1, 8, 8), layout=layout)
    with pytest.raises(ValueError, match=r"(?s)cannot fold a gate into .*it has no plain weight to absorb it"):
        fold(encoder, 1.0)


def test_tied_weights_fold_each_with_its_own_gate():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    encoder = torch.nn.Sequential(first, torch.nn.Tanh(), second)
    context = new_context()
    convert_to_multirate(encoder, torch.nn.Linear(2, 4), context, torch.zeros(2, 4), init="paper")
    x = torch.randn(3, 4)
    with context.at(0.2):
        expected = encoder(x)
    torch.testing.assert_close(fold(encoder, 0.2)(x), expected)
