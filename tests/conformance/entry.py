"""What the suite needs to know of a component, and how it puts one into a Trainer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_ext._lightning import Callback, LightningModule, Trainer
from lightning_ext.testing import StatefulLoader
from tests.conformance import toys

Kind = Literal["callback-observer", "callback-method", "module", "data", "metric", "nn"]
RECIPES = Path(__file__).resolve().parents[2] / "callbacks"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One public component.

    ``factory`` builds it; ``other`` builds a second one with other arguments (default: ``factory`` again); ``names``
    are the public names that it stands for. ``skip`` maps a check that does not apply to the reason why.

    A callback, a module or data: ``module`` and ``dataset`` are what it trains with; ``networks`` names the inner
    networks that get compiled and sharded; ``quiet`` switches a module's own noise off, so that two processes can be
    compared with one; ``recipe`` is the stem of its YAML file; ``not_finite`` names logged values that its
    documentation allows to be infinite or NaN.

    A metric: ``batches`` and ``reference`` as in ``check_metric``. An nn.Module: ``inputs`` builds the arguments of
    its call, and ``call`` may say how it is called.
    """

    names: Sequence[str]
    kind: Kind
    factory: Callable[[], Any]
    other: Callable[[], Any] | None = None
    module: Callable[[], LightningModule] = toys.Net
    dataset: Callable[[], Dataset[Any]] = toys.rows
    networks: Sequence[str] = ("net",)
    quiet: Callable[[LightningModule], None] = lambda module: None
    recipe: str | None = None
    not_finite: Sequence[str] = ()
    batches: Callable[[], list[Any]] = list
    reference: Callable[[Sequence[Any]], Any] | None = None
    metric_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Callable[[], tuple[Any, ...]] = tuple
    call: Callable[[nn.Module, tuple[Any, ...]], Any] = lambda module, inputs: module(*inputs)
    skip: Mapping[str, str] = dataclasses.field(default_factory=dict)
    label: str = ""

    @property
    def id(self) -> str:
        return self.label or self.names[0]

    @property
    def is_callback(self) -> bool:
        return self.kind.startswith("callback")

    def another(self) -> Any:
        return (self.other or self.factory)()

    def new_module(self) -> LightningModule:
        return self.factory() if self.kind == "module" else self.module()

    def new_callbacks(self) -> list[Callback]:
        return [self.factory()] if self.is_callback else []

    def new_data(self, batch_size: int = 4) -> Any:
        """``(train, validation)`` loaders of a fixed order that can stop in the middle, or the data module itself."""
        if self.kind == "data":
            return self.factory()
        items = self.dataset()
        return StatefulLoader(items, batch_size), DataLoader(items, batch_size=3)

    def sharded_data(self) -> Any:
        """Plain loaders, which Lightning shards over the ranks."""
        if self.kind == "data":
            return self.factory()
        return DataLoader(self.dataset(), batch_size=2), DataLoader(self.dataset(), batch_size=3)


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "limit_train_batches": 3,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def new_trainer(callbacks: Sequence[Callback] = (), **kwargs: Any) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**QUIET, **kwargs})
