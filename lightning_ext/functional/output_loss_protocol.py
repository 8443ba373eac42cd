r"""What curvature and influence ask of a loss, as a function of a network's outputs.

They look at a network through its outputs :math:`y_b`: the Gauss-Newton matrix needs
:math:`H_b = \nabla_y^2 L(y_b, t_b)`, the proximal Bregman response needs the divergence

.. math:: D_L(y, y_0) = L(y, t) - L(y_0, t) - \nabla_y L(y_0, t)^\top (y - y_0).

Nothing here averages over the batch: every value is one sample's, so that the caller alone decides on weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["OutputLoss", "exponential_remainder", "log_partition_divergence"]


class OutputLoss(ABC):
    r"""A loss :math:`L(y, t)` of one sample's outputs.

    Every method takes outputs ``y`` of shape ``(B, ...)`` and targets ``t`` with the samples first, keeps the samples
    apart, and can be used inside ``torch.func`` transforms. 16-bit outputs are computed in float32.

    Attributes:
        convex: whether :math:`L` is convex in ``y``; only then is the Gauss-Newton matrix positive semidefinite and
            the divergence at least 0.
    """

    convex: bool = True

    @abstractmethod
    def value(self, y: Tensor, t: Tensor) -> Tensor:
        """Return the losses, ``(B,)``."""

    @abstractmethod
    def gradient(self, y: Tensor, t: Tensor) -> Tensor:
        r"""Return :math:`\nabla_y L(y_b, t_b)` for each sample, shaped like ``y``."""

    @abstractmethod
    def hessian_product(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        r"""Return :math:`H_b u_b`; ``u`` has the shape ``(*leading, *y.shape)``, and so has the result."""

    def hessian_at(self, y: Tensor, t: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return :meth:`hessian_product` as a function of ``u`` alone, for many products at one point."""
        return partial(self.hessian_product, y, t)

    @abstractmethod
    def hessian_sqrt(self, y: Tensor, t: Tensor | None) -> Tensor:
        r"""Return columns ``(S, *y.shape)`` with :math:`H_b = \sum_s c_{sb} c_{sb}^\top`.

        S is the number of a sample's outputs, so this is for small outputs.
        """

    def hessian_columns(self, y: Tensor, t: Tensor | None, at_once: int) -> Iterator[Tensor]:
        """Yield the columns of :meth:`hessian_sqrt` in its order, in blocks ``(s, *y.shape)`` with s <= ``at_once``."""
        yield from torch.split(self.hessian_sqrt(y, t), at_once)

    @abstractmethod
    def sample_gradient(self, y: Tensor, t: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw :math:`g_b` with :math:`\mathbb E[g_b g_b^\top] = H_b`, shaped like ``y``.

        For one output per sample this is the loss gradient at a label drawn from the model; where a sample has
        several outputs whose losses are averaged, each output's gradient is scaled by the root of its weight.
        """

    def require_convex(self, y: Tensor, t: Tensor | None) -> None:  # noqa: B027  # most losses leave no doubt
        """Raise a ValueError if ``convex`` is claimed and not true at these outputs."""

    @abstractmethod
    def bregman(self, y: Tensor, y_ref: Tensor, t: Tensor | None = None) -> Tensor:
        r"""Return :math:`D_L(y_b, y_{0,b})`, ``(B,)`` in the loss's units (nats for log-likelihoods).

        Differentiable in ``y``, with ``y_ref`` a constant. Value and gradient of the losses that are written out here
        keep their relative precision however close ``y`` comes to ``y_ref``, and see of the targets only which outputs
        to leave out.
        """


def at_least_32_bit(y: Tensor) -> Tensor:
    """Return 16-bit numbers in float32, others as they are."""
    return y.to(torch.promote_types(y.dtype, torch.float32))


def fit_targets(t: Tensor, shape: torch.Size, of: str) -> Tensor:
    """Return ``t`` in ``shape``, where at most dimensions of size 1 keep them apart: nothing may broadcast."""
    if t.shape == shape:
        return t
    if [n for n in t.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(f"targets must have {of}, {tuple(shape)}; got {tuple(t.shape)}.")
    return t.reshape(shape)


def sum_per_sample(terms: Tensor) -> Tensor:
    """Sum over everything but the first dimension."""
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms


class _ExponentialRemainder(torch.autograd.Function):
    """exp(x) - 1 - x without cancellation: a series near 0. Its derivative is expm1, so nothing but x is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = args
        series = torch.ones_like(x)
        for n in range(16 if x.dtype == torch.float64 else 10, 2, -1):
            series = 1 + series * x / n
        return torch.where(x.abs() < 0.5, 0.5 * x.square() * series, torch.expm1(x) - x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = grad_outputs[0] * torch.expm1(x)
        return gradient

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        tangent: Tensor = grad_inputs[0] * torch.expm1(x)
        return tangent


def exponential_remainder(x: Tensor) -> Tensor:
    r"""Return :math:`e^x - 1 - x \ge 0` to the relative precision of the type, also for tiny x; differentiable.

    >>> exponential_remainder(torch.tensor([1e-10, 1.0]))  # x^2 / 2, e - 2
    tensor([5.0000e-21, 7.1828e-01])
    """
    result: Tensor = _ExponentialRemainder.apply(x)  # type: ignore[no-untyped-call]
    return result


_LARGEST_EXPONENT = 40.0  # exp of it can be squared in float32


def log_partition_divergence(change: Tensor, log_p: Tensor) -> Tensor:
    r"""Return :math:`\log \mathbb E_p e^{d} - \mathbb E_p d = \mathrm{KL}(p \| p e^{d} / Z)` over the last dimension.

    With d centred under p it is :math:`\log(1 + \mathbb E_p[e^d - 1 - d])`: a sum of terms that are all at least 0, of
    the size of the result, where log-probabilities subtracted from each other would leave rounding of size 1.
    """
    p = log_p.exp()
    centred = change - (p * change).sum(-1, keepdim=True)
    near = torch.log1p((p * exponential_remainder(centred.clamp(max=_LARGEST_EXPONENT))).sum(-1))
    far = (log_p + centred).logsumexp(-1)
    return torch.where(centred.amax(-1) <= _LARGEST_EXPONENT, near, far)
