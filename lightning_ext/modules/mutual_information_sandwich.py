"""The mutual information of a latent variable model between a lower and an upper bound, from pairs it simulates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torchmetrics import Metric, MetricCollection

from lightning_ext.functional import (
    annealed_weights,
    importance_log_means,
    seeded_generator,
    tune_step_sizes,
)
from lightning_ext.metrics import AISBound, MutualInformationSandwich
from lightning_ext.modules._mutual_information_options import Bound, SandwichOptions
from lightning_ext.nn import LatentModel, check_deterministic

__all__ = ["MutualInformationMeasurement", "measure_mutual_information"]

_PILOT_POINTS, _PILOT_CHAINS = 16, 4
_WEIGHED_AT_ONCE = 2**15  # importance samples times data points


@dataclass(frozen=True)
class MutualInformationMeasurement:
    """What :func:`measure_mutual_information` found.

    Args:
        values: ``"<bound>/lower"``, ``"/upper"`` and ``"/gap"`` in nats, each with its standard error as
            ``"<bound>/lower_stderr"`` and so on; for ``"ais"`` also ``accept``, ``divergent``, ``ess`` and
            ``step_size`` (the geometric mean).
        step_sizes: those that the chains ran with, ``(T,)``; None without ``"ais"``.
        metrics: the metrics behind the values, for this rank's pairs.
    """

    values: dict[str, Tensor]
    step_sizes: Tensor | None
    metrics: MutualInformationSandwich

    def plot(self, ax: Any = None, truth: float | None = None) -> tuple[Any, Any]:
        """Draw a row per bound, from its lower to its upper side with standard errors.

        Args:
            ax: matplotlib axes. Default: new ones.
            truth: the mutual information where it is known, drawn as a line.

        Returns:
            ``(figure, axes)``.
        """
        return self.metrics.plot(self.values, ax, truth)


def measure_mutual_information(
    model: LatentModel,
    *,
    bounds: Sequence[Bound] = ("iwae", "ais"),
    num_points: int = 128,
    num_samples: int = 1000,
    num_chains: int = 16,
    num_steps: int = 200,
    num_leapfrog: int = 10,
    schedule: Literal["sigmoid", "linear"] = "sigmoid",
    delta: float = 4.0,
    proposal: Literal["prior", "model"] = "prior",
    target_accept: float = 0.65,
    pilot_rounds: int = 6,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> MutualInformationMeasurement:
    r"""How many nats the latents of a generative model carry about its data, between two bounds.

    Pairs are simulated, :math:`z \sim p(z)`, :math:`x \sim p(x \mid z)`, so that each z is an exact posterior sample of
    its x, without which there is no lower bound. ``"iwae"`` weighs samples, ``"ais"`` anneals chains by Hamiltonian
    Monte Carlo, forward (independent) and in reverse (coupled). Step sizes are tuned on other pairs and frozen before
    the chains run: both sides hold in expectation whatever they are.

    Args:
        model: the model, in eval mode.
        bounds: which; each once.
        num_points: pairs in all, over all ranks; at least 2, for standard errors.
        num_samples: K of ``"iwae"``. Its lower bound is at most log K above what the proposal alone gives.
        num_chains: K of ``"ais"``, each way.
        num_steps: T, temperatures of a chain. The gap falls about as 1 / T.
        num_leapfrog: gradients of a transition.
        schedule: of the temperatures.
        delta: of the sigmoid: the larger, the denser its ends.
        proposal: where chains and samples start: the ``"prior"``, or the ``"model"``'s own proposal for each x.
        target_accept: mean acceptance that the pilot chains tune for.
        pilot_rounds: passes of the pilot, of 64 chains.
        chunk_size: chains, and samples, of each data point that run at once. Default: all chains, and 32,768 samples
            of all data points together.
        seed: of all draws, which leave torch's own generator alone.
        progress: called with 1 after each temperature.

    Returns:
        The bounds with their standard errors over pairs.

    Raises:
        ValueError: For arguments out of range; a model with dropout or batch normalisation in training mode; discrete
            latents with ``"ais"``; a model without a proposal; densities that are not numbers.

    Source: Brekelmans et al. 2022 (arXiv:2303.06992); Grosse et al. 2015 (arXiv:1511.02543).

    >>> from lightning_ext.nn import LinearGaussianModel
    >>> model = LinearGaussianModel(torch.tensor([[3.0]]), torch.zeros(1), 1.0)
    >>> found = measure_mutual_information(model, num_points=2000, num_steps=20, seed=1).values
    >>> bool(found["ais/lower"] < 1.1513 < found["ais/upper"])
    True

    Note:
        2 B K (T - 1) L gradients of the likelihood for ``"ais"``, B K evaluations for ``"iwae"``. Under an initialised
        process group each rank takes a share of the pairs, step sizes are shared, and values are those of all ranks.
    """
    options = SandwichOptions(
        num_chains, num_steps, num_leapfrog, schedule, delta, target_accept, pilot_rounds, chunk_size, bounds=bounds,
        num_points=num_points, num_samples=num_samples, proposal=proposal,
    )  # fmt: skip
    return run_sandwich(model, options, seed=seed, progress=progress)


def run_sandwich(
    model: LatentModel,
    options: SandwichOptions,
    *,
    seed: int = 0,
    counters: tuple[int, ...] = (),
    progress: Callable[[int], object] | None = None,
) -> MutualInformationMeasurement:
    """The same by options, with further addresses of the draws."""
    check_deterministic(model)
    if model.discrete and "ais" in options.bounds:
        raise ValueError("the model's latents are discrete, and chains cannot move along them: use bounds=('iwae',).")
    if model.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"the model is in {model.dtype}, whose rounding is larger than what is measured: copy.deepcopy(model)."
            "float() is measured as it should be."
        )
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    if options.num_points < world:
        raise ValueError(f"num_points must be at least one for each of {world} ranks; got {options.num_points}.")
    mine = options.num_points // world + (rank < options.num_points % world)
    device = model.device

    def generator(purpose: int) -> Generator:
        return seeded_generator(seed, *counters, rank, purpose, device=device)

    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        pairs = _Pairs(model, mine, options.proposal, generator(0))
        metrics: dict[str, Metric | MetricCollection] = {}
        found: dict[str, Tensor] = {}
        steps = None
        if "iwae" in options.bounds:
            upper, lower = importance_log_means(
                pairs.log_weight, pairs.draw, pairs.z, options.num_samples,
                chunk_size=options.chunk_size or max(1, _WEIGHED_AT_ONCE // mine), generator=generator(1),
            )  # fmt: skip
            bound = metrics["iwae"] = AISBound(scheme="single", key_prefix="iwae/").to(device)
            bound.update(pairs.log_likelihood, upper[None], lower[None])  # of K samples each, which is one weight
        if "ais" in options.bounds:
            pilot = _Pairs(model, _PILOT_POINTS, options.proposal, draws := generator(2))
            steps = tune_step_sizes(
                pilot.path, pilot.draw(_PILOT_CHAINS, draws), options.betas, num_leapfrog=options.num_leapfrog,
                target_accept=options.target_accept, rounds=options.pilot_rounds, generator=draws,
                reduce=_mean if world > 1 else None,
            )  # fmt: skip
            weights = annealed_weights(
                pairs.path, pairs.draw, pairs.z, options.betas, steps, num_chains=options.num_chains,
                num_leapfrog=options.num_leapfrog, chunk_size=options.chunk_size, seed=seed,
                counters=(*counters, rank, 3), progress=progress,
            )  # fmt: skip
            bound = metrics["ais"] = AISBound(key_prefix="ais/").to(device)
            bound.update(pairs.log_likelihood, weights.forward, weights.reverse)
            found = {
                "ais/accept": _mean(weights.accept), "ais/divergent": _mean(weights.divergent),
                "ais/ess": _mean(weights.ess.mean()), "ais/step_size": steps.log().mean().exp().to(weights.forward),
            }  # fmt: skip
        sandwich = MutualInformationSandwich({name: metrics[name] for name in options.bounds}, compute_groups=False)
        return MutualInformationMeasurement({**sandwich.compute(), **found}, steps, sandwich)


class _Pairs:
    """Simulated pairs, and where chains and samples for them start."""

    def __init__(self, model: LatentModel, num: int, start: str, generator: Generator) -> None:
        self.x, self.z = model.simulate(num, generator)
        odd = (~self.x.isfinite()).reshape(num, -1).any(1)
        if bool(odd.any()):
            raise ValueError(
                f"{int(odd.sum())} of {num} data points that {type(model).__name__} simulates are not finite: its "
                "decoder, or sample_x, gives NaN or infinity at latents from the prior."
            )
        self.model, self._proposal = model, None
        if start == "model":
            self._proposal = model.proposal(self.x)
            if self._proposal is None:
                raise ValueError(f"proposal='model' needs one, and this {type(model).__name__} has none.")
        self.path = model.path(self.x, self._proposal)
        self.log_likelihood = model.checked_likelihood(self.x, self.z)

    def draw(self, num: int, generator: Generator | None) -> Tensor:
        if self._proposal is not None:
            return self._proposal.draw(num, generator)
        return self.model.sample_prior(num * len(self.z), generator).view(num, *self.z.shape)

    def log_weight(self, z: Tensor) -> Tensor:
        return self.path.energy(z)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _mean(number: Tensor) -> Tensor:
    """Over ranks."""
    if _distributed():
        number = number.clone()
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number
