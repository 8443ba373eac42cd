"""Annealed importance sampling against closed forms: linear-Gaussian models, finite ones, exact posteriors as base."""

import math

import pytest
import torch

from lightning_ext.functional import (
    AnnealingPath,
    DiagonalGaussian,
    ais_forward,
    ais_reverse,
    hmc_kernel,
    linear_schedule,
    log_mean_exp,
    sigmoid_schedule,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear:
    """z ~ N(0, I), x = W z + b + noise of standard deviation 0.3, with all that is known of it."""

    def __init__(self, num, dim=4, events=10):
        generator = seeded(1)
        self.w = 0.5 * torch.randn(events, dim, generator=generator, dtype=F64)
        self.b, self.sigma = torch.randn(events, generator=generator, dtype=F64), 0.3
        self.z = torch.randn(num, dim, generator=generator, dtype=F64)
        self.x = self.z @ self.w.T + self.b + self.sigma * torch.randn(num, events, generator=generator, dtype=F64)
        covariance = self.w @ self.w.T + self.sigma**2 * torch.eye(events, dtype=F64)
        self.evidence = torch.distributions.MultivariateNormal(self.b, covariance).log_prob(self.x)
        self.path = AnnealingPath(DiagonalGaussian(torch.zeros((), dtype=F64), 1.0), self.log_likelihood)

    def log_likelihood(self, z):
        return torch.distributions.Normal(z @ self.w.T + self.b, self.sigma).log_prob(self.x).sum(-1)

    def tempered(self, beta):
        """Mean (B, d) and Cholesky factor of the covariance."""
        precision = torch.eye(self.w.shape[1], dtype=F64) + beta / self.sigma**2 * self.w.T @ self.w
        covariance = torch.linalg.inv(precision)
        return (self.x - self.b) @ self.w @ covariance * beta / self.sigma**2, torch.linalg.cholesky(covariance)

    def draw(self, chains, beta, generator):
        mean, root = self.tempered(beta)
        noise = torch.randn(chains, *mean.shape, generator=generator, dtype=F64)
        return mean + noise @ root.T

    def exact(self, generator):
        """A kernel that forgets where it was."""
        return lambda state, t, beta: (
            self.path.evaluate(self.draw(len(state.position), beta, generator), gradient=False), None
        )  # fmt: skip


def test_schedules():
    torch.testing.assert_close(linear_schedule(5), torch.arange(6, dtype=F64) / 5)
    expected = torch.tensor([0, 0.104994, 0.5, 0.895006, 1], dtype=F64)
    torch.testing.assert_close(sigmoid_schedule(4, 4.0), expected, rtol=0, atol=5e-7)
    torch.testing.assert_close(sigmoid_schedule(7, 1e-4), linear_schedule(7), rtol=0, atol=1e-8)
    steep = sigmoid_schedule(100_000, 20.0)
    assert (steep.diff() > 0).all()
    assert (steep[0].item(), steep[-1].item()) == (0.0, 1.0)
    assert sigmoid_schedule(1).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("betas", "upper", "lower"),
    [
        (linear_schedule(10), 14.7497, 3.4655), (linear_schedule(100), 6.6433, 5.5149),
        (sigmoid_schedule(10), 9.2016, 4.0616), (sigmoid_schedule(100), 6.2586, 5.7672),
        (sigmoid_schedule(100, 8.0), 6.3589, 5.6770),
    ],
)  # fmt: skip
def test_perfect_transitions_give_the_closed_form(betas, upper, lower):
    model, generator = Linear(20_000), seeded()
    scale = model.log_likelihood(model.z)
    forward = ais_forward(model.path, model.draw(1, 0.0, generator), betas, model.exact(generator))
    reverse = ais_reverse(model.path, model.z[None], betas, model.exact(generator))
    for result, expected in ((forward, upper), (reverse, lower)):
        values = (scale - result.log_weights).flatten()
        error = values.std().item() / math.sqrt(values.numel())
        assert values.mean().item() == pytest.approx(expected, abs=4 * error + 1e-4)
        assert error < 0.1


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("last", [False, True])
def test_a_base_that_is_the_posterior_has_no_variance(steps, last):
    """Every weight is the evidence, for every schedule, there and back: constants, order and normalisation."""
    model, generator = Linear(5, dim=1), seeded()
    mean, root = model.tempered(1.0)
    base = DiagonalGaussian(mean, root[0])

    def energy(z):
        return model.path.base(z) + model.log_likelihood(z) - base(z)

    path = AnnealingPath(base, energy)
    start = mean + root[0] * torch.randn(3, 5, 1, generator=generator, dtype=F64)
    for betas in (linear_schedule(steps), sigmoid_schedule(steps, 9.0)):
        kernel = hmc_kernel(path, torch.full((steps,), 0.05), 3, generator)
        for measure in (ais_forward, ais_reverse):
            found = measure(path, start, betas, kernel, last_transition=last)
            torch.testing.assert_close(found.log_weights, model.evidence.expand(3, 5), rtol=0, atol=1e-9)
            torch.testing.assert_close(found.ess, torch.full((5,), 3.0, dtype=F64))
            assert int(found.accept.isnan().sum()) == int(not last)


def one(x=1.3, scale=0.5):
    """z ~ N(0, 1), x = z + scale * noise."""
    noise = torch.distributions.Normal(0.0, torch.tensor(scale, dtype=F64))
    path = AnnealingPath(DiagonalGaussian(torch.zeros((), dtype=F64), 1.0), lambda z: noise.log_prob(x - z).sum(-1))
    evidence = torch.distributions.Normal(0.0, math.sqrt(1 + scale**2)).log_prob(torch.tensor(x, dtype=F64))
    return path, evidence, x / (1 + scale**2), scale / math.sqrt(1 + scale**2)


@pytest.mark.parametrize(("direction", "resample"), [("forward", None), ("forward", "systematic"), ("reverse", None)])
def test_weights_average_to_the_evidence_with_steps_however_bad(direction, resample):
    path, evidence, mean, scale = one()
    generator, chains = seeded(4), 200_000
    z = torch.randn(chains // 1000, 1000, 1, generator=generator, dtype=F64)
    kernel, betas = hmc_kernel(path, torch.full((5,), 1.2), 3, generator), linear_schedule(5)
    if direction == "forward":
        found = ais_forward(path, z, betas, kernel, resample=resample, ess_threshold=0.9, generator=generator)
        values = (log_mean_exp(found.log_weights) - evidence).exp()
    else:
        found = ais_reverse(path, mean + scale * z, betas, kernel)
        values = (log_mean_exp(-found.log_weights) + evidence).exp()
    assert 0.2 < found.accept[:-1].mean() < 0.8
    error = values.std().item() / math.sqrt(len(values))
    assert error < (0.004 if direction == "forward" else 0.03)
    assert values.mean().item() == pytest.approx(1.0, abs=4 * error)


TABLE = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]], dtype=F64)  # rows x, columns z


class Finite:
    """The path from p(z) to p(z | x) on three states, and Metropolis steps to one of the others."""

    def __init__(self, x, generator):
        prior = TABLE.sum(0)
        self.likelihood = (TABLE / prior).log()
        self.path = AnnealingPath(lambda z: prior.log()[z[..., 0]], lambda z: self.likelihood[x, z[..., 0]])
        self.generator = generator

    def __call__(self, state, t, beta):
        z = state.position
        other = self.path.evaluate((z + torch.randint(1, 3, z.shape, generator=self.generator)) % 3, gradient=False)
        ratio = other.log_prob(beta) - state.log_prob(beta)
        accepted = torch.rand(ratio.shape, generator=self.generator, dtype=F64).log() < ratio
        return other.where(accepted, state), None


@pytest.mark.parametrize(
    ("steps", "upper", "lower"), [(1, 0.516089, 0.0), (2, 0.364340, 0.117810), (4, 0.300400, 0.179311)]
)
def test_single_chains_on_a_finite_model_hit_the_enumerated_bounds(steps, upper, lower):
    generator, num = seeded(2), 100_000
    cell = torch.multinomial(TABLE.flatten(), num, replacement=True, generator=generator)
    x, z = cell // 3, cell % 3
    model = Finite(x, generator)
    scale = model.likelihood[x, z]
    start = torch.multinomial(TABLE.sum(0), num, replacement=True, generator=generator)
    forward = ais_forward(model.path, start[None, :, None], linear_schedule(steps), model)
    reverse = ais_reverse(model.path, z[None, :, None], linear_schedule(steps), model)
    for result, expected in ((forward, upper), (reverse, lower)):
        values = (scale - result.log_weights).flatten()
        error = values.std().item() / math.sqrt(num)
        assert values.mean().item() == pytest.approx(expected, abs=4 * error + 1e-6)


def test_resampling_keeps_heavy_chains():
    model, generator = Linear(30), seeded()
    kernel = hmc_kernel(model.path, torch.full((20,), 0.03), 3, generator)
    start = model.draw(64, 0.0, generator)
    plain = ais_forward(model.path, start, sigmoid_schedule(20), kernel)
    kept = ais_forward(model.path, start, sigmoid_schedule(20), kernel, resample="systematic", generator=generator)
    assert kept.ess.mean() > 3 * plain.ess.mean()
    gaps = [(model.evidence - log_mean_exp(found.log_weights)).mean().item() for found in (plain, kept)]
    assert 0 < gaps[1] < gaps[0]


def test_inference_mode_and_progress():
    model, seen = Linear(4), []
    with torch.inference_mode():
        start = torch.randn(3, 4, 4, generator=seeded(), dtype=F64)
        kernel = hmc_kernel(model.path, torch.full((6,), 0.1), 2, seeded(1))
        inside = ais_forward(model.path, start, linear_schedule(6), kernel, progress=seen.append)
    kernel = hmc_kernel(model.path, torch.full((6,), 0.1), 2, seeded(1))
    outside = ais_forward(model.path, start.clone(), linear_schedule(6), kernel)
    assert torch.equal(inside.log_weights, outside.log_weights)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_weights_keep_what_float32_would_lose():
    """A constant of a million nats on top of the log-likelihood shifts every weight by just that."""
    model = Linear(6)
    start, steps = torch.randn(2, 6, 4, generator=seeded(), dtype=F64), torch.full((50,), 0.1)
    shifted = AnnealingPath(model.path.base, lambda z: model.log_likelihood(z) + 1e6)
    found = [ais_forward(path, start, sigmoid_schedule(50, 12.0), hmc_kernel(path, steps, 2, seeded(1))).log_weights
             for path in (model.path, shifted)]  # fmt: skip
    torch.testing.assert_close(found[1] - found[0], torch.full((2, 6), 1e6, dtype=F64), rtol=0, atol=1e-6)
    single = AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: -z.square().sum(-1))
    kernel = hmc_kernel(single, steps, 2, seeded(1))
    assert ais_forward(single, start.float(), linear_schedule(50), kernel).log_weights.dtype == F64


def test_what_is_no_start_or_schedule_is_refused():
    model = Linear(3)
    start, kernel = torch.zeros(2, 3, 4, dtype=F64), hmc_kernel(model.path, torch.ones(4), 1)
    for betas in ([0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0], [1.0]):
        with pytest.raises(ValueError, match="betas must rise from 0 to 1"):
            ais_forward(model.path, start, betas, kernel)
    with pytest.raises(ValueError, match=r"start must have shape \(K, B, d\).*got \(3, 4\)"):
        ais_reverse(model.path, start[0], linear_schedule(4), kernel)
    hole = AnnealingPath(model.path.base, lambda z: torch.where(z[..., 0] > 0, torch.nan, -z.square().sum(-1)))
    with pytest.raises(ValueError, match=r"chains of data points \[1\] start is NaN.*path's base"):
        ais_forward(hole, start.index_fill(1, torch.tensor([1]), 1.0), linear_schedule(4), kernel)
    wall = AnnealingPath(model.path.base, lambda z: torch.where(z[..., 0] > 0, -torch.inf, -z.square().sum(-1)))
    with pytest.raises(ValueError, match=r"data points \[2\] start.*path's end"):
        ais_reverse(wall, start.index_fill(1, torch.tensor([2]), 1.0), linear_schedule(4), kernel)
    empty = ais_forward(wall, start + 1, linear_schedule(1), kernel)  # no mass where it began: that is a weight
    assert (empty.log_weights == -torch.inf).all()
    assert empty.ess.tolist() == [0.0] * 3
    for steps in ([0.1, 0.0], [0.1, torch.nan], [torch.inf]):
        with pytest.raises(ValueError, match="step_sizes must be positive and finite"):
            hmc_kernel(model.path, torch.tensor(steps), 3)
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        linear_schedule(0)
    with pytest.raises(ValueError, match="delta must be positive; got 0"):
        sigmoid_schedule(3, 0)
