"""What experiments B to E of the MR-VAE reproduction share: one progress bar, one way to train and to measure."""

import contextlib
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from tqdm.auto import tqdm

from lightning_ext.callbacks import KLSchedule, RateDistortionCallback
from lightning_ext.modules import BaseVAE, MultiRateVAE


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured point of the rate-distortion plane, nats."""

    rate: float
    distortion: float

    def loss(self, beta: float) -> float:
        """``D + beta R``."""
        return self.distortion + beta * self.rate


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, measured on test data.

    Attributes:
        points: The model's point at each beta it was asked for; a single-rate model has one.
        seconds: Wall-clock time of the training.
        parameters: Number of trained numbers.
    """

    points: dict[float, Point]
    seconds: float
    parameters: int


class Progress(pl.Callback):
    """One bar for all runs of an experiment; without a terminal, one line for every finished run."""

    def __init__(self, title: str, total_steps: int) -> None:
        self.title = title
        # delay: no bar appears before the first step. disable=None: none at all where nobody watches.
        self.bar = tqdm(total=total_steps, desc=title, unit="step", leave=False, disable=None, delay=0.5)
        self.what = ""

    @contextlib.contextmanager
    def run(self, what: str) -> Iterator[None]:
        """Announce a run."""
        self.what, start = what, time.perf_counter()
        self.bar.set_description(f"{self.title}: {what}", refresh=False)
        yield
        if self.bar.disable:
            print(f"  {self.title}: {what}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def step(self) -> None:
        """Count one step."""
        self.bar.update()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count one step of a Trainer."""
        self.step()

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes about devices, loggers and loader workers out of fifty short runs."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*GPU available but not used")
            warnings.filterwarnings("ignore", message=".*but have no `val_dataloader`")
            warnings.filterwarnings("ignore", message=".*slope_error is NaN")  # a network without gates has no slope
            yield
    finally:
        logger.setLevel(level)


def fit(
    model: BaseVAE, data: pl.LightningDataModule, epochs: int, callbacks: list[pl.Callback], accelerator: str = "cpu"
) -> tuple[pl.Trainer, float]:
    """Train with an ordinary Trainer; return it and the seconds it took."""
    with quiet():
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            callbacks=callbacks,
        )
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        return trainer, time.perf_counter() - start


def train_and_test(
    model: BaseVAE, data: pl.LightningDataModule, epochs: int, betas: Sequence[float], progress: Progress,
    accelerator: str = "cpu", anneal: bool = False,
) -> Run:  # fmt: skip
    """Train, then measure on the test data: at all betas at once, or at the model's own.

    ``anneal``: raise the weight of a single-rate model's rate from 0 over the first 30 % of the steps.
    """
    sweep = RateDistortionCallback(betas=list(betas), save_csv=False, log_figure=False)
    multi_rate = isinstance(model, MultiRateVAE)
    callbacks: list[pl.Callback] = [progress, sweep] if multi_rate else [progress]
    if anneal and not multi_rate:
        callbacks.append(KLSchedule("monotonic", model.beta, interval="step"))
    trainer, seconds = fit(model, data, epochs, callbacks, accelerator)
    with quiet():
        (logged,) = trainer.test(model, datamodule=data, verbose=False)
    if multi_rate:
        columns = (sweep.curve[name].tolist() for name in ("rate", "distortion"))
        points = {beta: Point(r, d) for beta, r, d in zip(betas, *columns, strict=True)}
    else:
        points = {float(model.beta): Point(logged["test/rate"], logged["test/distortion"])}
    return Run(points, seconds, sum(p.numel() for p in model.parameters()))
