"""How good influence scores are: against retraining, against planted label errors, against each other."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ext.functional.influence_quality import (
    check_finite,
    check_suspicion,
    linear_datamodeling_scores,
    mislabel_detection,
    row_correlation,
    topk_overlap,
)
from lightning_ext.metrics._precise import ConcatenatingMetric
from lightning_ext.metrics._query_mean import QueryMean, query_moments, summarize_queries
from lightning_ext.metrics.influence_plot import plot_detection, plot_effects

__all__ = ["LOOCorrelation", "LinearDatamodelingScore", "MislabelDetection", "TopKOverlap"]


class LinearDatamodelingScore(QueryMean):
    r"""Do scores predict what models trained on random subsets do?

    .. math::
        \mathrm{LDS} = \frac1Q \sum_q \mathrm{Spearman}_j
            \Bigl( \sum_{z \notin S_j} \tau(m_q, z),\; m_q(\theta_{S_j}) \Bigr)

    **Orientation.** Scores :math:`\tau(m, z)` are removal effects on the measurement m, those of
    :class:`~lightning_ext.metrics.InfluenceScores`: removing a helpful sample raises the loss, so the loss of a model
    trained on S *falls* with :math:`\sum_{z \in S} \tau`, and rises with the sum over the samples left out, which
    differs from it by sign and a constant. Perfect scores give +1, for a loss or any other measurement, as long as
    scores and outcomes are of the same one. See
    :func:`~lightning_ext.functional.linear_datamodeling_scores`.

    ``update(scores, outcomes)`` adds queries:

    - ``scores``: ``(Q, N)``, all training samples in the order of the masks' columns;
    - ``outcomes``: ``(M, Q)``, the measurement of each query by the model trained on each subset, averaged over seeds
      if there are several.

    ``compute()`` returns a dict of scalars: ``lds`` in [-1, 1], the mean over queries; ``standard_error`` over queries
    (of the queries alone: other subsets and seeds vary it too); ``num_queries``, those that count. A query whose
    predictions or outcomes are constant has no correlation: it is left out, and a warning says how many. NaN is
    returned, with a warning, where nothing is left.

    Args:
        subset_masks: ``(M, N)`` bool, True for the members of each subset, M at least 2; see
            :func:`~lightning_ext.functional.random_subsets`.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Park et al. 2023, TRAK (arXiv 2303.14186, definition 4.1), from Ilyas et al. 2022 (arXiv 2202.00622).

    Note:
        Memory: the masks, M N bytes, and three numbers, whatever the number of queries. Queries spread over ranks: each
        needs all its subsets on one rank. A query that a distributed sampler repeats counts twice.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import random_subsets
        >>> from lightning_ext.metrics import LinearDatamodelingScore
        >>> masks, effects = random_subsets(20, 8), torch.arange(24.0).reshape(3, 8)
        >>> metric = LinearDatamodelingScore(masks)
        >>> metric.update(effects, 5 - masks.float() @ effects.mT)
        >>> metric.compute()["lds"].item()
        1.0
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0

    subset_masks: Tensor
    summary = ("lds", "predictions or outcomes are constant over the subsets")

    def __init__(self, subset_masks: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if subset_masks.dtype != torch.bool or subset_masks.ndim != 2 or len(subset_masks) < 2:
            raise ValueError(
                "subset_masks must be a bool tensor (M, N) with at least two subsets, got "
                f"{subset_masks.dtype} of shape {tuple(subset_masks.shape)}."
            )
        self.register_buffer("subset_masks", subset_masks, persistent=False)

    def update(self, scores: Tensor, outcomes: Tensor) -> None:
        """Add queries with their scores and true measurements; see the class for the arguments."""
        self.add_queries(linear_datamodeling_scores(scores, self.subset_masks, outcomes))

    def merge_state(self, incoming_state: dict[str, Any] | Any) -> None:
        """Add the queries of another metric over the same subsets, or of its states, to this one."""
        if isinstance(incoming_state, LinearDatamodelingScore) and not torch.equal(
            incoming_state.subset_masks.to(self.subset_masks.device), self.subset_masks
        ):
            raise ValueError("Only metrics over equal subset_masks merge.")
        super().merge_state(incoming_state)


class TopKOverlap(QueryMean):
    """The share of the k most helpful training samples that two score matrices agree on, averaged over queries.

    ``update(scores, reference)`` adds queries: both ``(Q, N)``, all training samples in one order.

    ``compute()`` returns a dict of scalars: ``overlap`` in [0, 1], ``standard_error`` over queries (NaN, with a
    warning, for a single one) and ``num_queries``. Random scores reach k / N.

    Args:
        k: at least 1, and at most N at each update.
        kind: ``"helpful"`` compares the largest scores, ``"harmful"`` the smallest, ``"absolute"`` those farthest from
            0. Of equal scores, those of lower index come first.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Note:
        Memory: three numbers. Queries spread over ranks; one that a distributed sampler repeats counts twice.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import TopKOverlap
        >>> metric = TopKOverlap(k=2)
        >>> metric.update(
        ...     torch.tensor([[9.0, 8.0, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([[9.0, 1.0, 8.0], [0.0, 1.0, 2.0]])
        ... )
        >>> metric.compute()["overlap"].item()
        0.75
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    summary = ("overlap", "there is none")

    def __init__(self, k: int, kind: Literal["helpful", "harmful", "absolute"] = "helpful", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        if kind not in ("helpful", "harmful", "absolute"):
            raise ValueError(f"kind must be 'helpful', 'harmful' or 'absolute', got {kind!r}.")
        self.k, self.kind = k, kind

    def update(self, scores: Tensor, reference: Tensor) -> None:
        """Add queries with both their scores; see the class for the arguments."""
        self.add_queries(topk_overlap(self._by_kind(scores), self._by_kind(reference), self.k))

    def _by_kind(self, scores: Tensor) -> Tensor:
        return {"helpful": scores, "harmful": -scores, "absolute": scores.abs()}[self.kind]


class LOOCorrelation(ConcatenatingMetric):
    r"""Do predicted effects of removals agree with those of retraining?

    .. math:: r = \frac1Q \sum_q \mathrm{corr}_z\bigl( \hat\tau(m_q, z),\; m_q(\theta_{-z}) - m_q(\theta) \bigr)

    ``update(predicted, actual)`` adds removed samples (or groups): both ``(Q, B)``, the effects of B removals on the
    same Q queries at each update. ``compute()`` returns a dict of tensors:

    - ``correlation``: scalar in [-1, 1], the mean over queries;
    - ``standard_error``: scalar, over queries (NaN, with a warning, for a single one);
    - ``num_queries``: scalar, those that count;
    - ``per_query``: ``(Q,)``, NaN where a row is constant. Those are left out of the mean, and a warning says how many.

    Args:
        kind: ``"pearson"`` or ``"spearman"`` (average ranks).
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Bae et al. 2022 (arXiv 2209.05364); Grosse et al. 2023 (arXiv 2308.03296, section 5.1).

    Note:
        Memory: 16 Q bytes per removal, on every rank at ``compute``; retraining costs far more. Removals spread over
        ranks. The two arguments count alike, and a common sign or scale of either does not matter but for the sign.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import LOOCorrelation
        >>> metric = LOOCorrelation("spearman")
        >>> metric.update(
        ...     predicted=torch.tensor([[0.1, 0.2], [0.1, 0.2]]), actual=torch.tensor([[1.0, 4.0], [4.0, 2.0]])
        ... )
        >>> metric.update(predicted=torch.tensor([[0.3], [0.3]]), actual=torch.tensor([[9.0], [1.0]]))
        >>> metric.compute()["per_query"].round(decimals=6)
        tensor([ 1., -1.], dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0

    num_queries: Tensor

    def __init__(self, kind: Literal["pearson", "spearman"] = "pearson", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in ("pearson", "spearman"):
            raise ValueError(f"kind must be 'pearson' or 'spearman', got {kind!r}.")
        self.kind: Literal["pearson", "spearman"] = kind
        self.add_pieces("predicted", torch.float64)
        self.add_pieces("actual", torch.float64)
        self.add_state("num_queries", torch.zeros((), dtype=torch.long, device=self.device), dist_reduce_fx=_one_count)

    def update(self, predicted: Tensor, actual: Tensor) -> None:
        """Add removals with their predicted and actual effects; see the class for the arguments."""
        if predicted.ndim != 2 or predicted.shape != actual.shape or len(predicted) == 0:
            raise ValueError(
                "predicted and actual must have one shape (Q, B), a row per query and a column per removal, got "
                f"{tuple(predicted.shape)} and {tuple(actual.shape)}."
            )
        check_finite(predicted=predicted, actual=actual)
        self.num_queries = _one_count(torch.stack([self.num_queries, self.num_queries.new_tensor(len(predicted))]))
        self.append(predicted=predicted.mT, actual=actual.mT)

    def compute(self) -> dict[str, Tensor]:
        """The correlation so far, over all ranks; see the class for the keys."""
        per_query = row_correlation(*self._effects(), self.kind)
        value, problems = summarize_queries("correlation", query_moments(per_query), "effects are constant")
        self.warn_of(problems)
        return value | {"per_query": per_query}

    def effects(self) -> tuple[Tensor, Tensor]:
        """Predicted and actual effects of all ranks, each ``(Q, B)``. Under several ranks, call it on all of them."""
        alone = not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=alone, should_unsync=alone):
            return self._effects()

    def plot(self, ax: Any = None, query: int | None = None, label: str | None = None) -> tuple[Any, Any]:
        """Draw actual against predicted effects, one point per removal.

        Args:
            ax: Matplotlib axes to draw in, those of another metric's plot to compare. Default: those of a new figure.
            query: The query to draw. Default: effects on the mean over queries.
            label: What the points are, for the legend. It adds the correlation of the query, or, as :meth:`compute`
                has it, the mean over queries, and counts points that lie twenty times farther out than nine of ten:
                those are drawn at the edge.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        rows, others = self.effects()
        mean, title = "mean ", f"mean over {len(rows)} queries"
        if query is not None:
            rows, others, mean, title = rows[[query]], others[[query]], "", f"query {query}"
        correlation = row_correlation(rows, others, self.kind).nanmean().item()
        symbol = {"pearson": "r", "spearman": "\u03c1"}[self.kind]
        told = f"{mean}{symbol} = {correlation:.3f}"
        return plot_effects(rows.mean(0), others.mean(0), told, title, ax, label)

    def _effects(self) -> tuple[Tensor, Tensor]:
        queries = int(self.num_queries)
        if queries == 0:
            raise RuntimeError("LOOCorrelation has seen no removal on any rank; call update before compute.")
        return self.joined("predicted").reshape(-1, queries).mT, self.joined("actual").reshape(-1, queries).mT


class MislabelDetection(ConcatenatingMetric):
    r"""Does a score find planted label errors, when the most suspicious samples are inspected first?

    ``update(suspicion, is_flipped)`` adds training samples:

    - ``suspicion``: ``(B,)``, finite, larger for samples to inspect earlier: self-influence, or the training loss,
      which is a strong baseline;
    - ``is_flipped``: ``(B,)`` bool, or zeros and ones: whose label was changed.

    ``compute()`` returns a dict of tensors (see :func:`~lightning_ext.functional.mislabel_detection`):

    - ``auc``: area under the ROC curve, in [0, 1]; 1/2 for a random order;
    - ``recall``: share of the flipped samples among the ``fraction`` of all samples inspected first;
    - ``average_precision``: in [0, 1];
    - ``prevalence``: share of flipped samples;
    - ``inspected``, ``found``: the detection curve, ``(J,)`` each, fractions of all and of the flipped samples.

    Equal suspicions count in expectation over their orders (for the average precision, as one step). What cannot be had
    (none or all flipped) is NaN, with a
    warning.

    Args:
        fraction: share of the samples inspected for ``recall``, in (0, 1].
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Koh and Liang 2017 (arXiv 1703.04730, section 5.4); Bae et al. 2022 (arXiv 2209.05364).

    Note:
        Memory: 9 bytes per sample, on every rank at ``compute``. A sample that a distributed sampler repeats counts
        twice; ``trainer.predict`` repeats none.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import MislabelDetection
        >>> metric = MislabelDetection(fraction=0.5)
        >>> metric.update(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
        >>> metric.update(torch.tensor([0.8, 0.3]), torch.tensor([False, True]))
        >>> value = metric.compute()
        >>> value["auc"].item(), value["recall"].item()
        (0.75, 0.5)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")
        self.fraction = fraction
        self.add_pieces("suspicion", torch.float64)
        self.add_pieces("is_flipped", torch.uint8)

    def update(self, suspicion: Tensor, is_flipped: Tensor) -> None:
        """Add samples; see the class for the arguments."""
        check_suspicion(suspicion, is_flipped)
        self.append(suspicion=suspicion, is_flipped=is_flipped)

    def compute(self) -> dict[str, Tensor]:
        """The detection so far, over all ranks; see the class for the keys."""
        flipped = self.joined("is_flipped").bool()
        if len(flipped) == 0:
            raise RuntimeError("MislabelDetection has seen no sample on any rank; call update before compute.")
        if not bool(flipped.any()):
            self.warn_of(
                ["no label is flipped, so there is nothing to find: all but 'prevalence' and 'inspected' is NaN."]
            )
        elif bool(flipped.all()):
            self.warn_of(["all labels are flipped, so 'auc' is NaN."])
        return mislabel_detection(self.joined("suspicion"), flipped, self.fraction)._asdict()

    def plot(self, val: Mapping[str, Any] | None = None, ax: Any = None, label: str | None = None) -> tuple[Any, Any]:
        """Draw the share of flipped samples found against the share inspected, with random and perfect order.

        Args:
            val: What :meth:`compute` returned, or several such by name, ``{name: value}``, to compare scores of the
                same samples. Default: ``compute()``.
            ax: Matplotlib axes to draw in, those of another metric's plot to compare. Default: those of a new figure.
            label: Name of the curve where ``val`` is a single one.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value: Mapping[str, Any] = self.compute() if val is None else val
        return plot_detection({label or "found": value} if "found" in value else value, ax)


def _one_count(counts: Tensor) -> Tensor:
    """The number of queries that several updates or ranks agree on; 0 for none yet."""
    seen = sorted({int(count) for count in counts.tolist() if count})
    if len(seen) > 1:
        raise ValueError(
            "predicted and actual must have the same Q queries as rows at each update and on each rank, got "
            f"{' and '.join(map(str, seen))} rows."
        )
    return counts.max()
