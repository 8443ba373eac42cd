"""Self-influence of samples, logged like any other metric."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional import InfluenceObjective, KroneckerCurvature, SampleGradients, self_influence
from lightning_ext.functional.influence_ranking import ordered_scores
from lightning_ext.metrics._precise import ConcatenatingMetric
from lightning_ext.metrics.influence_plot import plot_largest

__all__ = ["SelfInfluence"]


class SelfInfluence(ConcatenatingMetric):
    r"""How much each sample's own loss would change if the network could fit it alone.

    .. math:: s(z) = \nabla L(z)^\top (G + \lambda I)^{-1} \nabla L(z)

    Large where the rest of the data contradicts a sample: among training samples, wrong labels lead.

    ``update(module, batch, indices=None)`` takes the network, a batch and the samples' positions ``(B,)``, which an
    :class:`~lightning_ext.data.IndexedBatch` brings along. Without them the samples are numbered as they come, with a
    warning: right for one process that reads a data set in its order. It may be called from ``validation_step`` or
    ``test_step``.

    ``compute()`` returns a dict of tensors: ``values`` ``(N,)``, at least 0, and ``indices`` ``(N,)``, ascending, each
    sample once.

    Args:
        curvature: the fitted curvature, such as :class:`~lightning_ext.callbacks.CurvatureCollector` leaves, or a
            function from gradients ``(B, D)`` to :math:`K^{-1}` times each. Default ``"identity"``:
            :math:`K = \lambda I`.
        damping: :math:`\lambda \ge 0`, on the scale of the mean loss; a function has its own and is given none.
        objective: loss, outputs and targets; default cross-entropy of ``module(batch[0])`` against ``batch[1]``.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: A damping out of range; no curvature, such as a collector has before its training, or the collector
            itself; from ``update`` a gradient that is not finite.
        RuntimeError: From ``compute`` when no rank saw a sample.

    Source: Koh and Liang 2017 (arXiv:1703.04730), section 5.4; Bae et al. 2022 (arXiv:2209.05364).

    Note:
        Each batch costs a backward pass and a solve with B rows of D numbers. Keeps 12 bytes per sample. Ranks add
        their samples, and samples that a distributed sampler repeats count once.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> metric = SelfInfluence(damping=0.5, objective=InfluenceObjective("half_squared_error"))
        >>> metric.update(layer, (torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]])), torch.arange(2))
        >>> metric.compute()["values"].tolist()  # gradients -1 and -2
        [2.0, 8.0]
    """

    higher_is_better: bool | None = None

    values: list[Tensor]
    indices: list[Tensor]

    def __init__(
        self,
        curvature: KroneckerCurvature | Callable[[Tensor], Tensor] | Literal["identity"] = "identity",
        damping: float = 1e-2,
        objective: InfluenceObjective | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_curvature(curvature)
        if not 0 <= damping < float("inf") or (curvature == "identity" and damping == 0):
            raise ValueError(f"damping must be at least 0, and positive without a curvature; got {damping!r}.")
        self.curvature, self.damping, self._warned = curvature, damping, False
        self.objective = InfluenceObjective.of(objective)
        self.add_pieces("values", torch.float64)
        self.add_pieces("indices", torch.long)

    def update(self, module: nn.Module, batch: Any, indices: Tensor | None = None) -> None:
        """Add the samples of a batch; see the class for the arguments."""
        if getattr(batch, "_fields", None) == ("indices", "batch"):
            indices, batch = batch.indices if indices is None else indices, batch.batch
        gradients = SampleGradients(module, self.objective).explicit(batch)
        if indices is None:
            start = sum(len(piece) for piece in self.indices)
            indices = torch.arange(start, start + len(gradients))
            self._warn_of_numbers()
        if indices.shape != (len(gradients),):
            raise ValueError(f"indices must be ({len(gradients)},), one per sample; got {tuple(indices.shape)}.")
        self.append(values=self_influence(gradients, self._solve(gradients)), indices=indices)

    def compute(self) -> dict[str, Tensor]:
        """What was seen so far, over all ranks; see the class for the keys."""
        values, indices = self.joined("values"), self.joined("indices")
        if not len(values):
            raise RuntimeError("SelfInfluence has seen no sample on any rank; call update before compute.")
        values, indices = ordered_scores(values[None], indices)
        return {"values": values[0], "indices": indices}

    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Any = None, count: int = 20) -> tuple[Any, Any]:
        """Draw the samples of largest self-influence as bars.

        Args:
            val: What :meth:`compute` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.
            count: At most this many samples.

        Returns:
            ``(figure, axes)``.

        Raises:
            ModuleNotFoundError: If matplotlib is missing, with the line that installs it.
        """
        value: Mapping[str, Tensor] = self.compute() if val is None else val
        values = value["values"].reshape(-1)  # torchmetrics drops the dimension of a single number
        largest, order = values.sort(descending=True, stable=True)
        return plot_largest(largest[:count], value["indices"].reshape(-1)[order[:count]], ax)

    def _warn_of_numbers(self) -> None:
        if not self._warned:
            self._warned = True
            self.warn_of([
                "Samples that come without positions are numbered as they come, which is wrong for a loader that "
                "shuffles. Pass indices, or batches of an IndexedDataset."
            ])  # fmt: skip

    def _solve(self, gradients: Tensor) -> Tensor:
        if isinstance(self.curvature, str):
            return gradients / self.damping
        if isinstance(self.curvature, KroneckerCurvature):
            return self.curvature.solve(gradients, self.damping)
        return self.curvature(gradients)


def _check_curvature(curvature: Any) -> None:
    if curvature == "identity" or callable(curvature):
        return
    hint = "collector.curvature, once its training is over" if curvature is None else "its .curvature"
    raise ValueError(
        f"curvature must be a fitted curvature, a function of gradients, or 'identity'; got {curvature!r}. From a "
        f"CurvatureCollector, pass {hint}."
    )
