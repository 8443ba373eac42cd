"""Both sides of known information, with chains in pieces and samples in chunks."""

import math

import pytest
import torch
from torch.distributions import Normal

from lightning_ext.functional import (
    AnnealingPath,
    DiagonalGaussian,
    ais_lower,
    ais_upper,
    annealed_weights,
    importance_log_means,
    iwae_bound,
    linear_gaussian_information,
    sigmoid_schedule,
    tune_step_sizes,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear:
    def __init__(self, num, seed=0):
        self.w, generator = torch.randn(8, 3, generator=seeded(5), dtype=F64), seeded(seed)
        self.z = torch.randn(num, 3, generator=generator, dtype=F64)
        self.x = self.z @ self.w.T + 0.5 * torch.randn(num, 8, generator=generator, dtype=F64)
        self.information = linear_gaussian_information(self.w, 0.5).item()
        self.path = AnnealingPath(DiagonalGaussian(torch.zeros((), dtype=F64), 1.0), self.log_likelihood)

    def log_likelihood(self, z):
        return Normal(z @ self.w.T, 0.5).log_prob(self.x).sum(-1)

    def draw(self, num, generator):
        return torch.randn(num, *self.z.shape, generator=generator, dtype=F64)


def measured(steps, num=400, **options):
    model, pilot, betas = Linear(num), Linear(16, seed=1), sigmoid_schedule(steps)
    sizes = tune_step_sizes(pilot.path, pilot.draw(8, seeded()), betas, num_leapfrog=6, rounds=6, generator=seeded(2))
    return model, annealed_weights(
        model.path, model.draw, model.z, betas, sizes, num_leapfrog=6, **{"num_chains": 8, "seed": 3, **options}
    )


def test_the_information_lies_between_and_the_gap_falls_with_the_steps():
    gaps = []
    for steps in (10, 40):
        model, found = measured(steps)
        scale = model.log_likelihood(model.z)
        upper, lower = ais_upper(scale, found.forward), ais_lower(scale, found.reverse)
        errors = [4 * side.std().item() / math.sqrt(len(side)) for side in (upper, lower)]
        assert lower.mean().item() - errors[1] < model.information < upper.mean().item() + errors[0]
        gaps.append((upper - lower).mean().item())
        assert 0.4 < found.accept < 0.95
        assert found.divergent < 0.01
        assert (found.ess >= 1).all()
        assert (found.ess <= 8 + 1e-9).all()
    assert 0 < gaps[1] < 0.4 * gaps[0]


def test_pieces_are_repeatable_and_independent():
    _, whole = measured(4, num=5, num_chains=6)
    _, again = measured(4, num=5, num_chains=6)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    _, pieces = measured(4, num=5, num_chains=6, chunk_size=4)
    assert pieces.forward.shape == pieces.reverse.shape == (6, 5)
    assert len(pieces.forward.flatten().unique()) == 30
    _, other = measured(4, num=5, num_chains=6, counters=(1,))
    assert not (whole.forward == other.forward).any()
    _, single = measured(4, num=5, num_chains=4)
    torch.testing.assert_close(single.forward, pieces.forward[:4])  # a piece does not depend on the others


def test_progress_counts_every_temperature():
    seen = []
    measured(5, num=2, num_chains=3, chunk_size=2, progress=seen.append)
    assert sum(seen) == 2 * 2 * 5


def test_one_interval_is_importance_sampling_from_the_prior():
    model = Linear(50)
    found = annealed_weights(
        model.path, model.draw, model.z, torch.tensor([0.0, 1.0]), torch.tensor([0.1]), num_chains=4
    )
    torch.testing.assert_close(found.reverse, model.log_likelihood(model.z).expand(4, 50))
    assert found.accept.isnan()
    assert found.divergent == 0


def test_importance_samples_in_chunks_are_those_at_once():
    model, seen = Linear(7), []
    drawn = model.draw(100, seeded())
    pieces = iter(drawn.split(33))
    upper, lower = importance_log_means(
        model.log_likelihood, lambda num, _: next(pieces), model.z, 100, chunk_size=33, progress=seen.append
    )
    weights, scale = model.log_likelihood(drawn), model.log_likelihood(model.z)
    torch.testing.assert_close(scale - upper, iwae_bound(scale, weights))
    own = torch.cat([scale[None], weights[:-1]])
    torch.testing.assert_close(scale - lower, iwae_bound(scale, own))
    assert seen == [33, 33, 33, 1]
    assert upper.dtype == F64
    alone = importance_log_means(model.log_likelihood, model.draw, model.z, 1, generator=seeded())
    torch.testing.assert_close(alone[1], scale)


def test_importance_bounds_hold_around_the_information():
    model = Linear(2000)
    upper, lower = importance_log_means(model.log_likelihood, model.draw, model.z, 300, generator=seeded(9))
    scale = model.log_likelihood(model.z)
    assert (scale - lower).mean() < model.information < (scale - upper).mean()
    assert (scale - lower).max() <= math.log(300) + 1e-9


def test_what_has_no_weight_is_refused():
    model = Linear(3)
    with pytest.raises(ValueError, match="num_samples and chunk_size must be at least 1; got 0 and 256"):
        importance_log_means(model.log_likelihood, model.draw, model.z, 0)
    with pytest.raises(ValueError, match=r"data points \[1\] is not finite"):
        importance_log_means(lambda z: torch.where(torch.arange(3) == 1, -torch.inf, z.sum(-1)), model.draw, model.z, 4)
    with pytest.raises(ValueError, match="weights are NaN"):
        importance_log_means(
            lambda z: z.sum(-1) if len(z) == 1 else torch.full(z.shape[:-1], torch.nan), model.draw, model.z, 4
        )
    for options in ({"num_chains": 0}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1; got 0"):
            measured(2, num=2, **options)
