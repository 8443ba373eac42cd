"""Experiments M1 to M3 and M7: bounds of generative models, trained ones and linear ones in which all is known."""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ext._resources import load_script
from lightning_ext.functional import (
    annealed_weights,
    barber_agakov_upper,
    linear_gaussian_information,
    log_mean_exp,
    seeded_generator,
    sigmoid_schedule,
    tune_step_sizes,
)
from lightning_ext.modules import MutualInformationMeasurement, measure_mutual_information
from lightning_ext.nn import LatentModel, LinearGaussianModel, latent_model_from_vae

training: Any = load_script(Path(__file__).with_name("_mutual_information_training.py"))

PAIRS, CHAINS, LEAPFROG = 64, 8, 10
STEPS, SAMPLES = (50, 200, 1000), (1, 1000, 100_000)
LINEAR_STEPS, LINEAR_PAIRS = (10, 50, 200), 500
HIGH_STEPS, HIGH_PAIRS, HIGH_CHAINS = (100, 400), 100, 16
BETAS, RATE_PAIRS = (0.005, 0.02, 0.08, 0.3, 1.0), 128


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Two sides in nats, and the wall clock that they took."""

    lower: float
    upper: float
    seconds: float

    @property
    def gap(self) -> float:
        """Upper less lower."""
        return self.upper - self.lower


def _bounds(found: MutualInformationMeasurement, name: str, seconds: float) -> Bounds:
    return Bounds(float(found.values[f"{name}/lower"]), float(found.values[f"{name}/upper"]), seconds)


# -- M1: a VAE of the digits -------------------------------------------------------------------------------------------


@functools.cache
def annealed(seed: int, steps: int) -> Bounds:
    """Chains from the prior."""
    model = training.digits_vae(seed)
    with training.quiet(), training.told(f"M1, AIS, T = {steps}, seed {seed}"):
        start = time.perf_counter()
        found = measure_mutual_information(
            model, bounds=["ais"], num_points=PAIRS, num_chains=CHAINS, num_steps=steps, num_leapfrog=LEAPFROG,
            seed=seed,
        )  # fmt: skip
        return _bounds(found, "ais", time.perf_counter() - start)


@functools.cache
def weighted(seed: int, samples: int, proposal: str = "prior") -> Bounds:
    """Importance samples of the same pairs."""
    model = training.digits_vae(seed)
    with training.quiet(), training.told(f"M1, IWAE, K = {samples:,} from the {proposal}, seed {seed}"):
        start = time.perf_counter()
        found = measure_mutual_information(
            model, bounds=["iwae"], num_points=PAIRS, num_samples=samples, proposal=proposal, seed=seed
        )
        return _bounds(found, "iwae", time.perf_counter() - start)


# -- M2 and M3: linear models ------------------------------------------------------------------------------------------


def seeded_model() -> LinearGaussianModel:
    """The specification's example: 4 latents, 10 numbers, 6.0068 nats."""
    generator = torch.Generator().manual_seed(1)
    weight = 0.5 * torch.randn(10, 4, generator=generator, dtype=torch.float64)
    return LinearGaussianModel(weight, torch.randn(10, generator=generator, dtype=torch.float64), 0.3)


def precise_model(seed: int = 0) -> LinearGaussianModel:
    """20 latents, 50 numbers with little noise, some 80 nats."""
    weight = 0.5 * torch.randn(50, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LinearGaussianModel(weight, torch.zeros(50, dtype=torch.float64), 0.05)


def information(model: LinearGaussianModel) -> float:
    """Its mutual information in nats."""
    return float(linear_gaussian_information(model.weight, model.sigma))


def log_evidence(model: LinearGaussianModel, x: Tensor) -> Tensor:
    """Exact log p(x), ``(B,)``."""
    eye = torch.eye(len(model.weight), dtype=x.dtype)
    covariance = model.weight @ model.weight.mT + model.sigma**2 * eye
    return torch.distributions.MultivariateNormal(model.bias, covariance).log_prob(x)


@functools.cache
def evidence(kind: str, steps: int, seed: int) -> Mapping[str, tuple[float, float]]:
    """Estimates of log p(x) less the truth, with standard errors, by scheme; lower ones end in "below"."""
    model, pairs, chains = (
        (seeded_model(), LINEAR_PAIRS, CHAINS) if kind == "seeded" else (precise_model(), HIGH_PAIRS, HIGH_CHAINS)
    )
    with training.quiet(), training.told(f"{kind} linear model, T = {steps}, seed {seed}"):
        betas = sigmoid_schedule(steps)
        pilot, _ = model.simulate(16, seeded_generator(seed, 0))
        draws = seeded_generator(seed, 1)
        start = model.sample_prior(64, draws).view(4, 16, -1)
        sizes = tune_step_sizes(model.path(pilot), start, betas, num_leapfrog=LEAPFROG, rounds=6, generator=draws)
        x, z = model.simulate(pairs, seeded_generator(seed, 2))

        def prior(num: int, generator: torch.Generator | None) -> Tensor:
            return model.sample_prior(num * pairs, generator).view(num, pairs, -1)

        found = annealed_weights(
            model.path(x), prior, z, betas, sizes, num_chains=chains, num_leapfrog=LEAPFROG, seed=seed, counters=(3,)
        )
        estimates = {
            "independent below": log_mean_exp(found.forward),
            "single": found.reverse.mean(0),
            "independent": log_mean_exp(torch.cat([found.reverse[:1], found.forward[1:]])),
            "coupled": -log_mean_exp(-found.reverse),
        }
        errors = {name: value - log_evidence(model, x) for name, value in estimates.items()}
        return {name: (float(e.mean()), float(e.std() / math.sqrt(pairs))) for name, e in errors.items()}


# -- M7: one VAE, many rates -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtBeta:
    """What a multi-rate VAE's generative model and its encoder say at one beta."""

    beta: float
    bounds: Bounds
    rate: float
    encoder_upper: float
    data_rate: float


@functools.cache
def rates(seed: int) -> Sequence[AtBeta]:
    """Sandwich, rate and the encoder's upper bound at every beta, on pairs that the model simulates."""
    vae, found = training.multi_rate_vae(seed), []
    for beta in BETAS:
        model = latent_model_from_vae(vae, beta).eval()
        with training.quiet(), training.told(f"M7, beta = {beta:g}, seed {seed}"), torch.no_grad():
            start = time.perf_counter()
            sandwich = measure_mutual_information(
                model, bounds=["ais"], num_points=RATE_PAIRS, num_chains=CHAINS, num_steps=STEPS[1],
                num_leapfrog=LEAPFROG, seed=seed,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            found.append(AtBeta(beta, _bounds(sandwich, "ais", seconds), *encoder_side(model, seed)))
    return found


def encoder_side(model: LatentModel, seed: int, pairs: int = 4096) -> tuple[float, float, float]:
    """The encoder's rate on the model's own data, Barber-Agakov's upper bound with it, and its rate on the digits."""
    generator = seeded_generator(seed, 11)
    x, z = model.simulate(pairs, generator)

    def rate(data: Tensor) -> tuple[Tensor, Tensor]:
        proposal = model.proposal(data)
        assert proposal is not None
        [drawn] = proposal.draw(1, generator)
        return proposal.density(drawn) - model.prior(drawn), drawn

    own, drawn = rate(x)
    upper = barber_agakov_upper(model.log_likelihood(x, z), model.log_likelihood(x, drawn) - own)
    return float(own.mean()), float(upper.mean()), float(rate(training.held_out())[0].mean())
