"""Mathematics of the multi-rate VAE against closed forms, ``torch.distributions`` and enumeration, in float64."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from lightning_ext.functional.mrvae import (
    bernoulli_distortion,
    beta_grid,
    free_bits_rate,
    gate_activation,
    gaussian_distortion,
    gaussian_kl,
    kl_weight,
    sigma_vae_distortion,
    squared_error_distortion,
    standardize_beta,
    stratified_uniform,
    total_correlation_terms,
    unstandardize_beta,
)

F64 = torch.float64
ACTIVATIONS = ("sigmoid", "sqrt", "two_sigmoid")
POINTS = (-50.0, -1e-12, 0.0, 0.5, 50.0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -- the range of beta ------------------------------------------------------------------------------------------------


def test_standardised_ends_and_middle():
    t = standardize_beta(torch.tensor([0.01, 1.0, 10.0, math.exp(-1.1512925464970227)], dtype=F64), 0.01, 10.0)
    expected = torch.tensor([-math.sqrt(3), 0.5773502692, math.sqrt(3), 0.0], dtype=F64)
    torch.testing.assert_close(t, expected, atol=5e-11, rtol=0)


def test_standardised_slope():
    eta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(standardize_beta(eta.exp(), 0.01, 10.0), eta)
    assert slope.item() == pytest.approx(0.501480, abs=5e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (torch.float32, 1e-6)])
def test_beta_survives_the_round_trip(dtype, tolerance):
    beta = beta_grid(101, 0.01, 10.0).to(dtype)
    back = unstandardize_beta(standardize_beta(beta, 0.01, 10.0), 0.01, 10.0)
    torch.testing.assert_close(back, beta, rtol=tolerance, atol=0)
    t = torch.linspace(-math.sqrt(3), math.sqrt(3), 101, dtype=dtype)
    again = standardize_beta(unstandardize_beta(t, 0.01, 10.0), 0.01, 10.0)
    torch.testing.assert_close(again, t, rtol=0, atol=2 * tolerance)


def test_a_range_of_one_point_stands_at_zero():
    assert torch.equal(standardize_beta(torch.tensor([0.5, 0.5]), 0.5, 0.5), torch.zeros(2))
    assert unstandardize_beta(torch.tensor([0.0, 1.7], dtype=F64), 0.5, 0.5).tolist() == pytest.approx([0.5, 0.5])


def test_grid_is_even_in_the_logarithm_and_ends_exactly():
    grid = beta_grid(20, 0.01, 10.0)
    assert (grid[0].item(), grid[-1].item()) == (0.01, 10.0)
    steps = grid.log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(19), rtol=1e-12, atol=0)
    assert beta_grid(1, 0.01, 10.0).item() == pytest.approx(math.sqrt(0.1))


RANGES = [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.1, math.nan), (0.1, math.inf)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_bad_range_is_named(low, high):
    message = rf"0 < low <= high, both finite; got low={low}, high={high}"
    for call in (
        lambda: standardize_beta(torch.ones(1), low, high),
        lambda: unstandardize_beta(torch.ones(1), low, high),
        lambda: beta_grid(3, low, high),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_grid_without_points_is_refused():
    with pytest.raises(ValueError, match="num must be at least 1; got 0"):
        beta_grid(0, 0.01, 10.0)


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_draw_in_each_stratum_of_the_global_batch(world_size):
    ranks = [stratified_uniform(8, 5, 0, 1, rank=rank, world_size=world_size) for rank in range(world_size)]
    strata = (torch.cat(ranks) * 8 * world_size).floor().long()
    assert strata.sort().values.tolist() == list(range(8 * world_size))
    assert strata.tolist() != list(range(8 * world_size)), "the strata are dealt out at random"


def test_two_ranks_draw_what_one_rank_draws_for_both():
    whole = stratified_uniform(16, 5, 3, 1)
    for rank in range(2):
        # DistributedSampler gives rank r the samples r, r + 2, r + 4, ...
        assert torch.equal(stratified_uniform(8, 5, 3, 1, rank=rank, world_size=2), whole[rank::2])


def test_each_draw_alone_is_uniform():
    draws = torch.stack([stratified_uniform(4, 0, step) for step in range(3000)])
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert abs(torch.corrcoef(draws.T)[0, 1] + 1 / 3) < 0.08, "strata exclude each other: correlation -1/(n - 1)"


def test_draws_follow_the_address_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first = stratified_uniform(8, 5, 3, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for other in ((6, 3, 1), (5, 1, 3), (5, 3, 2)):
        assert not torch.equal(stratified_uniform(8, *other), first)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_gradient_jvp_and_vmap_are_finite_everywhere(activation, dtype):
    def gate(x):
        return gate_activation(x, activation)

    x = torch.tensor(POINTS, dtype=dtype)
    gradient = torch.func.vmap(torch.func.grad(gate))(x)
    value, tangent = torch.func.jvp(gate, (x,), (torch.ones_like(x),))
    for result in (gate(x), torch.func.vmap(gate)(x), gradient, value, tangent):
        assert result.isfinite().all()
    torch.testing.assert_close(torch.func.vmap(gate)(x), gate(x), rtol=0, atol=0)
    torch.testing.assert_close(tangent, gradient)


def test_square_root_gate_at_minus_one():
    x = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    gate = gate_activation(x, "sqrt")
    gate.backward()
    assert (gate.item(), x.grad.item()) == pytest.approx((0.795060, -0.231353), abs=5e-7)


@pytest.mark.parametrize("point", [0.0, 0.5, 50.0])
def test_a_closed_gate_is_zero_with_zero_derivatives(point):
    x = torch.tensor(point)
    value, tangent = torch.func.jvp(lambda v: gate_activation(v, "sqrt"), (x,), (torch.tensor(1.0),))
    assert (value.item(), tangent.item()) == (0.0, 0.0)
    assert torch.func.grad(lambda v: gate_activation(v, "sqrt"))(x).item() == 0.0


def test_gates_equal_their_formulas_and_their_gradients_finite_differences():
    x = torch.cat([torch.linspace(-6, -0.05, 40, dtype=F64), torch.linspace(0.05, 3, 20, dtype=F64)])
    formulas = {
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "sqrt": torch.sqrt(torch.relu(1 - torch.exp(x))),
        "two_sigmoid": 2 / (1 + torch.exp(-x)),
    }
    for activation, expected in formulas.items():
        torch.testing.assert_close(gate_activation(x, activation), expected, rtol=1e-12, atol=1e-14)
        assert torch.autograd.gradcheck(lambda v, a=activation: gate_activation(v, a), x.clone().requires_grad_())


@pytest.mark.parametrize("x", [-1e-9, -1e-7, -1e-5])
def test_square_root_gate_does_not_lose_tiny_arguments_in_float32(x):
    assert gate_activation(torch.tensor(x), "sqrt").item() == pytest.approx(math.sqrt(-x), rel=1e-5)


def test_an_unknown_gate_is_named():
    with pytest.raises(ValueError, match="must be 'sigmoid', 'sqrt' or 'two_sigmoid'; got 'tanh'"):
        gate_activation(torch.zeros(1), "tanh")


# -- rates and distortions --------------------------------------------------------------------------------------------


def test_rate_is_the_divergence_from_the_standard_normal():
    mu, logvar = randn(7, 3), randn(7, 3, seed=1)
    expected = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mu, logvar), expected, rtol=1e-12, atol=1e-14)


def test_bernoulli_distortion_is_the_negative_log_likelihood_of_each_image():
    logits, target = randn(5, 1, 3, 3), (randn(5, 1, 3, 3, seed=1) > 0).double()
    expected = -Bernoulli(logits=logits).log_prob(target).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_distortion(logits, target), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        bernoulli_distortion(torch.sigmoid(logits), target, logits=False), expected, rtol=1e-10, atol=1e-12
    )


def test_gaussian_distortion_with_its_constant_is_a_density():
    mean, target = randn(5, 4), randn(5, 4, seed=1)
    expected = -Normal(mean, math.sqrt(0.3)).log_prob(target).sum(1)
    torch.testing.assert_close(gaussian_distortion(mean, target, variance=0.3, constant=True), expected, rtol=1e-12,
                               atol=0)  # fmt: skip
    bare = gaussian_distortion(mean, target, variance=0.3)
    torch.testing.assert_close(bare, expected - 2 * math.log(2 * math.pi * 0.3), rtol=1e-12, atol=1e-13)


def test_squared_error_is_twice_the_gaussian_distortion():
    mean, target = randn(5, 2, 2), randn(5, 2, 2, seed=1)
    expected = ((mean - target) ** 2).sum((1, 2))
    torch.testing.assert_close(squared_error_distortion(mean, target), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(2 * gaussian_distortion(mean, target), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distortions_of_half_precision_outputs_are_summed_in_float32(dtype):
    # 5000 errors of one: bfloat16 stops counting at 256 and float16 at 2048.
    reconstruction, target = torch.zeros(2, 5000, dtype=dtype), torch.ones(2, 5000, dtype=dtype)
    for values, expected in (
        (squared_error_distortion(reconstruction, target), 5000.0),
        (gaussian_distortion(reconstruction, target), 2500.0),
        (bernoulli_distortion(reconstruction, target), 5000 * math.log(2)),
    ):
        assert values.dtype == torch.float32
        assert values.tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_probabilities_work_under_autocast():
    probabilities, target = torch.full((2, 3), 0.25), torch.ones(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        values = bernoulli_distortion(probabilities, target, logits=False)
    assert values.tolist() == pytest.approx([3 * math.log(4)] * 2, rel=1e-6)


def test_sigma_vae_takes_the_variance_at_which_the_batch_is_most_likely():
    mean, target = randn(6, 4), randn(6, 4, seed=1)
    distortion, variance = sigma_vae_distortion(mean, target)
    assert variance.item() == pytest.approx(F.mse_loss(mean, target).item(), rel=1e-12)
    at = gaussian_distortion(mean, target, variance.item(), constant=True)
    torch.testing.assert_close(distortion, at, rtol=1e-12, atol=1e-12)
    for factor in (0.99, 1.01):
        other = gaussian_distortion(mean, target, factor * variance.item(), constant=True)
        assert other.mean() > distortion.mean()


def test_sigma_vae_survives_a_perfect_reconstruction():
    distortion, variance = sigma_vae_distortion(torch.ones(2, 3), torch.ones(2, 3))
    assert distortion.isfinite().all()
    assert variance > 0


def test_free_bits_charge_nothing_below_the_floor():
    kl = torch.tensor([[0.1, 2.0, 0.9], [0.3, 4.0, 0.9]], dtype=F64, requires_grad=True)
    rate = free_bits_rate(kl, 0.5)
    assert rate.item() == pytest.approx(0.5 + 3.0 + 0.9)
    (gradient,) = torch.autograd.grad(rate, kl)
    assert gradient.tolist() == [[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]
    assert free_bits_rate(kl, 0.0).item() == pytest.approx(kl.mean(0).sum().item())


# -- total correlation ------------------------------------------------------------------------------------------------


def posteriors(batch=6, latents=3):
    mu, logvar = randn(batch, latents), randn(batch, latents, seed=1) - 1
    return mu + torch.exp(logvar / 2) * randn(batch, latents, seed=2), mu, logvar


@pytest.mark.parametrize("estimator", ["mws", "mss"])
@pytest.mark.parametrize("dataset_size", [1, 6, 5000])
def test_the_three_terms_add_up_to_the_monte_carlo_rate(estimator, dataset_size):
    z, mu, logvar = posteriors()
    expected = (Normal(mu, (logvar / 2).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
    total = sum(total_correlation_terms(z, mu, logvar, dataset_size, estimator))
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-11)
    single = sum(total_correlation_terms(z.float(), mu.float(), logvar.float(), dataset_size, estimator))
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def log_densities(z, mu, logvar):
    """log q(z_i | x_m) per latent, by loops."""
    table = torch.zeros(len(z), len(z), z.shape[1], dtype=z.dtype)
    for i, m in itertools.product(range(len(z)), repeat=2):
        table[i, m] = Normal(mu[m], (logvar[m] / 2).exp()).log_prob(z[i])
    return table


def test_minibatch_weights_give_the_terms_of_the_formula():
    z, mu, logvar = posteriors()
    density = log_densities(z, mu, logvar)
    joint = density.sum(-1).exp().sum(1) / (6 * 100)
    product = (density.exp().sum(1) / (6 * 100)).prod(-1)
    information, correlation, dimension_wise = total_correlation_terms(z, mu, logvar, 100)
    own = density.diagonal(dim1=0, dim2=1).sum(0)
    torch.testing.assert_close(information, own - joint.log(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(correlation, joint.log() - product.log(), rtol=1e-10, atol=1e-11)
    prior = Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(dimension_wise, product.log() - prior, rtol=1e-10, atol=1e-11)


def test_stratified_weights_are_unbiased():
    """Averaged over all batches that hold a sample, the estimate of q(z) is the average over the whole data set."""
    z, mu, logvar = posteriors(batch=5, latents=2)
    expected = log_densities(z, mu, logvar)[0].sum(-1).exp().mean()
    estimates = []
    for others in itertools.permutations(range(1, 5), 2):
        batch = [0, *others]
        information, _, _ = total_correlation_terms(z[batch], mu[batch], logvar[batch], 5, "mss")
        own = Normal(mu[0], (logvar[0] / 2).exp()).log_prob(z[0]).sum()
        estimates.append(torch.exp(own - information[0]))
    torch.testing.assert_close(torch.stack(estimates).mean(), expected, rtol=1e-12, atol=0)


def test_bad_estimators_are_named():
    z, mu, logvar = posteriors()
    with pytest.raises(ValueError, match="dataset_size must be at least 1; got 0"):
        total_correlation_terms(z, mu, logvar, 0)
    with pytest.raises(ValueError, match="must be 'mws' or 'mss'; got 'best'"):
        total_correlation_terms(z, mu, logvar, 10, "best")
    with pytest.raises(ValueError, match="'mss' estimator needs a batch of at least two samples; got one"):
        total_correlation_terms(z[:1], mu[:1], logvar[:1], 10, "mss")


# -- schedules --------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": [1.0] * 20,
    "monotonic": [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6] + [1] * 14,
    "cyclical": [0, 0.4, 0.8, 1, 1] * 4,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_of_twenty_epochs(schedule):
    weights = [kl_weight(epoch / 20, schedule) for epoch in range(20)]
    assert weights == pytest.approx(SCHEDULES[schedule], abs=1e-8)


def test_the_published_schedules_of_two_hundred_epochs():
    monotonic = [kl_weight(epoch / 200, "monotonic") for epoch in range(200)]
    assert monotonic.index(1.0) == 60
    cyclical = [kl_weight(epoch / 200, "cyclical") for epoch in range(200)]
    assert [epoch for epoch, weight in enumerate(cyclical) if weight == 0.0] == [0, 50, 100, 150]


@pytest.mark.parametrize("num_cycles", [3, 7, 11, 49])
def test_every_cycle_starts_at_zero_whatever_the_rounding(num_cycles):
    total = 5 * num_cycles
    starts = [kl_weight(5 * cycle / total, "cyclical", num_cycles=num_cycles) for cycle in range(num_cycles)]
    assert starts == [0.0] * num_cycles


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="must be 'constant', 'monotonic' or 'cyclical'; got 'linear'"):
        kl_weight(0.5, "linear")
