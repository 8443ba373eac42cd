"""Avalanche's training with its EWC plugin, and the plugin alone, one step at a time.

avalanche-lib is installed without what it requires: torchvision's wheels are built for another torch, and the models
and data sets that need the rest are imported with the package but not used here. While it is imported, empty modules
stand in for them.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from _laftr_problem import BATCH, Learner, Task
from _turns import Run, Turns
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PACKAGE = "avalanche-lib"
UNUSED = ("GPUtil", "gdown", "pytorchcv", "qpsolvers", "torchvision", "wandb")


class MissingPeerError(Exception):
    """The peer cannot be imported here; the message says how to have it."""


class _Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {"__init__": lambda self, *_, **__: None}))
        return vars(self)[name]


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """For the time of an import; whoever asks for one of these packages later finds what is installed, or nothing."""
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Empty)]:
            del sys.modules[name]


def avalanche_version() -> str | None:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Avalanche(Learner):
    """A strategy that has been through an epoch of each past task, with its EWC plugin."""

    strategy: Any
    plugin: Any
    turns: Turns
    experience: Any

    def running(self) -> contextlib.AbstractContextManager[Run]:
        """Train on the next task; the value runs so many steps of it."""
        self.strategy.train_epochs = sys.maxsize
        return self.turns.running(lambda: self.strategy.train(self.experience))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What the plugin makes of the loss of a batch, outside of Avalanche's own loop."""
        step = types.SimpleNamespace(
            clock=self.strategy.clock, device=self.strategy.device, model=model, loss=cross_entropy(model(x), y)
        )
        self.plugin.before_backward(step)
        return step.loss


def avalanche_ewc(
    model: nn.Module, optimizer: torch.optim.Optimizer, past: Sequence[Task], task: Task, strength: float
) -> Avalanche:
    if avalanche_version() is None:
        raise MissingPeerError(f"{PACKAGE} is not installed; `make bench` installs it")
    with stand_ins():
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import as_classification_dataset
        from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, SupervisedPlugin
        from avalanche.training.supervised import Naive

    turns = Turns()

    class Pauses(SupervisedPlugin):
        def before_training_iteration(self, strategy: Any, **_: object) -> None:
            if strategy.train_epochs > 1 and turns.pause():
                strategy.stop_training()

    plugin = EWCPlugin(strength)
    strategy = Naive(
        model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=BATCH, train_epochs=1,
        plugins=[plugin, Pauses()], evaluator=EvaluationPlugin(),
    )  # fmt: skip
    sets = [as_classification_dataset(_Pairs(*each.train)) for each in (*past, task)]
    *experiences, following = benchmark_from_datasets(train=sets).train_stream
    for experience in experiences:
        strategy.train(experience)
    return Avalanche(strategy, plugin, turns, following)


class _Pairs(torch.utils.data.TensorDataset):
    """With the labels as Avalanche looks for them."""

    @property
    def targets(self) -> Tensor:
        return self.tensors[1]
