r"""Annealed importance sampling along a path of densities, forward and in reverse.

With :math:`\pi_0` normalised, the weights of forward chains average to the normaliser Z of the path's end, and the
inverse weights of reverse chains that start in exact samples of it to :math:`1 / Z`, whatever the kernels and schedule.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from lightning_ext.functional.log_mean_exp import log_mean_exp, widest_float
from lightning_ext.functional.sampling import AnnealingPath, HMCInfo, PathState, hmc_transition

__all__ = [
    "AISResult",
    "Transition",
    "ais_forward",
    "ais_reverse",
    "hmc_kernel",
    "linear_schedule",
    "sigmoid_schedule",
]


def linear_schedule(num_steps: int) -> Tensor:
    r"""Temperatures :math:`\beta_t = t / T`, ``(T + 1,)`` in float64.

    Args:
        num_steps: T, at least 1, the number of intervals. The points are one more.

    >>> linear_schedule(4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    _require_steps(num_steps)
    return torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64)


def sigmoid_schedule(num_steps: int, delta: float = 4.0) -> Tensor:
    r"""Temperatures that are dense at both ends, ``(T + 1,)`` in float64.

    .. math:: \beta_t = \frac{\sigma(\delta (2 t / T - 1)) - \sigma(-\delta)}{\sigma(\delta) - \sigma(-\delta)}

    Args:
        num_steps: T, at least 1, the number of intervals. The points are one more.
        delta: :math:`\delta > 0`; towards 0 it is :func:`linear_schedule`.

    >>> sigmoid_schedule(4)
    tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    _require_steps(num_steps)
    if not delta > 0:
        raise ValueError(f"delta must be positive; got {delta}.")
    ends = torch.tensor([-delta, delta], dtype=torch.float64).sigmoid()
    raw = torch.linspace(-delta, delta, num_steps + 1, dtype=torch.float64).sigmoid()
    betas = (raw - ends[0]) / (ends[1] - ends[0])
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")


class Transition(Protocol):
    """A kernel that leaves the path's density at a temperature as it is, and is its own reversal."""

    def __call__(self, state: PathState, t: int, beta: float) -> tuple[PathState, HMCInfo | None]:
        """Move all chains; ``t`` counts temperatures from 1 to T, and ``beta`` is the t-th."""


def hmc_kernel(
    path: AnnealingPath, step_sizes: Tensor, num_leapfrog: int, generator: Generator | None = None
) -> Transition:
    """Hamiltonian Monte Carlo with step sizes that were chosen beforehand.

    Args:
        path: the path.
        step_sizes: one for each temperature, ``(T,)``, from :func:`~lightning_ext.functional.tune_step_sizes`; or for
            each temperature and data point, ``(T, B)``. They are taken as they are: nothing adapts in a measurement.
        num_leapfrog: L, at least 1.
        generator: on the device of the chains. Default: torch's own.

    Raises:
        ValueError: If a step size is not positive and finite.
    """
    if not bool(((step_sizes > 0) & step_sizes.isfinite()).all()):
        raise ValueError(f"step_sizes must be positive and finite; the smallest is {float(step_sizes.min()):g}.")
    steps: list[float] | Tensor = step_sizes.tolist() if step_sizes.ndim == 1 else step_sizes.clone()

    def kernel(state: PathState, t: int, beta: float) -> tuple[PathState, HMCInfo | None]:
        return hmc_transition(path, state, beta, steps[t - 1], num_leapfrog, generator)

    return kernel


class AISResult(NamedTuple):
    """What chains along a path weigh, and how they moved.

    Args:
        log_weights: ``(K, B)`` of K chains for B data points, float64.
        state: where the chains ended.
        accept: mean acceptance probability at each temperature, ``(T,)``; NaN where there was no transition.
        divergent: how many proposals were divergent in all.
        ess: effective number of chains of each data point, ``(B,)``, between 1 and K.
    """

    log_weights: Tensor
    state: PathState
    accept: Tensor
    divergent: int
    ess: Tensor


def ais_forward(
    path: AnnealingPath,
    start: Tensor,
    betas: Sequence[float] | Tensor,
    transition: Transition,
    *,
    last_transition: bool = False,
    resample: Literal["systematic"] | None = None,
    ess_threshold: float = 0.5,
    generator: Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> AISResult:
    r"""Anneal samples of the base to the end of the path.

    .. math:: z_1 \sim \pi_0, \quad \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1})\, l(z_t), \quad
        z_{t+1} \sim k_t(\cdot \mid z_t), \qquad \mathbb E\, w = Z

    Args:
        path: the path; its base normalised.
        start: exact samples of the base, ``(K, B, d)``.
        betas: the schedule, T + 1 points from 0 to 1, in float64.
        transition: the kernel, such as :func:`hmc_kernel` makes.
        last_transition: also move at temperature 1, where no weight depends on it any more.
        resample: ``"systematic"``: where the effective number of a data point's chains falls below ``ess_threshold``
            times K, the light ones are replaced by copies of the heavy ones. The mean of the weights stays unbiased;
            single weights then mean nothing. Default: never.
        ess_threshold: between 0 and 1.
        generator: of the resampling. Default: torch's own.
        progress: called with t after each temperature.

    Returns:
        Log-weights and how it went.

    Raises:
        ValueError: If the schedule does not go from 0 to 1, or the path has no number at the start.

    Source: Neal 2001, arXiv:physics/9803008; resampling: Del Moral, Doucet & Jasra 2006.

    Note:
        T - 1 transitions. Works under ``no_grad`` and inference mode.
    """
    temperatures = _checked(betas)
    with torch.inference_mode(False), torch.no_grad():
        state = _begin(path, start)
        log_weights = torch.zeros(state.energy.shape, dtype=widest_float(start.device), device=start.device)
        moves = _Moves(len(temperatures) - 1)
        for t in range(1, len(temperatures)):
            log_weights += (temperatures[t] - temperatures[t - 1]) * state.energy.to(log_weights)
            if resample is not None and t < len(temperatures) - 1:
                state, log_weights = _resampled(state, log_weights, ess_threshold, generator)
            if t < len(temperatures) - 1 or last_transition:
                state = moves.make(transition, state, t, temperatures[t])
            if progress is not None:
                progress(t)
        return moves.result(log_weights, state)


def ais_reverse(
    path: AnnealingPath,
    start: Tensor,
    betas: Sequence[float] | Tensor,
    transition: Transition,
    *,
    last_transition: bool = False,
    progress: Callable[[int], object] | None = None,
) -> AISResult:
    r"""Take exact samples of the path's end back to its base.

    .. math:: z_T \sim \pi_1, \quad z_{t} \sim k_t(\cdot \mid z_{t+1}), \quad
        \log w = \sum_{t=T}^{1} (\beta_t - \beta_{t-1})\, l(z_t), \qquad \mathbb E\, w^{-1} = Z^{-1}

    Args:
        path: the path; its base normalised.
        start: exact samples of the end, ``(K, B, d)``; all K of a data point may be the same.
        betas: the schedule, T + 1 points from 0 to 1, in float64.
        transition: the kernel; it must be reversible, as Hamiltonian Monte Carlo is.
        last_transition: move at temperature 1 first. Exact samples need it not.
        progress: called with t after each temperature.

    Returns:
        Log-weights of the forward chain that ran the same way, and how it went.

    Raises:
        ValueError: If the schedule does not go from 0 to 1, or the path has no number at the start.

    Source: Grosse, Ghahramani & Adams 2015, arXiv:1511.02543.

    Note:
        T - 1 transitions. Works under ``no_grad`` and inference mode.
    """
    temperatures = _checked(betas)
    with torch.inference_mode(False), torch.no_grad():
        state = _begin(path, start, certain=True)
        log_weights = torch.zeros(state.energy.shape, dtype=widest_float(start.device), device=start.device)
        moves = _Moves(len(temperatures) - 1)
        for t in range(len(temperatures) - 1, 0, -1):
            if t < len(temperatures) - 1 or last_transition:
                state = moves.make(transition, state, t, temperatures[t])
            log_weights += (temperatures[t] - temperatures[t - 1]) * state.energy.to(log_weights)
            if progress is not None:
                progress(t)
        return moves.result(log_weights, state)


def _checked(betas: Sequence[float] | Tensor) -> list[float]:
    points: list[float] = torch.as_tensor(betas, dtype=torch.float64).tolist()
    rising = all(low < high for low, high in pairwise(points))
    if len(points) < 2 or points[0] != 0.0 or points[-1] != 1.0 or not rising:
        raise ValueError(f"betas must rise from 0 to 1; got {len(points)} points, {points[:1]} to {points[-1:]}.")
    return points


def _begin(path: AnnealingPath, start: Tensor, *, certain: bool = False) -> PathState:
    if start.ndim != 3:
        raise ValueError(f"start must have shape (K, B, d), chains of data points; got {tuple(start.shape)}.")
    start = start.clone() if start.is_inference() else start.detach()
    state = path.evaluate(start, gradient=start.is_floating_point())
    unsound = state.energy.isnan() | ~state.base.isfinite()
    unsound |= (state.energy == -torch.inf) if certain else False
    if bool(unsound.any()):
        points = unsound.any(0).nonzero().flatten().tolist()
        raise ValueError(
            f"the log-density where chains of data points {points[:10]} start is NaN or minus infinity: are these "
            f"samples of the path's {'end' if certain else 'base'}, and are its functions numbers there?"
        )
    return state


def _ess(log_weights: Tensor) -> Tensor:
    shares = torch.softmax(log_weights, 0).nan_to_num(torch.inf)  # no chain with any weight: 0 of them count
    return shares.square().sum(0).reciprocal()


def _resampled(
    state: PathState, log_weights: Tensor, threshold: float, generator: Generator | None
) -> tuple[PathState, Tensor]:
    chains = len(log_weights)
    light = (_ess(log_weights) < threshold * chains) & (log_weights.amax(0) > -torch.inf)
    offset = torch.rand(log_weights.shape[1:], generator=generator, dtype=log_weights.dtype, device=log_weights.device)
    places = (torch.arange(chains, device=offset.device).unsqueeze(1) + offset) / chains
    edges = torch.softmax(log_weights, 0).cumsum(0)
    heirs = torch.searchsorted(edges.mT.contiguous(), places.mT.contiguous()).mT.clamp(max=chains - 1)
    index = torch.where(light, heirs, torch.arange(chains, device=offset.device).unsqueeze(1))
    return state.select(index), torch.where(light, log_mean_exp(log_weights), log_weights)


class _Moves:
    """Makes transitions and keeps count, without a look at a number before the end."""

    def __init__(self, steps: int) -> None:
        self._accept: list[Tensor | None] = [None] * steps
        self._divergent: Tensor | int = 0

    def make(self, transition: Transition, state: PathState, t: int, beta: float) -> PathState:
        state, info = transition(state, t, beta)
        if info is not None:
            self._accept[t - 1] = info.accept_prob.mean()
            self._divergent = self._divergent + info.divergent.sum()
        return state

    def result(self, log_weights: Tensor, state: PathState) -> AISResult:
        nothing = log_weights.new_full((), torch.nan)
        accept = torch.stack([nothing if a is None else a.to(nothing) for a in self._accept])
        return AISResult(log_weights, state, accept, int(self._divergent), _ess(log_weights))
