r"""Bounds on mutual information from densities: Barber-Agakov, importance-weighted, GIWAE, annealed, energy-based.

With :math:`C = \log p(x \mid z)`, every bound is :math:`I(x; z) = \mathbb E[C - \log p(x)]` with a bound on the
evidence :math:`\log p(x)` in its place. Lower bounds of the evidence give upper bounds of the information, and they are
named by the information's side. Values are those of single data points, so that both terms belong to one pair
``(x, z)``, which removes most of their variance: average them, and only them.

Source: Brekelmans, Huang, Ghassemi, Ver Steeg, Grosse & Makhzani 2022 (arXiv:2303.06992), unless stated otherwise.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ext.functional.log_mean_exp import log_mean_exp

__all__ = [
    "ais_lower",
    "ais_upper",
    "barber_agakov_lower",
    "barber_agakov_upper",
    "giwae_lower",
    "giwae_upper",
    "ibal_certified",
    "ibal_forward",
    "iwae_bound",
    "structured_infonce",
    "structured_infonce_upper",
]

Scheme = Literal["single", "independent", "independent_reverse", "coupled_reverse"]


def _points(**vectors: Tensor) -> int:
    """How many data points all of these are about."""
    shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or any(shape != first for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"there must be one number per data point, (B,), in each; got {told}.")
    return first[0]


def _samples(points: int, **tables: Tensor) -> None:
    """Refuse what is no table of samples and data points, and what would broadcast to one."""
    shapes = {name: tuple(table.shape) for name, table in tables.items()}
    first = next(iter(shapes.values()))
    if len(first) != 2 or first[0] < 1 or first[1] != points or any(shape != first for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"there must be K >= 1 samples of each of {points} data points, (K, {points}); got {told}.")


def barber_agakov_lower(log_q: Tensor, log_prior: Tensor) -> Tensor:
    r"""Lower bound from any normalised density q in place of the posterior.

    .. math:: \mathbb E_{p(x, z)}[\log q(z \mid x) - \log p(z)] = I - \mathbb E\, \mathrm{KL}(p(z \mid x) \,\|\, q)

    The density :math:`p(x \mid z)` is not needed.

    Args:
        log_q: :math:`\log q(z_b \mid x_b)` of joint samples, ``(B,)``.
        log_prior: :math:`\log p(z_b)`, ``(B,)``.

    Returns:
        ``(B,)``, in nats; their mean is the bound.

    Raises:
        ValueError: If shapes differ.

    Source: Barber & Agakov 2003.

    >>> barber_agakov_lower(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    _points(log_q=log_q, log_prior=log_prior)
    return log_q - log_prior


def barber_agakov_upper(log_likelihood: Tensor, log_weight: Tensor) -> Tensor:
    r"""Upper bound from any normalised density q in place of the posterior.

    .. math:: \mathbb E_{p(x, z)} C - \mathbb E_{p(x) q(z' \mid x)} \log \frac{p(x, z')}{q(z' \mid x)}
        = I + \mathbb E\, \mathrm{KL}(q \,\|\, p(z \mid x))

    Args:
        log_likelihood: :math:`C_b = \log p(x_b \mid z_b)` of joint samples, ``(B,)``.
        log_weight: :math:`\log p(x_b, z'_b) - \log q(z'_b \mid x_b)` of one sample of q each, ``(B,)``.

    Returns:
        ``(B,)``, in nats; infinite where q puts mass where the joint has none.

    Raises:
        ValueError: If shapes differ.

    Source: Barber & Agakov 2003; Alemi et al. 2018 (the rate of a VAE).
    """
    _points(log_likelihood=log_likelihood, log_weight=log_weight)
    return log_likelihood - log_weight


def iwae_bound(log_likelihood: Tensor, log_weights: Tensor) -> Tensor:
    r"""Importance-weighted bound, of K samples.

    .. math:: C_b - \log \frac1K \sum_{k=1}^{K} w_{kb}, \quad w = \frac{p(x, z)}{q(z \mid x)}

    With all samples from q it is an **upper** bound. With a posterior sample in one of the slots, such as the z that x
    was simulated from, and K - 1 from q it is a **lower** bound, at most the Barber-Agakov one plus :math:`\log K`.
    Both tighten with K. With :math:`q = p(z)` the weights are :math:`p(x \mid z_k)`: structured InfoNCE.

    Args:
        log_likelihood: :math:`C_b` of joint samples, ``(B,)``.
        log_weights: :math:`\log w_{kb}`, ``(K, B)``.

    Returns:
        ``(B,)``, in nats; plus infinity where no sample has any weight.

    Raises:
        ValueError: If shapes do not fit.

    Source: Burda et al. 2016 (arXiv:1509.00519); Sobolev & Vetrov 2019 for the other side.

    >>> iwae_bound(torch.tensor([0.0]), torch.tensor([[0.0], [-torch.inf]]))  # at most log K
    tensor([0.6931])
    """
    _samples(_points(log_likelihood=log_likelihood), log_weights=log_weights)
    return log_likelihood - log_mean_exp(log_weights)


def structured_infonce(scores: Tensor) -> Tensor:
    r"""Lower bound from the likelihood and samples of the prior, whose density is not needed.

    .. math:: \log \frac{p(x_b \mid z_{1b})}{\frac1K \sum_{k=1}^{K} p(x_b \mid z_{kb})} \le \log K

    Args:
        scores: :math:`\log p(x_b \mid z_{kb})`, ``(K, B)``: the joint sample first, the others from :math:`p(z)`. Any
            function of x may be added.

    Returns:
        ``(B,)``, in nats, at most :math:`\log K` each; minus infinity where the first is.

    Raises:
        ValueError: If shapes do not fit.

    >>> structured_infonce(torch.tensor([[0.0], [-torch.inf]]))  # log K
    tensor([0.6931])
    """
    _samples(scores.shape[-1] if scores.ndim else 0, scores=scores)
    return contrast(scores[0], scores, 0)


def structured_infonce_upper(log_likelihood: Tensor, scores: Tensor) -> Tensor:
    r"""Upper bound from the likelihood and samples of the prior alone: :func:`iwae_bound` with the prior as q.

    Args:
        log_likelihood: :math:`C_b` of joint samples, ``(B,)``.
        scores: :math:`\log p(x_b \mid z_{kb})` with all :math:`z_k` from :math:`p(z)`, ``(K, B)``.

    Returns:
        ``(B,)``, in nats; plus infinity where no sample explains x.

    Raises:
        ValueError: If shapes do not fit.

    >>> structured_infonce_upper(torch.tensor([0.0]), torch.tensor([[-1.0], [-1.0]]))
    tensor([1.])
    """
    _samples(_points(log_likelihood=log_likelihood), scores=scores)
    return log_likelihood - log_mean_exp(scores)


def contrast(positive: Tensor, scores: Tensor, dim: int) -> Tensor:
    """Positive scores less the log-mean-exp of all along ``dim``, the positive among them: never above its log K.

    Differences come first: rounding of large scores would break the cap, and minus infinities would leave NaN.
    """
    excluded = positive == -torch.inf
    centred = torch.where(excluded.unsqueeze(dim), 0.0, scores - positive.unsqueeze(dim))
    return torch.where(excluded, -torch.inf, -log_mean_exp(centred, dim))


def giwae_lower(log_q: Tensor, log_prior: Tensor, critic: Tensor) -> Tensor:
    r"""GIWAE: what a critic adds to the Barber-Agakov bound, where :math:`p(x \mid z)` is not known.

    .. math:: \log \frac{q(z_{1b} \mid x_b)}{p(z_{1b})}
        + T(x_b, z_{1b}) - \log \frac1K \sum_{k=1}^{K} e^{T(x_b, z_{kb})}

    The first sample is the joint one and stands **inside** the sum; the others are drawn from q. With q the prior it is
    InfoNCE, with K = 1 Barber-Agakov, and with T = log w, up to a function of x, the importance-weighted bound, which
    it never exceeds. The second part is at most :math:`\log K`.

    Args:
        log_q: :math:`\log q(z_{1b} \mid x_b)`, ``(B,)``.
        log_prior: :math:`\log p(z_{1b})`, ``(B,)``.
        critic: :math:`T(x_b, z_{kb})`, ``(K, B)``, the joint sample first.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: If shapes do not fit.

    >>> giwae_lower(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([[5.0], [5.0]]))  # a constant critic
    tensor([1.])
    """
    _samples(_points(log_q=log_q, log_prior=log_prior), critic=critic)
    return log_q - log_prior + contrast(critic[0], critic, 0)


def giwae_upper(log_likelihood: Tensor, log_weights: Tensor, critic: Tensor) -> Tensor:
    r"""The upper bound of the same proposal: K samples of q, one of them chosen by the critic.

    .. math:: C_b - \sum_{s=1}^{K} p_{sb} \bigl[\log w_{sb} - \log (K p_{sb})\bigr],
        \quad p_{\cdot b} = \operatorname{softmax}(T(x_b, z_{\cdot b}))

    The choice is summed over, not drawn. With T = log w it is the importance-weighted bound.

    Args:
        log_likelihood: :math:`C_b` of joint samples, ``(B,)``.
        log_weights: :math:`\log w_{kb}` of samples of q, ``(K, B)``.
        critic: :math:`T(x_b, z_{kb})` of the same, ``(K, B)``.

    Returns:
        ``(B,)``, in nats; plus infinity where the critic may choose a sample without weight.

    Raises:
        ValueError: If shapes do not fit.
    """
    _samples(_points(log_likelihood=log_likelihood), log_weights=log_weights, critic=critic)
    log_p = critic.log_softmax(0)
    eligible = log_p > -torch.inf  # masked before the product, so that gradients are finite as well
    scaled = torch.where(eligible, log_weights, 0.0) - torch.where(eligible, log_p, 0.0)
    return log_likelihood + math.log(len(critic)) - (log_p.exp() * scaled).sum(0)


def ibal_certified(log_q: Tensor, log_prior: Tensor, critic: Tensor, reverse_log_weights: Tensor) -> Tensor:
    r"""A lower bound that an energy-based posterior gives, whatever the critic and the step sizes.

    .. math:: \log \frac{q(z_b \mid x_b)}{p(z_b)} + T(x_b, z_b) + \log \frac1K \sum_{k=1}^{K} \frac{1}{w_{kb}}

    for K reverse chains that all start at the joint sample :math:`z_b` and run to the base q along
    :math:`q\, e^{\beta T}`: the Barber-Agakov bound of the density that the end of a forward chain has. It is near the
    implicit bound :math:`I - \mathbb E\, \mathrm{KL}(p(z \mid x) \,\|\, q\, e^T / Z)` of MINE-AIS, from below.

    Args:
        log_q: of the base at the joint samples, ``(B,)``; the prior may be the base.
        log_prior: :math:`\log p(z_b)`, ``(B,)``.
        critic: :math:`T(x_b, z_b)`, ``(B,)``.
        reverse_log_weights: ``(K, B)``, from :func:`~lightning_ext.functional.ais_reverse` with T as the energy.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: If shapes do not fit.
    """
    _samples(_points(log_q=log_q, log_prior=log_prior, critic=critic), reverse_log_weights=reverse_log_weights)
    return log_q - log_prior + critic + log_mean_exp(-reverse_log_weights)


def ibal_forward(log_q: Tensor, log_prior: Tensor, critic: Tensor, forward_log_weights: Tensor) -> Tensor:
    r"""An **estimate** of the implicit Barber-Agakov bound, from above in expectation: no bound of the information.

    .. math:: \log \frac{q(z_b \mid x_b)}{p(z_b)} + T(x_b, z_b) - \log \frac1K \sum_{k=1}^{K} w_{kb}

    for K forward chains from the base q along :math:`q\, e^{\beta T}`, which estimate its normaliser.

    Args:
        log_q: of the base at the joint samples, ``(B,)``.
        log_prior: :math:`\log p(z_b)`, ``(B,)``.
        critic: :math:`T(x_b, z_b)`, ``(B,)``.
        forward_log_weights: ``(K, B)``, from :func:`~lightning_ext.functional.ais_forward` with T as the energy.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: If shapes do not fit.
    """
    _samples(_points(log_q=log_q, log_prior=log_prior, critic=critic), forward_log_weights=forward_log_weights)
    return log_q - log_prior + critic - log_mean_exp(forward_log_weights)


def ais_upper(
    log_likelihood: Tensor, forward: Tensor, reverse: Tensor | None = None, *, scheme: Scheme = "independent"
) -> Tensor:
    r"""Upper bound from annealed chains.

    ``"single"``: :math:`C - \log w_f`, the mean over the chains. ``"independent"``: :math:`C - \log \frac1K \sum w_f`.
    ``"independent_reverse"`` and ``"coupled_reverse"``: :math:`C + \log \frac1K \sum w^{-1}` over one forward chain and
    K - 1 reverse ones, which start in posterior samples of their own, or all where the forward chain ended.

    Args:
        log_likelihood: :math:`C_b` of joint samples, ``(B,)``.
        forward: log-weights of forward chains, ``(K, B)``; the reverse schemes take the first.
        reverse: log-weights of the reverse chains, ``(K - 1, B)``, for the reverse schemes alone.
        scheme: as above.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: If shapes do not fit, or the reverse chains are missing or not asked for.
    """
    points = _points(log_likelihood=log_likelihood)
    _samples(points, forward=forward)
    if scheme in ("single", "independent"):
        if reverse is not None:
            raise ValueError(f"reverse has no part in the upper bound with scheme={scheme!r}.")
        return log_likelihood - (forward.mean(0) if scheme == "single" else log_mean_exp(forward))
    _require_scheme(scheme)
    if reverse is None:
        raise ValueError(f"scheme={scheme!r} needs the weights of the reverse chains too: pass reverse, (K - 1, B).")
    _samples(points, reverse=reverse)
    return log_likelihood + log_mean_exp(-torch.cat([forward[:1], reverse]))


def ais_lower(
    log_likelihood: Tensor, reverse: Tensor, forward: Tensor | None = None, *, scheme: Scheme = "coupled_reverse"
) -> Tensor:
    r"""Lower bound from annealed chains, of which those in reverse start in posterior samples.

    ``"single"``: :math:`C - \log w_r`, the mean over the chains. ``"independent"``: :math:`C - \log \frac1K \sum w`
    over one reverse and K - 1 forward chains. ``"independent_reverse"`` and ``"coupled_reverse"``:
    :math:`C + \log \frac1K \sum w_r^{-1}` over chains from posterior samples of their own, or all from the same one.
    The z that x was simulated from is such a sample; of real data there is none, and no lower bound.

    Args:
        log_likelihood: :math:`C_b` of joint samples, ``(B,)``.
        reverse: log-weights of reverse chains, ``(K, B)``; ``"independent"`` takes the first.
        forward: log-weights of the forward chains, ``(K - 1, B)``, for ``"independent"`` alone.
        scheme: as above.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: If shapes do not fit, or the forward chains are missing or not asked for.
    """
    points = _points(log_likelihood=log_likelihood)
    _samples(points, reverse=reverse)
    _require_scheme(scheme)
    if scheme == "independent":
        if forward is None:
            raise ValueError("scheme='independent' needs the weights of forward chains too: pass forward, (K - 1, B).")
        _samples(points, forward=forward)
        return log_likelihood - log_mean_exp(torch.cat([reverse[:1], forward]))
    if forward is not None:
        raise ValueError(f"forward has no part in the lower bound with scheme={scheme!r}.")
    return log_likelihood - reverse.mean(0) if scheme == "single" else log_likelihood + log_mean_exp(-reverse)


def _require_scheme(scheme: str) -> None:
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(map(repr, get_args(Scheme)))}; got {scheme!r}.")
