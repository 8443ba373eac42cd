r"""Weights for bounds on both sides of the mutual information, of many samples or chains in bounded memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lightning_ext.functional.annealed_sampling import AISResult, ais_forward, ais_reverse, hmc_kernel
from lightning_ext.functional.counter_rng import seeded_generator
from lightning_ext.functional.log_mean_exp import StreamingLogMeanExp
from lightning_ext.functional.sampling import AnnealingPath

__all__ = ["AnnealedWeights", "annealed_weights", "importance_log_means"]

Draw = Callable[[int, Generator | None], Tensor]


class AnnealedWeights(NamedTuple):
    """Log-weights of chains from either end of a path, for :func:`~lightning_ext.functional.ais_upper` and ``lower``.

    Args:
        forward: of chains from the base, ``(K, B)``, float64.
        reverse: of chains from the posterior samples, ``(K, B)``, float64.
        accept: mean acceptance probability of all transitions.
        divergent: share of all proposals that were divergent.
        ess: effective number of forward chains, ``(B,)``, from 1 to K.
    """

    forward: Tensor
    reverse: Tensor
    accept: Tensor
    divergent: Tensor
    ess: Tensor


def annealed_weights(
    path: AnnealingPath,
    draw: Draw,
    posterior: Tensor,
    betas: Tensor,
    step_sizes: Tensor,
    *,
    num_chains: int = 16,
    num_leapfrog: int = 10,
    chunk_size: int | None = None,
    seed: int = 0,
    counters: tuple[int, ...] = (),
    progress: Callable[[int], object] | None = None,
) -> AnnealedWeights:
    r"""Annealed importance sampling with Hamiltonian Monte Carlo, from the base and back from the posterior.

    All K reverse chains of a data point start at the same posterior sample (the coupled scheme).

    Args:
        path: from a normalised base to the joint density :math:`p(x_b, z)`.
        draw: ``(num, generator) -> (num, B, d)``, exact samples of the base.
        posterior: one exact posterior sample of each data point, ``(B, d)``: the z that x was simulated from.
        betas: the schedule, ``(T + 1,)``.
        step_sizes: frozen ones, ``(T,)``, from :func:`~lightning_ext.functional.tune_step_sizes` on other data.
        num_chains: K, at least 1.
        num_leapfrog: L of each transition, at least 1.
        chunk_size: how many chains of each data point run at once, at least 1. Default: all. Another number is another
            draw.
        seed: of all draws.
        counters: further addresses of the draws, such as epoch and rank.
        progress: called with 1 after each temperature of each chunk; there are 2 T of them in a chunk.

    Returns:
        The weights.

    Raises:
        ValueError: If a number is below 1, or the density is not a number where the chains start.

    Note:
        2 K B (T - 1) L evaluations of the gradient of the likelihood.
    """
    for name, value in (("num_chains", num_chains), ("chunk_size", 1 if chunk_size is None else chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    chunk = chunk_size or num_chains
    forward: list[Tensor] = []
    reverse: list[Tensor] = []
    accepts: list[Tensor] = []
    divergent = 0
    report = None if progress is None else lambda _: progress(1)
    for number, start in enumerate(range(0, num_chains, chunk)):
        size = min(chunk, num_chains - start)
        generator = seeded_generator(seed, *counters, number, device=posterior.device)
        kernel = hmc_kernel(path, step_sizes, num_leapfrog, generator)
        starts = draw(size, generator), posterior.expand(size, *posterior.shape)
        for weights, anneal, first in zip((forward, reverse), (ais_forward, ais_reverse), starts, strict=True):
            found: AISResult = anneal(path, first, betas, kernel, progress=report)
            weights.append(found.log_weights)  # and not where the chains are, which is much more
            accepts.append(found.accept)
            divergent += found.divergent
    together = torch.cat(forward)
    accept = torch.stack(accepts).nanmean() if len(betas) > 2 else together.new_tensor(torch.nan)
    proposals = max(1, 2 * together.numel() * (len(betas) - 2))
    shares = torch.softmax(together, 0).nan_to_num(torch.inf)
    return AnnealedWeights(
        together, torch.cat(reverse), accept.to(together), together.new_tensor(divergent / proposals),
        shares.square().sum(0).reciprocal(),
    )  # fmt: skip


@torch.no_grad()
def importance_log_means(
    log_weight: Callable[[Tensor], Tensor],
    draw: Draw,
    posterior: Tensor,
    num_samples: int,
    *,
    chunk_size: int = 256,
    generator: Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The two log-means of importance weights between which :math:`\log p(x)` lies in expectation.

    .. math:: \log \frac1K \sum_{k=1}^{K} w(z_k), \qquad
        \log \frac1K \Bigl[ w(z^*) + \sum_{k=1}^{K-1} w(z_k) \Bigr], \qquad z_k \sim q, \; z^* \sim p(z \mid x)

    Taken from :math:`\log p(x \mid z^*)`, the first gives the upper bound of
    :func:`~lightning_ext.functional.iwae_bound`, the second the lower one. They share their samples.

    Args:
        log_weight: latents ``(k, B, d)`` to :math:`\log p(x_b, z) - \log q(z \mid x_b)`, ``(k, B)``.
        draw: ``(num, generator) -> (num, B, d)``, samples of q.
        posterior: one exact posterior sample of each data point, ``(B, d)``.
        num_samples: K, at least 1.
        chunk_size: how many samples of each data point are weighed at once, at least 1.
        generator: of the samples. Default: torch's own.
        progress: called with the number of samples after each chunk.

    Returns:
        Both, ``(B,)`` in float64.

    Raises:
        ValueError: If a number is below 1, a weight is NaN, or a posterior sample has none.

    Note:
        K evaluations of the likelihood of each data point; memory for ``chunk_size`` of them.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(f"num_samples and chunk_size must be at least 1; got {num_samples} and {chunk_size}.")
    own = log_weight(posterior[None])
    if not bool(own.isfinite().all()):
        points = (~own[0].isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"the weight at the posterior samples of data points {points[:10]} is not finite: is each x simulated from "
            "its z?"
        )
    upper, lower = (StreamingLogMeanExp(tuple(own.shape[1:]), own.device) for _ in range(2))
    lower.add(own)  # in the place of the last sample
    for start in range(0, num_samples, chunk_size):
        size = min(chunk_size, num_samples - start)
        weights = log_weight(draw(size, generator))
        if bool(weights.isnan().any()):
            raise ValueError(
                f"{int(weights.isnan().sum())} of {weights.numel()} weights are NaN: is the likelihood a number at "
                "every sample of q?"
            )
        upper.add(weights)
        lower.add(weights[:-1] if start + size == num_samples else weights)
        if progress is not None:
            progress(size)
    return upper.value(), lower.value()
