"""The implicit lower bound of any critic, between an estimate from above and a certificate from below."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lightning_ext._lightning import pl
from lightning_ext.functional import (
    AnnealedWeights,
    AnnealingPath,
    annealed_weights,
    seeded_generator,
    tune_step_sizes,
)
from lightning_ext.metrics import IBALEstimate, MutualInformationSandwich
from lightning_ext.modules._mutual_information_options import AnnealingOptions
from lightning_ext.modules._mutual_information_pairs import (
    distribution_of,
    log_prior_of,
    require_critic,
    standard_normal,
)
from lightning_ext.nn import PairCritic, Proposal, check_deterministic

__all__ = ["ImplicitBound", "measure_implicit_bound"]

_PILOT_POINTS, _PILOT_CHAINS = 16, 4
_COARSE = 0.01  # nats


@dataclass(frozen=True)
class ImplicitBound:
    r"""What :func:`measure_implicit_bound` found.

    Args:
        values: ``lower``, the certified bound, and ``estimate``, in nats, each with ``..._stderr``; ``accept`` and
            ``divergent``, shares of the proposals.
        step_sizes: those that the chains ran with, ``(T,)``.
        metrics: the metrics behind the values.
    """

    values: dict[str, Tensor]
    step_sizes: Tensor
    metrics: MutualInformationSandwich

    def plot(self, ax: Any = None, truth: float | None = None) -> tuple[Any, Any]:
        """Draw the certified bound and the estimate with their standard errors.

        Args:
            ax: matplotlib axes. Default: new ones.
            truth: the mutual information where it is known, drawn as a line.

        Returns:
            ``(figure, axes)``.
        """
        return self.metrics.plot(None, ax, truth)


def measure_implicit_bound(
    critic: PairCritic,
    x: Tensor,
    z: Tensor,
    *,
    proposal: nn.Module | None = None,
    prior: Distribution | None = None,
    num_chains: int = 8,
    num_steps: int = 200,
    num_leapfrog: int = 10,
    schedule: Literal["sigmoid", "linear"] = "sigmoid",
    delta: float = 4.0,
    target_accept: float = 0.65,
    pilot_rounds: int = 6,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> ImplicitBound:
    r"""What a critic says of the information between x and z, however it was trained.

    A critic and a base density q make a posterior, :math:`\pi(z \mid x) = q(z \mid x)\, e^{T(x, z)} / Z(x)`, and it
    the implicit Barber-Agakov bound

    .. math:: \mathbb E \Bigl[ \log \frac{q(z \mid x)}{p(z)} + T(x, z) - \log Z(x) \Bigr]
        = I - \mathbb E\, \mathrm{KL}(p(z \mid x) \,\|\, \pi)

    which is at least what any objective makes of the critic and has no cap of log samples. Annealed chains from q give
    :math:`\log Z` from below, and so an **estimate** from above; chains from the pairs' own z give a **certified**
    lower bound of the information, valid in expectation for any critic and any steps.

    Args:
        critic: T, in eval mode.
        x: ``(B, *event)``.
        z: ``(B, d)``, each from the joint density with its x, and none that the critic was trained on.
        proposal: q: x to a distribution of z. Default: the prior.
        prior: p(z), on the device of z. Default: standard normal.
        num_chains: K, each way.
        num_steps: T, temperatures of a chain.
        num_leapfrog: gradients of a transition.
        schedule: of the temperatures.
        delta: of the sigmoid.
        target_accept: mean acceptance that pilot chains tune the steps for; they never see z.
        pilot_rounds: passes of the pilot.
        chunk_size: chains of each pair that run at once. Default: all.
        seed: of all draws, which leave torch's own generator alone.
        progress: called with 1 after each temperature.

    Returns:
        Both numbers with their standard errors over pairs.

    Raises:
        ValueError: For arguments out of range; a network with dropout or batch normalisation in training mode; a critic
            that is not a number at a pair.

    Warns:
        UserWarning: scores so large that their type rounds by more than 0.01 nats.

    Source: Brekelmans et al. 2022 (arXiv:2303.06992).

    >>> from lightning_ext.nn import QuadraticCritic
    >>> critic = QuadraticCritic(1, 1)  # a posterior N(0, 1 / 2), whatever x
    >>> x, z = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0))  # independent: below zero
    >>> found = measure_implicit_bound(critic, x, z, num_steps=20).values
    >>> abs(found["lower"].item() + 0.1534) < 0.1  # (log 2 - 1) / 2
    True

    Note:
        2 B K (T - 1) L gradients of the critic with respect to z. It runs on one process; each rank may measure pairs
        of its own and share the metrics.
    """
    options = AnnealingOptions(
        num_chains, num_steps, num_leapfrog, schedule, delta, target_accept, pilot_rounds, chunk_size
    )
    found = anneal(critic, x, z, proposal, prior, options, seed=seed, progress=progress)
    certified = IBALEstimate(key_prefix="certified/").to(z.device)
    forward = IBALEstimate("forward", key_prefix="forward estimate/").to(z.device)
    found.update(certified, forward)
    sandwich = MutualInformationSandwich({"ibal": certified, "ibal_forward": forward}, compute_groups=False)
    known = sandwich.compute()
    values = {
        "lower": known["certified/lower"], "lower_stderr": known["certified/stderr"],
        "estimate": known["forward estimate/estimate"], "estimate_stderr": known["forward estimate/stderr"],
        "accept": found.weights.accept, "divergent": found.weights.divergent,
    }  # fmt: skip
    return ImplicitBound(values, found.step_sizes, sandwich)


@dataclass(frozen=True)
class AnnealedCritic:
    """Chains of a batch of pairs, and what goes with them into the bounds."""

    t_joint: Tensor
    ba_term: Tensor
    weights: AnnealedWeights
    step_sizes: Tensor

    def update(self, certified: IBALEstimate, forward: IBALEstimate) -> None:
        """Put them into the metrics."""
        certified.update(self.t_joint, self.ba_term, self.weights.reverse)
        forward.update(self.t_joint, self.ba_term, self.weights.forward)


def critic_path(critic: PairCritic, x: Tensor, base: Callable[[Tensor], Tensor]) -> AnnealingPath:
    r"""From q to :math:`q\, e^T`; what the critic computes of x alone, it computes once."""
    with torch.no_grad():
        embedded = critic.embed(x)

    def energy(z: Tensor) -> Tensor:
        return critic.score(embedded, z)

    return AnnealingPath(base, energy)


def base_of(proposal: nn.Module | None, prior: Distribution | None, x: Tensor, z: Tensor) -> Proposal:
    """Where chains start: what the proposal gives for x, or the prior, for ``z (B, d)``."""
    if proposal is not None:
        with torch.no_grad():
            return Proposal.of(distribution_of(proposal, x))
    if prior is None:
        return Proposal(standard_normal, lambda num, generator: standard_normal.sample((num, *z.shape), z, generator))
    one = Proposal.of(prior)
    return Proposal(one.density, lambda num, generator: one.draw(num * len(z), generator).view(num, *z.shape))


def anneal(
    critic: PairCritic,
    x: Tensor,
    z: Tensor,
    proposal: nn.Module | None,
    prior: Distribution | None,
    options: AnnealingOptions,
    *,
    seed: int,
    counters: tuple[int, ...] = (),
    progress: Callable[[int], object] | None = None,
) -> AnnealedCritic:
    """Tune the steps on chains that never see z, freeze them, and run the chains both ways."""
    require_critic(critic)
    for network in (critic, *([] if proposal is None else [proposal])):
        check_deterministic(network)
    if z.ndim != 2 or len(z) != len(x):
        raise ValueError(f"z must be (B, d) with one for each x; got {tuple(z.shape)} for {len(x)} x.")
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        x, z = (t.clone() if t.is_inference() else t for t in (x, z))
        few = base_of(proposal, prior, x[:_PILOT_POINTS], z[:_PILOT_POINTS])
        draws = seeded_generator(seed, *counters, 1, device=z.device)
        steps = tune_step_sizes(
            critic_path(critic, x[:_PILOT_POINTS], few.density), few.draw(_PILOT_CHAINS, draws), options.betas,
            num_leapfrog=options.num_leapfrog, target_accept=options.target_accept, rounds=options.pilot_rounds,
            generator=draws,
        )  # fmt: skip
        base = base_of(proposal, prior, x, z)
        path = critic_path(critic, x, base.density)
        weights = annealed_weights(
            path, base.draw, z, options.betas, steps, num_chains=options.num_chains,
            num_leapfrog=options.num_leapfrog, chunk_size=options.chunk_size, seed=seed, counters=(*counters, 2),
            progress=progress,
        )  # fmt: skip
        ba_term = torch.zeros(len(z), device=z.device)
        if proposal is not None:
            ba_term = distribution_of(proposal, x).log_prob(z) - log_prior_of(prior)(z)
        t_joint = critic(x, z)
        _warn_of_rounding(t_joint)
        return AnnealedCritic(t_joint, ba_term, weights, steps)


def _warn_of_rounding(scores: Tensor) -> None:
    """Objectives that ignore functions of x alone let them grow until differences in z are rounded away."""
    largest = float(scores.abs().max())
    step = largest * torch.finfo(scores.dtype).eps
    if step > _COARSE:
        pl.utilities.rank_zero_warn(
            f"the critic's scores reach {largest:.1e}, where {scores.dtype} tells {step:.1e} nats apart at best: the "
            "bounds are about as uncertain. Measure in float64: critic.double(), x.double(), z.double()."
        )
