"""What is kept of past tasks: an estimator for each, or one for all."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_ext.nn import FunctionSpaceEstimator, function_space_estimator
from lightning_ext.nn._laftr_network import require_heads

Heads = slice | Tensor | Sequence[int]
Consolidation = Literal["all", "last", "merge"]


def prototype_of(
    estimator: str | FunctionSpaceEstimator, reading_batches: dict[str, Any], options: dict[str, Any]
) -> FunctionSpaceEstimator:
    """The estimator that each task gets a copy of: by name, or as it was passed."""
    given = {name: value for name, value in reading_batches.items() if value is not None}
    if isinstance(estimator, str):
        return function_space_estimator(estimator, **given, **options)
    if not isinstance(estimator, FunctionSpaceEstimator):
        raise ValueError(f"estimator must be a name or a FunctionSpaceEstimator; got {estimator!r}.")
    if given or options:
        raise ValueError(f"{', '.join([*given, *options])}: say this to the estimator that you pass, as its arguments.")
    if estimator.fitted:
        raise ValueError("estimator must not be fitted yet: each task gets a copy of it, fitted when the task ends.")
    return estimator


class TaskMemory:
    """Fitted estimators by task.

    Args:
        prototype: an estimator that has not been fitted; copied for each task.
        consolidate: ``"all"``: estimators stay as they are. ``"last"``: after each task all refer to its weights, and
            a distance is taken over all in one pass. ``"merge"``: there is one estimator, which takes each task in.
    """

    def __init__(self, prototype: FunctionSpaceEstimator, consolidate: Consolidation) -> None:
        if consolidate == "merge" and type(prototype).absorb is FunctionSpaceEstimator.absorb:
            raise ValueError(
                f"consolidate='merge' pools the statistics of tasks, and {type(prototype).__name__} cannot. Use 'all', "
                "'last', or estimator='laftr'."
            )
        self.prototype, self.consolidate = prototype, consolidate
        self.tasks: list[int] = []
        self._held: list[FunctionSpaceEstimator] = []  # one per task, or with "merge" at most one
        self._pool: tuple[list[int], FunctionSpaceEstimator] | None = None

    def rehearse(self, module: nn.Module, batches: Sequence[Any], heads: Heads | None) -> None:
        """Meet on a few samples what would be refused when the task ends.

        Raises:
            ValueError: the heads are no outputs of the module; what the estimator refuses.
        """
        trial = copy.deepcopy(self.prototype).to(next(module.parameters()).device)
        for batch in batches:
            trial.fit(module, [batch], heads=None)
            require_heads(heads, trial.outputs(module, batch).shape[-1])

    def remember(
        self,
        task: int,
        module: nn.Module,
        batches: Iterable[Any],
        heads: Heads | None,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Fit an estimator to the task; one that is known is replaced, but what is merged adds up."""
        new = copy.deepcopy(self.prototype).to(next(module.parameters()).device)
        new.fit(module, batches, heads=heads, reduce=reduce)
        if self.consolidate == "merge" and self._held:
            if task in self.tasks:
                rank_zero_warn(
                    f"task {task} ends again, and with consolidate='merge' what was kept of it before cannot be taken "
                    "out: its samples of both times count. Use consolidate='all' or 'last' to replace them."
                )
            new.absorb(self._held[0])
            self._held = [new]
            self.tasks = [*(t for t in self.tasks if t != task), task]
            return
        if task in self.tasks:
            place = self.tasks.index(task)
            del self.tasks[place], self._held[place]
        self.tasks.append(task)
        self._held.append(new)
        self._pool = None
        self._consolidate()

    def _consolidate(self) -> None:
        if self.consolidate == "last":
            for old in self._held[:-1]:
                old.share_reference(self._held[-1])

    def distance(
        self, module: nn.Module, tasks: Sequence[int], address: Sequence[int], *, average: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The mean or sum of the tasks' distances, and those of single tasks where they are taken one by one."""
        *stream, position = address
        if self.consolidate != "all":
            one = self._one(tasks)
            one.reseed(*address)
            found = one.distance(module)
            return (found if average or one.merges_to_a_sum else found * len(tasks)), {}
        single: dict[int, Tensor] = {}
        for task in tasks:
            estimator = self._held[self.tasks.index(task)]
            estimator.reseed(*stream, task, position)
            single[task] = estimator.distance(module)
        distances = list(single.values())
        if len(distances) == 1:
            return distances[0], single
        total = torch.stack(distances)
        return (total.mean() if average else total.sum()), single

    def _one(self, tasks: Sequence[int]) -> FunctionSpaceEstimator:
        if self.consolidate == "merge":
            return self._held[0]
        if self._pool is None or self._pool[0] != list(tasks):
            chosen = [self._held[self.tasks.index(task)] for task in tasks]
            self._pool = list(tasks), type(self.prototype).pool(chosen)
        return self._pool[1]

    def to(self, device: torch.device) -> None:
        """Move everything."""
        for estimator in self._held:
            estimator.to(device)
        self._pool = None
        self._consolidate()  # a copy of the shared weights came along with each

    @property
    def nbytes(self) -> int:
        """Bytes of references and statistics; what several tasks share counts once."""
        return sum(estimator.nbytes for estimator in self._held)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        saved = [dict(e.state_dict()) for e in self._held]
        return {"tasks": list(self.tasks), "estimators": saved, "kept": self._kept()}

    def _kept(self) -> dict[str, str]:
        """What others than these settings would misread."""
        return {"estimator": self.prototype.kind, "consolidate": self.consolidate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the estimators.

        Raises:
            ValueError: the memory is that of another estimator, or was consolidated in another way.
        """
        saved, mine = state.get("kept", self._kept()), self._kept()
        if saved != mine:
            raise ValueError(f"the memory of tasks {list(state['tasks'])} was kept with {saved}, and here is {mine}.")
        self.tasks, self._held, self._pool = list(state["tasks"]), [], None
        for saved in state["estimators"]:
            estimator = copy.deepcopy(self.prototype)
            estimator.load_state_dict(saved)
            self._held.append(estimator)
        self._consolidate()
