"""The reference networks: sizes, shapes, and the hierarchical pair against its own densities."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_ext.nn import LadderDecoder, LadderEncoder, MLPDecoder, MLPEncoder, ResNetDecoder, ResNetEncoder


def number_of_parameters(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def test_mlp_sizes_and_shapes():
    encoder, decoder = MLPEncoder([2, 3], [7, 5], 4), MLPDecoder(4, [5, 7], [2, 3])
    assert number_of_parameters(encoder) == (6 * 7 + 7) + (7 * 5 + 5) + 2 * (5 * 4 + 4)
    assert number_of_parameters(decoder) == (4 * 5 + 5) + (5 * 7 + 7) + (7 * 6 + 6)
    mu, logvar = encoder(torch.randn(9, 2, 3))
    assert mu.shape == logvar.shape == (9, 4)
    assert decoder(mu).shape == (9, 2, 3)


def test_mlp_without_hidden_layers_is_linear():
    encoder, decoder = MLPEncoder([3], [], 2).double(), MLPDecoder(2, [], [3]).double()
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    middle = (encoder(x)[0] + encoder(y)[0]) / 2
    torch.testing.assert_close(encoder((x + y) / 2)[0], middle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoder(middle), (decoder(encoder(x)[0]) + decoder(encoder(y)[0])) / 2)


def test_outputs_are_logits_and_not_squashed():
    decoder = MLPDecoder(2, [8], [4])
    assert decoder(100 * torch.randn(50, 2)).abs().max() > 1
    decoder = ResNetDecoder(2, 4)
    torch.nn.init.constant_(decoder.net[-1].bias, 30.0)
    assert decoder(torch.randn(2, 2)).max() > 1


def test_resnet_has_the_size_of_the_paper():
    assert number_of_parameters(ResNetEncoder(), ResNetDecoder()) == 1_881_217


def test_resnet_shapes():
    encoder, decoder = ResNetEncoder(3, 4), ResNetDecoder(3, 4)
    mu, logvar = encoder(torch.rand(2, 1, 28, 28))
    assert mu.shape == logvar.shape == (2, 3)
    assert decoder(mu).shape == (2, 1, 28, 28)


def test_residual_blocks_add_to_their_input():
    block = ResNetEncoder(2, 4).body[4]
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(block(x), x)


class Recorded:
    """Noise that remembers what it drew."""

    def __init__(self):
        self.drawn = []

    def __call__(self, like):
        self.drawn.append(torch.randn_like(like))
        return self.drawn[-1]


def test_ladder_rates_are_divergences_of_its_groups():
    encoder, decoder = LadderEncoder([5], 6).double(), LadderDecoder(6, [2, 3], [5]).double()
    noise = Recorded()
    features = encoder(torch.randn(4, 5, dtype=torch.float64))
    picture, (upper, lower) = decoder(features, noise)
    assert picture.shape == (4, 5)
    bottom, top = features
    mu, logvar = decoder.upper_posterior(top).chunk(2, 1)
    q_upper = Normal(mu, (logvar / 2).exp())
    torch.testing.assert_close(upper, kl_divergence(q_upper, Normal(0.0, 1.0)).sum(1))
    z_upper = mu + (logvar / 2).exp() * noise.drawn[0]
    prior = Normal(decoder.lower_prior(z_upper), 1.0)
    correction, logvar = decoder.lower_posterior(torch.cat([bottom, z_upper], 1)).chunk(2, 1)
    posterior = Normal(prior.mean + correction, (logvar / 2).exp())
    torch.testing.assert_close(lower, kl_divergence(posterior, prior).sum(1))
    z_lower = posterior.mean + posterior.stddev * noise.drawn[1]
    torch.testing.assert_close(picture, decoder.net(torch.cat([z_upper, z_lower], 1)))


def test_ladder_samples_the_prior():
    decoder = LadderDecoder(6, [2, 3], [4, 2]).double()
    noise = Recorded()
    picture = decoder.sample(5, noise)
    assert picture.shape == (5, 4, 2)
    z_upper = noise.drawn[0]
    z_lower = decoder.lower_prior(z_upper) + noise.drawn[1]
    assert (z_upper.shape, z_lower.shape) == ((5, 2), (5, 3))
    torch.testing.assert_close(picture, decoder.net(torch.cat([z_upper, z_lower], 1)))


def test_ladder_draws_from_the_handed_noise_only():
    encoder, decoder = LadderEncoder([2, 3], 4), LadderDecoder(4, [1, 2], [2, 3])
    state = torch.get_rng_state()
    first, _ = decoder(encoder(torch.ones(2, 2, 3)), torch.zeros_like)
    second, _ = decoder(encoder(torch.ones(2, 2, 3)), torch.zeros_like)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [[6], [2, 3], [1, 2, 3]])
def test_shapes_are_those_asked_for(shape):
    x = torch.rand(3, *shape)
    assert MLPDecoder(2, [4], shape)(MLPEncoder(shape, [4], 2)(x)[0]).shape == x.shape
    assert LadderDecoder(4, [2, 2], shape)(LadderEncoder(shape, 4)(x))[0].shape == x.shape
    assert math.prod(shape) == 6
