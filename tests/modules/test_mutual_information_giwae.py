"""GIWAE's module against the bounds it lies between, and the gradients of its two parts."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, Independent, Normal, OneHotCategorical, TransformedDistribution

from lightning_ext.functional import giwae_lower, iwae_bound
from lightning_ext.modules import GIWAEModule
from lightning_ext.nn import GaussianProposal, LinearGaussianModel, PairCritic, QuadraticCritic
from tests.modules.pairs import correlated, loader, trainer


class Density(PairCritic):
    """log w of a model and a proposal: the best critic."""

    def __init__(self, model, proposal):
        super().__init__()
        self.model, self.proposal = model, proposal

    def score(self, embedded, z):
        q = self.proposal(embedded)
        return self.model.log_likelihood(embedded, z) + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z)


class Nothing(PairCritic):
    """A function of x alone."""

    def score(self, embedded, z):
        return embedded.sum(-1).expand(z.shape[:-1])


def model():
    return LinearGaussianModel(torch.tensor([[1.0], [2.0]]), torch.zeros(2), 0.7)


def proposal():
    torch.manual_seed(0)
    return GaussianProposal(nn.Linear(2, 2))


def simulated(num=400):
    return model().simulate(num, torch.Generator().manual_seed(0))


def measured(module, pairs):
    found = trainer().test(module, loader(*pairs), verbose=False)[0]
    return {key.removeprefix("mutual_information/"): value for key, value in found.items()}


def test_with_the_weights_as_critic_it_is_the_importance_weighted_bound():
    x, z = simulated(50)
    q = proposal()
    module = GIWAEModule(q, Density(model(), q), num_samples=6, seed=1)
    module.set_address("test", 0)
    log_q, log_prior, critic = module.terms(x, z)
    expected = iwae_bound(model().log_likelihood(x, z), critic)
    torch.testing.assert_close(giwae_lower(log_q, log_prior, critic), expected, rtol=1e-4, atol=1e-4)


def test_a_critic_that_knows_nothing_leaves_barber_agakov():
    found = measured(GIWAEModule(proposal(), Nothing(), num_samples=5), simulated())
    assert found["giwae/lower"] == pytest.approx(found["ba/lower"], abs=1e-5)
    assert found["giwae/stderr"] == pytest.approx(found["ba/stderr"], rel=1e-4)


def test_the_own_latents_come_first_and_the_others_from_the_proposal():
    x, z = simulated(2000)
    q = proposal()
    seen = []

    class Looks(PairCritic):
        def score(self, embedded, z):
            seen.append(z)
            return z.sum(-1)

    GIWAEModule(q, Looks(), num_samples=5, seed=0).loss(x, z)
    [found] = seen
    assert found.shape == (5, 2000, 1)
    assert torch.equal(found[0], z)
    standard = ((found[1:] - q(x).mean) / q(x).stddev).flatten()
    assert abs(standard.mean()) < 4 / math.sqrt(8000)
    assert abs(standard.var() - 1) < 4 * math.sqrt(2 / 8000)


def test_training_goes_beyond_the_proposal_and_stays_below_the_truth():
    torch.manual_seed(0)
    narrow = GaussianProposal(nn.Linear(1, 2))
    module = GIWAEModule(
        narrow, QuadraticCritic(1, 1), num_samples=16, optimizer=functools.partial(torch.optim.Adam, lr=0.03), seed=0
    )
    narrow.network.weight.data.zero_()  # knows nothing of x, and stays so
    narrow.network.weight.requires_grad_(False)
    trainer().fit(module, loader(*correlated(20_000)))
    found = measured(module, correlated(4000, seed=1))
    truth = -0.5 * math.log(1 - 0.81)
    assert abs(found["ba/lower"]) < 0.05
    assert 0.6 < found["giwae/lower"] < truth + 4 * found["giwae/stderr"]


def gradient(**options):
    x, z = simulated(64)
    torch.manual_seed(1)
    critic = QuadraticCritic(2, 1)
    critic.coupling.data.fill_(0.5)
    q = proposal()
    module = GIWAEModule(q, critic, num_samples=4, seed=2, **options)
    module.set_address("train", 0)
    module.loss(x, z).backward()
    return q, critic.coupling.grad, (x, z)


def test_both_parts_train_the_proposal_unless_the_samples_are_detached():
    q, of_critic, (x, z) = gradient(detach_negatives=True)
    alone = torch.autograd.grad(-q(x).log_prob(z).mean(), q.network.weight)[0]
    torch.testing.assert_close(q.network.weight.grad, alone)
    whole, of_critic_too, _ = gradient()
    torch.testing.assert_close(of_critic, of_critic_too)
    assert (whole.network.weight.grad - alone).norm() > 0.5


def test_draws_are_addressed_and_leave_the_global_state_alone():
    x, z = simulated(8)
    module = GIWAEModule(proposal(), QuadraticCritic(2, 1), seed=3)
    module.critic.coupling.data.fill_(1.0)
    before = torch.random.get_rng_state()
    losses = []
    for batch in (0, 1, 0):
        module.set_address("train", batch)
        losses.append(module.loss(x, z).item())
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_predict_gives_the_term_of_each_pair():
    x, z = simulated(6)
    module = GIWAEModule(proposal(), QuadraticCritic(2, 1), seed=0)
    [found] = trainer().predict(module, loader(x, z))
    assert found.shape == (6,)
    assert found.mean().item() == pytest.approx(measured(module, (x, z))["giwae/lower"], rel=1e-4)


def test_another_prior_is_taken():
    x, z = simulated(6)
    prior = Independent(Normal(torch.zeros(1), 3 * torch.ones(1)), 1)
    module = GIWAEModule(proposal(), Nothing(), prior=prior)
    torch.testing.assert_close(module.terms(x, z)[1], prior.log_prob(z))


class Hot(nn.Module):
    def forward(self, x):
        return OneHotCategorical(logits=x)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"num_samples must be at least 2; got 1.*BarberAgakovModule"):
        GIWAEModule(proposal(), Nothing(), num_samples=1)
    x, _z = simulated(4)
    with pytest.raises(ValueError, match="OneHotCategorical has no rsample"):
        GIWAEModule(Hot(), Nothing()).loss(x, torch.ones(4, 2))


class Flow(nn.Module):
    """The standard normal distribution, as a flow that has no mean to ask for."""

    def forward(self, x):
        base = Independent(Normal(torch.zeros(len(x), 2), 1.0), 1)
        return TransformedDistribution(base, [AffineTransform(torch.zeros(2), 1.0, event_dim=1)])


def test_a_flow_may_propose():
    x, z = torch.randn(4, 2), torch.randn(4, 2)
    found = GIWAEModule(Flow(), QuadraticCritic(2, 2), num_samples=3, seed=0).loss(x, z)
    plain = GIWAEModule(Standard(), QuadraticCritic(2, 2), num_samples=3, seed=0).loss(x, z)
    torch.testing.assert_close(found, plain)


class Standard(nn.Module):
    def forward(self, x):
        return Independent(Normal(torch.zeros(len(x), 2), 1.0), 1)
