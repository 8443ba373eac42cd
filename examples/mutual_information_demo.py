"""Demo tile of mutual information: how many nats a VAE's latents carry, by annealing and by importance weighting."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_ext.callbacks import MutualInformationCallback
from lightning_ext.data import DigitsDataModule
from lightning_ext.demo import EpochBar, Picture, Table, Tile
from lightning_ext.modules import SigmaVAE, measure_mutual_information
from lightning_ext.nn import LatentModel, latent_model_from_vae

TITLE = "Mutual information: how many nats do the latents carry?"

EPOCHS, EVERY, LATENTS, PAIRS, CHAINS = 60, 15, 10, 64, 8
SAMPLES, STEPS = (10, 1000, 100_000), (25, 50, 100, 200)
WATCHED = {"num_points": 32, "num_chains": CHAINS, "num_steps": 100, "num_samples": 1000}


def networks() -> tuple[nn.Module, nn.Module]:
    """Smooth ones: annealing follows their gradients."""
    return (
        nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2 * LATENTS)),
        nn.Sequential(nn.Linear(LATENTS, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64)),
    )


class History(pl.Callback):
    """What the callback found, epoch by epoch."""

    def __init__(self, measure: MutualInformationCallback) -> None:
        self.measure = measure
        self.points: list[tuple[int, dict[str, float]]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep it."""
        if not trainer.sanity_checking:
            self.points.append((trainer.current_epoch + 1, dict(self.measure.result)))


def _train(output_dir: Path) -> tuple[LatentModel, History]:
    pl.seed_everything(0, verbose=False)
    vae = SigmaVAE(*networks(), input_shape=[64], lr=3e-3, seed=0)
    measure = MutualInformationCallback(latent_model_from_vae, log_figure=False, **WATCHED)
    history = History(measure)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        check_val_every_n_epoch=EVERY,
        callbacks=[measure, history, EpochBar("VAE")],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(output_dir),
    )
    trainer.fit(vae, DigitsDataModule(binarize=False, seed=0))
    return latent_model_from_vae(vae.eval()), history


def _timed(model: LatentModel, bound: str, **options: Any) -> tuple[float, float, float]:
    """Seconds, lower and upper bound."""
    start = time.perf_counter()
    values = measure_mutual_information(model, bounds=[bound], num_points=PAIRS, seed=1, **options).values
    return time.perf_counter() - start, float(values[f"{bound}/lower"]), float(values[f"{bound}/upper"])


def _over_seconds(found: dict[str, list[tuple[str, tuple[float, float, float]]]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7.4, 4.2))
    for colour, (name, points) in zip(("C1", "C0"), found.items(), strict=True):
        seconds, lower, upper = zip(*(bounds for _, bounds in points), strict=True)
        axes.fill_between(seconds, lower, upper, color=colour, alpha=0.15, lw=0)
        axes.plot(seconds, upper, color=colour, marker="v", ms=5, label=f"{name}: upper bound")
        axes.plot(seconds, lower, color=colour, marker="^", ms=5, label=f"{name}: lower bound")
        for label, (second, low, high) in points:
            above = low < 5 or colour == "C0"
            place = (high if colour == "C0" else low), (0, 9 if above else -16)
            axes.annotate(label, (second, place[0]), place[1], textcoords="offset points", ha="center", fontsize=8)
    axes.margins(x=0.08)
    axes.set(xscale="log", xlabel="seconds on one core", ylabel="nats", ylim=(0, 60))
    axes.set_title("The information lies in the shade")
    axes.legend(fontsize=9)
    return figure


def _over_epochs(history: History) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    epochs = [epoch for epoch, _ in history.points]
    for colour, name, label in (("C1", "iwae", "importance weighting, K = 1,000"), ("C0", "ais", "annealing, T = 100")):
        lower, upper = (
            [found[f"mutual_information/{name}/{side}"] for _, found in history.points] for side in ("lower", "upper")
        )
        axes.fill_between(epochs, lower, upper, color=colour, alpha=0.2, lw=0)
        axes.plot(epochs, lower, color=colour, marker="^", ms=5, label=label)
        axes.plot(epochs, upper, color=colour, marker="v", ms=5)
    axes.set(xlabel="epoch", ylabel="nats", ylim=(0, None), xticks=epochs)
    axes.set_title("What the callback logs during training")
    axes.legend(fontsize=9, loc="upper left")
    return figure


def tile(output_dir: Path) -> Tile:
    """One training run with the callback, then both bounds at several sizes."""
    threads, logger = torch.get_num_threads(), logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    torch.set_num_threads(1)  # layers this small only lose by sharing them out
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            return _tile(output_dir)
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def _tile(output_dir: Path) -> Tile:
    start = time.perf_counter()
    model, history = _train(output_dir)
    weighted, annealed = "importance weighting", "annealing"
    found = {
        weighted: [(f"K = {k:,}", _timed(model, "iwae", num_samples=k)) for k in SAMPLES],
        annealed: [(f"T = {t}", _timed(model, "ais", num_chains=CHAINS, num_steps=t)) for t in STEPS],
    }
    rows = [
        [name, label, f"{lower:.2f}", f"{upper:.2f}", f"{upper - lower:.2f}", f"{seconds:.1f}"]
        for name, points in found.items()
        for label, (seconds, lower, upper) in points
    ]
    _, (seconds, lower, upper) = found[annealed][-1]
    _, (slow, low, high) = found[weighted][-1]
    return Tile(
        heading=f"{lower:.1f} to {upper:.1f} nats: bounds on both sides, where samples alone stop at log K",
        summary=(
            f"A VAE of 1,400 digits with {LATENTS} latents. Annealed importance sampling with {STEPS[-1]} temperatures "
            f"puts the information between latents and images at {lower:.2f} to {upper:.2f} nats, in {seconds:.0f} s "
            f"on one core; a hundred thousand importance samples at {low:.2f} to {high:.2f}, in {slow:.0f} s. A lower "
            "bound from K samples of the prior cannot pass log K. Each bound holds on average over simulated pairs; "
            "the shade is where the truth may be."
        ),
        tables=[Table(["method", "size", "lower (nats)", "upper (nats)", "gap", "seconds"], rows)],
        figures=[
            Picture(
                "Both bounds over the seconds they take.",
                _over_seconds(found),
                alt="The annealed bounds close in within seconds; those of importance weighting stay far apart.",
            ),
            Picture(
                "The bounds that MutualInformationCallback logs while the VAE trains.",
                _over_epochs(history),
                alt="The information grows during training; the lower bound of importance weighting stands at 6.9.",
            ),
        ],
        figures_of_merit={
            "ais_lower": lower, "ais_upper": upper, "iwae_lower": low, "iwae_upper": high,
            "seconds": time.perf_counter() - start,
        },
    )  # fmt: skip
