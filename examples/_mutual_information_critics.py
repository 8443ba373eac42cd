"""Experiments M4 to M6 and M8: trained critics and proposals, on Gaussians whose information is known."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._resources import load_script
from lightning_ext.data import CorrelatedGaussianDataModule, SimulatedPairsDataModule
from lightning_ext.functional import giwae_lower, iwae_bound, seeded_generator
from lightning_ext.modules import (
    BarberAgakovModule,
    CriticModule,
    GIWAEModule,
    MINEAISModule,
    measure_implicit_bound,
    measure_mutual_information,
)
from lightning_ext.nn import ConcatenatedCritic, GaussianProposal, LinearGaussianModel, MLPEncoder, QuadraticCritic

training: Any = load_script(Path(__file__).with_name("_mutual_information_training.py"))

DIM, RHO, BATCH, TRAINED, HELD_OUT = 5, 0.98, 128, 2000, 1024
LEARNING_RATES = (0.1, 0.02)
BASELINES: Mapping[str, dict[str, Any]] = {
    "InfoNCE": {"objective": "infonce"},
    "MINE-DV": {"objective": "mine", "num_negatives": 1},
    "MINE-F": {"objective": "nwj", "num_negatives": 1},
    "DV, all pairs of a batch": {"objective": "dv"},
}
CHAINS, STEPS = 8, 300
GIWAE_SAMPLES, GIWAE_STEPS = 64, 1500
NATS, SCAN_DIM, SCAN_STEPS, SCAN_PAIRS, SCAN_SAMPLES = (1, 5, 10, 20, 40, 80), 20, 500, 128, 10_000


def adam(steps: int, rate: float) -> Any:
    """A mixin: Adam along a cosine."""

    class Cosine(pl.LightningModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=rate)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Cosine


def fitted(
    kind: type[pl.LightningModule], arguments: Sequence[Any], data: Any, steps: int, rate: float, **kw: Any
) -> Any:
    """A module after so many steps."""
    module = type(kind.__name__, (adam(steps, rate), kind), {})(*arguments, **kw)
    training.trainer(max_steps=steps, limit_val_batches=0, gradient_clip_val=10.0).fit(module, data)
    return module


def logged(module: pl.LightningModule, x: Tensor, z: Tensor) -> dict[str, float]:
    """What it logs of held-out pairs, without the names' first part."""
    loader = DataLoader(TensorDataset(x, z), BATCH)
    [found] = training.trainer().test(module, loader, verbose=False)
    return {name.removeprefix("mutual_information/"): value for name, value in found.items()}


# -- M4 and M5 ---------------------------------------------------------------------------------------------------------


def implicit_bound(critic: QuadraticCritic, x: Tensor, z: Tensor) -> float:
    """The implicit bound of a quadratic critic on these pairs, whose normaliser is known."""
    with torch.no_grad():
        wide = 1 + critic.z_log_curvature.exp()
        log_normaliser = critic(x, torch.zeros_like(z)) + 0.5 * (
            ((x @ critic.coupling).square() / wide).sum(1) - wide.log().sum()
        )
        return float((critic(x, z) - log_normaliser).mean())


@dataclasses.dataclass(frozen=True)
class Learned:
    """A trained critic: its own objective on held-out pairs, its implicit bound, and what annealing says of that."""

    own: float
    implicit: float
    certified: float
    forward: float


def _data(seed: int) -> CorrelatedGaussianDataModule:
    return CorrelatedGaussianDataModule(DIM, RHO, num_train=BATCH * TRAINED, batch_size=BATCH, seed=seed)


def held_out(seed: int) -> tuple[Tensor, Tensor]:
    """Pairs that nothing was trained on."""
    return _data(seed).draw(HELD_OUT, seeded_generator(seed, 77))


def _learned(critic: QuadraticCritic, own: float | None, seed: int) -> Learned:
    x, z = (part.double() for part in held_out(seed))
    critic = critic.double().eval()  # InfoNCE lets functions of x alone grow until float32 rounds the rest away
    found = measure_implicit_bound(critic, x, z, num_chains=CHAINS, num_steps=STEPS, seed=seed).values
    certified, forward = float(found["lower"]), float(found["estimate"])
    return Learned(certified if own is None else own, implicit_bound(critic, x, z), certified, forward)


@functools.cache
def mine_ais(seed: int) -> Learned:
    """Trained by contrastive divergence, certified."""
    with training.quiet(), training.told(f"M4, MINE-AIS, seed {seed}"):
        pl.seed_everything(seed, verbose=False)
        module = fitted(MINEAISModule, [QuadraticCritic(DIM, DIM)], _data(seed), TRAINED, LEARNING_RATES[0], seed=seed)
        return _learned(module.critic, None, seed)


@functools.cache
def baseline(name: str, rate: float, seed: int) -> Learned:
    """Trained on samples alone."""
    with training.quiet(), training.told(f"M4, {name}, lr {rate:g}, seed {seed}"):
        pl.seed_everything(seed, verbose=False)
        module = fitted(CriticModule, [QuadraticCritic(DIM, DIM)], _data(seed), TRAINED, rate, **BASELINES[name])
        own = next(v for key, v in logged(module, *held_out(seed)).items() if not key.endswith("stderr"))
        return _learned(module.critic, own, seed)


# -- M6 ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ordered:
    """Lower bounds of one proposal on the same samples, and the information."""

    ba: float
    giwae: float
    best: float
    iwae: float
    truth: float
    difference: float


@functools.cache
def giwae(seed: int) -> Ordered:
    """A posterior with correlated latents, and proposals without."""
    weight = torch.tensor([[1.0, 0.9], [0.9, 1.0], [0.5, 0.5]])
    model = LinearGaussianModel(weight, torch.zeros(3), 0.3)
    with training.quiet(), training.told(f"M6, GIWAE, seed {seed}"):
        pl.seed_everything(seed, verbose=False)
        data = SimulatedPairsDataModule(model, BATCH * GIWAE_STEPS, 1, BATCH, seed=seed)
        parts = GaussianProposal(MLPEncoder([3], [32], 2)), ConcatenatedCritic(3, 2, [64, 64])
        module = fitted(GIWAEModule, parts, data, GIWAE_STEPS, 0.01, num_samples=GIWAE_SAMPLES, seed=seed).eval()
        x, z = model.simulate(8 * HELD_OUT, seeded_generator(seed, 77))
        module.set_address("test", 0)
        with torch.no_grad():
            log_q, log_prior, critic = module.terms(x, z)
            module.set_address("test", 0)
            proposal = module.proposal(x)
            others = _again(module, x)
            samples = torch.cat([z[None], others])
            log_w = model.log_likelihood(x, samples) + model.prior(samples) - proposal.log_prob(samples)
            best = giwae_lower(log_q.double(), log_prior.double(), log_w.double())
            iwae = iwae_bound(model.log_likelihood(x, z).double(), log_w.double())
            own = giwae_lower(log_q.double(), log_prior.double(), critic.double())
        truth = 0.5 * torch.logdet(torch.eye(2) + weight.mT @ weight / 0.09)
        return Ordered(
            float((log_q - log_prior).mean()), float(own.mean()), float(best.mean()), float(iwae.mean()),
            float(truth), float((best - iwae).abs().max()),
        )  # fmt: skip


def _again(module: GIWAEModule, x: Tensor) -> Tensor:
    """The samples of the proposal that ``terms`` drew at this address."""
    seen: list[Tensor] = []
    hook = module.critic.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    module.terms(x, torch.zeros(len(x), 2))
    hook.remove()
    return seen[0][1:]


# -- M8 ----------------------------------------------------------------------------------------------------------------


@functools.cache
def scan(seed: int) -> Mapping[str, Sequence[tuple[float, float | None]]]:
    """For each estimator and each information a lower bound or estimate, and an upper bound where there is one."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for nats in NATS:
        with training.quiet(), training.told(f"M8, {nats} nats, seed {seed}"):
            pl.seed_everything(seed, verbose=False)
            for name, sides in _scanned(nats, seed).items():
                found.setdefault(name, []).append(sides)
    return found


def scan_error(nats: float) -> float:
    """Standard error of the mean of log p(x | z) - log p(x) over the pairs of a sandwich."""
    correlated = -math.expm1(-2 * nats / SCAN_DIM)  # squared correlation of each dimension; its variance as well
    return math.sqrt(SCAN_DIM * correlated / SCAN_PAIRS)


def _scanned(nats: float, seed: int) -> dict[str, tuple[float, float | None]]:
    sigma = 1 / math.sqrt(math.expm1(2 * nats / SCAN_DIM))
    model = LinearGaussianModel(torch.eye(SCAN_DIM), torch.zeros(SCAN_DIM), sigma)
    data = SimulatedPairsDataModule(model, BATCH * SCAN_STEPS, 1, BATCH, seed=seed)
    x, z = model.simulate(HELD_OUT, seeded_generator(seed, 78))
    measured = measure_mutual_information(
        model, num_points=SCAN_PAIRS, num_samples=SCAN_SAMPLES, num_chains=CHAINS, num_steps=200, seed=seed
    ).values
    results: dict[str, tuple[float, float | None]] = {
        name: (float(measured[f"{key}/lower"]), float(measured[f"{key}/upper"]))
        for name, key in (("AIS", "ais"), (f"IWAE, K = {SCAN_SAMPLES:,}", "iwae"))
    }
    learn = functools.partial(fitted, data=data, steps=SCAN_STEPS)

    def proposal() -> nn.Module:
        return GaussianProposal(nn.Linear(SCAN_DIM, 2 * SCAN_DIM))

    ba = logged(learn(BarberAgakovModule, [proposal()], rate=0.02), x, z)
    results["Barber-Agakov"] = ba["ba/lower"], None
    mixed = logged(learn(GIWAEModule, [proposal(), QuadraticCritic(SCAN_DIM, SCAN_DIM)], rate=0.02, seed=seed), x, z)
    results["GIWAE, K = 64"] = mixed["giwae/lower"], None
    for name in ("InfoNCE", "DV, all pairs of a batch"):
        module = learn(CriticModule, [QuadraticCritic(SCAN_DIM, SCAN_DIM)], rate=0.02, **BASELINES[name])
        own = next(v for key, v in logged(module, x, z).items() if not key.endswith("stderr"))
        results[name] = own, None
    energy = learn(MINEAISModule, [QuadraticCritic(SCAN_DIM, SCAN_DIM)], rate=0.1, seed=seed)
    certified = measure_implicit_bound(
        energy.critic.eval(), x[:SCAN_PAIRS], z[:SCAN_PAIRS], num_chains=CHAINS, num_steps=200, seed=seed
    ).values
    results["MINE-AIS, certified"] = float(certified["lower"]), None
    return results
