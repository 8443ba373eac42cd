"""The folder that scores stream to: opened by all ranks at once, continued, and told how the solves ended."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_ext._lightning import submodule
from lightning_ext.data import RowStore


class ScoreTable:
    """One row of scores per sample in a folder.

    Args:
        folder: where the rows are.
        first: whether this process makes the folder.
        agree: gives every process what the first one passes, and lets none on before that; default for one process.
        arguments: of the :class:`~lightning_ext.data.RowStore`.

    Attributes:
        store: the rows.
        complete: whether all rows were there when the table was opened, so that nothing is left to solve.
    """

    def __init__(
        self, folder: Path, first: bool = True, agree: Callable[[int], int] = lambda found: found, **arguments: Any
    ) -> None:
        store = RowStore(folder, **arguments) if first else None
        found = agree(0 if store is None else int(store.done.sum()))
        self.store = RowStore(folder, **arguments) if store is None else store
        self.complete = found == self.store.num_samples
        self._first, self._before = first, self.store.report if found else {}
        if found:
            left = "nothing is left to compute" if self.complete else "the others are computed"
            rank_zero_info(f"{found} of {self.store.num_samples} rows were found in {folder}: {left}.")

    def has(self, indices: Tensor) -> bool:
        """Whether all of these rows are there."""
        return self.complete or bool(self.store.done[indices].all())

    def tell(self, report: Mapping[str, Any]) -> None:
        """Keep the report beside the rows."""
        if report and self._first and not self.complete:
            self.store.write_report(merged(self._before, report))


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The report of two runs that filled one table: of iterations and residuals the larger, converged if both did."""
    found = {**before, **now}
    for name, pick in (("iterations", max), ("residual", max), ("converged", min)):
        values = [report[name] for report in (before, now) if report.get(name) is not None]
        if values:
            found[name] = pick(values)
    return found


def told(folder: Path | None) -> dict[str, Any]:
    """What the table in a folder says about its solves; empty where there is none."""
    try:
        return {} if folder is None else RowStore(folder).report
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def warn_unless_kept(trainer: Any) -> None:
    """Warn at the start of a run without a table whose predictions go nowhere."""
    hooks, bar = ("on_predict_batch_end", "on_predict_epoch_end"), submodule("callbacks").ProgressBar
    takers = [c for c in trainer.callbacks if not isinstance(c, bar) and any(h in vars(type(c)) for h in hooks)]
    if not trainer.predict_loop.return_predictions and not takers:
        rank_zero_warn(
            "The scores of this run are kept nowhere: trainer.predict returns none with return_predictions=False, as "
            "under strategies that fork or spawn their processes. Give InfluenceModule an output_dir."
        )
