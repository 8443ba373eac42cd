"""Experiments B and C of the MR-VAE reproduction: one multi-rate run against separate beta-VAEs, on small data."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ext._resources import load_script
from lightning_ext.data import DigitsDataModule
from lightning_ext.functional.mrvae import beta_grid
from lightning_ext.modules import BetaVAE, MultiRateVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder

training = load_script(Path(__file__).with_name("_mrvae_training.py"))

PIXELS, HIDDEN, LATENTS = 64, (128, 128), 8
GRID = tuple(beta_grid(20, 0.01, 10.0).tolist())
FRESH_BETAS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0)
DIGITS_BETAS = (0.01, 0.1, 0.5, 1.0, 3.0, 10.0)


class _FreshBatches(Dataset[Tensor]):
    """Whole batches of a distribution known in full: 4 normal latents, 16 tanh units, 64 Bernoulli pixels."""

    def __init__(self, batches: int, batch_size: int, seed: int) -> None:
        weights = torch.Generator().manual_seed(0)  # the distribution is the same for every seed
        self.hidden = torch.randn(4, 16, generator=weights)
        self.pixels = torch.randn(16, PIXELS, generator=weights)
        self.batches, self.batch_size = batches, batch_size
        self.stream = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.batches:
            raise IndexError(index)
        latents = torch.randn(self.batch_size, 4, generator=self.stream)
        return torch.bernoulli(torch.sigmoid(torch.tanh(latents @ self.hidden) @ self.pixels), generator=self.stream)


class FreshData(pl.LightningDataModule):
    """A new batch at every step, so that nothing can be overfitted, and 8,192 test samples, the same for all seeds."""

    def __init__(self, steps: int, seed: int) -> None:
        super().__init__()
        self.steps, self.seed = steps, seed

    def train_dataloader(self) -> DataLoader[Tensor]:
        """One epoch of ``steps`` batches of 128."""
        return DataLoader(_FreshBatches(self.steps, 128, 1000 + self.seed), batch_size=None)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """8 batches of 1,024."""
        return DataLoader(_FreshBatches(8, 1024, 999), batch_size=None)


def networks() -> tuple[MLPEncoder, MLPDecoder]:
    """The same two networks for every model of B and C."""
    return MLPEncoder([PIXELS], HIDDEN, LATENTS), MLPDecoder(LATENTS, HIDDEN, [PIXELS])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one kind of model is built and trained."""

    label: str
    lr: float
    options: Mapping[str, Any] | None = None
    """Arguments of MultiRateVAE; ``None`` for a beta-VAE."""

    def build(self, seed: int, beta: float) -> BetaVAE | MultiRateVAE:
        """A fresh model; equal seeds start from equal base networks."""
        torch.manual_seed(seed)
        encoder, decoder = networks()
        if self.options is None:
            return BetaVAE(encoder, decoder, [PIXELS], beta=beta, lr=self.lr, seed=seed)
        return MultiRateVAE(encoder, decoder, [PIXELS], lr=self.lr, seed=seed, **self.options)


PAPER_GATES = {"init": "paper", "gate_heads": True}
FRESH = {
    "beta": Recipe("separate β-VAEs", 3e-3),
    "mr": Recipe("one MR-VAE run", 1e-2, {"convert": PAPER_GATES, "beta_sampling": "sample"}),
    "batch": Recipe("one β per batch", 1e-2, {"convert": PAPER_GATES, "beta_sampling": "batch"}),
    "none": Recipe("no gates", 3e-3, {"conditioning": "none", "beta_sampling": "sample"}),
}
DIGITS = {
    "beta": Recipe("separate β-VAEs, learning rate 3e-3", 3e-3),
    "slow": Recipe("separate β-VAEs, learning rate 1e-3", 1e-3),
    "mr": Recipe("one MR-VAE run", 5e-3, {"convert": {"init": "paper", "gate_heads": False}}),
}


@dataclasses.dataclass
class Curves:
    """All runs of one experiment.

    Attributes:
        betas: Where separate beta-VAEs were trained.
        seeds: Seeds of the runs.
        multi_rate: ``multi_rate[kind][seed]`` is one run, measured at many betas.
        single_rate: ``single_rate[kind][seed][beta]`` is the run that was trained at this beta.
    """

    betas: Sequence[float]
    seeds: Sequence[int]
    multi_rate: dict[str, dict[int, Any]]
    single_rate: dict[str, dict[int, dict[float, Any]]]

    def loss(self, kind: str, seed: int, beta: float) -> float:
        """Test ``L_beta``, nats."""
        run = self.multi_rate[kind][seed] if kind in self.multi_rate else self.single_rate[kind][seed][beta]
        return run.points[beta].loss(beta)

    def gaps(self, kind: str, seed: int, against: str = "beta") -> list[float]:
        """``L_beta`` minus that of the beta-VAE trained at this beta, nats."""
        return [self.loss(kind, seed, beta) - self.loss(against, seed, beta) for beta in self.betas]

    def mean_gap(self, kind: str, seed: int) -> float:
        """Mean of the gaps over the betas."""
        return statistics.fmean(self.gaps(kind, seed))

    def gaps_by_beta(self, kind: str, against: str = "beta") -> dict[float, list[float]]:
        """Gaps of all seeds at each beta."""
        rows = [self.gaps(kind, seed, against) for seed in self.seeds]
        return dict(zip(self.betas, map(list, zip(*rows, strict=True)), strict=True))


def experiment(
    title: str, recipes: Mapping[str, Recipe], betas: Sequence[float], seeds: Sequence[int], epochs: int,
    steps: int, data: Callable[[int], pl.LightningDataModule],
) -> Curves:  # fmt: skip
    """Train every multi-rate recipe once per seed, and every other once per seed and beta.

    The beta-VAEs' rate is annealed over the first 30 % of the training: at a constant large beta some collapse.
    """
    single = [kind for kind, recipe in recipes.items() if recipe.options is None]
    multi = [kind for kind in recipes if kind not in single]
    progress = training.Progress(title, len(seeds) * (len(betas) * len(single) + len(multi)) * steps)
    everywhere = sorted({*GRID, *betas})

    def run(kind: str, seed: int, beta: float | None = None) -> Any:
        what = "" if beta is None else f" at {beta:g}"
        with progress.run(f"seed {seed}, {recipes[kind].label}{what}"):
            model = recipes[kind].build(seed, 1.0 if beta is None else beta)
            return training.train_and_test(model, data(seed), epochs, everywhere, progress, anneal=beta is not None)

    curves = Curves(betas, tuple(seeds), {kind: {} for kind in multi}, {kind: {} for kind in single})
    for seed in seeds:
        for kind in multi:
            curves.multi_rate[kind][seed] = run(kind, seed)
        for kind in single:
            curves.single_rate[kind][seed] = {beta: run(kind, seed, beta) for beta in betas}
    progress.close()
    return curves


def fresh(seeds: Sequence[int], steps: int) -> Curves:
    """Experiment B: fresh synthetic binary data."""
    return experiment("B, fresh data", FRESH, FRESH_BETAS, seeds, 1, steps, lambda seed: FreshData(steps, seed))


def digits(seeds: Sequence[int], epochs: int) -> Curves:
    """Experiment C: binarised digits."""
    steps = 11 * epochs  # 1,400 images in batches of 128
    return experiment("C, digits", DIGITS, DIGITS_BETAS, seeds, epochs, steps, lambda _: DigitsDataModule(128))
