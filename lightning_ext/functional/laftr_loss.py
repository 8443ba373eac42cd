"""The curvature of output divergences, for Gauss-Newton matrices over inputs that stand for data that is gone."""

import math

import torch
from torch import Tensor

from lightning_ext.functional.elementwise_losses import SquaredError
from lightning_ext.functional.laftr import output_divergence
from lightning_ext.functional.output_loss_protocol import OutputLoss, at_least_32_bit, sum_per_sample
from lightning_ext.functional.output_losses import SoftmaxCrossEntropy

__all__ = ["DivergenceLoss"]


class _SoftmaxSquaredError(OutputLoss):
    """Half the squared distance of softmaxes, mean over a sample's positions, with the target at the prediction."""

    def value(self, y: Tensor, t: Tensor) -> Tensor:
        return y.new_zeros(len(y))

    def gradient(self, y: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(y)

    @staticmethod
    def _derivative(y: Tensor, u: Tensor) -> Tensor:
        """The softmax's Jacobian, which is symmetric, times u."""
        p = y.softmax(-1)
        weighted = p * u
        product: Tensor = weighted - p * weighted.sum(-1, keepdim=True)
        return product

    @staticmethod
    def _positions(y: Tensor) -> int:
        return max(1, y[:1].numel() // y.shape[-1])

    def hessian_product(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        return self._derivative(y, self._derivative(y, u)) / self._positions(y)

    def hessian_sqrt(self, y: Tensor, t: Tensor | None) -> Tensor:
        size = y[:1].numel()
        basis = torch.eye(size, dtype=y.dtype, device=y.device).view(size, 1, *y.shape[1:])
        return self._derivative(y, basis.expand(size, *y.shape)) / math.sqrt(self._positions(y))

    def sample_gradient(self, y: Tensor, t: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        drawn = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        return self._derivative(y, drawn) / math.sqrt(self._positions(y))

    def bregman(self, y: Tensor, y_ref: Tensor, t: Tensor | None = None) -> Tensor:
        difference = y.softmax(-1) - y_ref.detach().softmax(-1)
        return 0.5 * sum_per_sample(difference.square()) / self._positions(y)


_KINDS: dict[str, OutputLoss] = {
    "kl": SoftmaxCrossEntropy(),
    "mse": SquaredError(0.5, "sum"),
    "softmax_l2": _SoftmaxSquaredError(),
}


class DivergenceLoss(OutputLoss):
    r"""A divergence from the outputs' present values, weighted: :math:`L(y) = w\, \rho(y, y_0)` at :math:`y = y_0`.

    Value and gradient are 0 there; the Hessian is w times that of :math:`\rho`. The Gauss-Newton matrix of this loss
    is therefore the Hessian of :math:`\sum_s w_s\, \rho(f(x_s; \theta), f(x_s; \theta_0))` at :math:`\theta_0`.

    Args:
        divergence: ``"kl"``, ``"mse"`` or ``"softmax_l2"``, see `output_divergence`.

    The targets are the weights, ``(B,)``, at least 0. They have no gradient, so ``value`` and ``gradient`` are zeros;
    ``bregman`` is :math:`w\, \rho(y, y_0)`, precise for small changes.

    Raises:
        ValueError: For another name.

    >>> loss = DivergenceLoss("mse")
    >>> loss.hessian_product(torch.zeros(1, 2), torch.tensor([3.0]), torch.tensor([[1.0, 2.0]]))
    tensor([[3., 6.]])
    """

    def __init__(self, divergence: str = "kl") -> None:
        output_divergence(torch.zeros(1, 2), torch.zeros(1, 2), divergence)  # knows the names
        self.divergence = divergence
        self._kind = _KINDS[divergence]

    def __repr__(self) -> str:
        return f"DivergenceLoss({self.divergence!r})"

    def value(self, y: Tensor, t: Tensor) -> Tensor:
        """Return zeros ``(B,)``."""
        return at_least_32_bit(y).new_zeros(len(y))

    def gradient(self, y: Tensor, t: Tensor) -> Tensor:
        """Return zeros shaped like ``y``."""
        return torch.zeros_like(y)

    def hessian_product(self, y: Tensor, t: Tensor | None, u: Tensor) -> Tensor:
        r"""Return :math:`w_b H_b u_b`."""
        return self._weighted(self._kind.hessian_product(y, None, u), y, t)

    def hessian_sqrt(self, y: Tensor, t: Tensor | None) -> Tensor:
        """Return the columns of a root of it."""
        return self._weighted(self._kind.hessian_sqrt(y, None), y, t, power=0.5)

    def sample_gradient(self, y: Tensor, t: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Draw vectors whose second moment it is."""
        return self._weighted(self._kind.sample_gradient(y, None, generator), y, t, power=0.5)

    def bregman(self, y: Tensor, y_ref: Tensor, t: Tensor | None = None) -> Tensor:
        r"""Return :math:`w_b\, \rho(y_b, y_{0,b})`, ``(B,)``."""
        found = self._kind.bregman(y, y_ref)
        return found if t is None else found * t.to(found)

    @staticmethod
    def _weighted(values: Tensor, y: Tensor, t: Tensor | None, power: float = 1.0) -> Tensor:
        return values if t is None else values * t.to(y).pow(power).view(-1, *[1] * (y.ndim - 1))
