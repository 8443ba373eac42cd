"""GIWAE: a proposal and a critic that are trained for one lower bound of mutual information."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lightning_ext.functional import giwae_lower
from lightning_ext.metrics import BarberAgakovBound, GIWAEBound
from lightning_ext.modules._mutual_information_pairs import (
    MakeOptimizer,
    PairModule,
    distribution_of,
    log_prior_of,
    reparametrised,
    require_critic,
)
from lightning_ext.nn import PairCritic

__all__ = ["GIWAEModule"]


class GIWAEModule(PairModule):
    r"""A lower bound where p(z) is known and :math:`p(x \mid z)` is not: Barber-Agakov's and what a critic adds.

    .. math:: \mathbb E \log \frac{q(z_1 \mid x)}{p(z_1)}
        + \mathbb E \Bigl[ T(x, z_1) - \log \frac1K \sum_{k=1}^{K} e^{T(x, z_k)} \Bigr]

    with :math:`z_1` the pair's own, inside the sum, and :math:`z_2, \dots, z_K \sim q(\cdot \mid x)`. The critic adds
    at most :math:`\log K`. Proposal and critic are trained together for the whole bound.

    Batches are ``(x, z)`` from the joint density. ``predict`` gives the bound's term of each pair, ``(B,)`` nats.

    Args:
        proposal: q: x to a distribution of z, such as :class:`~lightning_ext.nn.GaussianProposal`.
        critic: T, such as :class:`~lightning_ext.nn.ConcatenatedCritic`.
        prior: p(z), on the module's device. Default: standard normal.
        num_samples: K, at least 2.
        detach_negatives: train the proposal for Barber-Agakov's term alone, and the critic beside it.
        optimizer: builds the optimizer from the parameters of both.
        seed: of the samples; None takes the program's.

    Raises:
        ValueError: K is below 2, or the prior is no distribution.

    Logged: ``mutual_information/giwae/lower`` and, for comparison, ``mutual_information/ba/lower``, each with
    ``/stderr``, in validation and test; ``train/loss``, the negative bound of a batch.

    Source: Brekelmans et al. 2022 (arXiv:2303.06992).

    Note:
        K evaluations of the critic for each pair. Everything is a mean over pairs: ranks give what one process gives.

    >>> from lightning_ext.nn import ConcatenatedCritic, GaussianProposal
    >>> module = GIWAEModule(GaussianProposal(nn.Linear(3, 4)), ConcatenatedCritic(3, 2), num_samples=8)
    >>> module.loss(torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([])
    """

    def __init__(
        self,
        proposal: nn.Module,
        critic: PairCritic,
        prior: Distribution | None = None,
        num_samples: int = 64,
        detach_negatives: bool = False,
        optimizer: MakeOptimizer = torch.optim.Adam,
        seed: int | None = None,
    ) -> None:
        if num_samples < 2:
            raise ValueError(
                f"num_samples must be at least 2; got {num_samples}. With 1 there is no critic: BarberAgakovModule."
            )
        require_critic(critic)
        super().__init__(optimizer, seed, {"giwae": GIWAEBound(), "ba": BarberAgakovBound()})
        self.proposal, self.critic = proposal, critic
        self.num_samples, self.detach_negatives = num_samples, detach_negatives
        self._log_prior = log_prior_of(prior)

    def terms(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-densities of q and of the prior at z, ``(B,)``, and T with z first, ``(K, B)``."""
        proposal = distribution_of(self.proposal, x)
        others = reparametrised(proposal, self.num_samples - 1, self)
        others = others.detach() if self.detach_negatives else others
        return proposal.log_prob(z), self._log_prior(z), self.critic(x, torch.cat([z[None].to(others), others]))

    def loss(self, x: Tensor, z: Tensor, batch: object = None) -> Tensor:
        """The negative bound."""
        return -giwae_lower(*(term.float() for term in self.terms(x, z))).mean()

    def measure(self, x: Tensor, z: Tensor) -> None:
        """The bound, and that of the proposal alone."""
        log_q, log_prior, critic = self.terms(x, z)
        self.bound("giwae").update(log_q=log_q, log_prior=log_prior, critic=critic)
        self.bound("ba").update(log_q=log_q, log_prior=log_prior)

    def pointwise(self, x: Tensor, z: Tensor) -> Tensor:
        """The bound's term of each pair."""
        return giwae_lower(*self.terms(x, z))
