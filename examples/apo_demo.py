"""Demo tile of APO: one classifier from five initial learning rates, with and without the callback."""

import functools
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from lightning_ext.callbacks import APOLearningRate
from lightning_ext.data import DigitsDataModule
from lightning_ext.demo import EpochBar, Picture, Table, Tile
from lightning_ext.modules import Classifier
from lightning_ext.nn import MLP

TITLE = "APO: a learning rate that finds itself"

EPOCHS = 30
STARTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class _Record(pl.Callback):
    """Remembers loss and learning rate of every step."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def _train(lr: float, adapted: bool, output_dir: Path) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    record, data = _Record(), DigitsDataModule(batch_size=100, binarize=False)
    model = Classifier(MLP([64, 64, 64, 10]), functools.partial(torch.optim.SGD, lr=lr, momentum=0.9))
    name = f"{'APO' if adapted else 'fixed'}, lr = {lr:g}"
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        limit_val_batches=0,
        callbacks=[EpochBar(name), record, *([APOLearningRate()] if adapted else [])],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(output_dir),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only lose by sharing them out
    try:
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    images, labels = data.held_out_set.tensors
    with torch.no_grad():
        loss = F.cross_entropy(model(data.train_set.tensors[0]), data.train_set.tensors[1])
        accuracy = (model(images).argmax(1) == labels).float().mean()
    return {
        "losses": torch.stack(record.losses).tolist(),
        "rates": record.rates,
        "loss": float(loss),
        "accuracy": float(accuracy),
        "seconds": seconds,
    }


def _smooth(values: list[float]) -> list[float]:
    """Mean over one epoch, so that lines can be told apart."""
    window = min(14, len(values))
    return torch.tensor(values).unfold(0, window, 1).mean(1).tolist()


def _pictures(fixed: dict[float, Any], adapted: dict[float, Any]) -> tuple[plt.Figure, plt.Figure]:
    colours = plt.get_cmap("plasma")(torch.linspace(0.0, 0.85, len(STARTS)).numpy())
    rates, axis = plt.subplots()
    for colour, lr in zip(colours, STARTS, strict=True):
        axis.semilogy([lr, *adapted[lr]["rates"]], color=colour, label=f"{lr:g}")
    axis.set(xlabel="step", ylabel="learning rate")
    axis.legend(title="start", ncols=2)
    losses, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
    for axis, runs, title in zip(axes, (fixed, adapted), ("learning rate fixed", "with APO"), strict=True):
        for colour, lr in zip(colours, STARTS, strict=True):
            axis.semilogy(_smooth(runs[lr]["losses"]), color=colour, label=f"{lr:g}")
        axis.set(xlabel="step", title=title)
    axes[0].set_ylabel("training loss (nats)")
    return rates, losses


def tile(output_dir: Path) -> Tile:
    """Train ten times, measure and draw."""
    fixed = {lr: _train(lr, False, output_dir) for lr in STARTS}
    adapted = {lr: _train(lr, True, output_dir) for lr in STARTS}
    rows = [
        [
            f"{lr:g}",
            *(fixed[lr][key] for key in ("loss", "accuracy")),
            *(adapted[lr][key] for key in ("loss", "accuracy")),
            adapted[lr]["rates"][-1],
        ]
        for lr in STARTS
    ]
    worst, best_fixed = max(row[3] for row in rows), min(row[1] for row in rows)
    ends = [row[5] for row in rows]
    cost = sum(run["seconds"] for run in adapted.values()) / sum(run["seconds"] for run in fixed.values())
    rates, losses = _pictures(fixed, adapted)
    return Tile(
        heading="Five starts over five orders of magnitude end at one learning rate",
        summary=[
            f"The same digits classifier (SGD with momentum, {EPOCHS} epochs) from five initial learning rates. With "
            f"the callback the worst of the five ends at a loss of {worst:.4f} nats; the best of the five fixed rates "
            f"at {best_fixed:.4f}, the worst at {max(row[1] for row in rows):.2f}.",
            f"The final learning rates lie between {min(ends):.2g} and {max(ends):.2g}. A training with the callback "
            f"took {cost:.2f} times as long; most of that is the first 50 steps, in which it looks ahead every time.",
        ],
        tables=[
            Table(
                ["start", "loss, fixed", "accuracy, fixed", "loss, APO", "accuracy, APO", "final rate, APO"],
                rows,
                "loss in nats on the 1,400 training digits; accuracy on the 397 held-out ones",
            )
        ],
        figures=[
            Picture(
                "Learning rate at every step, with the callback, from five starts.",
                rates,
                "Five learning rates start at 1e-5 to 1e-1 and come together within fifty steps.",
            ),
            Picture(
                "Training loss, averaged over an epoch. Left: the learning rate stays where it starts.",
                losses,
                "Left, only the largest fixed rates learn; right, all five runs with APO fall together.",
            ),
        ],
        figures_of_merit={
            "worst_loss_apo": worst,
            "best_loss_fixed": best_fixed,
            "largest_over_smallest_final_rate": max(ends) / min(ends),
            "time_ratio": cost,
        },
    )
