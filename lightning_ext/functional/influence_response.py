r"""What a network becomes when training samples are taken away: objectives of four responses, for many copies at once.

A copy's parameters are :math:`\theta = \theta^s + \delta`: the trained network's, which all copies share, and a change,
which is what is stored. Differences of order :math:`1/N` then do not drown in the rounding of the parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_ext.functional.output_losses import OutputLoss

__all__ = [
    "DataTerm",
    "RemovalTerm",
    "ResponseObjective",
    "ResponseTerms",
    "influence_gaps",
    "removal_gradients",
    "removal_losses",
    "response_terms",
    "response_terms_and_gradients",
]

Response = Literal["cold", "warm", "proximal", "pbrf"]
RESPONSES: tuple[Response, ...] = get_args(Response)


@dataclass(frozen=True)
class DataTerm:
    r"""A batch of training samples, which every copy sees.

    Args:
        function: parameters to outputs ``(B, ...)``.
        targets: ``(B, ...)``.
        reference_outputs: the trained network's outputs, for the response ``"pbrf"``.
        weights: ``(G, B)``, weight of each sample in the mean of each copy; None for 1.
    """

    function: Callable[[Mapping[str, Tensor]], Tensor]
    targets: Tensor
    reference_outputs: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class RemovalTerm:
    r"""The samples that are taken away, :math:`\sum_s w_{gs} L(f(\theta_g, x_s), t_s)` for copy g.

    Args:
        function: (parameters, positions ``(S,)``) to the outputs ``(S, ...)`` of the samples at these positions.
        targets: ``(U, ...)``, of all samples that any copy removes.
        index: ``(G, S)`` positions in ``targets``, padded with any.
        weights: ``(G, S)``: :math:`1/N` for a sample that is removed, 0 for padding.
    """

    function: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    targets: Tensor
    index: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ResponseTerms:
    """The parts of the objective, one value per copy, ``(G,)`` each, in units of the loss.

    Args:
        data: mean loss of the batch, or mean Bregman divergence for the PBRF.
        removed: loss of the removed samples, weighted; it is subtracted.
        decay: the weight decay's share of the training objective.
        proximity: half the damped squared distance to the trained network.
    """

    data: Tensor
    removed: Tensor
    decay: Tensor
    proximity: Tensor

    @property
    def total(self) -> Tensor:
        """The objective, ``(G,)``."""
        return self.data - self.removed + self.decay + self.proximity


@dataclass(frozen=True)
class ResponseObjective:
    r"""What a response minimises over :math:`\theta = \theta^s + \delta`.

    With :math:`J(\theta) = \frac1N \sum_i L(f(\theta, x_i), t_i) + \frac w2 \lVert\theta\rVert^2` the training
    objective, S the removed samples, and :math:`Q(\theta) = J(\theta) - \frac1N \sum_{z \in S} L(f(\theta, x_z), t_z)`:

    - ``"cold"``, ``"warm"``: :math:`Q(\theta)`, from fresh and from the trained parameters;
    - ``"proximal"``: :math:`Q(\theta) + \frac\lambda2 \lVert\delta\rVert^2`;
    - ``"pbrf"``: :math:`\frac1N \sum_i D_L(f(\theta, x_i), f(\theta^s, x_i)) - \frac1N \sum_{z \in S}
      L(f(\theta, x_z), t_z) + \frac{\lambda + w}2 \lVert\delta\rVert^2`, the proximal Bregman objective, with
      :math:`D_L` the loss's Bregman divergence. The divergence of the weight decay is the damping's own form.

    At :math:`\delta = 0` the gradient of the last one is :math:`-\frac1N \sum_{z \in S} \nabla L` and its Hessian,
    without removal, the damped Gauss-Newton matrix, wherever :math:`\theta^s` lies: a Newton step from there is the
    influence function's estimate.

    Args:
        loss: the loss of the outputs.
        response: one of the four.
        damping: :math:`\lambda \ge 0`; used by ``"proximal"`` and ``"pbrf"``.
        weight_decay: :math:`w \ge 0`.

    Raises:
        ValueError: A negative number, an unknown response; for ``"pbrf"`` a loss that is not convex in the outputs,
            or :math:`\lambda + w = 0`, with which the objective may have no minimum.

    Source: Bae, Ng, Lo, Ghassemi, Grosse 2022, arXiv:2209.05364.
    """

    loss: OutputLoss
    response: Response
    damping: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.response not in RESPONSES:
            raise ValueError(f"response must be one of {', '.join(map(repr, RESPONSES))}; got {self.response!r}.")
        if not (0 <= self.damping < torch.inf and 0 <= self.weight_decay < torch.inf):
            raise ValueError(
                f"damping and weight_decay must be at least 0; got {self.damping} and {self.weight_decay}."
            )
        if self.response == "pbrf" and not self.loss.convex:
            raise ValueError(
                f"the PBRF needs a loss that is convex in the outputs, or its divergence is none; got {self.loss!r}."
            )
        if self.response == "pbrf" and not self.damping + self.weight_decay > 0:
            raise ValueError(
                "damping + weight_decay must be positive for the PBRF: the removed loss is not bounded, and without "
                f"damping the objective may have no minimum; got {self.damping} + {self.weight_decay}."
            )

    def data(self, y: Tensor, term: DataTerm, weights: Tensor | None) -> Tensor:
        """Mean over the batch for one copy."""
        if self.response == "pbrf":
            if term.reference_outputs is None:
                raise ValueError("the PBRF compares with the trained network: give reference_outputs.")
            values = self.loss.bregman(y, term.reference_outputs, term.targets)
        else:
            values = self.loss.value(y, term.targets)
        return (values if weights is None else values * weights).mean()

    def regularisers(self, change: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weight decay and proximity of one copy."""
        distance = _squared_norm(change)
        if self.response == "pbrf":
            return torch.zeros_like(distance), 0.5 * (self.damping + self.weight_decay) * distance
        damping = self.damping if self.response == "proximal" else 0.0
        size = _squared_norm({name: reference[name] + value for name, value in change.items()})
        return 0.5 * self.weight_decay * size, 0.5 * damping * distance


def _squared_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.square().sum() for value in tensors.values()]).sum()


def _moved(reference: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: reference[name] + value for name, value in change.items()}


def _removed(loss: OutputLoss, params: Mapping[str, Tensor], term: RemovalTerm, index: Tensor, w: Tensor) -> Tensor:
    return (w * loss.value(term.function(params, index), term.targets[index])).sum()


def _one_copy(
    objective: ResponseObjective, reference: Mapping[str, Tensor], data: DataTerm, removal: RemovalTerm | None
) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    def value(
        change: Mapping[str, Tensor], weights: Tensor | None, index: Tensor | None, removed_weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        params = _moved(reference, change)
        fit = objective.data(data.function(params), data, weights)
        decay, proximity = objective.regularisers(change, reference)
        removed = torch.zeros_like(fit)
        if removal is not None and index is not None and removed_weights is not None:
            removed = _removed(objective.loss, params, removal, index, removed_weights)
        terms = ResponseTerms(fit, removed, decay, proximity)
        return terms.total, (fit, removed, decay, proximity)

    return value


def _over_copies(
    function: Callable[..., Any],
    change: Mapping[str, Tensor],
    data: DataTerm,
    removal: RemovalTerm | None,
    chunk_size: int | None,
) -> Any:
    extra = (data.weights, *((removal.index, removal.weights) if removal is not None else (None, None)))
    in_dims = (0, *(None if x is None else 0 for x in extra))
    return torch.func.vmap(function, in_dims=in_dims, chunk_size=chunk_size)(dict(change), *extra)


def response_terms(
    objective: ResponseObjective,
    change: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    data: DataTerm,
    removal: RemovalTerm | None = None,
    *,
    chunk_size: int | None = None,
) -> ResponseTerms:
    r"""Evaluate the objective of G copies on one batch.

    Args:
        objective: what is minimised.
        change: :math:`\delta` of all copies, ``(G, *shape)`` by parameter name.
        reference: :math:`\theta^s`, ``(*shape)`` by the same names.
        data: the batch.
        removal: the removed samples, or None.
        chunk_size: copies that are computed at once, which bounds the memory; None for all.

    Returns:
        The terms, ``(G,)`` each.
    """
    one = _one_copy(objective, reference, data, removal)
    _, terms = _over_copies(one, change, data, removal, chunk_size)
    return ResponseTerms(*terms)


def response_terms_and_gradients(
    objective: ResponseObjective,
    change: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    data: DataTerm,
    removal: RemovalTerm | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[ResponseTerms, dict[str, Tensor]]:
    r"""Evaluate the objective of G copies on one batch, and its gradient by :math:`\delta`.

    Args: as for :func:`response_terms`.

    Returns:
        The terms, ``(G,)`` each, and the gradients ``(G, *shape)`` by name, each copy's of its own objective.

    Note:
        One forward and one backward pass of G networks; memory of ``chunk_size`` of them.

    >>> from lightning_ext.functional.output_losses import SquaredError
    >>> x, t = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])
    >>> function = lambda params: x * params["w"]
    >>> reference = {"w": torch.tensor(1.0)}
    >>> removal = RemovalTerm(lambda params, i: x[i] * params["w"], t, torch.tensor([[1]]), torch.tensor([[0.5]]))
    >>> objective = ResponseObjective(SquaredError(), "pbrf", damping=0.1)
    >>> data = DataTerm(function, t, reference_outputs=x * 1.0)
    >>> terms, gradients = response_terms_and_gradients(objective, {"w": torch.zeros(1)}, reference, data, removal)
    >>> terms.data, gradients["w"]  # no divergence yet; minus the gradient of half of (2 w)^2
    (tensor([0.]), tensor([-4.]))
    """
    one = torch.func.grad_and_value(_one_copy(objective, reference, data, removal), has_aux=True)
    gradients, (_, terms) = _over_copies(one, change, data, removal, chunk_size)
    return ResponseTerms(*terms), gradients


def removal_gradients(
    loss: OutputLoss, reference: Mapping[str, Tensor], removal: RemovalTerm, *, chunk_size: int | None = None
) -> dict[str, Tensor]:
    r"""Gradients of the removed samples at the trained parameters, :math:`\frac1N \sum_{z \in S_g} \nabla L(z)`.

    The right-hand side of the influence function: :math:`\theta_{lin} - \theta^s = (G + \lambda I)^{-1}` times it.

    Args:
        loss: the loss of the outputs.
        reference: :math:`\theta^s`, ``(*shape)`` by name.
        removal: the removed samples of each copy.
        chunk_size: copies that are computed at once; None for all.

    Returns:
        ``(G, *shape)`` by name, without weight decay.
    """

    def gradient(index: Tensor, weights: Tensor) -> dict[str, Tensor]:
        by_params = torch.func.grad(lambda params: _removed(loss, params, removal, index, weights))
        gradients: dict[str, Tensor] = by_params(dict(reference))
        return gradients

    result: dict[str, Tensor] = torch.func.vmap(gradient, chunk_size=chunk_size)(removal.index, removal.weights)
    return result


def removal_losses(
    loss: OutputLoss,
    change: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    removal: RemovalTerm,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Loss of the removed samples in each copy, :math:`\frac1N \sum_{z \in S_g} L(f(\theta_g, x_z), t_z)`.

    Args:
        loss: the loss of the outputs.
        change: :math:`\delta` of all copies, ``(G, *shape)`` by name.
        reference: :math:`\theta^s`, ``(*shape)`` by name.
        removal: the removed samples of each copy.
        chunk_size: copies that are computed at once; None for all.

    Returns:
        ``(G,)``.
    """

    def one(change: Mapping[str, Tensor], index: Tensor, weights: Tensor) -> Tensor:
        return _removed(loss, _moved(reference, change), removal, index, weights)

    result: Tensor = torch.func.vmap(one, chunk_size=chunk_size)(dict(change), removal.index, removal.weights)
    return result


_GAPS = {
    "warm-start": ("cold", "warm"),
    "proximity": ("warm", "proximal"),
    "non-convergence": ("proximal", "pbrf"),
    "linearization": ("pbrf", "linear"),
    "solver": ("linear", "estimate"),
}


def influence_gaps(stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Split the distance from retraining to an influence estimate into the five terms of the paper.

    .. math:: a_{cold} - a_{estimate} = (a_{cold} - a_{warm}) + (a_{warm} - a_{proximal}) + (a_{proximal} - a_{pbrf})
        + (a_{pbrf} - a_{linear}) + (a_{linear} - a_{estimate})

    Exact for parameters and for any function of them, such as outputs.

    Args:
        stages: tensors of one shape under the names ``"cold"``, ``"warm"``, ``"proximal"``, ``"pbrf"``, ``"linear"``
            (the exact solve) and ``"estimate"`` (what is used in practice).

    Returns:
        Differences under ``"warm-start"``, ``"proximity"``, ``"non-convergence"``, ``"linearization"``, ``"solver"``.

    Raises:
        ValueError: A stage is missing or has another shape.

    Source: Bae et al. 2022, arXiv:2209.05364, section 4.

    >>> stages = dict(
    ...     zip(["cold", "warm", "proximal", "pbrf", "linear", "estimate"], torch.tensor([9.0, 5, 3, 2, 2, 1]))
    ... )
    >>> {name: gap.item() for name, gap in influence_gaps(stages).items()}
    {'warm-start': 4.0, 'proximity': 2.0, 'non-convergence': 1.0, 'linearization': 0.0, 'solver': 1.0}
    """
    needed = list(dict.fromkeys(name for pair in _GAPS.values() for name in pair))
    shapes = {name: tuple(stages[name].shape) for name in needed if name in stages}
    if len(shapes) < len(needed) or len(set(shapes.values())) > 1:
        raise ValueError(f"stages must hold {', '.join(needed)}, all of one shape; got {shapes}.")
    return {gap: stages[first] - stages[second] for gap, (first, second) in _GAPS.items()}
