"""What the experiments of the LAFTR reproduction share: tasks in a row under an ordinary Trainer, and a quiet one."""

import contextlib
import dataclasses
import functools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.data import ContinualDataModule
from lightning_ext.metrics import ContinualMetrics
from lightning_ext.modules import Classifier


@functools.cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,300 digits to train on and 497 to test on, ``(N, 64)``, less one mean, over one standard deviation."""
    from sklearn import datasets

    x, t = (torch.as_tensor(values) for values in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, t = ((x - x.mean()) / x.std()).float()[order], t[order]
    return (x[:1300], t[:1300]), (x[1300:], t[1300:])


@dataclasses.dataclass(frozen=True)
class Method:
    """One way not to forget.

    Attributes:
        name: For tables.
        estimator: By the name that :func:`lightning_ext.nn.function_space_estimator` knows; None for fine-tuning.
        weight: Of the penalty.
        consolidate: As in :class:`lightning_ext.callbacks.FunctionSpaceRegularizer`.
        options: Of the estimator.
        keeps_reference: Whether it needs the old weights; stored outputs do not.
    """

    name: str
    estimator: str | None = None
    weight: float = 0.0
    consolidate: str = "all"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keeps_reference: bool = True

    def regularizer(self, epochs: int, seed: int, heads: Callable[[int], Any] | None) -> FunctionSpaceRegularizer:
        """The callback."""
        return FunctionSpaceRegularizer(
            self.estimator, self.weight, heads=heads, epochs_per_task=epochs, consolidate=self.consolidate,
            estimator_options=dict(self.options), seed=seed,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """How a method came through the tasks.

    Attributes:
        values: What :class:`lightning_ext.metrics.ContinualMetrics` says at the end.
        nbytes: Kept from task to task, besides the network itself.
        seconds: Of the whole training.
    """

    values: dict[str, Tensor]
    nbytes: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Mean over all tasks at the end."""
        return float(self.values["cl/avg_acc"])

    @property
    def transfer(self) -> float:
        """BWT."""
        return float(self.values["cl/bwt"])


class Turns(pl.Callback):
    """Tests on all tasks when one ends, and goes on to the next where nobody else does.

    Args:
        epochs: Per task.
        lead: Whether to choose the tasks too.
    """

    def __init__(self, epochs: int, lead: bool) -> None:
        self.epochs, self.lead = epochs, lead
        self.metric: ContinualMetrics | None = None

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last epoch of a task."""
        if (trainer.current_epoch + 1) % self.epochs:
            return
        data = trainer.datamodule
        self.metric = self.metric or ContinualMetrics(data.num_tasks)
        pl_module.eval()
        for other in range(data.num_tasks):
            for x, t in data.dataloader_of(other):
                logits = pl_module(x.to(pl_module.device)).cpu()
                self.metric.update(logits, t, seen=data.task, task=other, heads=data.heads(other))
        pl_module.train()
        if self.lead and data.task + 1 < data.num_tasks:
            data.set_task(data.task + 1)


def learn(
    method: Method, data: ContinualDataModule, network: nn.Module, epochs: int, seed: int, lr: float = 1e-3,
    accelerator: str = "cpu", heads: Callable[[int], Any] | None = None, module: Callable[..., Any] = Classifier,
) -> Run:  # fmt: skip
    """All tasks in one fit, Adam, whose state goes on from task to task."""
    start = time.perf_counter()
    model = module(network, functools.partial(torch.optim.Adam, lr=lr))
    turns = Turns(epochs, lead=method.estimator is None)
    kept = None if method.estimator is None else method.regularizer(epochs, seed, heads)
    data.set_task(0)
    with quiet(), one_thread():
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_epochs=epochs * data.num_tasks, callbacks=[turns, *([] if kept is None else [kept])],
            accelerator=accelerator, reload_dataloaders_every_n_epochs=1, limit_val_batches=0, **SILENT,
        )  # fmt: skip
        trainer.fit(model, data)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    nbytes = 0 if kept is None else kept.stats_bytes - (0 if method.keeps_reference else weights * len(kept.tasks))
    assert turns.metric is not None
    return Run(turns.metric.compute(), nbytes, time.perf_counter() - start)


def fit(module: pl.LightningModule, loader: Any, epochs: int) -> None:
    """Train with an ordinary Trainer."""
    with quiet(), one_thread():
        pl.Trainer(max_epochs=epochs, accelerator="cpu", **SILENT).fit(module, loader)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notes about devices, loggers and loader workers out of many short runs."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*GPU available but not used")
            warnings.filterwarnings("ignore", message=".*The number of training batches .* is smaller")
            warnings.filterwarnings("ignore", message=".*but have no `val(idation_step|_dataloader)`")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing them out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


SILENT = {
    "devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False,
}  # fmt: skip


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say what was done and how long it took."""
    start = time.perf_counter()
    yield
    print(f"  {what}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
