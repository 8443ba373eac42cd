"""Experiments A and E of the APO reproduction: a digits classifier under a real Trainer, from many initial rates."""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ext._resources import load_script
from lightning_ext.callbacks import APOLearningRate
from lightning_ext.data import DigitsDataModule

training = load_script(Path(__file__).with_name("_apo_training.py"))

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGDm": functools.partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": functools.partial(torch.optim.AdamW, fused=True),
}
NAMES = {"SGD": "SGD", "SGDm": "SGD, momentum 0.9", "Adam": "Adam", "AdamW": "AdamW, fused"}
# ten rates in half decades, down to a thousandth of the best fixed one and up to ten times it
INITIAL_RATES = {
    "SGD": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
    "SGDm": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
    "Adam": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1),
    "AdamW": (1e-5, 1e-4, 1e-3, 1e-2, 0.1),
}
KINDS: dict[str, dict[str, Any] | None] = {"fixed": None, "cosine": None, "apo": {}, "auto": {"lam_f": "auto"}}
GUESSING = math.log(10)
"""The loss of a classifier that knows nothing; a fixed rate that broke down is counted as this, not as worse."""


@dataclasses.dataclass(frozen=True)
class RateRun:
    """One training run.

    Attributes:
        loss: Cross-entropy on the training images after the last step, nats; infinite where training broke down.
        rates: The learning rate after every step.
    """

    loss: float
    rates: tuple[float, ...]


class Classifier(pl.LightningModule):
    """A module as anybody writes it; nothing in it knows of APO."""

    def __init__(self, base: str, lr: float, seed: int, regularised: bool, cosine_steps: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = (64, 64, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            extra = [nn.BatchNorm1d(outputs)] if regularised else []
            layers += [nn.Linear(inputs, outputs), *extra, nn.ReLU()]
            layers += [nn.Dropout(0.1)] if regularised else []
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], 10))
        self.base, self.lr, self.cosine_steps = base, lr, cosine_steps
        self.rates: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """The base optimizer, with a cosine schedule where one is asked for."""
        optimizer = BASES[self.base](self.parameters(), lr=self.lr)
        if not self.cosine_steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.cosine_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_end(self, *args: Any) -> None:
        """Keep the learning rate."""
        self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))


@functools.cache
def _data() -> DigitsDataModule:
    data = DigitsDataModule(batch_size=100, binarize=False)
    data.setup()
    return data


def train(base: str, kind: str, lr: float, seed: int, epochs: int, regularised: bool, progress: Any) -> RateRun:
    """Train one classifier and measure it in evaluation mode on all training images."""
    data = DigitsDataModule(batch_size=100, binarize=False, seed=seed)
    data.train_set, data.held_out_set = _data().train_set, _data().held_out_set
    options = KINDS[kind]
    callbacks = [progress] if options is None else [progress, APOLearningRate(**options)]
    cosine_steps = epochs * len(data.train_dataloader()) if kind == "cosine" else 0
    model = Classifier(base, lr, seed, regularised, cosine_steps)
    try:
        training.fit(model, data, epochs, callbacks)
    except RuntimeError as error:
        if "training broke down" not in str(error):
            raise
        return RateRun(math.inf, tuple(model.rates))
    x, y = data.train_set.tensors
    with torch.no_grad():
        loss = float(F.cross_entropy(model.eval()(x), y))
    return RateRun(loss if math.isfinite(loss) else math.inf, tuple(model.rates))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All runs with one base optimizer: ``runs[kind][initial rate]`` is a list with one run per seed."""

    base: str
    runs: Mapping[str, Mapping[float, Sequence[RateRun]]]

    def loss(self, kind: str, rate: float) -> float:
        """Median final loss over the seeds; a fixed rate that is worse than guessing counts as guessing."""
        middle = statistics.median(run.loss for run in self.runs[kind][rate])
        return middle if kind in ("apo", "auto") else min(middle, GUESSING)

    def best(self, kind: str = "fixed") -> float:
        """The initial rate with the smallest loss."""
        return min(self.runs[kind], key=functools.partial(self.loss, kind))

    def near_best(self, kind: str) -> list[float]:
        """The initial rates of ``kind`` from a thousandth of the best fixed rate to ten times it."""
        best = self.best()
        return [rate for rate in self.runs[kind] if 0.999e-3 * best <= rate <= 10.01 * best]

    def worst(self, kind: str) -> float:
        """The initial rate, of those near the best fixed one, with the largest loss."""
        return max(self.near_best(kind), key=functools.partial(self.loss, kind))

    def spread(self, kind: str, starts: Sequence[float]) -> float:
        """Largest minus smallest loss over some initial rates, nats."""
        losses = [self.loss(kind, rate) for rate in starts]
        return max(losses) - min(losses)


def sweep(base: str, kinds: Iterable[str], seeds: Sequence[int], epochs: int, regularised: bool = False) -> Sweep:
    """Train from every initial rate, once per seed.

    ``"auto"`` from every other rate, ``"cosine"`` from the best fixed one and the two above it.
    """
    rates = INITIAL_RATES[base]
    steps = epochs * len(_data().train_dataloader())
    progress = training.Progress(f"{'E' if regularised else 'A'}, {NAMES[base]}", steps)
    found = Sweep(base, {})
    for kind in kinds:
        chosen = rates[::2] if kind == "auto" else rates
        if kind == "cosine":
            first = rates.index(found.best())
            chosen = rates[first : first + 3]
        progress.expect(steps * len(chosen) * len(seeds))
        with progress.run(kind):
            runs = {
                rate: [train(base, kind, rate, seed, epochs, regularised, progress) for seed in seeds]
                for rate in chosen
            }
        found = Sweep(base, {**found.runs, kind: runs})
    progress.close()
    return found
