"""Demo tile of LAFTR: five tasks in a row with the callback and without, and what is kept of their data."""

import functools
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.data import ContinualDataModule
from lightning_ext.demo import EpochBar, Picture, Table, Tile
from lightning_ext.metrics import ContinualMetrics
from lightning_ext.modules import Classifier
from lightning_ext.nn import MLP

TITLE = "LAFTR: learn the next task, keep the last ones, store no data"

TASKS, EPOCHS, SAMPLES, STORED = 5, 5, 40, 40
PLAIN, LAFTR, REPLAY = "fine-tuning", "LAFTR", "replay buffer"
COLOURS = {PLAIN: "C1", LAFTR: "C0", REPLAY: "C2"}


class Watch(pl.Callback):
    """Tests on every task after every epoch; goes on to the next task where no other callback does."""

    def __init__(self, lead: bool) -> None:
        self.lead = lead
        self.curve: list[list[float]] = []
        self.metric = ContinualMetrics(TASKS)

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Accuracy on each task, kept in the matrix at the end of a task."""
        data, row = trainer.datamodule, []
        last = (trainer.current_epoch + 1) % EPOCHS == 0
        for task, dataset in enumerate(data.test_sets):
            x, t = dataset[list(range(len(dataset)))]
            right = pl_module(x).argmax(1)
            row.append(float((right == t).double().mean()))
            if last:
                self.metric.update(right, t, seen=data.task, task=task)
        self.curve.append(row)
        if self.lead and last and data.task + 1 < TASKS:
            data.set_task(data.task + 1)


def _learn(name: str, regularizer: FunctionSpaceRegularizer | None, output_dir: Path) -> tuple[Watch, float]:
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule.permuted(num_tasks=TASKS, batch_size=32, seed=0)
    model = Classifier(MLP([64, 64, 64, 10]), functools.partial(torch.optim.Adam, lr=1e-3))
    watch = Watch(lead=regularizer is None)
    trainer = pl.Trainer(
        max_epochs=TASKS * EPOCHS,
        callbacks=[watch, EpochBar(name), *([] if regularizer is None else [regularizer])],
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(output_dir),
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    return watch, time.perf_counter() - start


def _seen(curve: Sequence[Sequence[float]]) -> list[float]:
    """Mean accuracy on the tasks that were trained on so far, per epoch."""
    counts = [1 + epoch // EPOCHS for epoch in range(len(curve))]
    return [sum(row[:count]) / count for row, count in zip(curve, counts, strict=True)]


def _over_time(watches: dict[str, Watch]) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.7), sharey=True)
    epochs = range(1, TASKS * EPOCHS + 1)
    for name, watch in watches.items():
        style = {"color": COLOURS[name], "ls": "--" if name == REPLAY else "-"}
        left.plot(epochs, [row[0] for row in watch.curve], label=name, **style)
        right.plot(epochs, _seen(watch.curve), **style)
    for axes, title in ((left, "The first task"), (right, "All tasks so far, mean")):
        for task in range(1, TASKS):
            axes.axvline(task * EPOCHS + 0.5, color="#8a97a6", lw=0.8, ls=":")
        axes.set(xlabel="epoch (dotted: the next task begins)", ylim=(0, 1.02))
        axes.set_title(title)
    left.set_ylabel("test accuracy")
    left.legend(loc="lower left")
    return figure


def _matrices(watches: dict[str, Watch]) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.5))
    for axes, name in zip(panels, (PLAIN, LAFTR), strict=True):
        axes.grid(visible=False)
        watches[name].metric.plot(ax=axes)
        axes.set_title(f"{name}\n{axes.get_title()}", fontsize=10)
    return figure


def _stored(kept: dict[str, list[tuple[str, float]]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.8, 2.7))
    shades = {"weights": 1.0, "statistics": 0.6, "images": 1.0, "outputs": 0.6}
    for row, (name, parts) in enumerate(kept.items()):
        start = 0.0
        for part, size in parts:
            axes.barh(row, size, left=start, color="C0" if name == LAFTR else "C2", alpha=shades[part], label=part)
            axes.text(start + size / 2, row, part if size > 60 else "", ha="center", va="center", fontsize=9)
            start += size
        axes.text(start, row, f" {start:.0f} kB", va="center")
    axes.set_yticks(range(len(kept)), kept)
    axes.set_xlabel("kB kept after five tasks")
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)
    return figure


def tile(output_dir: Path) -> Tile:
    """Three runs over the same tasks."""
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
    shared: dict[str, Any] = {"weight": 10.0, "epochs_per_task": EPOCHS}
    laftr = FunctionSpaceRegularizer("laftr", consolidate="last", estimator_options={"num_samples": SAMPLES}, **shared)
    replay = FunctionSpaceRegularizer("coreset", estimator_options={"size": STORED}, **shared)
    runs = {
        name: _learn(name, regularizer, output_dir)
        for name, regularizer in ((PLAIN, None), (LAFTR, laftr), (REPLAY, replay))
    }
    watches = {name: watch for name, (watch, _) in runs.items()}
    values = {name: watch.metric.compute() for name, watch in watches.items()}
    weights = 4 * sum(parameter.numel() for parameter in MLP([64, 64, 64, 10]).parameters())
    every_image = 4 * 64 * 1400 * TASKS
    buffer = 4 * (64 + 10) * STORED * TASKS  # images and outputs; it needs no old weights
    kept = {PLAIN: 0, LAFTR: laftr.stats_bytes, REPLAY: buffer}
    accuracy = {name: float(value["cl/avg_acc"]) for name, value in values.items()}
    images = {PLAIN: 0, LAFTR: 0, REPLAY: STORED * TASKS}
    rows = [
        [name, accuracy[name], float(values[name]["cl/bwt"]), kept[name] / 1000, images[name], seconds]
        for name, (_, seconds) in runs.items()
    ]
    parts = {
        LAFTR: [("weights", weights / 1000), ("statistics", (laftr.stats_bytes - weights) / 1000)],
        REPLAY: [("images", 4 * 64 * STORED * TASKS / 1000), ("outputs", 4 * 10 * STORED * TASKS / 1000)],
    }
    return Tile(
        heading=f"Five tasks in a row: {accuracy[LAFTR]:.0%} with the callback, {accuracy[PLAIN]:.0%} without",
        summary=[
            "One network learns five versions of the digits, the pixels in another order each time. Plain training "
            "forgets: the first task falls as soon as the second begins. FunctionSpaceRegularizer, added to the "
            "Trainer, holds the outputs on past tasks in place, from means and covariances of their inputs.",
            f"It keeps {kept[LAFTR] / 1000:.0f} kB and no image. A replay buffer of {STORED} images per task with "
            f"their outputs reaches {accuracy[REPLAY]:.0%} with {buffer / 1000:.0f} kB; all training images are "
            f"{every_image / 1000:.0f} kB. Moments of a 64-pixel image by class cost more than 40 such images: what "
            "is saved here is not memory, but the need to keep anybody's data.",
        ],
        tables=[
            Table(
                ["method", "accuracy", "BWT", "kB kept", "images kept", "seconds"],
                rows,
                f"after {TASKS} tasks of {EPOCHS} epochs, one core; BWT is what later tasks did to earlier ones",
            )
        ],
        figures=[
            Picture(
                "Test accuracy while one task after the other is learned.",
                _over_time(watches),
                "Without the callback, accuracy on the first task falls with every new task; with it, it stays.",
            ),
            Picture(
                "Accuracy on every task (columns) after every task (rows).",
                _matrices(watches),
                "Fine-tuning: only the diagonal is bright. With the callback the whole lower triangle is.",
            ),
            Picture(
                "What is kept of five tasks. Dark: the weights, or the images; light: statistics, or the outputs.",
                _stored(parts),
                "Bars: the statistics of LAFTR with one copy of the weights, and a replay buffer of 200 images.",
            ),
        ],
        figures_of_merit={
            "accuracy_laftr": accuracy[LAFTR],
            "accuracy_plain": accuracy[PLAIN],
            "accuracy_replay": accuracy[REPLAY],
            "bytes_laftr": kept[LAFTR],
            "bytes_replay": buffer,
        },
    )
