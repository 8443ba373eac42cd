"""Divergences between two outputs of one network: how far a change of the weights moved its predictions.

Each is the Bregman divergence of a common loss and has that loss's reduction, so that loss and divergence can be added
without a hidden factor. All of them are differentiable in the new output only; the old one is a constant.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bernoulli_kl",
    "divergence_named",
    "mean_squared_error",
    "softmax_kl",
    "softmax_squared_error",
    "squared_error",
]


def _pair(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    if new.shape != old.shape:
        raise ValueError(f"new and old must have one shape; got {tuple(new.shape)} and {tuple(old.shape)}.")
    if new.numel() == 0:
        raise ValueError(f"new and old must not be empty; got shape {tuple(new.shape)}.")
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    return new.to(dtype), old.detach().to(dtype)


def _average(terms: Tensor, count: int, weights: Tensor | None) -> Tensor:
    """Sum of the terms over ``count``, or with weights ``(B,)`` of the examples in place of one B-th each."""
    if weights is None:
        return terms.sum() / count
    if weights.shape != terms.shape[:1]:
        raise ValueError(f"weights must have shape ({len(terms)},), one for each example; got {tuple(weights.shape)}.")
    return weights.to(terms.dtype) @ terms.flatten(1).sum(1) * (len(terms) / count)


def _classes(name: str, new: Tensor, old: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    new, old = _pair(new, old)
    if new.ndim < 2 or new.shape[dim] < 2:
        raise ValueError(
            f"{name} needs a batch and at least two classes along dim={dim}; got shape {tuple(new.shape)}. "
            "For one logit per example use bernoulli_kl."
        )
    return new, old


def squared_error(new: Tensor, old: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Half the squared distance, summed over outputs and averaged over the batch.

    .. math:: D(y, y_0) = \frac{1}{B} \sum_{b=1}^{B} \tfrac12 \lVert y_b - y_{0,b} \rVert^2

    The discrepancy of Bae et al. 2022 (arXiv:2203.00089, section 3) for regression, the Bregman divergence of a loss
    that sums :math:`\tfrac12 (y - t)^2` over outputs.

    Args:
        new: ``(B, ...)``, differentiable.
        old: ``(B, ...)``, treated as constant.
        weights: ``(B,)``, of the examples, batch first. Default one B-th each.

    Returns:
        A scalar, at least 0, in squared units of the output; float32 or wider.

    Raises:
        ValueError: If the shapes differ or are empty.

    >>> squared_error(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor(12.5000)
    """
    new, old = _pair(new, old)
    return 0.5 * _average((new - old).square(), len(new), weights)


def mean_squared_error(new: Tensor, old: Tensor) -> Tensor:
    r"""Squared distance averaged over every element, the Bregman divergence of ``F.mse_loss``.

    .. math:: D(y, y_0) = \frac{1}{n} \sum_{i=1}^{n} (y_i - y_{0,i})^2

    Args:
        new: any shape of n elements, differentiable.
        old: the same shape, treated as constant.

    Returns:
        A scalar, at least 0; float32 or wider.

    Raises:
        ValueError: If the shapes differ or are empty.

    >>> mean_squared_error(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor(12.5000)
    """
    new, old = _pair(new, old)
    return (new - old).square().mean()


def softmax_kl(new: Tensor, old: Tensor, dim: int = -1, weights: Tensor | None = None) -> Tensor:
    r"""Kullback-Leibler divergence between categorical predictions, averaged over all positions.

    .. math:: D(z, z_0) = \frac{1}{N} \sum_{n=1}^{N} \sum_c p_{nc} (\log p_{nc} - \log q_{nc}), \quad
        p = \operatorname{softmax}(z_0), \; q = \operatorname{softmax}(z)

    The Bregman divergence of ``F.cross_entropy``. To second order it is
    :math:`\tfrac12 u^\top (\operatorname{diag} p - p p^\top) u` for :math:`z = z_0 + u`, in either direction. The
    direction, old against new, is the one of Bae et al. 2022 (arXiv:2203.00089, section 3).

    Args:
        new: logits or log-probabilities with the classes along ``dim``, differentiable.
        old: the same shape, treated as constant. A class at minus infinity in both has probability 0 and adds nothing.
        dim: the dimension of the classes, at least two of them.
        weights: ``(B,)``, of the examples, batch first. Default one B-th each.

    Returns:
        A scalar in nats, at least 0 up to rounding; float32 or wider.

    Raises:
        ValueError: If the shapes differ or are empty, or there is no batch dimension or only one class.

    >>> softmax_kl(torch.zeros(1, 2), torch.tensor([[0.0, 0.0]]))
    tensor(0.)
    >>> softmax_kl(torch.tensor([[0.0, 3.0]]).log(), torch.tensor([[1.0, 1.0]]).log())
    tensor(inf)
    """
    new, old = _classes("softmax_kl", new, old, dim)
    log_p, log_q = old.log_softmax(dim), new.log_softmax(dim)
    terms = log_p.exp() * (log_p - log_q)
    return _average(terms.masked_fill(log_p == -torch.inf, 0.0), new.numel() // new.shape[dim], weights)


def softmax_squared_error(new: Tensor, old: Tensor, dim: int = -1, weights: Tensor | None = None) -> Tensor:
    r"""Half the squared distance between categorical predictions, averaged over all positions.

    .. math:: D(z, z_0) = \frac{1}{N} \sum_{n=1}^{N} \tfrac12 \lVert \operatorname{softmax}(z_n) -
        \operatorname{softmax}(z_{0,n}) \rVert^2

    The Bregman divergence of the Brier score :math:`\tfrac12 \lVert p - t \rVert^2` as a function of p.

    Args:
        new: logits or log-probabilities with the classes along ``dim``, differentiable.
        old: the same shape, treated as constant.
        dim: the dimension of the classes, at least two of them.
        weights: ``(B,)``, of the examples, batch first. Default one B-th each.

    Returns:
        A scalar between 0 and 1; float32 or wider.

    Raises:
        ValueError: If the shapes differ or are empty, or there is no batch dimension or only one class.

    >>> softmax_squared_error(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
    tensor(1.)
    """
    new, old = _classes("softmax_squared_error", new, old, dim)
    return 0.5 * _average((new.softmax(dim) - old.softmax(dim)).square(), new.numel() // new.shape[dim], weights)


def bernoulli_kl(new: Tensor, old: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence between Bernoulli predictions, averaged over every element.

    .. math:: D(z, z_0) = \frac{1}{n} \sum_{i=1}^{n} \Bigl[ p_i \log \frac{p_i}{q_i}
        + (1 - p_i) \log \frac{1 - p_i}{1 - q_i} \Bigr], \quad p = \sigma(z_0), \; q = \sigma(z)

    The Bregman divergence of ``F.binary_cross_entropy_with_logits``.

    Args:
        new: logits of any shape, differentiable.
        old: the same shape, treated as constant.

    Returns:
        A scalar in nats, at least 0 up to rounding; float32 or wider.

    Raises:
        ValueError: If the shapes differ or are empty.

    >>> round(bernoulli_kl(torch.zeros(1), torch.full((1,), 40.0)).item(), 6)  # log 2
    0.693147
    """
    new, old = _pair(new, old)
    positive = old.sigmoid() * (F.logsigmoid(old) - F.logsigmoid(new))
    negative = (-old).sigmoid() * (F.logsigmoid(-old) - F.logsigmoid(-new))
    return (positive + negative).mean()


_NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "squared_error": squared_error,
    "kl": softmax_kl,
    "bernoulli_kl": bernoulli_kl,
}


def divergence_named(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the divergence called ``"mse"``, ``"squared_error"``, ``"kl"`` (classes last) or ``"bernoulli_kl"``.

    Raises:
        ValueError: For any other name.

    >>> divergence_named("kl") is softmax_kl
    True
    """
    if name not in _NAMED:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, _NAMED))}, or a function; got {name!r}.")
    return _NAMED[name]
