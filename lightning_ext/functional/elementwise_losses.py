r"""Losses that add a function of each output and its target: Bernoulli, squared error, Gaussian, Poisson."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext.functional.output_loss_protocol import (
    OutputLoss,
    at_least_32_bit,
    exponential_remainder,
    fit_targets,
    log_partition_divergence,
    sum_per_sample,
)

__all__ = ["BernoulliCrossEntropy", "GaussianNLL", "PoissonNLL", "SquaredError"]


class _ElementwiseLoss(OutputLoss):
    """A loss that is a weighted sum of a function of each output and its target; its Hessians are diagonal."""

    def _weight(self, y: Tensor) -> float:
        return 1.0

    @abstractmethod
    def _term(self, y: Tensor, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, y: Tensor, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _curvature(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _divergence(self, y: Tensor, y_ref: Tensor) -> Tensor: ...

    @abstractmethod
    def _draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor: ...

    def value(self, y: Tensor, t: Tensor) -> Tensor:
        y = at_least_32_bit(y)
        return sum_per_sample(
            self._weight(y) * self._term(y, fit_targets(t, y.shape, "the outputs' shape").to(y.dtype))
        )

    def gradient(self, y: Tensor, t: Tensor) -> Tensor:
        wide = at_least_32_bit(y)
        slope = self._slope(wide, fit_targets(t, y.shape, "the outputs' shape").to(wide.dtype))
        return (self._weight(y) * slope).to(y.dtype)

    def hessian_product(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        return (self._weight(y) * self._curvature(at_least_32_bit(y)) * u).to(u.dtype)

    def hessian_sqrt(self, y: Tensor, t: Tensor | None) -> Tensor:
        return torch.cat(list(self.hessian_columns(y, t, max(1, y[:1].numel()))))

    def hessian_columns(self, y: Tensor, t: Tensor | None, at_once: int) -> Iterator[Tensor]:
        roots = (self._weight(y) * self._curvature(at_least_32_bit(y))).sqrt().to(y.dtype).reshape(len(y), -1)
        for part in torch.split(torch.arange(roots.shape[1], device=y.device), at_once):
            columns = roots.new_zeros(len(part), *roots.shape)
            columns[torch.arange(len(part), device=y.device), :, part] = roots[:, part].mT
            yield columns.reshape(len(part), *y.shape)

    def sample_gradient(self, y: Tensor, t: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        return (math.sqrt(self._weight(y)) * self._draw(at_least_32_bit(y), generator)).to(y.dtype)

    def bregman(self, y: Tensor, y_ref: Tensor, t: Tensor | None = None) -> Tensor:
        y, y_ref = at_least_32_bit(y), at_least_32_bit(y_ref.detach())
        return sum_per_sample(self._weight(y) * self._divergence(y, y_ref))


def _mean_weight(y: Tensor, reduction: str) -> float:
    return 1 / max(1, math.prod(y.shape[1:])) if reduction == "mean" else 1.0


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean' over a sample's outputs; got {reduction!r}.")


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite; got {value}.")


def _normal(y: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)


@dataclass(frozen=True)
class BernoulliCrossEntropy(_ElementwiseLoss):
    r"""Cross-entropy of logits with targets in [0, 1], in nats; a sum or mean over a sample's outputs.

    .. math:: L(y, t) = \sum_k \bigl[\log(1 + e^{y_k}) - t_k y_k\bigr], \quad
        H = \operatorname{diag} \sigma(1 - \sigma), \quad
        D(y, y_0) = \sum_k \mathrm{KL}\bigl(\sigma(y_{0,k}) \,\Vert\, \sigma(y_k)\bigr)

    Args:
        reduction: ``"sum"`` over a sample's outputs, or their ``"mean"`` as in ``F.binary_cross_entropy_with_logits``.

    >>> BernoulliCrossEntropy().value(torch.zeros(1, 3), torch.tensor([[0.0, 0.5, 1.0]]))  # 3 log 2
    tensor([2.0794])
    """

    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        _check_reduction(self.reduction)

    def _weight(self, y: Tensor) -> float:
        return _mean_weight(y, self.reduction)

    def _term(self, y: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y, t, reduction="none")

    def _slope(self, y: Tensor, t: Tensor) -> Tensor:
        return y.sigmoid() - t

    def _curvature(self, y: Tensor) -> Tensor:
        return y.sigmoid() * (-y).sigmoid()

    def _divergence(self, y: Tensor, y_ref: Tensor) -> Tensor:
        change = torch.stack([y - y_ref, torch.zeros_like(y)], -1)
        return log_partition_divergence(change, torch.stack([F.logsigmoid(y_ref), F.logsigmoid(-y_ref)], -1))

    def _draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        p = y.sigmoid()
        return p - torch.bernoulli(p, generator=generator)


@dataclass(frozen=True)
class SquaredError(_ElementwiseLoss):
    r"""Squared distance :math:`L(y, t) = c \operatorname{reduce}_k (y_k - t_k)^2`, so that :math:`H = 2 c I` for a sum.

    Args:
        factor: c, positive; 1 for ``F.mse_loss``, 0.5 for the half squared error.
        reduction: ``"mean"`` or ``"sum"`` over a sample's outputs.

    >>> SquaredError(0.5, "sum").value(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([12.5000])
    """

    factor: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        _check_reduction(self.reduction)
        _check_positive("factor", self.factor)

    def _weight(self, y: Tensor) -> float:
        return self.factor * _mean_weight(y, self.reduction)

    def _term(self, y: Tensor, t: Tensor) -> Tensor:
        return (y - t).square()

    def _slope(self, y: Tensor, t: Tensor) -> Tensor:
        return 2 * (y - t)

    def _curvature(self, y: Tensor) -> Tensor:
        return torch.full_like(y, 2.0)

    def _divergence(self, y: Tensor, y_ref: Tensor) -> Tensor:
        return (y - y_ref).square()

    def _draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        return math.sqrt(2) * _normal(y, generator)


@dataclass(frozen=True)
class GaussianNLL(_ElementwiseLoss):
    r"""Negative log-likelihood of a Gaussian of fixed variance around the outputs, summed over them, in nats.

    .. math:: L(y, t) = \sum_k \Bigl[\frac{(y_k - t_k)^2}{2 v} + \tfrac12 \log 2 \pi v\Bigr], \quad H = I / v

    Args:
        variance: v, positive.

    >>> GaussianNLL().value(torch.zeros(1, 1), torch.zeros(1, 1))  # log(2 pi) / 2
    tensor([0.9189])
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("variance", self.variance)

    def _term(self, y: Tensor, t: Tensor) -> Tensor:
        return 0.5 * ((y - t).square() / self.variance + math.log(2 * math.pi * self.variance))

    def _slope(self, y: Tensor, t: Tensor) -> Tensor:
        return (y - t) / self.variance

    def _curvature(self, y: Tensor) -> Tensor:
        return torch.full_like(y, 1 / self.variance)

    def _divergence(self, y: Tensor, y_ref: Tensor) -> Tensor:
        return (y - y_ref).square() / (2 * self.variance)

    def _draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        return _normal(y, generator) / math.sqrt(self.variance)


@dataclass(frozen=True)
class PoissonNLL(_ElementwiseLoss):
    r"""Negative log-likelihood of counts whose log rates are the outputs, summed over them, in nats.

    .. math:: L(y, t) = \sum_k \bigl[e^{y_k} - t_k y_k + \log t_k!\bigr], \quad H = \operatorname{diag} e^{y}

    >>> PoissonNLL().value(torch.zeros(1, 1), torch.tensor([[2.0]]))  # 1 + log 2
    tensor([1.6931])
    """

    def _term(self, y: Tensor, t: Tensor) -> Tensor:
        return y.exp() - t * y + torch.lgamma(t + 1)

    def _slope(self, y: Tensor, t: Tensor) -> Tensor:
        return y.exp() - t

    def _curvature(self, y: Tensor) -> Tensor:
        return y.exp()

    def _divergence(self, y: Tensor, y_ref: Tensor) -> Tensor:
        return y_ref.exp() * exponential_remainder(y - y_ref)

    def _draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = y.exp()
        return rate - torch.poisson(rate, generator=generator)
