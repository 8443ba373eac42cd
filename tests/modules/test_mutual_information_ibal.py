"""The implicit bound of quadratic critics, whose value is known, and what certifies it."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from lightning_ext.functional import correlated_gaussian_information, quadratic_critic_values
from lightning_ext.modules import measure_implicit_bound
from lightning_ext.nn import ConcatenatedCritic, GaussianProposal, PairCritic, QuadraticCritic
from tests.modules.pairs import correlated

SHORT = {"num_chains": 8, "num_steps": 60, "num_leapfrog": 5}


def critic(a, b, c):
    """T = a x z - b z^2 / 2 - c x^2 / 2."""
    found = QuadraticCritic(1, 1)
    with torch.no_grad():
        found.coupling.fill_(a)
        found.z_log_curvature.fill_(b).log_()
        found.x_log_curvature.fill_(c).log_()
    return found


@pytest.mark.parametrize("rho", [0.5, 0.9])
@pytest.mark.parametrize("abc", [(2.0, 1.0, 1.5), (4.7368, 4.2632, 4.2632), (1.0, 3.0, 0.1), (0.5, 0.2, 9.0)])
def test_certificate_and_estimate_lie_on_either_side_of_the_closed_form(rho, abc):
    exact = quadratic_critic_values(rho, *abc)["ibal"]
    x, z = correlated(1500, rho)
    found = measure_implicit_bound(critic(*abc), x, z, **SHORT).values
    noise = 4 * found["lower_stderr"].item()
    assert found["lower"] <= found["estimate"] + 0.01  # in expectation
    assert exact - 0.1 - noise < found["lower"] < exact + noise
    assert exact - noise < found["estimate"] < exact + 0.1 + noise
    assert found["lower"] < correlated_gaussian_information(1, rho) + noise
    assert 0.4 < found["accept"] < 0.95


def test_a_proposal_as_the_base_adds_its_barber_agakov_term():
    class Nothing(PairCritic):
        def score(self, embedded, z):
            return 0 * (z.sum(-1) + embedded.sum(-1))

    x, z = correlated(300)
    torch.manual_seed(0)
    proposal = GaussianProposal(nn.Linear(1, 2))
    prior = Independent(Normal(torch.zeros(1), torch.ones(1)), 1)
    for given in (None, prior):
        found = measure_implicit_bound(Nothing(), x, z, proposal=proposal, prior=given, **SHORT).values
        with torch.no_grad():
            expected = (proposal(x).log_prob(z) - prior.log_prob(z)).mean().item()
        assert found["lower"].item() == pytest.approx(expected, abs=1e-4)
        assert found["estimate"].item() == pytest.approx(expected, abs=1e-4)


def test_a_wider_prior_is_where_chains_start():
    prior = Independent(Normal(torch.zeros(1), 2 * torch.ones(1)), 1)
    x, z = correlated(500)
    quadratic = critic(2.0, 1.0, 1.5)
    found = measure_implicit_bound(quadratic, x, 2 * z, prior=prior, **SHORT).values
    same = measure_implicit_bound(critic(4.0, 4.0, 1.5), x, z, **SHORT).values  # in z / 2
    assert found["estimate"].item() == pytest.approx(same["estimate"].item(), abs=0.05)
    assert found["lower"].item() == pytest.approx(same["lower"].item(), abs=0.05)


def test_any_critic_is_certified_and_figures_show_it():
    torch.manual_seed(0)
    found = measure_implicit_bound(ConcatenatedCritic(1, 1, [8]), *correlated(64), num_chains=2, num_steps=5)
    assert found.values["lower"] < 0.8304
    assert found.step_sizes.shape == (5,)
    figure, axes = found.plot(truth=0.8304)
    assert {text.get_text() for text in axes.get_yticklabels()} == {"certified", "forward estimate"}
    assert figure is axes.figure


def test_it_runs_in_inference_mode_with_draws_of_its_own():
    quadratic = critic(2.0, 1.0, 1.5)
    plain = measure_implicit_bound(quadratic, *correlated(8), num_steps=5, seed=3).values
    before, seen = torch.random.get_rng_state(), []
    with torch.inference_mode():
        pairs = correlated(8)
        again = measure_implicit_bound(quadratic, *pairs, num_steps=5, seed=3, progress=seen.append).values
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert torch.equal(before, torch.random.get_rng_state())
    assert sum(seen) == 10
    other = measure_implicit_bound(quadratic, *correlated(8), num_steps=5, seed=4).values
    assert other["lower"] != plain["lower"]
    assert all(parameter.grad is None for parameter in quadratic.parameters())


def test_scores_too_large_for_their_type_are_told_of():
    quadratic = critic(2.0, 1.0, 1e7)  # a function of x alone, which no objective of the ratio minds
    x, z = correlated(200)
    with pytest.warns(UserWarning, match=r"scores reach .*torch.float32 tells .* nats apart.*critic.double\(\)"):
        measure_implicit_bound(quadratic, x, z, **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = measure_implicit_bound(quadratic.double(), x.double(), z.double(), **SHORT).values
        plain = measure_implicit_bound(critic(2.0, 1.0, 1.0).double(), x.double(), z.double(), **SHORT).values
    assert fine["lower"].item() == pytest.approx(plain["lower"].item(), abs=1e-5)


class Dropping(QuadraticCritic):
    def __init__(self):
        super().__init__(1, 1)
        self.drop = nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, z: measure_implicit_bound(Dropping(), x, z), r"drop \(Dropout\) is in training mode"),
        (lambda x, z: measure_implicit_bound(critic(1, 1, 1), x, z[:3]), r"one for each x; got \(3, 1\) for 8 x"),
        (
            lambda x, z: measure_implicit_bound(critic(1, 1, 1), x, z, num_chains=0),
            "num_chains must be an integer of at least 1",
        ),
        (lambda x, z: measure_implicit_bound(critic(1, 1, 1), x, z, schedule="log"), "'sigmoid' or 'linear'.*'log'"),
        (lambda x, z: measure_implicit_bound(critic(1, 1, 1), x, z, delta=-1.0), "delta must be positive; got -1.0"),
        (lambda x, z: measure_implicit_bound(critic(1, 1, 1), x, z, target_accept=1.0), "target_accept must be betw"),
        (lambda x, z: measure_implicit_bound(critic(1, 1, 1), x, z, chunk_size=0), "chunk_size must be at least 1"),
        (lambda x, z: measure_implicit_bound(critic(1, 1, 1), x * torch.nan, z), "no step is accepted|not finite|NaN"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*correlated(8))


def test_autocasting_around_it_changes_nothing():
    x, z = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    mixed = ConcatenatedCritic(2, 2)
    plain = measure_implicit_bound(mixed, x, z, num_steps=5, num_chains=2).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = measure_implicit_bound(mixed, x, z, num_steps=5, num_chains=2).values
    assert {name: float(value) for name, value in plain.items()} == {name: float(v) for name, v in within.items()}
