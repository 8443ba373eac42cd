"""Latent variable models: densities are torch's own, samples have their moments, shapes never broadcast."""

import copy
import math
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Distribution, Independent, MultivariateNormal, Normal

from lightning_ext.functional import DiagonalGaussian, ais_forward, hmc_kernel, linear_schedule
from lightning_ext.nn import (
    BernoulliDecoderModel,
    DistributionModel,
    FiniteModel,
    GaussianDecoderModel,
    LatentModel,
    LinearGaussianModel,
    MLPEncoder,
    Proposal,
    check_deterministic,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(*event, dtype=F64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, math.prod(event)), nn.Unflatten(1, event)).to(dtype)


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 4, 2, stride=2), nn.BatchNorm2d(4),
        nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1),
    ).double().eval()  # fmt: skip


def linear(dtype=F64):
    generator = seeded(1)
    weight, bias = torch.randn(6, 3, generator=generator, dtype=dtype), torch.randn(6, generator=generator, dtype=dtype)
    return LinearGaussianModel(weight, bias, 0.5)


MODELS = {
    "gaussian": lambda: GaussianDecoderModel(dense(7), -1.0, 3),
    "image": lambda: GaussianDecoderModel(conv(), nn.Parameter(torch.tensor(-0.5)), 3),
    "pixels": lambda: GaussianDecoderModel(dense(4, 4), torch.linspace(-2, 0, 16).reshape(4, 4), 3),
    "bernoulli": lambda: BernoulliDecoderModel(dense(4, 4), 3),
    "probabilities": lambda: BernoulliDecoderModel(nn.Sequential(dense(7), nn.Sigmoid()), 3, logits=False),
    "distributions": lambda: DistributionModel(
        Independent(Normal(torch.ones(3, dtype=F64), 2.0), 1), lambda z: Normal(z.cumsum(-1), 0.7)
    ),
    "linear": linear,
    "finite": lambda: FiniteModel(torch.tensor([[0.3, 0.1], [0.1, 0.2], [0.1, 0.2]])),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def by_hand(name, model, x, z):
    """log p(x | z) by torch.distributions."""
    if name == "linear":
        mean, noise = z @ model.weight.T + model.bias, 0.5
    elif name == "distributions":
        mean, noise = z.cumsum(-1), 0.7
    elif name == "finite":
        return (model.joint / model.joint.sum(0)).log()[x[..., 0], z[..., 0]]
    else:
        mean = model.decode(z)
        if isinstance(model, BernoulliDecoderModel):
            kind = Bernoulli(logits=mean) if model.logits else Bernoulli(mean)
            return kind.log_prob(x).flatten(z.ndim - 1).sum(-1)
        noise = (0.5 * model.log_var).exp().double()
    return Normal(mean, noise).log_prob(x).flatten(z.ndim - 1).sum(-1)


@EVERY
@torch.no_grad()
def test_likelihoods_are_those_of_torch(name):
    model = MODELS[name]()
    x, z = model.simulate(5, seeded())
    assert z.shape == (5, model.latent_dim)
    table = torch.stack([z, z.roll(1, 0), z.flip(0)])
    for latents in (z, table, table[None]):
        found = model.checked_likelihood(x, latents)
        assert found.shape == latents.shape[:-1]
        torch.testing.assert_close(found, by_hand(name, model, x, latents), rtol=1e-6, atol=1e-6)


@EVERY
def test_generators_decide_the_draws(name):
    model = MODELS[name]()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    pairs = [model.simulate(4, seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1], strict=True))
    if not model.discrete:
        assert not torch.equal(pairs[0][1], pairs[2][1])
    assert not any(part.requires_grad for part in pairs[0])
    x, z = model.simulate(4)
    assert (x.shape, z.shape) == (pairs[0][0].shape, pairs[0][1].shape)


@pytest.mark.parametrize("name", ["gaussian", "pixels", "bernoulli", "distributions", "linear"])
def test_samples_have_the_moments_of_the_density(name):
    model = MODELS[name]()
    z = model.sample_prior(1, seeded(3)).expand(40_000, -1)
    x = model.sample_x(z, seeded(4)).double()
    if name == "bernoulli":
        mean, variance = model.decode(z[:1]).sigmoid()[0], None
    elif name in ("linear", "distributions"):
        mean = z[0] @ model.weight.T + model.bias if name == "linear" else z[0].cumsum(-1)
        variance = torch.full_like(mean, 0.25 if name == "linear" else 0.49)
    else:
        mean = model.decode(z[:1])[0]
        variance = model.log_var.exp().double().expand(mean.shape)
    torch.testing.assert_close(x.mean(0), mean.detach(), rtol=0, atol=0.03)
    if variance is not None:
        torch.testing.assert_close(x.var(0), variance, rtol=0.05, atol=0.0)


def test_the_prior_is_what_its_samples_say():
    model = MODELS["distributions"]()
    z = model.sample_prior(50_000, seeded())
    assert z.mean().item() == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(model.prior(z[:4]), Normal(1.0, 2.0).log_prob(z[:4]).sum(-1))
    finite = MODELS["finite"]()
    counts = torch.bincount(finite.sample_prior(50_000, seeded())[:, 0]) / 50_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.5]), rtol=0, atol=0.01)
    assert isinstance(GaussianDecoderModel(dense(2), 0.0, 3).prior, DiagonalGaussian)


def test_the_linear_posterior_is_bayes():
    model = linear()
    x, _ = model.simulate(4, seeded())
    z = torch.randn(9, 4, 3, dtype=F64)
    evidence = model.prior(z) + model.log_likelihood(x, z) - model.posterior(x).log_prob(z)
    covariance = model.weight @ model.weight.T + 0.25 * torch.eye(6, dtype=F64)
    expected = MultivariateNormal(model.bias, covariance).log_prob(x)
    torch.testing.assert_close(evidence, expected.expand(9, 4), rtol=0, atol=1e-10)
    tempered = model.prior(z) + 0.3 * model.log_likelihood(x, z) - model.posterior(x, 0.3).log_prob(z)
    torch.testing.assert_close(tempered, tempered[:1].expand(9, 4), rtol=0, atol=1e-10)


def test_paths_lead_to_the_posterior_from_the_prior_and_from_a_proposal():
    model = linear()
    x, _ = model.simulate(4, seeded())
    z = torch.randn(5, 4, 3, dtype=F64)
    for proposal in (None, model.proposal(x), Proposal.gaussian(torch.ones(4, 3, dtype=F64), torch.full((4, 3), 0.5))):
        state = model.path(x, proposal).evaluate(z)
        torch.testing.assert_close(state.log_prob(1.0), model.prior(z) + model.log_likelihood(x, z))
        start = model.prior(z) if proposal is None else proposal.density(z)
        torch.testing.assert_close(state.log_prob(0.0), start)
    exact = model.proposal(x)
    kernel = hmc_kernel(path := model.path(x, exact), torch.full((3,), 0.1), 2, seeded())
    found = ais_forward(path, exact.draw(5, seeded()), linear_schedule(3), kernel)
    assert (found.log_weights.amax(0) - found.log_weights.amin(0)).max() < 1e-9


def test_an_encoder_proposes():
    model = GaussianDecoderModel(dense(7, dtype=torch.float32), 0.0, 3, encoder=MLPEncoder([7], [5], 3))
    x, _ = model.simulate(4, seeded())
    proposal, (mean, log_var) = model.proposal(x), model.encoder(x)
    drawn = proposal.draw(20_000, seeded())
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.var(0), log_var.exp(), rtol=0.05, atol=0.0)
    expected = Normal(mean, (0.5 * log_var).exp()).log_prob(drawn).sum(-1)
    torch.testing.assert_close(proposal.density(drawn), expected, rtol=1e-5, atol=1e-4)
    assert GaussianDecoderModel(dense(7), 0.0, 3).proposal(x) is None
    assert not drawn.requires_grad


def test_parameters_and_numbers_of_the_noise():
    trained = nn.Parameter(torch.tensor(0.3))
    assert any(p is trained for p in GaussianDecoderModel(dense(2), trained, 3).parameters())
    assert "log_var" in GaussianDecoderModel(dense(2), 0.3, 3).state_dict()


class Unsummed(LatentModel):
    def log_likelihood(self, x, z):
        return Normal(z, 1.0).log_prob(x)

    def sample_x(self, z, generator=None):
        return z


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentModel(0), "latent_dim must be at least 1; got 0"),
        (lambda: Unsummed(2).checked_likelihood(torch.zeros(3, 2), torch.zeros(3, 2)),
         r"Unsummed.log_likelihood must give one number per data point and sample, \(3,\); got \(3, 2\)"),
        (lambda: linear().checked_likelihood(torch.zeros(4, 6), torch.zeros(3, 3)), r"z must have shape \(..., 4, 3\)"),
        (lambda: linear().checked_likelihood(torch.zeros(4, 6), torch.zeros(4, 2)), r"got \(4, 2\)"),
        (lambda: GaussianDecoderModel(dense(7), 0.0, 3).log_likelihood(
            torch.zeros(2, 8, dtype=F64), torch.zeros(2, 3, dtype=F64)),
         r"outputs are \(7,\) for each latent, but x is \(8,\)"),
        (lambda: GaussianDecoderModel(nn.Flatten(0), 0.0, 3).decode(torch.zeros(2, 3)), "one output per latent, 2"),
        (lambda: GaussianDecoderModel(dense(7), 0.0, 2).decode(torch.zeros(4, 2, dtype=F64)),
         r"the decoder does not take latents \(4, 2\).*Is latent_dim=2 its number of inputs"),
        (lambda: GaussianDecoderModel(dense(7), None, 3), "log_var must be a finite number .*; got None"),
        (lambda: GaussianDecoderModel(dense(7), math.nan, 3), "log_var must be a finite number .*; got nan"),
        (lambda: GaussianDecoderModel(dense(7), torch.zeros(3), 3).simulate(2),
         r"log_var must broadcast against the decoder's outputs for one latent, \(7,\); got \(3,\)"),
        (lambda: DistributionModel(Normal(torch.zeros(2), 1.0), lambda z: Normal(z.sum(), 1.0)).simulate(4),
         r"x must be one data point for each of 4 latents; got shape \(\)"),
        (lambda: LinearGaussianModel(torch.ones(2, 1), torch.ones(2), 0.0), "sigma must be positive"),
        (lambda: FiniteModel(torch.tensor([[1.0, 0.0]])), "none of whose columns is empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_variance_that_was_worked_out_can_be_copied():
    trained = nn.Parameter(torch.tensor(0.3))
    model = copy.deepcopy(GaussianDecoderModel(dense(2), 2 * trained, 3))
    assert model.log_var.item() == pytest.approx(0.6)
    assert not model.log_var.requires_grad


def test_a_distribution_need_not_tell_its_support():
    class Mine(Distribution):
        arg_constraints: ClassVar[dict] = {}

        def log_prob(self, z):
            return Normal(0.0, 1.0).log_prob(z)

        def sample(self, shape=()):
            return torch.randn(*shape, *self.batch_shape)

    model = DistributionModel(Mine(torch.Size([2])), lambda z: Normal(z, 1.0))
    _, z = model.simulate(5, seeded())
    assert not model.discrete
    torch.testing.assert_close(model.prior(z), DiagonalGaussian(0.0, 1.0)(z))


def test_densities_that_change_from_call_to_call_are_refused():
    blind = GaussianDecoderModel(nn.BatchNorm1d(3, track_running_stats=False), 0.0, 3).eval()
    with pytest.raises(ValueError, match=r"decoder \(BatchNorm1d\) keeps no running statistics"):
        check_deterministic(blind)
    attention = nn.MultiheadAttention(4, 1, dropout=0.1)
    for part in (nn.Dropout(0.1), nn.BatchNorm1d(3), nn.Dropout2d(), nn.RReLU(), attention):
        model = GaussianDecoderModel(nn.Sequential(nn.Linear(3, 3), part), 0.0, 3)
        with pytest.raises(ValueError, match=rf"decoder.1 \({type(part).__name__}\) is in training mode"):
            check_deterministic(model)
        check_deterministic(model.eval())
    check_deterministic(GaussianDecoderModel(dense(2), 0.0, 3).train())
