"""Figure of the accuracy matrix of continual learning. Matplotlib is imported only when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_ext.metrics._figure import INK, axes_of

__all__: list[str] = []  # drawn through the metric's own plot()

_MOST_CELLS = 400
_SHORT = 6  # letters that have room below a cell


def plot_accuracy_matrix(
    value: Mapping[str, Tensor], ax: Any = None, task_names: Sequence[str] | None = None
) -> tuple[Any, Any]:
    """Draw a heat map of the accuracy on each task (columns) after training on each (rows), with the numbers."""
    matrix = value["cl/matrix"].detach().cpu()
    matrix = matrix.reshape(1, 1) if matrix.numel() == 1 else matrix  # torchmetrics drops the dimensions of one number
    tasks = len(matrix)
    names = [str(i) for i in range(tasks)] if task_names is None else list(task_names)
    if len(names) != tasks:
        raise ValueError(f"task_names must name {tasks} tasks, got {len(names)}: {names}.")
    longest = max(map(len, names))
    aslant = longest > _SHORT  # names that would cover each other
    margin = 0.08 * longest if aslant else 0.0  # inches that they take beside the matrix, and below it
    figure, axes = axes_of(ax, (max(4.6, 2.6 + 0.55 * tasks) + margin, 1.8 + 0.48 * tasks + 0.7 * margin))
    axes.set_facecolor("#eceef1")  # shows where nothing was measured
    image = axes.imshow(matrix.tolist(), cmap="cividis", vmin=0, vmax=1)
    if matrix.numel() <= _MOST_CELLS:
        _write_numbers(axes, matrix)
    slope: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if aslant else {}
    axes.set_xticks(range(tasks), names, **slope)
    axes.set_yticks(range(tasks), names)
    axes.set_xlabel("tested on task", color=INK)
    axes.set_ylabel("after training on task", color=INK)
    summary = (("average", "cl/avg_acc"), ("BWT", "cl/bwt"), ("forgetting", "cl/forgetting"))
    parts = [f"{name} {value[key].item():.3f}" for name, key in summary if not value[key].isnan()]
    axes.set_title(", ".join(parts), fontsize=10, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.05, 1)))  # as tall as the matrix
    bar.set_label("accuracy", color=INK)
    bar.outline.set_visible(False)
    return figure, axes


def _write_numbers(axes: Any, matrix: Tensor) -> None:
    for row, line in enumerate(matrix.tolist()):
        for column, cell in enumerate(line):
            if cell == cell:
                colour = "#111111" if cell > 0.45 else "#f5f5f5"
                weight = "bold" if row == column else "normal"  # just trained
                axes.text(column, row, f"{cell:.2f}", ha="center", va="center", fontsize=8, color=colour, weight=weight)
