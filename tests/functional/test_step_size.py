"""Pilot chains find the step sizes at which measured chains are accepted as asked for."""

import math

import pytest
import torch

from lightning_ext.functional import (
    AnnealingPath,
    DiagonalGaussian,
    DualAveraging,
    ais_forward,
    ais_reverse,
    hmc_kernel,
    sigmoid_schedule,
    tune_step_sizes,
)

PRECISION = torch.linspace(1, 10, 10) ** 2


def narrow():
    """A posterior whose dimensions have scales from 1 / 10 to 0.7."""
    return AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: -0.5 * (PRECISION * (z - 0.5).square()).sum(-1))


def start(direction, chains, generator):
    z = torch.randn(chains, 16, 10, generator=generator)
    return z if direction == "forward" else z / (1 + PRECISION).sqrt() + 0.5 * PRECISION / (1 + PRECISION)


def test_dual_averaging_settles_every_kernel_at_the_target():
    tuned, slopes = DualAveraging(torch.full((3,), 0.1), target=0.8), torch.tensor([0.1, 1.0, 10.0])
    for _ in range(2000):
        tuned.update(torch.exp(-slopes * tuned.step_size))
    torch.testing.assert_close(tuned.averaged, (-math.log(0.8) / slopes).double(), rtol=0.1, atol=0.0)


def test_dual_averaging_is_that_of_hoffman_and_gelman():
    tuned, error, log = DualAveraging(torch.tensor(2.0), 0.65, gamma=0.05, delay=10.0), 0.0, math.log(2.0)
    mean = log
    for k, accept in enumerate((0.2, 0.9, 0.5), 1):
        tuned.update(torch.tensor(accept))
        error += 0.65 - accept
        log = math.log(2.0) - math.sqrt(k) / (0.05 * (k + 10)) * error
        mean = k**-0.75 * log + (1 - k**-0.75) * mean
        assert tuned.step_size.item() == pytest.approx(math.exp(log))
        assert tuned.averaged.item() == pytest.approx(math.exp(mean))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("initial", [1e-4, 30.0])
def test_measured_chains_are_accepted_as_asked_for(direction, initial):
    generator, betas = torch.Generator().manual_seed(0), sigmoid_schedule(30)
    steps = tune_step_sizes(
        narrow(), start(direction, 16, generator), betas, num_leapfrog=10, rounds=16, initial=initial,
        direction=direction, generator=generator,
    )  # fmt: skip
    assert steps.shape == (30,)
    assert steps.dtype == torch.float64
    measure = ais_forward if direction == "forward" else ais_reverse
    kernel = hmc_kernel(narrow(), steps, 10, generator)
    found = measure(narrow(), start(direction, 100, generator), betas, kernel, last_transition=True)
    assert found.accept.mean().item() == pytest.approx(0.65, abs=0.05)
    assert (found.accept - 0.65).abs().max() < 0.25


def test_ranks_agree_through_reduce():
    seen = []

    def reduce(accept):
        seen.append(accept)
        return torch.tensor(0.65)

    steps = tune_step_sizes(
        narrow(), start("forward", 2, None), [0.0, 0.5, 1.0], num_leapfrog=2, rounds=3, initial=0.3, reduce=reduce
    )
    torch.testing.assert_close(steps, torch.full((2,), 0.3, dtype=torch.float64))
    assert len(seen) == 2 * 4


def test_what_cannot_be_tuned_is_refused():
    flat = AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: torch.full(z.shape[:-1], torch.nan) * z.sum(-1))
    with pytest.raises(ValueError, match="no step is accepted"):
        tune_step_sizes(flat, torch.zeros(2, 2, 1), [0.0, 1.0], num_leapfrog=2)
    for wrong in ({"rounds": 0}, {"initial": 0.0}, {"target_accept": 1.0}, {"betas": [0.0]}):
        options = {"betas": [0.0, 1.0], **wrong}
        with pytest.raises(ValueError, match="rounds at least 1"):
            tune_step_sizes(narrow(), torch.zeros(2, 2, 10), num_leapfrog=2, **options)
    with pytest.raises(ValueError, match="direction must be 'forward' or 'reverse'; got 'back'"):
        tune_step_sizes(narrow(), torch.zeros(2, 2, 10), [0.0, 1.0], num_leapfrog=2, direction="back")
