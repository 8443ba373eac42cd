r"""Mutual information from samples and a critic T(x, z): objectives to train one, bounds, and estimates that are none.

A bound of samples alone is at most about :math:`\log N` (McAllester & Stratos 2020). What is not a bound is called an
estimate.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ext.functional.log_mean_exp import log_mean_exp
from lightning_ext.functional.mutual_information import contrast

__all__ = [
    "club_estimate",
    "donsker_varadhan_estimate",
    "infonce",
    "jensen_shannon_objective",
    "leave_one_out_upper",
    "mine_objective",
    "nwj_estimate",
    "smile_estimate",
]


def _require_square(scores: Tensor, least: int = 1) -> None:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < least:
        raise ValueError(
            f"scores must be (B, B) with B >= {least}, rows x and columns z, joint pairs on the diagonal; got "
            f"{tuple(scores.shape)}."
        )


def _require_samples(joint: Tensor, marginal: Tensor, ba_term: Tensor | float = 0.0) -> None:
    if joint.ndim != 1 or not joint.numel() or not marginal.numel():
        raise ValueError(
            f"there must be scores of joint pairs, (B,), and of independent ones; got {tuple(joint.shape)} and "
            f"{tuple(marginal.shape)}."
        )
    if isinstance(ba_term, Tensor) and ba_term.ndim and ba_term.shape != joint.shape:
        raise ValueError(
            f"ba_term must have one number per joint pair, {tuple(joint.shape)}, or be a number; got "
            f"{tuple(ba_term.shape)}."
        )


def infonce(scores: Tensor, layout: Literal["slots", "in_batch"] = "in_batch") -> Tensor:
    r"""InfoNCE, a lower bound of at most :math:`\log K`.

    .. math:: T(x, z_1) - \log \frac1K \sum_{k=1}^{K} e^{T(x, z_k)}

    with :math:`z_1` from the joint and the others from :math:`p(z)`. The best critic is
    :math:`\log p(x \mid z) + c(x)`.

    Args:
        scores: with ``layout="in_batch"`` ``(B, B)``, rows x and columns z, joint pairs on the diagonal, so that K = B;
            with ``"slots"`` ``(K, B)``, the joint sample of each data point first.
        layout: see there.

    Returns:
        ``(B,)``, in nats; their mean is the bound.

    Raises:
        ValueError: If the shape or the layout is another.

    Source: van den Oord et al. 2018 (arXiv:1807.03748); Poole et al. 2019 (arXiv:1905.06922).

    >>> infonce(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))  # log 2
    tensor([0.6931, 0.6931])
    """
    if layout == "in_batch":
        _require_square(scores)
        return contrast(scores.diagonal(), scores, 1)
    if layout != "slots":
        raise ValueError(f"layout must be 'slots' or 'in_batch'; got {layout!r}.")
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores must be (K, B) with K >= 1, the joint sample first; got {tuple(scores.shape)}.")
    return contrast(scores[0], scores, 0)


def donsker_varadhan_estimate(joint: Tensor, marginal: Tensor, ba_term: Tensor | float = 0.0) -> Tensor:
    r"""The Donsker-Varadhan functional with means over samples.

    .. math:: \mathbb E_{p(x, z)}[\log q(z \mid x) / p(z) + T] - \log \mathbb E_{p(x) q(z \mid x)}\, e^T

    A lower bound with expectations; with the logarithm of a mean over samples it is biased upwards, and its variance
    grows exponentially with the information: an estimate.

    Args:
        joint: T of joint pairs, ``(B,)``.
        marginal: T of pairs with z from q, or from the prior, of any shape.
        ba_term: :math:`\log q / p` of the joint pairs, ``(B,)``; 0 where q is the prior.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If there are no samples.

    Source: Donsker & Varadhan 1983; Belghazi et al. 2018 (arXiv:1801.04062).
    """
    _require_samples(joint, marginal, ba_term)
    return (joint + ba_term).mean() - log_mean_exp(marginal.flatten())


def nwj_estimate(joint: Tensor, marginal: Tensor, ba_term: Tensor | float = 0.0) -> Tensor:
    r"""The NWJ functional (MINE-f), a lower bound in expectation of any number of samples.

    .. math:: \mathbb E_{p(x, z)}[\log q(z \mid x) / p(z) + T] + 1 - \mathbb E_{p(x) q(z \mid x)}\, e^T

    Unbiased, at most the Donsker-Varadhan functional; its variance is exponential in the information. In the other
    convention, :math:`\mathbb E T - e^{-1} \mathbb E e^T`, the critic is larger by 1.

    Args:
        joint: T of joint pairs, ``(B,)``.
        marginal: T of pairs with z from q, or from the prior, of any shape.
        ba_term: :math:`\log q / p` of the joint pairs, ``(B,)``; 0 where q is the prior.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If there are no samples.

    Source: Nguyen, Wainwright & Jordan 2010 (arXiv:0809.0853).
    """
    _require_samples(joint, marginal, ba_term)
    return (joint + ba_term).mean() + 1 - marginal.exp().mean()


def mine_objective(
    joint: Tensor,
    marginal: Tensor,
    log_average: Tensor | None = None,
    decay: float = 0.99,
    log_mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""MINE's objective: the Donsker-Varadhan functional whose gradient divides by a moving average.

    .. math:: \nabla \Bigl( \mathbb E_p T - \frac{\mathbb E_q e^T}{\bar m} \Bigr), \qquad
        \bar m \leftarrow d\, \bar m + (1 - d)\, \mathbb E_q e^T

    The gradient of a logarithm of a small batch's mean is biased; with the average over batches it is less so.

    Args:
        joint: T of joint pairs, ``(B,)``.
        marginal: T of independent pairs, of any shape.
        log_average: :math:`\log \bar m` after the last batch; None before the first.
        decay: d, from 0 to below 1; with 0 the gradient is that of the functional itself.
        log_mean_over_ranks: gives :math:`\log` of the mean over ranks of what a scalar is the logarithm of. With it the
            gradient, averaged over ranks, is that of all their pairs together. Default: there is one rank.

    Returns:
        The objective, to be maximised, whose value is the functional's (not a bound) and whose gradient is as above;
        the functional's value, detached; and the new :math:`\log \bar m`.

    Raises:
        ValueError: If there are no samples, or decay is out of range.

    Source: Belghazi et al. 2018 (arXiv:1801.04062), section 3.2.
    """
    _require_samples(joint, marginal)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and below 1; got {decay}.")
    log_mean = log_mean_exp(marginal.flatten())
    now = log_mean.detach()
    if log_mean_over_ranks is not None:
        now = log_mean_over_ranks(now)
    if log_average is not None and decay > 0:
        log_average = torch.logaddexp(log_average.to(now) + math.log(decay), now + math.log1p(-decay))
    else:
        log_average = now
    share = (log_mean - log_average).exp()
    value = joint.mean().detach() - now
    return joint.mean() - share + (share.detach() - now), value, log_average


def jensen_shannon_objective(joint: Tensor, marginal: Tensor) -> Tensor:
    r"""An objective whose best critic is :math:`\log p(x, z) / p(x) p(z)`, stable and no estimate of the information.

    .. math:: -\mathbb E_{p(x, z)} \operatorname{softplus}(-T) - \mathbb E_{p(x) p(z)} \operatorname{softplus}(T)

    Put the critic it has trained into :func:`nwj_estimate` or :func:`smile_estimate`.

    Args:
        joint: T of joint pairs, ``(B,)``.
        marginal: T of independent pairs, of any shape.

    Returns:
        A scalar, at most 0.

    Raises:
        ValueError: If there are no samples.

    Source: Nowozin et al. 2016 (arXiv:1606.00709); Hjelm et al. 2019 (arXiv:1808.06670).
    """
    _require_samples(joint, marginal)
    return -F.softplus(-joint).mean() - F.softplus(marginal).mean()


def smile_estimate(joint: Tensor, marginal: Tensor, clip: float | None = 5.0) -> Tensor:
    r"""The Donsker-Varadhan functional with the density ratio clipped, which trades its variance for a bias.

    .. math:: \mathbb E_{p(x, z)} T - \log \mathbb E_{p(x) p(z)} \operatorname{clip}(e^T, e^{-\tau}, e^{\tau})

    Args:
        joint: T of joint pairs, ``(B,)``.
        marginal: T of independent pairs, of any shape.
        clip: :math:`\tau > 0`; None for none.

    Returns:
        A scalar, in nats: an estimate, no bound.

    Raises:
        ValueError: If there are no samples, or clip is not positive.

    Source: Song & Ermon 2020 (arXiv:1910.06222).
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None; got {clip}.")
    return donsker_varadhan_estimate(joint, marginal if clip is None else marginal.clamp(-clip, clip))


def club_estimate(log_q: Tensor) -> Tensor:
    r"""CLUB: how much likelier a variational density makes the joint pairs than others.

    .. math:: \mathbb E_{p(x, z)} \log q(z \mid x) - \mathbb E_{p(x) p(z)} \log q(z \mid x)

    An upper bound if q is the true conditional density, else an estimate.

    Args:
        log_q: :math:`\log q(z_j \mid x_i)`, ``(B, B)``, rows x and columns z.

    Returns:
        ``(B,)``, in nats; their mean is the estimate.

    Raises:
        ValueError: If it is not square.

    Source: Cheng et al. 2020 (arXiv:2006.12013).
    """
    _require_square(log_q)
    return log_q.diagonal() - log_q.mean(1)


def leave_one_out_upper(log_q: Tensor) -> Tensor:
    r"""L1Out: the marginal of z is the mixture of the other data points' conditional densities.

    .. math:: \log q(z_i \mid x_i) - \log \frac{1}{B - 1} \sum_{j \ne i} q(z_i \mid x_j)

    An upper bound in expectation if q is the true conditional density, such as a VAE's encoder for its own codes.

    Args:
        log_q: :math:`\log q(z_j \mid x_i)`, ``(B, B)`` with B at least 2, rows x and columns z.

    Returns:
        ``(B,)``, in nats; plus infinity where no other data point could have given the code.

    Raises:
        ValueError: If it is not square, or there is no other.

    Source: Poole et al. 2019 (arXiv:1905.06922), equation 13.
    """
    _require_square(log_q, 2)
    size = len(log_q)
    others = log_q.masked_fill(torch.eye(size, dtype=torch.bool, device=log_q.device), -torch.inf)
    return log_q.diagonal() - (torch.logsumexp(others, 0) - math.log(size - 1))
