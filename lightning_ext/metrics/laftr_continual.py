"""The accuracy matrix of a network that learns tasks in a row, and what follows from it."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
)
from lightning_ext.metrics._precise import PreciseMetric
from lightning_ext.metrics.laftr_plot import plot_accuracy_matrix

__all__ = ["ContinualMetrics"]

_UNTRAINED = -1


class ContinualMetrics(PreciseMetric):
    r"""Accuracy on every task after training on each, and what it says of learning, forgetting and transfer.

    :math:`R_{t,i}` is the accuracy on task i after training on tasks 0 to t. ``update(preds, target, seen, task)`` adds
    examples of one entry:

    - ``preds``: labels ``(B,)``, or scores ``(B, C)`` whose largest one counts;
    - ``target``: whole labels ``(B,)`` of at least 0, with scores below C; leave out what is not to be counted;
    - ``seen``: t, the last task trained on, from 0 to T - 1; or -1 for the network before any training, which is the
      baseline of the forward transfer;
    - ``task``: i, the task that the examples are from;
    - ``heads``: with scores, the outputs among which the largest one is sought, a slice or list of indices; labels
      remain numbers of all outputs. Default all.

    ``compute()`` returns a dict of float64 tensors, over the tasks 0 to t trained on so far; what takes an entry that
    was not measured is NaN:

    - ``cl/avg_acc``: accuracy at the end, averaged over the tasks (:func:`~lightning_ext.functional.average_accuracy`);
    - ``cl/bwt``: backward transfer, below 0 where later tasks harmed earlier ones; NaN after one task;
    - ``cl/forgetting``: fall below the best accuracy so far; NaN after one task;
    - ``cl/fwt``: forward transfer, over accuracies of the untrained network; NaN after one task, or without baseline,
      or where tasks were not tested before they were trained on;
    - ``cl/learning_acc``: accuracy on each task just after training on it, averaged;
    - ``cl/matrix``: R, ``(T, T)``.

    Args:
        num_tasks: T, at least 1.
        baseline: accuracy of the untrained network on each task, in [0, 1]. Default: what updates with ``seen=-1`` say.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840); Chaudhry et al. 2018 (arXiv 1801.10112).

    Note:
        Whole counts, summed over ranks; memory 2 T (T + 1) of them. An example that a distributed sampler repeats
        counts twice. A warning tells of a missing test of a task that was trained on.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import ContinualMetrics
        >>> metric, right = ContinualMetrics(num_tasks=2), torch.tensor([0, 0, 0, 0])
        >>> metric.update(torch.tensor([0, 0, 0, 0]), right, seen=0, task=0)
        >>> metric.update(torch.tensor([0, 0, 1, 1]), right, seen=1, task=0)
        >>> metric.update(torch.tensor([0, 0, 0, 1]), right, seen=1, task=1)
        >>> value = metric.compute()
        >>> value["cl/avg_acc"].item(), value["cl/bwt"].item(), value["cl/learning_acc"].item()
        (0.625, -0.5, 0.875)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    correct: Tensor
    total: Tensor
    untrained_correct: Tensor
    untrained_total: Tensor
    baseline: Tensor | None

    def __init__(self, num_tasks: int, baseline: Sequence[float] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}.")
        given = None if baseline is None else torch.as_tensor(baseline, dtype=torch.float64)
        if given is not None and (given.shape != (num_tasks,) or not bool(((given >= 0) & (given <= 1)).all())):
            raise ValueError(f"baseline must hold {num_tasks} accuracies in [0, 1], one for each task; got {baseline}.")
        self.num_tasks = num_tasks
        self.register_buffer("baseline", given, persistent=False)
        for name, rows in (("", (num_tasks,)), ("untrained_", ())):
            for kind in ("correct", "total"):
                counts = torch.zeros(*rows, num_tasks, dtype=torch.long, device=self.device)
                self.add_state(name + kind, counts, dist_reduce_fx="sum")

    def update(
        self, preds: Tensor, target: Tensor, seen: int, task: int, heads: slice | Sequence[int] | None = None
    ) -> None:
        """Add examples of one entry of the matrix; see the class for the arguments."""
        self._check_place(seen, task)
        _check_labels(preds, target)
        labels = _labels(preds, heads)
        if labels.shape != target.shape or target.ndim != 1:
            raise ValueError(
                f"preds must be labels (B,) or scores (B, C), and target labels (B,); got {tuple(preds.shape)} and "
                f"{tuple(target.shape)}."
            )
        untrained = seen == _UNTRAINED
        correct, total = (
            (self.untrained_correct, self.untrained_total) if untrained else (self.correct[seen], self.total[seen])
        )
        correct[task] += (labels == target).sum()
        total[task] += len(target)

    def compute(self) -> dict[str, Tensor]:
        """The matrix so far, over all ranks, and what follows from it; see the class for the keys."""
        trained = self.total.any(1).nonzero()
        if len(trained) == 0 and not bool(self.untrained_total.any()):
            raise RuntimeError("ContinualMetrics has seen no example on any rank; call update before compute.")
        matrix = self.correct / self.total.double()
        if len(trained) == 0:
            nothing = matrix.new_tensor(torch.nan)
            return {f"cl/{name}": nothing for name in ("avg_acc", "bwt", "forgetting", "fwt", "learning_acc")} | {
                "cl/matrix": matrix
            }
        tasks = int(trained[-1]) + 1
        so_far = matrix[:tasks, :tasks]
        self._warn_of_missing(so_far)
        measured = self.untrained_correct / self.untrained_total.double()
        baseline = (measured if self.baseline is None else self.baseline)[:tasks]
        return {
            "cl/avg_acc": average_accuracy(so_far),
            "cl/bwt": backward_transfer(so_far),
            "cl/forgetting": forgetting(so_far),
            "cl/fwt": forward_transfer(so_far, baseline),
            "cl/learning_acc": learning_accuracy(so_far),
            "cl/matrix": matrix,
        }

    def plot(
        self, val: Mapping[str, Tensor] | None = None, ax: Any = None, task_names: Sequence[str] | None = None
    ) -> tuple[Any, Any]:
        """Draw the accuracy matrix with its numbers.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.
            task_names: Names of the tasks. Default: their numbers.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        return plot_accuracy_matrix(self.compute() if val is None else val, ax, task_names)

    def _check_place(self, seen: int, task: int) -> None:
        numbers: dict[str, Any] = {"seen": seen, "task": task}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, Integral):
                raise ValueError(f"{name} must be a whole number, got {number!r}.")
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must lie between 0 and {self.num_tasks - 1}, got {task}.")
        if not _UNTRAINED <= seen < self.num_tasks:
            raise ValueError(f"seen must be -1 (untrained) or lie between 0 and {self.num_tasks - 1}, got {seen}.")
        if seen == _UNTRAINED and self.baseline is not None:
            raise ValueError("seen=-1 measures the baseline, which was given; leave out one of the two.")

    def _warn_of_missing(self, matrix: Tensor) -> None:
        missing = matrix.isnan().tril().nonzero().tolist()
        if missing:
            places = ", ".join(f"task {i} after task {t}" for t, i in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            self.warn_of([f"no test of {places}{more}: what takes these entries is NaN."])


def _check_labels(preds: Tensor, target: Tensor) -> None:
    """A label that no output stands for would count as an error of the network."""
    for name, given in (("preds", preds), ("target", target)):
        if not isinstance(given, Tensor) or given.is_complex():
            raise ValueError(f"{name} must be a tensor of real numbers, got {getattr(given, 'dtype', type(given))}.")
    if target.is_floating_point():
        raise ValueError(f"target must hold whole labels, got {target.dtype}.")
    outputs = preds.shape[1] if preds.ndim == 2 else None
    if target.numel() and (int(target.min()) < 0 or (outputs is not None and int(target.max()) >= outputs)):
        above = "" if outputs is None else f" and below {outputs}, the number of scores"
        raise ValueError(
            f"target must hold labels of at least 0{above}; got {int(target.min())} to {int(target.max())}. Leave out "
            "what is not to be counted, such as classes that the network has no output for yet."
        )


def _labels(preds: Tensor, heads: slice | Sequence[int] | None) -> Tensor:
    if bool(preds.isnan().any()):
        raise ValueError("preds must not hold NaN.")
    if preds.ndim == 1:
        if heads is not None or preds.is_floating_point():
            raise ValueError("preds of shape (B,) must be whole labels, without heads; pass scores (B, C) otherwise.")
        return preds
    if preds.ndim != 2 or preds.shape[1] < 2:
        raise ValueError(
            f"preds must be labels (B,) or scores (B, C) of two classes or more; got {tuple(preds.shape)}."
        )
    if heads is None:
        return preds.argmax(1)
    try:
        outputs = torch.arange(preds.shape[1], device=preds.device)[heads]
    except (IndexError, TypeError) as error:
        raise ValueError(f"heads must index {preds.shape[1]} outputs; got {heads!r}.") from error
    if outputs.ndim != 1 or not len(outputs):
        raise ValueError(f"heads must be a slice or list with at least one of {preds.shape[1]} outputs; got {heads!r}.")
    return outputs[preds[:, heads].argmax(1)]
