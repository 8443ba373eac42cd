"""Latent variable models in which everything is known: their posteriors, and their mutual information."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from lightning_ext.nn.mutual_information import LatentModel, Proposal

__all__ = ["FiniteModel", "LinearGaussianModel"]


class LinearGaussianModel(LatentModel):
    r"""Probabilistic PCA: :math:`x = W z + b + \sigma \epsilon`, in which everything is known.

    Args:
        weight: W, ``(D, d)``.
        bias: b, ``(D,)``.
        sigma: positive.
    """

    def __init__(self, weight: Tensor, bias: Tensor, sigma: float) -> None:
        super().__init__(weight.shape[1])
        if not sigma > 0:
            raise ValueError(f"sigma must be positive; got {sigma}.")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor
        self.bias: Tensor
        self.sigma = float(sigma)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-density, summed over the event."""
        squared = (x - (z @ self.weight.mT + self.bias)).square().sum(-1)
        return -0.5 * squared / self.sigma**2 - x.shape[-1] * (math.log(self.sigma) + 0.5 * math.log(2 * math.pi))

    def sample_x(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Data ``(B, D)``."""
        mean = z @ self.weight.mT + self.bias
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.sigma * noise

    def posterior(self, x: Tensor, beta: float = 1.0) -> Distribution:
        r"""The exact density :math:`\propto p(z)\, p(x \mid z)^\beta` of each data point, with shapes ``(B, d)``."""
        eye = torch.eye(self.latent_dim, dtype=self.weight.dtype, device=self.weight.device)
        precision = eye + beta / self.sigma**2 * self.weight.mT @ self.weight
        mean = beta / self.sigma**2 * torch.linalg.solve(precision, self.weight.mT @ (x - self.bias).mT).mT
        return torch.distributions.MultivariateNormal(mean, precision_matrix=precision)

    def proposal(self, x: Tensor) -> Proposal | None:
        """The exact posterior."""
        return Proposal.of(self.posterior(x))


class FiniteModel(LatentModel):
    """A table of probabilities; latents and data are integers.

    Args:
        joint: ``(X, Z)``, at least 0, summing to 1, with no empty column.
    """

    discrete = True

    def __init__(self, joint: Tensor) -> None:
        super().__init__(1)
        if joint.ndim != 2 or bool((joint < 0).any()) or not bool((joint.sum(0) > 0).all()):
            raise ValueError("joint must be a table (X, Z) of probabilities, none of whose columns is empty.")
        self.register_buffer("joint", joint / joint.sum())
        self.joint: Tensor

    @property
    def prior(self) -> Callable[[Tensor], Tensor]:
        """Log-probabilities of the columns."""
        log_p = self.joint.sum(0).log()
        return lambda z: log_p[z[..., 0]]

    def sample_prior(self, num: int, generator: Generator | None = None) -> Tensor:
        """Columns ``(num, 1)``."""
        return torch.multinomial(self.joint.sum(0), num, replacement=True, generator=generator).unsqueeze(1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-probabilities of the rows ``(B, 1)`` given the columns."""
        return (self.joint / self.joint.sum(0)).log()[x[..., 0], z[..., 0]]

    def sample_x(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Rows ``(B, 1)``."""
        return torch.multinomial(self.joint.mT[z[..., 0]], 1, generator=generator)
