"""Modules that bound or estimate mutual information by learning: a proposal on either side, or a critic."""

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchmetrics import Metric

from lightning_ext.functional import (
    barber_agakov_lower,
    infonce,
    jensen_shannon_objective,
    mine_objective,
    nwj_estimate,
)
from lightning_ext.metrics import BarberAgakovBound, DonskerVaradhanEstimate, InfoNCE, NWJEstimate
from lightning_ext.modules._mutual_information_pairs import (
    MakeOptimizer,
    PairModule,
    distribution_of,
    log_prior_of,
    reparametrised,
    require_critic,
)
from lightning_ext.nn import LatentModel, PairCritic

__all__ = ["BarberAgakovModule", "CriticModule"]

Objective = Literal["infonce", "dv", "mine", "nwj", "js", "smile"]

_MEASURED = {"infonce": "infonce", "dv": "dv", "mine": "dv", "nwj": "nwj", "js": "nwj", "smile": "smile"}


class BarberAgakovModule(PairModule):
    r"""Barber-Agakov bounds with a proposal trained for each side.

    .. math:: \mathbb E \log \frac{q_L(z \mid x)}{p(z)} \le I \le
        \mathbb E \Bigl[\log p(x \mid z) - \log \frac{p(x, z')}{q_U(z' \mid x)}\Bigr], \quad z' \sim q_U(\cdot \mid x)

    The lower side wants a proposal that covers the posterior (inclusive KL divergence), the upper one that lies inside
    of it (exclusive). One module for both is trained for the sum of both divergences.

    Batches are ``(x, z)`` from the joint density, such as those of
    :class:`~lightning_ext.data.SimulatedPairsDataModule`. ``predict`` gives :math:`\log q_L(z \mid x) / p(z)` of each.

    Args:
        lower: :math:`q_L`: x to a distribution of z, such as :class:`~lightning_ext.nn.GaussianProposal`.
        upper: :math:`q_U`, which needs ``model``; its samples must be reparametrised.
        model: the generative model, of which a frozen copy is kept; its prior is p(z).
        prior: p(z) where there is no model. Default: standard normal.
        optimizer: builds the optimizer from the proposals' parameters, such as ``torch.optim.Adam``.
        seed: of the samples; None takes the program's.

    Raises:
        ValueError: no side, an upper one without a model, or both a model and a prior.

    Logged: ``mutual_information/ba/lower`` and ``/upper`` in nats, each with its standard error (``/stderr``, or
    ``/lower_stderr`` and so on with ``/gap`` where there are both), in validation and test; ``train/loss``, the upper
    bound less the lower one and less the mean log-likelihood of the pairs, which training does not change.

    Source: Barber & Agakov 2003; Brekelmans et al. 2022 (arXiv:2303.06992).

    >>> from lightning_ext.nn import GaussianProposal
    >>> BarberAgakovModule(lower=GaussianProposal(nn.Linear(3, 4))).loss(torch.zeros(5, 3), torch.zeros(5, 2)).shape
    torch.Size([])
    """

    def __init__(
        self,
        lower: nn.Module | None = None,
        upper: nn.Module | None = None,
        model: LatentModel | None = None,
        prior: Distribution | None = None,
        optimizer: MakeOptimizer = torch.optim.Adam,
        seed: int | None = None,
    ) -> None:
        if lower is None and upper is None:
            raise ValueError("there must be a proposal, lower or upper or both.")
        if upper is not None and model is None:
            raise ValueError("upper needs the model: the upper bound is made of its likelihood.")
        if model is not None and prior is not None:
            raise ValueError("prior must be None where there is a model, which has its own.")
        side = "both" if lower is not None and upper is not None else "upper" if lower is None else "lower"
        super().__init__(optimizer, seed, {"ba": BarberAgakovBound(side)})  # type: ignore[arg-type]
        self.lower, self.upper = lower, upper
        self.model = None if model is None else copy.deepcopy(model).eval().requires_grad_(False)
        self._log_prior = log_prior_of(prior)

    def train(self, mode: bool = True) -> "BarberAgakovModule":
        """Switch the proposals' mode; the model stays in evaluation."""
        super().train(mode)
        if self.model is not None:
            self.model.eval()
        return self

    def loss(self, x: Tensor, z: Tensor, batch: Any = None) -> Tensor:
        """What each side lacks."""
        terms = []
        if self.lower is not None:
            terms.append(-barber_agakov_lower(*self._lower(x, z)))
        if self.upper is not None:
            terms.append(-self._upper_weight(x))
        return torch.stack([term.mean() for term in terms]).sum()

    def measure(self, x: Tensor, z: Tensor) -> None:
        """Both bounds of the same pairs."""
        needed: dict[str, Tensor] = {}
        if self.lower is not None:
            needed["log_q"], needed["log_prior"] = self._lower(x, z)
        if self.upper is not None:
            assert self.model is not None
            needed["log_weight"] = self._upper_weight(x)
            needed["log_likelihood"] = self.model.checked_likelihood(x, z)
        self.bound("ba").update(**needed)

    def pointwise(self, x: Tensor, z: Tensor) -> Tensor:
        """The lower bound's term of each pair, ``(B,)`` nats."""
        if self.lower is None:
            raise ValueError("predict needs a lower proposal.")
        return barber_agakov_lower(*self._lower(x, z))

    def _lower(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        assert self.lower is not None
        log_prior = self._log_prior if self.model is None else self.model.prior
        return distribution_of(self.lower, x).log_prob(z), log_prior(z)

    def _upper_weight(self, x: Tensor) -> Tensor:
        assert self.upper is not None
        assert self.model is not None
        proposal = distribution_of(self.upper, x)
        [z] = reparametrised(proposal, 1, self)
        return self.model.checked_likelihood(x, z) + self.model.prior(z) - proposal.log_prob(z)


class CriticModule(PairModule):
    r"""A critic trained on pairs to tell joint from independent ones, and what it says about the information.

    ========== ================================================== =============================================
    objective  trained by                                         measured as
    ========== ================================================== =============================================
    infonce    :func:`~lightning_ext.functional.infonce`          ``infonce/lower``, at most the log of samples
    dv         Donsker-Varadhan                                   ``dv/estimate``, no bound
    mine       the same, its gradient over a moving average       ``dv/estimate``, no bound
    nwj        :func:`~lightning_ext.functional.nwj_estimate`     ``nwj/lower``, of large variance
    js         the Jensen-Shannon objective                       ``nwj/lower``
    smile      the same                                           ``smile/estimate``, no bound
    ========== ================================================== =============================================

    Each x meets the other z of its batch. A trained critic often certifies more than its own objective says: see
    :func:`~lightning_ext.modules.measure_implicit_bound`.

    Batches are ``(x, z)``. ``predict`` gives T of each pair, ``(B,)``, the pointwise information of a critic that dv,
    nwj, js or smile have trained (with dv up to a constant, with infonce up to a function of x).

    Args:
        critic: T, such as :class:`~lightning_ext.nn.ConcatenatedCritic`.
        objective: see the table.
        num_negatives: z of other pairs that each x meets; the default is all.
        gather_negatives: under DDP also those of the other ranks, whose batches must be of one size. Gradients are
            then those of one process with the whole batch.
        ema: decay of mine's average, from 0 to below 1.
        clip: of smile's estimate, in nats; None for none.
        optimizer: builds the optimizer from the critic's parameters.

    Raises:
        ValueError: an argument is out of range; or a batch has too few pairs for the negatives.

    Logged: ``mutual_information/<the table's>`` in nats with ``/stderr`` in validation and test; ``train/loss``, the
    negative objective of a batch, which is an estimate of the information for infonce alone.

    Distributed: objectives that are logarithms of means (dv, mine) take them over all ranks, so that gradients are
    those of all pairs; which x meet which z is up to ``gather_negatives``. Checkpoints hold mine's average.

    Source: van den Oord et al. 2018 (arXiv:1807.03748); Belghazi et al. 2018 (arXiv:1801.04062); Nguyen et al. 2010
    (arXiv:0809.0853); Hjelm et al. 2019 (arXiv:1808.06670); Song & Ermon 2020 (arXiv:1910.06222).

    >>> from lightning_ext.nn import QuadraticCritic
    >>> round(CriticModule(QuadraticCritic(1, 1)).loss(torch.ones(4, 1), torch.ones(4, 1)).item(), 4)  # all alike
    -0.0
    """

    _log_average: Tensor | None = None

    def __init__(
        self,
        critic: PairCritic,
        objective: Objective = "infonce",
        num_negatives: int | None = None,
        gather_negatives: bool = False,
        ema: float = 0.99,
        clip: float | None = 5.0,
        optimizer: MakeOptimizer = torch.optim.Adam,
    ) -> None:
        if objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}; got {objective!r}.")
        if num_negatives is not None and num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, or None; got {num_negatives}.")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1; got {ema}.")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None; got {clip}.")
        require_critic(critic)
        measured = _MEASURED[objective]
        metrics: dict[str, Metric] = {
            "infonce": InfoNCE("slots"), "nwj": NWJEstimate(), "dv": DonskerVaradhanEstimate(),
            "smile": DonskerVaradhanEstimate(),
        }  # fmt: skip
        super().__init__(optimizer, None, {measured: metrics[measured]})
        self.critic = critic
        self.objective, self.num_negatives, self.gather_negatives = objective, num_negatives, gather_negatives
        self.ema, self.clip = (ema if objective == "mine" else 0.0), clip

    def scores(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """T of the joint pairs, ``(B,)``, and of each x with M other z, ``(M, B)``."""
        pool, first = self._pool(z)
        others = len(pool) - 1
        if others < (self.num_negatives or 1):
            raise ValueError(
                f"each x must meet {self.num_negatives or 'at least 1'} other z, and there are {others} in a batch of "
                f"{len(x)}: take larger batches; and if it is the last one, another number of pairs, or drop_last=True."
            )
        own = torch.arange(len(x), device=z.device) + first
        if self.num_negatives is None:
            table = self.critic.matrix(x, pool)
            mask = torch.ones_like(table, dtype=torch.bool).scatter_(1, own[:, None], False)
            return table.gather(1, own[:, None])[:, 0], table[mask].view(len(x), others).mT
        turned = own + torch.arange(self.num_negatives + 1, device=z.device)[:, None]
        found = self.critic(x, pool[turned % len(pool)])
        return found[0], found[1:]

    def loss(self, x: Tensor, z: Tensor, batch: Any = None) -> Tensor:
        """The negative objective."""
        joint, negatives = (scores.float() for scores in self.scores(x, z))
        if self.objective == "infonce":
            return -infonce(torch.cat([joint[None], negatives]), "slots").mean()
        if self.objective == "nwj":
            return -nwj_estimate(joint, negatives)
        if self.objective in ("js", "smile"):
            return -jensen_shannon_objective(joint, negatives)
        value, _, self._log_average = mine_objective(
            joint, negatives, self._log_average, self.ema, self.log_mean_over_ranks
        )
        return -value

    def measure(self, x: Tensor, z: Tensor) -> None:
        """What the critic says of a batch."""
        joint, negatives = self.scores(x, z)
        [name] = self.bounds
        metric = self.bound(name)
        if name == "infonce":
            metric.update(torch.cat([joint[None], negatives]))
        elif name == "smile" and self.clip is not None:
            metric.update(joint, negatives.clamp(-self.clip, self.clip))
        else:
            metric.update(joint, negatives)

    def pointwise(self, x: Tensor, z: Tensor) -> Tensor:
        """T of each pair, ``(B,)``."""
        found: Tensor = self.critic(x, z)
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep mine's average."""
        super().on_save_checkpoint(checkpoint)
        if self._log_average is not None:
            checkpoint["lightning_ext_log_average"] = self._log_average

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up."""
        super().on_load_checkpoint(checkpoint)
        self._log_average = checkpoint.get("lightning_ext_log_average")

    def _pool(self, z: Tensor) -> tuple[Tensor, int]:
        """The latents that each x may meet, and where this rank's begin."""
        if not self.gather_negatives or self._world_size == 1:
            return z, 0
        gathered: Tensor = self.all_gather(z)  # type: ignore[assignment]
        return gathered.flatten(0, 1), self._rank * len(z)
