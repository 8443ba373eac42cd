"""How far a network's outputs moved on data, and the sums over data from which that is estimated without them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ext.functional import ActivationSite, InputModel, InputStatistics, output_divergence, widest_float
from lightning_ext.metrics._precise import PreciseMetric

__all__ = ["FunctionSpaceDistance", "LAFTRStatistics"]

Heads = slice | Tensor | Sequence[int]


class FunctionSpaceDistance(PreciseMetric):
    r"""The distance between two networks as functions, averaged over data: the value that LAFTR estimates.

    .. math:: D(\theta_0, \theta_1) = \frac1N \sum_{n=1}^{N} \rho\bigl( f(x_n; \theta_0), f(x_n; \theta_1) \bigr)

    - ``"kl"``: :math:`\rho = \mathrm{KL}(p_0 \Vert p_1)` of the softmaxes, in nats;
    - ``"mse"``: :math:`\rho = \tfrac12 \lVert z_1 - z_0 \rVert^2`, summed over the outputs;
    - ``"softmax_l2"``: :math:`\rho = \tfrac12 \lVert p_1 - p_0 \rVert^2`.

    ``update(new, old, heads=None)`` adds examples:

    - ``new``, ``old``: ``(B, C)`` or ``(B, T, C)``, outputs at :math:`\theta_1` and at :math:`\theta_0`, classes last.
      For sequences the softmax divergences are averaged over all positions, ``"mse"`` is summed over them;
    - ``heads``: the outputs that count, an index into the last dimension. Default all.

    ``compute()`` returns a scalar, at least 0 up to rounding.

    Args:
        divergence: ``"kl"``, ``"mse"`` or ``"softmax_l2"``.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input, NaN among it; the message names them.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Dhawan et al. 2023 (arXiv 2302.03519); Benjamin et al. 2019 (arXiv 1805.08289) for the distance in
    function space.

    Note:
        Sums in float64, as ``"kl"`` between close networks loses its digits in float32. Memory: two numbers. Each rank
        adds its own examples; one that a distributed sampler repeats counts twice.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import FunctionSpaceDistance
        >>> distance = FunctionSpaceDistance("mse")
        >>> distance.update(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        >>> distance.update(torch.zeros(4, 2), torch.zeros(4, 2))
        >>> distance.compute().item()
        2.5
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0

    total: Tensor
    count: Tensor

    def __init__(self, divergence: Literal["kl", "mse", "softmax_l2"] = "kl", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        output_divergence(torch.zeros(1, 2), torch.zeros(1, 2), divergence)  # knows the names
        self.divergence = divergence
        self.add_state("total", self.float_state(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long, device=self.device), dist_reduce_fx="sum")

    def update(self, new: Tensor, old: Tensor, heads: Heads | None = None) -> None:
        """Add examples with their outputs; see the class for the arguments."""
        if len(new) == 0:
            return
        dtype = widest_float(self.device)
        mean = output_divergence(new.detach().to(dtype), old.detach().to(dtype), self.divergence, heads)
        if bool(mean.isnan()):
            raise ValueError("new and old must not hold NaN, nor infinities whose difference is none.")
        count = len(new) if self.divergence == "mse" else new[..., 0].numel()
        self.total += mean * count
        self.count += count

    def compute(self) -> Tensor:
        """The distance so far, over all ranks."""
        if not bool(self.count):
            raise RuntimeError("FunctionSpaceDistance has seen no example on any rank; call update before compute.")
        return self.total / self.count

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw one value, or several in their order.

        Args:
            val: What :meth:`compute` or ``forward`` returned. Default: ``compute()``.
            ax: Matplotlib axes to draw in. Default: those of a new figure.

        Returns:
            ``(figure, axes)``.
        """
        return self._plot(val, ax)


class LAFTRStatistics(PreciseMetric):
    r"""Moments of the inputs and mean gates by group, as sums: what LAFTR keeps of a task, over all ranks.

    ``update(x, groups=None, sites=())`` adds examples as :meth:`~lightning_ext.functional.InputStatistics.add` does:

    - ``x``: ``(B, *shape)``, floating;
    - ``groups``: ``(B,)``, integers from 0 to ``num_groups - 1``; needed where there is more than one;
    - ``sites``: from a reference pass over x, where gates are kept.

    ``compute()`` returns a dict of float64 tensors:

    - ``weights``: :math:`\pi_c`, ``(G,)``, shares of the groups;
    - ``means``: :math:`m_c`, ``(G, *shape)``;
    - ``factors``: :math:`L_c`, ``(G, d, r)`` with :math:`L_c L_c^\top = \Sigma_c + \epsilon I`; for ``"diag"`` the
      standard deviations, ``(G, d)``;
    - ``gate.0``, ``gate.1``, ...: :math:`\mu` for each ReLU in the order of its calls.

    :meth:`model` gives the same as an :class:`~lightning_ext.functional.InputModel`, to draw inputs from.

    Args:
        shape: of one input, without the batch.
        sites: from a reference pass over any batch; only their shapes are used. Default: no gates.
        num_groups: G, at least 1, such as the number of classes.
        covariance: ``"full"``, ``"diag"`` or ``"lowrank"``, a sketch.
        rank: of the sketch, at least 1.
        granularity: a mean gate for each ``"unit"``, or for each ``"channel"`` of a feature map.
        jitter: :math:`\epsilon \ge 0`, in squared units of the inputs.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: On malformed arguments or input; the message names them.
        TypeError: For inputs that are not floating.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Dhawan et al. 2023 (arXiv 2302.03519).

    Note:
        Memory and cost are those of :class:`~lightning_ext.functional.InputStatistics`; one reduction over ranks per
        sum. An example that a distributed sampler repeats counts twice.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import LAFTRStatistics
        >>> statistics = LAFTRStatistics([1], jitter=0.0)
        >>> statistics.update(torch.tensor([[0.0]]))
        >>> statistics.update(torch.tensor([[3.0], [6.0]]))
        >>> {name: value.flatten().tolist() for name, value in statistics.compute().items() if name != "factors"}
        {'weights': [1.0], 'means': [3.0]}
    """

    def __init__(
        self,
        shape: Sequence[int],
        sites: Sequence[ActivationSite] = (),
        num_groups: int = 1,
        covariance: Literal["full", "diag", "lowrank"] = "full",
        rank: int = 64,
        granularity: Literal["unit", "channel"] = "unit",
        jitter: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if jitter < 0:
            raise ValueError(f"jitter must be at least 0; got {jitter}.")
        self.jitter = jitter
        self._statistics = InputStatistics.zeros(
            shape, sites, num_groups=num_groups, covariance=covariance, rank=rank, granularity=granularity
        )
        self._names = {name: name.replace(".", "_") for name in self._statistics.state}
        for name, value in self._statistics.state.items():
            self.add_state(self._names[name], value, dist_reduce_fx="sum")

    def update(self, x: Tensor, groups: Tensor | None = None, sites: Sequence[ActivationSite] = ()) -> None:
        """Add examples; see the class for the arguments."""
        self.statistics().add(x, groups, sites)

    def compute(self) -> dict[str, Tensor]:
        """Means, factors and gates so far, over all ranks; see the class for the keys."""
        model = self._model()
        gates = {f"gate.{i}": gate for i, gate in enumerate(model.gates)}
        return {"weights": model.weights, "means": model.means, "factors": model.factors} | gates

    def model(self) -> InputModel:
        """What :meth:`compute` returns, to draw inputs from. Under several ranks, call it on all of them."""
        alone = not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=alone, should_unsync=alone):
            return self._model()

    def statistics(self) -> InputStatistics:
        """The sums of this rank; a view, not a copy."""
        state = {name: getattr(self, attribute) for name, attribute in self._names.items()}
        if state["count"].device != self._statistics.state["count"].device:
            self._statistics = replace(self._statistics, state=state)  # its sketch stays where it was made
        self._statistics.state = state
        return self._statistics

    def _model(self) -> InputModel:
        if not bool(self.count.any()):  # type: ignore[operator]
            raise RuntimeError("LAFTRStatistics has seen no example on any rank; call update before compute.")
        return self.statistics().finalise(self.jitter)
