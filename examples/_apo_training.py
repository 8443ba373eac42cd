"""What the experiments of the APO reproduction share: progress, and a Trainer that says nothing else."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm.auto import tqdm


class Progress(pl.Callback):
    """One bar for all runs of an experiment; without a terminal, one line for every finished group of runs."""

    def __init__(self, title: str, total_steps: int = 0) -> None:
        self.title = title
        # delay: no bar appears before the first step. disable=None: none at all where nobody watches.
        self.bar = tqdm(total=total_steps, desc=title, unit="step", leave=False, disable=None, delay=0.5)

    def expect(self, steps: int) -> None:
        """Say how many steps the next runs have."""
        self.bar.reset(steps)

    @contextlib.contextmanager
    def run(self, what: str) -> Iterator[None]:
        """Announce a run."""
        start = time.perf_counter()
        self.bar.set_description(f"{self.title}: {what}", refresh=False)
        yield
        if self.bar.disable:
            print(f"  {self.title}: {what}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count one step."""
        self.bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes about devices, loggers and loader workers out of hundreds of short runs."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*GPU available but not used")
            warnings.filterwarnings("ignore", message=".*but have no `val(idation_step|_dataloader)`")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small only lose by sharing them out, and processor seconds are seconds then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit(
    model: pl.LightningModule, data: pl.LightningDataModule, epochs: int, callbacks: list[pl.Callback],
    accelerator: str = "cpu",
) -> pl.Trainer:  # fmt: skip
    """Train with an ordinary Trainer and return it."""
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
        trainer.fit(model, datamodule=data)
    return trainer
