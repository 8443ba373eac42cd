"""The true distance on data that was kept aside, beside the estimate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ext._lightning import LightningModule, Trainer
from lightning_ext.callbacks._laftr_samples import one_pass
from lightning_ext.functional import output_divergence
from lightning_ext.nn import FunctionSpaceEstimator

Loaders = Iterable[Any] | Callable[[int], Iterable[Any] | None]


class Diagnostics:
    """Outputs of the reference on a loader per task, and how far the outputs are from them later.

    Args:
        estimator: says which outputs a batch has and how they are compared.
        loaders: one loader, or a function of the task that gives one or ``None``.
    """

    def __init__(self, estimator: FunctionSpaceEstimator, loaders: Loaders | None) -> None:
        if isinstance(loaders, Iterator):
            raise ValueError("diagnostics_loader is gone through more than once: pass a loader, no iterator.")
        if loaders is not None and not callable(loaders) and not isinstance(loaders, Iterable):
            raise ValueError(f"diagnostics_loader must be a loader, or a function task -> loader; got {loaders!r}.")
        if isinstance(loaders, Sequence) and any(isinstance(loader, DataLoader) for loader in loaders):
            raise ValueError("diagnostics_loader holds several loaders: pass a function, such as loaders.__getitem__.")
        self.estimator, self.loaders = estimator, loaders
        self._outputs: dict[int, Tensor] = {}

    def _loader(self, task: int) -> Iterable[Any] | None:
        return self.loaders(task) if callable(self.loaders) else self.loaders

    def knows(self, task: int) -> bool:
        """Are there outputs of the task's reference to compare with?"""
        return self.loaders is not None and task in self._outputs

    def _batches(self, trainer: Trainer | None, pl_module: LightningModule, task: int) -> Iterator[Tensor]:
        loader = self._loader(task)
        # every rank sees all of it: little data, and then nothing is left to reduce or to save for each rank
        for batch in () if loader is None else one_pass(trainer, pl_module, loader, shared=False):
            yield self.estimator.outputs(pl_module, batch).detach().float()

    @torch.no_grad()
    def record(self, trainer: Trainer | None, pl_module: LightningModule, tasks: Sequence[int]) -> None:
        """Keep the outputs on the tasks' loaders as those of their reference."""
        for task in tasks if self.loaders is not None else ():
            rows = list(self._batches(trainer, pl_module, task))
            if rows:
                self._outputs[task] = torch.cat(rows)

    @torch.no_grad()
    def distance(
        self, trainer: Trainer | None, pl_module: LightningModule, tasks: Sequence[int], heads: Callable[[int], Any]
    ) -> float:
        """Mean over tasks of the mean divergence between the kept outputs and those of the module as it is."""
        total = 0.0
        for task in tasks:
            new = torch.cat(list(self._batches(trainer, pl_module, task)))
            old = self._outputs[task].to(new.device)
            new = new[..., : old.shape[-1]]  # a head that has grown
            if new.shape != old.shape:
                raise ValueError(
                    f"diagnostics_loader gives outputs {tuple(new.shape)} for task {task}; when the task ended they "
                    f"were {tuple(old.shape)}. It must give the same samples each time."
                )
            total += float(output_divergence(new, old, self.estimator.divergence, heads(task)))
        return total / len(tasks)

    def state_dict(self) -> dict[str, Any]:
        """The kept outputs."""
        return {"tasks": list(self._outputs), "outputs": list(self._outputs.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up kept outputs."""
        self._outputs = dict(zip(state["tasks"], state["outputs"], strict=True))
