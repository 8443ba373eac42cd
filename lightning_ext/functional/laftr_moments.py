r"""Function-space distance of ReLU chains in closed form, from two moments of the inputs and one mean gate per unit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OutputMoments", "ReferenceMoments", "joint_moments", "moment_distance"]

Layer = tuple[Tensor, Tensor | None]
Heads = slice | Tensor | Sequence[int]


class OutputMoments(NamedTuple):
    r"""Moments of the change of the outputs :math:`\Delta z = z_1 - z_0`."""

    mean: Tensor
    r""":math:`\mathbb E\,\Delta z`, ``(..., C)``."""
    second: Tensor
    r""":math:`\mathbb E\,\Delta z\,\Delta z^\top`, not centred, ``(..., C, C)``."""

    def distance(self, metric: Tensor | None = None) -> Tensor:
        r"""Half the expected squared length of :math:`\Delta z` under a metric.

        .. math:: D = \tfrac12 \operatorname{tr}(H\, \mathbb E\, \Delta z\, \Delta z^\top)

        Args:
            metric: :math:`H`, ``(..., C, C)``, one for each group or one for all; default the identity.

        Returns:
            ``(...)``, one for each group.

        Raises:
            ValueError: If the metric has another size than the outputs.

        >>> OutputMoments(torch.zeros(2), torch.eye(2)).distance()
        tensor(1.)
        """
        if metric is None:
            return 0.5 * self.second.diagonal(dim1=-2, dim2=-1).sum(-1)
        if metric.shape[-2:] != self.second.shape[-2:]:
            raise ValueError(
                f"metric must be square over the {self.mean.shape[-1]} outputs that count (after heads); got shape "
                f"{tuple(metric.shape)}."
            )
        return 0.5 * (metric.detach().to(self.second.dtype) * self.second).sum((-2, -1))


class ReferenceMoments:
    r"""The moments of a reference network, ready to be compared with any number of others.

    In the chain :math:`s_l = W_l a_{l-1} + b_l`, :math:`a_l = g_l \odot s_l`, the gates are independent Bernoulli
    variables with means :math:`\mu_l` and the same in both networks. With :math:`u = (a_0, 1, \Delta a)`, where index 0
    is the reference, 1 the other network and :math:`\Delta` their difference, both kinds of layer act linearly on
    :math:`M = \mathbb E\, u u^\top`:

    .. math::
        \Delta s = [\Delta W, \Delta b, W_1]\, u, \qquad
        M \leftarrow M \odot C, \quad C = \mu \mu^\top - \operatorname{diag}(\mu^2) + \operatorname{diag}(\mu),

    with :math:`\Delta a = 0` at the input. The result is the exact expectation over gates and over every input
    distribution with these two moments. Its precision does not suffer as the networks approach, since differences are
    propagated, not formed in the end.

    Args:
        layers: :math:`(W, b)` of the reference, in order: weights ``(n_out, n_in)``, biases ``(n_out,)`` or None.
            Treated as constants.
        mean: of the inputs, ``(..., d)``; leading dimensions are groups, such as classes.
        covariance: ``(..., d, d)``, or only its diagonal ``(..., d)``, or None for 0.
        gates: :math:`\mu_l`, the mean gate of every hidden unit, in [0, 1], ``(..., n_l)``; one tensor for each layer
            but the last.
        factor: :math:`L`, ``(..., d, r)``, for inputs of covariance ``covariance`` :math:`+ L L^\top`. Low rank is
            cheap.
        heads: which outputs count, an index into them. Default all.
        dtype: of the computation, default that of the first weight; at least float32.

    Raises:
        ValueError: If shapes do not fit together.

    Source: derived from Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519), "BGLN-D". The authors' code leaves out the
    covariance of :math:`\Delta W a_0` with :math:`W_1 \Delta a`, and the variance of the gates.

    >>> one = torch.ones(1, 1)
    >>> reference = ReferenceMoments([(one, None), (one, None)], one[0], 2 * one, [0.5 * one[0]])
    >>> reference.compare([(3 * one, None), (2 * one, None)]).distance()  # (2 * 3 - 1)^2 / 2 * mu * E x^2
    tensor(18.7500)

    Note:
        Products of n by n matrices, for each layer and group, and no data; nothing is drawn, and nothing is reduced
        over ranks. Keeps :math:`n_l^2` numbers for each hidden layer and group.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        mean: Tensor,
        covariance: Tensor | None,
        gates: Sequence[Tensor],
        *,
        factor: Tensor | None = None,
        heads: Heads | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _require_fitting(layers, mean, covariance, gates, factor)
        self.dtype = torch.promote_types(dtype or layers[0][0].dtype, torch.float32)
        self.heads = heads
        self.layers = self._affine(layers)
        with torch.no_grad(), _full_precision(mean):
            self._covariance = None if covariance is None else covariance.to(self.dtype)
            self._root = _augmented_root(mean.to(self.dtype), None if factor is None else factor.to(self.dtype))
            self._gates = [_gate_moments(gate.detach().to(self.dtype)) for gate in gates]
            self._blocks = self._reference_blocks()

    def _affine(self, layers: Sequence[Layer]) -> list[Tensor]:
        """The reference's layers as constants ``[W, b]``, the last one on the chosen outputs."""
        return [layer.detach() for layer in _joined(layers, self.heads, self.dtype)]

    def _reference_blocks(self) -> list[Tensor]:
        """For each hidden layer the moments of its activations and 1, after the gates."""
        blocks: list[Tensor] = []
        for layer, gate in zip(self.layers, self._gates, strict=False):
            map_ = _keep_one(layer)
            if blocks:
                second = map_ @ (blocks[-1] @ map_.mT)
            else:
                self._first = self._project(map_)
                second = _inner(self._first, self._first)
            blocks.append(second * gate)
        return blocks

    def _project(self, layer: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of matrices (X, Y) for each part of the inputs' second moment: T A U' = sum of X(T)' Y(U)."""
        outer = self._root.mT @ layer.mT
        pairs = [(outer, outer)]
        if self._covariance is not None:
            weight = layer[:, :-1].mT
            diagonal = self._covariance.ndim == self._root.ndim - 1
            pairs.append((self._covariance[..., None] * weight if diagonal else self._covariance @ weight, weight))
        return pairs

    def compare(self, layers: Sequence[Layer]) -> OutputMoments:
        """Moments of the difference of the outputs from those of another network.

        Args:
            layers: of the other network, shapes as in the reference; differentiable to any order.

        Returns:
            :class:`OutputMoments`, in the computation's type, float32 or wider even under autocast.

        Raises:
            ValueError: If a shape differs from the reference's.
        """
        with _full_precision(self._root):
            current = _joined(layers, self.heads, self.dtype)
            _require_same(self.layers, current)
            changes = [new - old for new, old in zip(current, self.layers, strict=True)]
            first = self._project(changes[0])
            second = _inner(first, first)
            if len(changes) == 1:
                return OutputMoments(first[0][0][..., -1, :], second)
            cross = _inner(self._first, first)
            for i, block in enumerate(self._blocks, start=1):
                gate = self._gates[i - 1]
                cross, second = cross * gate[..., :-1], second * gate[..., :-1, :-1]
                change, weight = changes[i].mT, current[i][:, :-1].mT
                with_reference = block @ change + cross @ weight
                with_change = cross.mT @ change + second @ weight
                second = changes[i] @ with_reference + weight.mT @ with_change
                if i < len(self._blocks):
                    cross = _keep_one(self.layers[i]) @ with_reference
            return OutputMoments(with_reference[..., -1, :], second)


def joint_moments(
    reference: Sequence[Layer],
    current: Sequence[Layer],
    mean: Tensor,
    covariance: Tensor | None,
    gates: Sequence[Tensor],
    *,
    factor: Tensor | None = None,
    variant: str = "exact",
    heads: Heads | None = None,
) -> OutputMoments:
    r"""Moments of the change of the outputs of a ReLU chain with independent Bernoulli gates.

    Args:
        reference: :math:`\theta_0`: weights ``(n_out, n_in)`` and biases ``(n_out,)`` or None in order; constants.
        current: :math:`\theta_1`, likewise; differentiable. Its type is that of the computation, at least float32.
        mean: of the inputs, ``(..., d)``; leading dimensions are groups, such as classes.
        covariance: ``(..., d, d)``, or only its diagonal ``(..., d)``, or None for 0.
        gates: mean gates in [0, 1], ``(..., n_l)``, one tensor for each layer but the last.
        factor: ``(..., d, r)``, whose product with its own transpose is added to ``covariance``. Default none.
        variant: ``"exact"``, see :class:`ReferenceMoments`; ``"official"``, for comparison, is the formula of the
            authors' code. It propagates covariances of :math:`a_0` and of :math:`\Delta a` apart and multiplies both by
            :math:`\mu\mu^\top`, which is wrong even for linear networks.
        heads: which outputs count, an index into them. Default all.

    Returns:
        :class:`OutputMoments`.

    Raises:
        ValueError: If shapes do not fit together, or for another variant.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519), "BGLN-D"; the exact form is derived.

    >>> one = torch.ones(1, 1)
    >>> layers = [(one, None), (one, None)], [(3 * one, None), (2 * one, None)]
    >>> joint_moments(*layers, one[0], 2 * one, [0.5 * one[0]]).second
    tensor([[37.5000]])

    Note:
        To compare one reference with many, keep a :class:`ReferenceMoments`: it computes the reference's part once.
    """
    if variant not in ("exact", "official"):
        raise ValueError(f'variant must be "exact" or "official"; got {variant!r}.')
    if variant == "official":
        return _official_moments(reference, current, mean, covariance, gates, factor, heads)
    dtype = current[0][0].dtype if current else None
    kept = ReferenceMoments(reference, mean, covariance, gates, factor=factor, heads=heads, dtype=dtype)
    return kept.compare(current)


def moment_distance(
    reference: Sequence[Layer],
    current: Sequence[Layer],
    mean: Tensor,
    covariance: Tensor | None,
    gates: Sequence[Tensor],
    *,
    factor: Tensor | None = None,
    metric: Tensor | None = None,
    variant: str = "exact",
    heads: Heads | None = None,
) -> Tensor:
    r"""Function-space distance of a ReLU chain in closed form.

    .. math:: D(\theta_0, \theta_1) = \tfrac12 \operatorname{tr}(H\, \mathbb E_{x, g}\, \Delta z\, \Delta z^\top)

    Without a metric this is the squared error of the outputs; with :math:`H` from :func:`class_hessians` it is the
    Kullback-Leibler divergence to second order.

    Args:
        reference: as in :func:`joint_moments`, which also describes the other arguments.
        current: likewise.
        mean: likewise.
        covariance: likewise.
        gates: likewise.
        factor: likewise.
        metric: :math:`H`, ``(..., C, C)`` for the outputs that ``heads`` leaves; default the identity.
        variant: likewise.
        heads: likewise.

    Returns:
        ``(...)``, one distance for each group, to be averaged with the groups' shares; at least 0 up to rounding. In
        nats under a metric of :func:`class_hessians`, else in squared units of the outputs.

    Raises:
        ValueError: If shapes do not fit together, or for another variant.

    Source: derived; see :class:`ReferenceMoments`.

    >>> one = torch.ones(1, 1)
    >>> layers = [(one, None), (one, None)], [(3 * one, None), (2 * one, None)]
    >>> moment_distance(*layers, one[0], 2 * one, [0.5 * one[0]])
    tensor(18.7500)
    >>> moment_distance(*layers, one[0], 2 * one, [0.5 * one[0]], variant="official")
    tensor(7.3750)

    Note:
        Equal on every rank without communication.
    """
    moments = joint_moments(reference, current, mean, covariance, gates, factor=factor, variant=variant, heads=heads)
    return moments.distance(metric)


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _joined(layers: Sequence[Layer], heads: Heads | None, dtype: torch.dtype) -> list[Tensor]:
    """Matrices ``[W, b]``, the last one on the chosen outputs."""
    joined = []
    for weight, bias in layers:
        column = weight.new_zeros(len(weight)) if bias is None else bias
        joined.append(torch.cat([weight.to(dtype), column.to(dtype)[:, None]], -1))
    if heads is not None:
        joined[-1] = joined[-1][heads]
    return joined


def _keep_one(layer: Tensor) -> Tensor:
    """``[[W, b], [0, 1]]``: the 1 that carries the bias goes on to the next layer."""
    unit = torch.zeros_like(layer[:1])
    unit[:, -1] = 1
    return torch.cat([layer, unit])


def _augmented_root(mean: Tensor, factor: Tensor | None) -> Tensor:
    """``[[L, m], [0, 1]]``, whose product with its own transpose is the second moment of ``(x, 1)``."""
    top = mean[..., None]
    if factor is not None:
        top = torch.cat([factor, top], -1)
    unit = torch.zeros_like(top[..., :1, :])
    unit[..., -1] = 1
    return torch.cat([top, unit], -2)


def _gate_moments(gate: Tensor) -> Tensor:
    """Second moments of independent Bernoulli gates, and of the 1 that is always open."""
    gate = F.pad(gate, (0, 1), value=1.0)
    return torch.diagonal_scatter(gate[..., None] * gate[..., None, :], gate, dim1=-2, dim2=-1)


def _inner(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> Tensor:
    terms = [x.mT @ y for (x, _), (_, y) in zip(left, right, strict=True)]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _official_moments(
    reference: Sequence[Layer],
    current: Sequence[Layer],
    mean: Tensor,
    covariance: Tensor | None,
    gates: Sequence[Tensor],
    factor: Tensor | None,
    heads: Heads | None,
) -> OutputMoments:
    """The authors' formula: right means, covariances without cross terms and without the gates' variance."""
    _require_fitting(reference, mean, covariance, gates, factor)
    dtype = torch.promote_types(current[0][0].dtype, torch.float32)
    with _full_precision(mean):
        old = [layer.detach() for layer in _joined(reference, heads, dtype)]
        new = _joined(current, heads, dtype)
        _require_same(old, new)
        first, change = mean.to(dtype), torch.zeros_like(mean, dtype=dtype)
        spread = torch.diag_embed(change)
        if covariance is not None:
            spread = (torch.diag_embed(covariance) if covariance.shape == mean.shape else covariance).to(dtype)
        if factor is not None:
            spread = spread + (factor @ factor.mT).to(dtype)
        change_spread = torch.zeros_like(spread)
        for i, (layer, other) in enumerate(zip(old, new, strict=True)):
            weight, step, after = layer[:, :-1], (other - layer)[:, :-1], other[:, :-1]
            change = first @ step.mT + (other - layer)[:, -1] + change @ after.mT
            first = first @ weight.mT + layer[:, -1]
            change_spread = step @ spread @ step.mT + after @ change_spread @ after.mT
            spread = weight @ spread @ weight.mT
            if i < len(gates):
                gate = gates[i].to(dtype)
                both = gate[..., None] * gate[..., None, :]
                first, change, spread, change_spread = first * gate, change * gate, spread * both, change_spread * both
        return OutputMoments(change, change[..., None] * change[..., None, :] + change_spread)


def _require_fitting(
    layers: Sequence[Layer],
    mean: Tensor,
    covariance: Tensor | None,
    gates: Sequence[Tensor],
    factor: Tensor | None,
) -> None:
    if not layers or len(gates) != len(layers) - 1:
        raise ValueError(f"gates must hold one tensor for each layer but the last; got {len(gates)} for {len(layers)}.")
    widths = [weight.shape[1] for weight, _ in layers]
    if [len(weight) for weight, _ in layers[:-1]] != widths[1:]:
        raise ValueError(f"layers do not follow one another: weights of shape {[tuple(w.shape) for w, _ in layers]}.")
    if [gate.shape[-1] for gate in gates] != widths[1:] or mean.shape[-1:] != (widths[0],):
        raise ValueError(
            f"mean and gates must have {widths} numbers in the last dimension; got shapes {tuple(mean.shape)} and "
            f"{[tuple(gate.shape) for gate in gates]}."
        )
    if covariance is not None and covariance.shape not in (mean.shape, (*mean.shape, widths[0])):
        raise ValueError(
            f"covariance must have shape {(*mean.shape, widths[0])}, or {tuple(mean.shape)} if diagonal; got "
            f"{tuple(covariance.shape)}."
        )
    if factor is not None and factor.shape[:-1] != mean.shape:
        raise ValueError(f"factor must have shape {(*mean.shape, 'r')}; got {tuple(factor.shape)}.")


def _require_same(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    shapes = [[(len(t), t.shape[1] - 1) for t in tensors] for tensors in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"both networks must have weights of one shape; got {shapes[0]} and {shapes[1]}.")
