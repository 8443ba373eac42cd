"""Step sizes of Hamiltonian Monte Carlo, tuned on chains of their own and frozen before anything is measured."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from lightning_ext.functional.log_mean_exp import widest_float
from lightning_ext.functional.sampling import AnnealingPath, PathState, hmc_transition

__all__ = ["DualAveraging", "tune_step_sizes"]

_CLOSE = 0.2  # how far from the target an acceptance may lie for averaging to begin
_STEEP = 1.1  # between steps of such a ratio acceptance may fall off a cliff
_SMALLEST, _LARGEST = 1e-10, 1e10


class DualAveraging:
    r"""Drives acceptance probabilities to a target by step sizes, one each for as many kernels as there are.

    .. math:: \log \epsilon_{k+1} = \log \epsilon_1 - \frac{\sqrt k}{\gamma (k + k_0)} \sum_{i=1}^{k} (a^* - a_i),
        \qquad \log \bar\epsilon_{k+1} = k^{-\kappa} \log \epsilon_{k+1} + (1 - k^{-\kappa}) \log \bar\epsilon_k

    Args:
        initial: :math:`\epsilon_1 > 0`, any shape.
        target: :math:`a^*`, between 0 and 1. Default 0.65, the best for many dimensions (Beskos et al. 2013).
        gamma: the smaller, the longer the first moves. The default suits acceptances that are means over many chains.
        delay: :math:`k_0 \ge 0`, which shortens the first moves.
        kappa: between 0.5 and 1; the larger, the more the average forgets.

    Source: Hoffman & Gelman 2014, arXiv:1111.4246, equation 6; Nesterov 2009.

    >>> tuned = DualAveraging(torch.tensor([1.0]))
    >>> for _ in range(200):
    ...     tuned.update(torch.exp(-tuned.step_size))  # accepts e^-step
    >>> round(tuned.step_size.item(), 1)  # -log 0.65
    0.4
    """

    def __init__(
        self, initial: Tensor, target: float = 0.65, gamma: float = 0.25, delay: float = 3.0, kappa: float = 0.75
    ) -> None:
        self.target, self.gamma, self.delay, self.kappa = target, gamma, delay, kappa
        self._first = initial.double().log()
        self._log, self._log_mean = self._first.clone(), self._first.clone()
        self._error, self._count = torch.zeros_like(self._first), 0

    @property
    def step_size(self) -> Tensor:
        """What to try next."""
        return self._log.exp()

    @property
    def averaged(self) -> Tensor:
        """What to use in the end."""
        return self._log_mean.exp()

    def update(self, accept_prob: Tensor) -> None:
        """Take in the acceptance probabilities of the steps that were tried."""
        self._count += 1
        k = self._count
        self._error += self.target - accept_prob.to(self._error)
        self._log = self._first - math.sqrt(k) / (self.gamma * (k + self.delay)) * self._error
        weight = k**-self.kappa
        self._log_mean = weight * self._log + (1 - weight) * self._log_mean


@torch.no_grad()
def tune_step_sizes(
    path: AnnealingPath,
    start: Tensor,
    betas: Sequence[float] | Tensor,
    *,
    num_leapfrog: int,
    target_accept: float = 0.65,
    rounds: int = 12,
    initial: float = 0.1,
    direction: Literal["forward", "reverse"] = "forward",
    generator: Generator | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""One step size for each temperature of a path, from pilot chains.

    The chains go along the path as those of a measurement will. A first pass finds the scale, each temperature
    beginning where its neighbour ended; each further pass is an update of :class:`DualAveraging` for all of them.

    Args:
        path: the path, best on other data points than those that are measured.
        start: where the chains begin, ``(K, B, d)`` or ``(..., d)``: samples of the base for ``"forward"``, of the
            posterior for ``"reverse"``. 64 chains in all are enough.
        betas: the schedule, T + 1 points from 0 to 1.
        num_leapfrog: L of the kernel that the steps are for.
        target_accept: mean acceptance probability to reach, between 0 and 1.
        rounds: passes after the first, at least 1.
        initial: where the search begins, positive.
        direction: of the chains.
        generator: on the device of the chains. Default: torch's own.
        reduce: mean over ranks of a tensor, so that all have the same steps. Default: there is one rank.

    Returns:
        ``(T,)``, float64, on the CPU.

    Raises:
        ValueError: For arguments out of range, or if no step size is ever accepted.

    Note:
        ``rounds + 1`` passes of T L gradients each.
    """
    temperatures = torch.as_tensor(betas, dtype=torch.float64).tolist()[1:]
    if not temperatures or rounds < 1 or initial <= 0 or not 0 < target_accept < 1:
        raise ValueError(
            "there must be a temperature, rounds at least 1, initial positive and target_accept between 0 and 1; got "
            f"{len(temperatures)} temperatures, {rounds}, {initial}, {target_accept}."
        )
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}.")
    order = list(range(len(temperatures)))
    order = order if direction == "forward" else order[::-1]

    def transition(t: int, state: PathState, step: float) -> tuple[PathState, float]:
        state, info = hmc_transition(path, state, temperatures[t], step, num_leapfrog, generator)
        accept = info.accept_prob.to(widest_float(info.accept_prob.device)).mean()
        return state, float(accept if reduce is None else reduce(accept))

    beginning = path.evaluate(start)
    steps, state, step = torch.empty(len(order), dtype=torch.float64), beginning, initial
    for t in order:
        state, step = _bracketed(partial(transition, t, state), step, target_accept)
        steps[t] = step
    tuned = DualAveraging(steps, target_accept)
    for _ in range(rounds):
        accepts, state = torch.empty_like(steps), beginning
        for t in order:
            state, accept = transition(t, state, float(tuned.step_size[t]))
            accepts[t] = accept
        tuned.update(accepts)
    return tuned.averaged


def _bracketed(
    transition: Callable[[float], tuple[PathState, float]], step: float, target: float
) -> tuple[PathState, float]:
    """A step whose acceptance is near the target, and the states that it leads to."""
    low, high = 0.0, math.inf  # accepted more, and less
    while True:
        state, accept = transition(step)
        if abs(accept - target) < _CLOSE:
            return state, step
        if accept > target:
            low = step
        else:
            high = step
        if low > 0 and high / low < _STEEP:
            return transition(low)[0], low
        if high < _SMALLEST:
            raise ValueError(f"no step is accepted, down to {high:.0e}: is the log-density finite and smooth?")
        if low > _LARGEST:
            return state, low
        step = math.sqrt(low * high) if low > 0 and high < math.inf else (2 * low or high / 2)
