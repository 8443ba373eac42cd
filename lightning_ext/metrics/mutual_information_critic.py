"""Mutual information from the scores of a critic, streamed over batches and ranks."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ext.functional import ibal_certified, ibal_forward, infonce, log_mean_exp, nwj_estimate
from lightning_ext.metrics._per_datum import PerDatumMean, require_finite

__all__ = ["DonskerVaradhanEstimate", "IBALEstimate", "InfoNCE", "NWJEstimate"]


class InfoNCE(PerDatumMean):
    r"""InfoNCE, a lower bound of at most :math:`\log K` from a critic and samples.

    .. math:: \mathbb E\left[T(x, z_1) - \log \frac1K \sum_{k=1}^K e^{T(x, z_k)}\right]

    ``update(scores)`` takes, with ``layout="in_batch"``, ``(B, B)``, rows x, columns z, pairs on the diagonal, so that
    K = B; with ``"slots"``, ``(K, B)``, row 0 of the pairs, the others of x_b with samples of p(z).

    ``compute()`` returns a dict of scalars: ``lower`` in nats, its ``stderr``, and ``count``, the number of pairs.

    Args:
        layout: What ``update`` takes.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on scores of another shape, empty batches, NaN, and a pair whose score is infinite.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: van den Oord et al. 2018 (arXiv 1807.03748).

    Note:
        The mean is over pairs, also of batches of different K; over ranks, each with its own negatives, as over
        batches. Pairs of one in-batch matrix share their negatives, which the standard error does not know.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import InfoNCE
        >>> bound = InfoNCE()
        >>> bound.update(100 * torch.eye(4))  # at the cap, log 4
        >>> round(bound.compute()["lower"].item(), 4)
        1.3863
    """

    def __init__(self, layout: Literal["in_batch", "slots"] = "in_batch", key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(("lower",), key_prefix, **kwargs)
        if layout not in ("in_batch", "slots"):
            raise ValueError(f"layout must be 'in_batch' or 'slots'; got {layout!r}.")
        self.layout = layout

    def update(self, scores: Tensor) -> None:
        """Add pairs; see the class for the argument."""
        (scores,) = self.widened(scores=scores)
        values = infonce(scores, self.layout)
        require_finite("scores of pairs", scores.diagonal() if self.layout == "in_batch" else scores[0])
        self.add(values)


class DonskerVaradhanEstimate(PerDatumMean):
    r"""Plug-in Donsker-Varadhan estimate. It is not a bound.

    .. math:: \mathbb E\left[a + T(x, z)\right] - \log \mathbb E\, e^{T(x, z')}

    In expectations it is a lower bound; the logarithm of a mean over samples is too low and the estimate too high. Its
    variance grows exponentially with the information.

    ``update(t_joint, t_marginal, ba_term=None)`` takes

    - ``t_joint``: scores of pairs, ``(B,)``;
    - ``t_marginal``: scores of x_b with M draws z' of q(z|x), or of p(z), ``(M, B)``; or ``(N,)``, one draw each;
    - ``ba_term``: :math:`a = \log q(z|x) - \log p(z)` of pairs, ``(B,)``. Default: q is p(z), a = 0.

    ``compute()`` returns a dict of scalars: ``estimate`` in nats, its ``stderr``, and ``count``, the number of pairs.

    Args:
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on malformed shapes, empty batches and NaN.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Donsker and Varadhan 1983; Belghazi et al. 2018 (arXiv 1801.04062).

    Note:
        The logarithm is of the mean over all batches and ranks, whose states are logarithms of sums: many ranks give
        what one gives, unlike a mean of their estimates. The standard error is that of the delta method with
        independent terms; it says nothing of the bias.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import DonskerVaradhanEstimate
        >>> estimate = DonskerVaradhanEstimate()
        >>> estimate.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0, -torch.inf]))
        >>> round(estimate.compute()["estimate"].item(), 4)  # 2 + log 2
        2.6931
    """

    log_sums: Tensor
    draws: Tensor

    def __init__(self, key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(("estimate",), key_prefix, **kwargs)
        self.add_state("log_sums", self.float_state(2) - torch.inf, dist_reduce_fx=add_log_sums)
        self.add_state("draws", torch.zeros((), dtype=torch.long, device=self.device), dist_reduce_fx="sum")

    def update(self, t_joint: Tensor, t_marginal: Tensor, ba_term: Tensor | None = None) -> None:
        """Add scores; see the class for the arguments."""
        t_joint, t_marginal, ba_term = _scores(self, t_joint, t_marginal, ba_term)
        log_means = log_mean_exp(_rows(t_joint, t_marginal, paired=False))
        _below_infinity("t_marginal", t_marginal)
        new = torch.stack([torch.logsumexp(power * log_means, 0) for power in (1, 2)])
        self.log_sums = torch.logaddexp(self.log_sums, new)
        self.draws = self.draws + len(log_means)
        self.add(t_joint + ba_term)

    def compute(self) -> dict[str, Tensor]:
        """The estimate so far, over all ranks; see the class for the keys."""
        joint, joint_stderr = self.means(), self.stderrs()
        first, second = self.log_sums
        estimate = joint - (first - self.draws.to(first.dtype).log())
        spread = self.draws * (second - 2 * first).exp() - 1  # of the mean: its relative variance times draws - 1
        relative = torch.where(self.draws > 1, spread.clamp(min=0) / (self.draws - 1), torch.nan)
        stderr = torch.where(estimate.isinf(), torch.inf, (joint_stderr.square() + relative).sqrt())
        self.warn_of(self._problems(estimate))
        return self.named(estimate, stderr)


class NWJEstimate(PerDatumMean):
    r"""Nguyen-Wainwright-Jordan estimate (MINE-F), whose expectation is a lower bound with any number of samples.

    .. math:: \mathbb E\left[a + T(x, z) + 1 - e^{T(x, z')}\right]

    The best critic is :math:`\log p(x, z) / (p(x) p(z))`. Its variance grows exponentially with the information.

    ``update(t_joint, t_marginal, ba_term=None)`` takes what :class:`DonskerVaradhanEstimate` does, with ``t_marginal``
    ``(M, B)``, or ``(B,)`` for M = 1.

    ``compute()`` returns a dict of scalars: ``lower`` in nats, its ``stderr``, and ``count``, the number of pairs.

    Args:
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on malformed shapes, empty batches and NaN.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Nguyen et al. 2010 (arXiv 0809.0853); Belghazi et al. 2018 (arXiv 1801.04062).

    Note:
        Distributed behaviour as :class:`~lightning_ext.metrics.BarberAgakovBound`.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import NWJEstimate
        >>> bound = NWJEstimate()
        >>> bound.update(torch.tensor([1.0, 3.0]), torch.tensor([[0.0, 0.0]]))
        >>> bound.compute()["lower"].item()
        2.0
    """

    def __init__(self, key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(("lower",), key_prefix, **kwargs)

    def update(self, t_joint: Tensor, t_marginal: Tensor, ba_term: Tensor | None = None) -> None:
        """Add scores; see the class for the arguments."""
        t_joint, t_marginal, ba_term = _scores(self, t_joint, t_marginal, ba_term)
        rows = _rows(t_joint, t_marginal)
        _below_infinity("t_marginal", t_marginal)
        per_pair = torch.func.vmap(nwj_estimate, in_dims=(1, 1, 0))
        self.add(per_pair(t_joint[None], rows, ba_term))


class IBALEstimate(PerDatumMean):
    r"""Information that an energy-based posterior :math:`\pi(z|x) \propto q(z|x) e^{T(x, z)}` certifies, or may have.

    ``mode="certified"``: a lower bound for any critic and any chains, of K reverse chains from the pair's own z.
    ``mode="forward"``: an estimate of the critic's implicit bound, from above, of K forward chains; not a bound on the
    information. See :func:`~lightning_ext.functional.ibal_certified` and :func:`~lightning_ext.functional.ibal_forward`
    for the definitions. Both work with any critic, also one that InfoNCE trained, and with q = p(z).

    ``update(t_joint, ba_term, log_weights)`` takes

    - ``t_joint``: :math:`T(x_b, z_b)`, ``(B,)``, finite;
    - ``ba_term``: :math:`\log q(z_b|x_b) - \log p(z_b)`, ``(B,)``; zeros where q is p(z);
    - ``log_weights``: log weights of the mode's chains along :math:`q e^{\beta T}`, ``(K, B)``.

    ``compute()`` returns a dict of scalars: ``lower`` where certified, else ``estimate``, in nats, its ``stderr``, and
    ``count``, the number of pairs.

    Args:
        mode: Which chains the weights are of.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on malformed shapes, empty batches, NaN, and reverse weights that are not finite.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        Distributed behaviour as :class:`~lightning_ext.metrics.BarberAgakovBound`.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import IBALEstimate
        >>> bound = IBALEstimate()
        >>> bound.update(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 1.0]), torch.full((4, 2), 0.5))
        >>> bound.compute()["lower"].item()  # nothing but the Barber-Agakov term
        1.5
    """

    def __init__(
        self, mode: Literal["certified", "forward"] = "certified", key_prefix: str = "", **kwargs: Any
    ) -> None:
        if mode not in ("certified", "forward"):
            raise ValueError(f"mode must be 'certified' or 'forward'; got {mode!r}.")
        super().__init__(("lower" if mode == "certified" else "estimate",), key_prefix, **kwargs)
        self.mode = mode

    def update(self, t_joint: Tensor, ba_term: Tensor, log_weights: Tensor) -> None:
        """Add pairs; see the class for the arguments."""
        t_joint, ba_term, log_weights = self.widened(t_joint=t_joint, ba_term=ba_term, log_weights=log_weights)
        value = ibal_certified if self.mode == "certified" else ibal_forward
        values = value(ba_term, torch.zeros_like(ba_term), t_joint, log_weights)
        require_finite("t_joint", t_joint)
        if self.mode == "certified":
            require_finite("log_weights of reverse chains", log_weights)
        self.add(values)


def add_log_sums(parts: Tensor) -> Tensor:
    """The logarithm of the sum over ranks, ``(ranks, ...)``, of what has these logarithms."""
    return torch.logsumexp(parts, 0)


def _scores(
    metric: PerDatumMean, t_joint: Tensor, t_marginal: Tensor, ba_term: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    ba_term = torch.zeros_like(t_joint) if ba_term is None else ba_term
    t_joint, t_marginal, ba_term = metric.widened(t_joint=t_joint, t_marginal=t_marginal, ba_term=ba_term)
    if t_joint.ndim != 1 or ba_term.shape != t_joint.shape:
        raise ValueError(
            "t_joint and ba_term must be (B,), a number per pair; got "
            f"{tuple(t_joint.shape)} and {tuple(ba_term.shape)}."
        )
    _below_infinity("t_joint", t_joint)
    _below_infinity("ba_term", ba_term)
    return t_joint, t_marginal, ba_term


def _rows(t_joint: Tensor, t_marginal: Tensor, paired: bool = True) -> Tensor:
    rows = t_marginal[None] if t_marginal.ndim == 1 else t_marginal
    if rows.ndim != 2 or ((paired or t_marginal.ndim == 2) and rows.shape[1:] != t_joint.shape):
        raise ValueError(
            f"t_marginal must be (M, B) for t_joint (B,), M draws per pair; got {tuple(t_marginal.shape)} and "
            f"{tuple(t_joint.shape)}."
        )
    return rows


def _below_infinity(name: str, values: Tensor) -> None:
    if bool((values == torch.inf).any()):
        raise ValueError(f"{name} must be below infinity; got {int((values == torch.inf).sum())} that are not.")
