"""What metrics that average a number per query share: the mean, its standard error, and queries without a number."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ext.functional import merge_moments, moments_variance, update_moments
from lightning_ext.metrics._precise import PreciseMetric
from lightning_ext.metrics.influence_plot import plot_mean


class QueryMean(PreciseMetric):
    """A mean over queries that come in batches; NaN stands for a query that has no number."""

    moments: Tensor

    summary: ClassVar[tuple[str, str]]
    """Name of the mean, and why a query may have no number."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("moments", self.float_state(2, 1, 3), dist_reduce_fx=merge_moments)

    def add_queries(self, per_query: Tensor) -> None:
        """Add each query's number, ``(Q,)``."""
        self.moments = merge_moments(torch.stack([self.moments, query_moments(per_query)]))

    def compute(self) -> dict[str, Tensor]:
        """The mean so far, over all ranks; see the class for the keys."""
        name = type(self).__name__
        if not bool(self.moments[..., 0].any()):
            raise RuntimeError(f"{name} has seen no query on any rank; call update before compute.")
        value, problems = summarize_queries(self.summary[0], self.moments, self.summary[1])
        self.warn_of(problems)
        return value

    def plot(
        self, val: Mapping[str, Tensor] | None = None, ax: Any = None, label: str | None = None
    ) -> tuple[Any, Any]:
        """Draw the mean and its standard error.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in, those of another metric's plot to compare. Default: those of a new figure.
            label: What was measured, below the point. Default: the class's name.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value, name = self.compute() if val is None else val, self.summary[0]
        bounds = (self.plot_lower_bound, self.plot_upper_bound)
        return plot_mean(value[name], value["standard_error"], name, bounds, ax, label or type(self).__name__)


def query_moments(per_query: Tensor) -> Tensor:
    """Count, mean and M2 of the numbers, and the count of NaN, ``(2, 1, 3)``."""
    missing = per_query.isnan()
    values = per_query.where(~missing, torch.zeros_like(per_query))[:, None]
    return update_moments(values.new_zeros(2, 1, 3), missing.long(), values)


def summarize_queries(name: str, moments: Tensor, reason: str) -> tuple[dict[str, Tensor], list[str]]:
    """The mean by its name, its standard error and the number of queries; and what has to be warned of."""
    count, missing = moments[:, 0, 0]
    mean = torch.where(count > 0, moments[0, 0, 1], torch.nan)
    variance = moments_variance(moments)[0, 0]
    value = {name: mean, "standard_error": (variance / count).sqrt(), "num_queries": count.long()}
    problems = []
    if missing > 0:
        problems.append(f"{int(missing)} of {int(missing + count)} queries are NaN and left out: their {reason}.")
    if count == 0:
        problems.append(f"'{name}' and 'standard_error' are NaN.")
    elif count == 1:
        problems.append("'standard_error' is NaN: it takes two queries.")
    return value, problems
