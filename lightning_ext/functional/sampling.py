r"""Hamiltonian Monte Carlo on paths from a tractable density to one that is not.

A state keeps the log-densities at both ends of the path, and their gradients. Any temperature in between then costs no
new evaluation, and a transition of L leapfrog steps calls the gradient L times.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

__all__ = ["AnnealingPath", "DiagonalGaussian", "HMCInfo", "LogDensity", "PathState", "hmc_transition"]

_DIVERGENCE = 1000.0  # an energy error in nats that no stable integration has


@runtime_checkable
class LogDensity(Protocol):
    """A log-density that knows its gradient; a plain function is differentiated by autograd instead."""

    def __call__(self, z: Tensor) -> Tensor:
        """Log-density ``(...)`` of points ``(..., d)``, up to a constant."""

    def gradient(self, z: Tensor) -> Tensor:
        """Its gradient ``(..., d)``."""


class DiagonalGaussian:
    r"""Log-density of :math:`\mathcal N(m, \operatorname{diag}(s^2))`, with a gradient that needs no autograd.

    Args:
        mean: m, ``(d,)`` or one for each data point, ``(B, d)``; or a number.
        scale: s, likewise, positive.

    >>> standard = DiagonalGaussian(0.0, 1.0)
    >>> standard(torch.zeros(1, 2)), standard.gradient(torch.ones(1, 2))  # -log(2 pi)
    (tensor([-1.8379]), tensor([[-1., -1.]]))
    """

    def __init__(self, mean: Tensor | float, scale: Tensor | float) -> None:
        self.mean, self.scale = torch.as_tensor(mean), torch.as_tensor(scale)
        if not bool((self.scale > 0).all()):
            raise ValueError("scale must be positive.")
        self._precision = self.scale.reciprocal().square()
        self._log_scale = self.scale.log()

    def __call__(self, z: Tensor) -> Tensor:
        """Log-density, normalised."""
        standardized = (z - self.mean.to(z)) / self.scale.to(z)
        log_volume = self._log_scale.to(z) + 0.5 * math.log(2 * math.pi)
        log_volume = log_volume.expand(*log_volume.shape[:-1], z.shape[-1])
        return -0.5 * standardized.square().sum(-1) - log_volume.sum(-1)

    def gradient(self, z: Tensor) -> Tensor:
        """Its gradient."""
        return (self.mean.to(z) - z) * self._precision.to(z)

    def sample(self, shape: Sequence[int], like: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw points of a shape ``(..., d)``, with the dtype and on the device of a tensor."""
        noise = torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.mean.to(like) + self.scale.to(like) * noise


class PathState(NamedTuple):
    """Points, and all that is known of the path there.

    Args:
        position: ``(..., d)``.
        base: log-density at the beginning of the path, ``(...)``.
        energy: log-density at its end less that at its beginning, ``(...)``.
        base_gradient: ``(..., d)``; None where no kernel needs it.
        energy_gradient: likewise.
    """

    position: Tensor
    base: Tensor
    energy: Tensor
    base_gradient: Tensor | None = None
    energy_gradient: Tensor | None = None

    def log_prob(self, beta: float) -> Tensor:
        """Unnormalised log-density at a temperature, ``(...)``."""
        return torch.add(self.base, self.energy, alpha=beta) if beta else self.base

    def gradient(self, beta: float) -> Tensor:
        """Its gradient, ``(..., d)``."""
        if self.base_gradient is None or self.energy_gradient is None:
            raise ValueError("this state has no gradients: evaluate(position, gradient=True) gives one that has.")
        return torch.add(self.base_gradient, self.energy_gradient, alpha=beta) if beta else self.base_gradient

    def where(self, chosen: Tensor, other: "PathState") -> "PathState":
        """This state where ``chosen`` ``(...)``, the other elsewhere, whatever stands there in this one."""

        def pick(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            mask = chosen.unsqueeze(-1) if mine.ndim > chosen.ndim else chosen
            return torch.where(mask, mine, theirs)

        return PathState(*(pick(*pair) for pair in zip(self, other, strict=True)))  # type: ignore[arg-type]

    def select(self, index: Tensor) -> "PathState":
        """The chains ``index`` ``(K, B)`` of each data point, of a state ``(K, B, ...)``."""

        def take(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            wanted = index.unsqueeze(-1).expand(*index.shape, x.shape[-1]) if x.ndim > index.ndim else index
            return x.gather(0, wanted)

        return PathState(*map(take, self))  # type: ignore[arg-type]


class AnnealingPath:
    r"""The geometric path :math:`\log \pi_\beta(z) = \log \pi_0(z) + \beta\, l(z)` for :math:`0 \le \beta \le 1`.

    With a prior as :math:`\pi_0` and :math:`l(z) = \log p(x \mid z)` it leads to the posterior, unnormalised; with a
    proposal q, :math:`l(z) = \log p(x, z) - \log q(z \mid x)`.

    Args:
        base: :math:`\log \pi_0`, a function of points ``(..., d)`` that gives ``(...)``; rows must not depend on each
            other. With a method ``gradient``, such as :class:`DiagonalGaussian` has, it needs no autograd.
        energy: :math:`l`, likewise.

    >>> path = AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: -z.square().sum(-1))
    >>> state = path.evaluate(torch.tensor([[1.0]]))
    >>> state.energy, state.gradient(0.5)  # -z - 2 beta z
    (tensor([-1.]), tensor([[-2.]]))

    Note:
        Works under ``no_grad`` and inference mode; parameters get no gradients. What the functions close over must not
        be an inference tensor: clone such a batch outside of inference mode.
    """

    def __init__(self, base: Callable[[Tensor], Tensor], energy: Callable[[Tensor], Tensor]) -> None:
        self.base, self.energy = base, energy
        self._closed = isinstance(base, LogDensity), isinstance(energy, LogDensity)  # looked up once: it is slow

    def evaluate(self, position: Tensor, *, gradient: bool = True) -> PathState:
        """Look at the path at points ``(..., d)``; without gradients they may be integers."""
        if not gradient:
            with torch.no_grad():
                return PathState(position, self.base(position), self.energy(position))
        base, base_gradient = _both(self.base, position, self._closed[0])
        energy, energy_gradient = _both(self.energy, position, self._closed[1])
        return PathState(position, base, energy, base_gradient, energy_gradient)

    def gradient(self, position: Tensor, beta: float) -> Tensor:
        """Gradient ``(..., d)`` of the log-density at a temperature."""
        base = _gradient(self.base, position, self._closed[0])
        return torch.add(base, _gradient(self.energy, position, self._closed[1]), alpha=beta) if beta else base


def _both(function: Any, z: Tensor, closed: bool) -> tuple[Tensor, Tensor]:
    """Values and gradients, by autograd unless the function knows its own."""
    if closed:
        with torch.no_grad():
            return function(z), function.gradient(z)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (z.clone() if z.is_inference() else z.detach()).requires_grad_()
        value = function(leaf)
        if value.shape != z.shape[:-1]:
            raise ValueError(
                f"a log-density must give one number per point, {tuple(z.shape[:-1])}; got {tuple(value.shape)}."
            )
        if not value.requires_grad:
            raise ValueError("a log-density must depend on z by autograd: is it detached, or worked out in no_grad?")
        [gradient] = torch.autograd.grad([value], [leaf], [torch.ones_like(value)])
    return value.detach(), gradient


def _gradient(function: Any, z: Tensor, closed: bool) -> Tensor:
    return function.gradient(z) if closed else _both(function, z, closed)[1]


class HMCInfo(NamedTuple):
    """How a transition went, for each chain, ``(...)``.

    Args:
        accept_prob: probability with which it was accepted.
        accepted: whether it was.
        divergent: whether the integration left the region where it is stable, or met a number that is not finite.
    """

    accept_prob: Tensor
    accepted: Tensor
    divergent: Tensor


@torch.no_grad()
def hmc_transition(
    path: AnnealingPath,
    state: PathState,
    beta: float,
    step_size: Tensor | float,
    num_leapfrog: int,
    generator: Generator | None = None,
) -> tuple[PathState, HMCInfo]:
    r"""One transition of Hamiltonian Monte Carlo, which leaves :math:`\pi_\beta` as it is.

    Momenta are drawn anew, :math:`r \sim \mathcal N(0, I)`; L leapfrog steps propose :math:`(z', r')`; it is accepted
    with probability :math:`\min(1, e^{H(z, r) - H(z', r')})`, :math:`H = -\log \pi_\beta(z) + \tfrac12 \lVert r
    \rVert^2`. A proposal where H is not finite is rejected.

    Args:
        path: the path.
        state: of all chains, ``(..., d)``, from ``path.evaluate`` or the transition before.
        beta: the temperature, from 0 to 1.
        step_size: positive; one number, or one for each chain, ``(...)`` or what broadcasts to it. It must not depend
            on where the chain has been, or the density does not stay as it is.
        num_leapfrog: L, at least 1.
        generator: on the state's device. Default: torch's own.

    Returns:
        The next state, and how it went.

    Raises:
        ValueError: If there is no step.

    Source: Neal 2011, *MCMC using Hamiltonian dynamics*, arXiv:1206.1901.

    >>> path = AnnealingPath(DiagonalGaussian(0.0, 1.0), lambda z: -4 * z.square().sum(-1))
    >>> state, generator = path.evaluate(torch.zeros(20_000, 1)), torch.Generator().manual_seed(0)
    >>> for _ in range(10):
    ...     state, info = hmc_transition(path, state, 1.0, 0.4, 4, generator)
    >>> round(9 * state.position.var().item(), 1)
    1.0

    Note:
        L evaluations of the gradient, of all chains at once; no value leaves the device.
    """
    if num_leapfrog < 1:
        raise ValueError(f"num_leapfrog must be at least 1; got {num_leapfrog}.")
    z = state.position
    step: Any = step_size.to(z).unsqueeze(-1) if isinstance(step_size, Tensor) and step_size.ndim else step_size
    momentum = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    before = state.log_prob(beta) - 0.5 * momentum.square().sum(-1)
    momentum += 0.5 * step * state.gradient(beta)
    for _ in range(num_leapfrog - 1):
        z = z + step * momentum
        momentum += step * path.gradient(z, beta)
    proposal = path.evaluate(z + step * momentum)
    momentum += 0.5 * step * proposal.gradient(beta)
    after = proposal.log_prob(beta) - 0.5 * momentum.square().sum(-1)
    log_ratio = torch.where(after.isfinite(), after - before, -torch.inf)
    uniform = torch.rand(log_ratio.shape, generator=generator, dtype=log_ratio.dtype, device=z.device)
    accepted = uniform.log() < log_ratio
    info = HMCInfo(log_ratio.clamp(max=0.0).exp(), accepted, log_ratio < -_DIVERGENCE)
    return proposal.where(accepted, state), info
