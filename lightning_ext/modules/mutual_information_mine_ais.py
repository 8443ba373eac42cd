"""MINE-AIS: a critic trained as an energy, and certified by annealed importance sampling."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lightning_ext._lightning import refuse_sharded
from lightning_ext.data import IndexedBatch
from lightning_ext.functional import hmc_transition
from lightning_ext.metrics import IBALEstimate
from lightning_ext.modules._mutual_information_options import AnnealingOptions
from lightning_ext.modules._mutual_information_pairs import (
    MakeOptimizer,
    PairModule,
    distribution_of,
    log_prior_of,
    require_critic,
)
from lightning_ext.modules.mutual_information_ibal import anneal, base_of, critic_path
from lightning_ext.nn import PairCritic, check_deterministic

__all__ = ["MINEAISModule"]

ChainInit = Literal["data", "base", "persistent"]

_ADAPTATION = 0.1  # of the log step size, per batch and unit of acceptance
_SMALLEST, _LARGEST = 1e-6, 1e3


class MINEAISModule(PairModule):
    r"""A lower bound without a cap of log samples, where p(z) is known and :math:`p(x \mid z)` is not.

    The critic makes a posterior :math:`\pi(z \mid x) \propto q(z \mid x)\, e^{T(x, z)}`, and is trained to make the
    implicit bound :math:`I - \mathbb E\, \mathrm{KL}(p(z \mid x) \,\|\, \pi)` large, by

    .. math:: \nabla = \mathbb E_{p(x, z)} \nabla \log q\, e^T - \mathbb E_{p(x)\, \pi(z \mid x)} \nabla \log q\, e^T,

    with samples of :math:`\pi` from short chains of Hamiltonian Monte Carlo. It is evaluated as
    :func:`~lightning_ext.modules.measure_implicit_bound` does: a certified lower bound, and an estimate from above.

    Batches are ``(x, z)`` from the joint density; for persistent chains
    :class:`~lightning_ext.data.IndexedBatch` of such pairs, as
    :class:`~lightning_ext.data.IndexedDataset` gives. ``predict`` gives T of each pair, ``(B,)``.

    Args:
        critic: T, without dropout and batch normalisation, smooth in z.
        proposal: q: x to a distribution of z, trained too unless its parameters are frozen. Default: the prior.
        prior: p(z), on the module's device. Default: standard normal.
        chain_init: where chains start: at the pairs' own z (``"data"``: contrastive divergence, which never leaves for
            modes far away), at samples of q (``"base"``), or where those of the same pair ended an epoch ago, at first
            at its z (``"persistent"``: memory for a z of each pair of the data set).
        num_transitions: of each chain and batch.
        num_leapfrog: gradients of a transition, also in evaluations.
        step_size: the first; from there it follows the acceptance.
        target_accept: mean acceptance that it follows.
        energy_l2: weight of the mean squares of T, which hold its level.
        num_chains: K of an evaluation, each way.
        num_steps: temperatures of an evaluation.
        delta: of its sigmoid schedule.
        measure_in_validation: whether validation measures the bounds, as the test does; it costs 2 K (T - 1) L
            gradients for each pair.
        optimizer: builds the optimizer from the parameters. Steps of the critic may have to be large: the sharper
            the posterior, the longer the way.
        seed: of the chains; None takes the program's.

    Raises:
        ValueError: an argument is out of range, or a network draws at random or looks at its batch.
        MisconfigurationException: the strategy shards parameters.

    Logged: ``mutual_information/ibal/lower`` (certified) and ``mutual_information/ibal_forward/estimate`` in nats, each
    with ``/stderr``, in the test and, if asked for, in validation. In training, and in validation of fresh chains,
    ``mutual_information/mine_ais/energy_gap`` (T and log q of the data less those of the chains); in training also
    ``/accept`` and ``/step_size``, and ``train/loss``, which is **no** estimate of the information and is near 0 in the
    end.

    Source: Brekelmans et al. 2022 (arXiv:2303.06992).

    Note:
        M L gradients of the critic for each pair and training step. Chains run outside of the strategy's wrapper, and
        a step size is shared by all ranks. Checkpoints hold the step size, the seed and persistent chains.
    """

    step_size: Tensor
    chains: Tensor

    def __init__(
        self,
        critic: PairCritic,
        proposal: nn.Module | None = None,
        prior: Distribution | None = None,
        chain_init: ChainInit = "data",
        num_transitions: int = 5,
        num_leapfrog: int = 10,
        step_size: float = 0.1,
        target_accept: float = 0.65,
        energy_l2: float = 1e-4,
        num_chains: int = 8,
        num_steps: int = 200,
        delta: float = 4.0,
        measure_in_validation: bool = False,
        optimizer: MakeOptimizer = torch.optim.Adam,
        seed: int | None = None,
    ) -> None:
        if chain_init not in get_args(ChainInit):
            raise ValueError(
                f"chain_init must be one of {', '.join(map(repr, get_args(ChainInit)))}; got {chain_init!r}."
            )
        if num_transitions < 1:
            raise ValueError(f"num_transitions must be at least 1; got {num_transitions}.")
        if not step_size > 0 or energy_l2 < 0:
            raise ValueError(f"step_size must be positive and energy_l2 at least 0; got {step_size} and {energy_l2}.")
        require_critic(critic)
        options = AnnealingOptions(num_chains, num_steps, num_leapfrog, delta=delta, target_accept=target_accept)
        super().__init__(optimizer, seed, {"ibal": IBALEstimate(), "ibal_forward": IBALEstimate("forward")})
        self.critic, self.proposal, self.prior = critic, proposal, prior
        self._log_prior = log_prior_of(prior)
        self.chain_init, self.num_transitions, self.energy_l2 = chain_init, num_transitions, energy_l2
        self.options, self.measure_in_validation = options, measure_in_validation
        self.register_buffer("step_size", torch.tensor(float(step_size)))
        self.chains = torch.empty(0, 0)

    def get_pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Data and latents of a batch ``(x, z)``, or of an indexed one."""
        return super().get_pair(batch.batch if isinstance(batch, IndexedBatch) else batch)

    def setup(self, stage: str) -> None:
        """Refuse densities that change from call to call, and sharded parameters."""
        super().setup(stage)
        refuse_sharded(self.trainer, type(self).__name__, "runs chains on the critic outside of the strategy's wrapper")
        if stage == "fit":
            check_deterministic(self)

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, z: Tensor, batch: Any = None) -> Tensor:
        """Energy of the data less that of the chains, which has the gradient of the implicit bound."""
        start = self._start(x, z, batch)
        ends, accept = self.sample(x, z, start)
        self._adapt(accept)
        if self.chain_init == "persistent":
            self._keep(batch, ends)
        scores, log_q = self.log_density(x, torch.stack([z, ends]))
        gap = (scores + log_q).float().diff(dim=0).mean()
        if self._trainer is not None and self._logs_now:
            values = {"energy_gap": -gap.detach(), "accept": accept, "step_size": self.step_size}
            self.log_dict({f"mutual_information/mine_ais/{name}": value for name, value in values.items()})
        return gap + self.energy_l2 * scores.float().square().sum(0).mean()

    def log_density(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """T and log q of latents ``(..., B, d)``, ``(..., B)`` each."""
        scores: Tensor = self.critic(x, z)
        if self.proposal is None:
            return scores, self._log_prior(z)
        return scores, distribution_of(self.proposal, x).log_prob(z)

    def sample(self, x: Tensor, z: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Where chains of :math:`\pi(z \mid x)` end, ``(B, d)``, and their mean acceptance.

        Args:
            x: data.
            z: latents, whose shape and dtype the chains take.
            start: where they begin, ``(B, d)``. Default: samples of q.
        """
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            generator = self.generator(z.device)
            base = base_of(self.proposal, self.prior, x, z)
            path = critic_path(self.critic, x, base.density)
            state = path.evaluate(base.draw(1, generator)[0] if start is None else start)
            accepts = []
            for _ in range(self.num_transitions):
                state, info = hmc_transition(path, state, 1.0, self.step_size, self.options.num_leapfrog, generator)
                accepts.append(info.accept_prob.mean())
        return state.position, torch.stack(accepts).mean()

    def _start(self, x: Tensor, z: Tensor, batch: Any) -> Tensor | None:
        if self.chain_init == "base":
            return None
        if self.chain_init == "data":
            return z
        indices = self._indices(batch)
        self._make_room(indices, z)
        kept = self.chains[indices]
        return torch.where(kept.isnan(), z, kept)

    def _make_room(self, indices: Tensor, like: Tensor) -> None:
        missing = int(indices.max()) + 1 - len(self.chains)
        if missing > 0 or self.chains.device != like.device:
            known = self.chains.to(like).view(-1, like.shape[1])
            self.chains = torch.cat([known, like.new_full((max(0, missing), like.shape[1]), torch.nan)])

    def _keep(self, batch: Any, ends: Tensor) -> None:
        """Every rank keeps the chains of all, since pairs go to other ranks in other epochs."""
        indices = self._indices(batch)
        if self._world_size > 1:
            indices, ends = (self.all_gather(t).flatten(0, 1) for t in (indices, ends))  # type: ignore[union-attr]
            self._make_room(indices, ends)
        self.chains[indices] = ends

    def _indices(self, batch: Any) -> Tensor:
        if not isinstance(batch, IndexedBatch):
            raise ValueError(
                f"chain_init='persistent' needs to know which pairs a batch holds; got {type(batch).__name__}. Wrap "
                "the data set: IndexedDataset(dataset)."
            )
        return torch.as_tensor(batch.indices, device=self.device)

    @torch.no_grad()
    def _adapt(self, accept: Tensor) -> None:
        if self._world_size > 1:
            accept = self.all_gather(accept).mean()  # type: ignore[union-attr]
        self.step_size.mul_((_ADAPTATION * (accept - self.options.target_accept)).exp()).clamp_(_SMALLEST, _LARGEST)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self, stage: str, batch: Any, batch_idx: int) -> None:
        if stage == "test" or self.measure_in_validation:
            super()._evaluate(stage, batch, batch_idx)
            return
        self.set_address(stage, batch_idx)
        x, z = self._pair(batch)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            x, z = x.clone(), z.clone()
            ends, _ = self.sample(x, z, None if self.chain_init == "base" else z)
            scores, log_q = self.log_density(x, torch.stack([z, ends]))
            gap = -(scores + log_q).diff(dim=0).mean()
        self.log("mutual_information/mine_ais/energy_gap", gap, batch_size=len(x), sync_dist=True)

    def measure(self, x: Tensor, z: Tensor) -> None:
        """The certified bound and the estimate of a batch."""
        epoch, stage, number = self._address
        found = anneal(
            self.critic, x, z, self.proposal, self.prior, self.options, seed=self.seed,
            counters=(epoch, stage, number, self._rank),
        )  # fmt: skip
        certified, forward = self.bound("ibal"), self.bound("ibal_forward")
        assert isinstance(certified, IBALEstimate)
        assert isinstance(forward, IBALEstimate)
        found.update(certified, forward)

    def on_validation_epoch_end(self) -> None:
        """Log the bounds if they were measured."""
        if self.measure_in_validation:
            self._log_bounds()

    def pointwise(self, x: Tensor, z: Tensor) -> Tensor:
        """T of each pair, ``(B,)``."""
        scores: Tensor = self.critic(x, z)
        return scores

    # -- state --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the chains."""
        super().on_save_checkpoint(checkpoint)
        if self.chain_init == "persistent":
            checkpoint["lightning_ext_chains"] = self.chains

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the chains."""
        super().on_load_checkpoint(checkpoint)
        if "lightning_ext_chains" in checkpoint:
            self.chains = checkpoint["lightning_ext_chains"]
