r"""How far a change of the weights moves a network's outputs, without linearising the weights (Dhawan et al. 2023)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_ext.functional.activation_replay import RecordActivations, ReplayActivations
from lightning_ext.functional.activation_sites import ActivationSite
from lightning_ext.functional.divergences import softmax_kl, softmax_squared_error, squared_error
from lightning_ext.functional.parameters import recomputation_refused

__all__ = ["gated_distance", "output_divergence"]

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Heads = slice | Tensor | Sequence[int]

_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "kl": softmax_kl,
    "mse": squared_error,
    "softmax_l2": softmax_squared_error,
}


def output_divergence(
    new: Tensor, old: Tensor, divergence: str = "kl", heads: Heads | None = None, weights: Tensor | None = None
) -> Tensor:
    r"""Weighted sum of the divergences of single examples.

    .. math:: D = \sum_{s=1}^{S} w_s \, \rho(z_s, z_{0,s})

    Args:
        new: ``(S, C)`` or ``(S, T, C)``, classes last, differentiable.
        old: the same shape, treated as constant.
        divergence: ``"kl"`` (`softmax_kl`), ``"mse"`` (`squared_error`) or ``"softmax_l2"`` (`softmax_squared_error`).
        heads: which outputs count, an index into the last dimension, applied to both before anything else. Default
            all.
        weights: ``(S,)``; default :math:`1/S`.

    Returns:
        A scalar, in nats for ``"kl"``, else in squared units of the outputs.

    Raises:
        ValueError: If a shape or the name of the divergence is not one of these.

    >>> output_divergence(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), "mse", heads=[1])
    tensor(8.)
    """
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, _DIVERGENCES))}; got {divergence!r}.")
    if new.shape != old.shape or new.ndim < 2:
        raise ValueError(
            f"outputs must be (S, ..., C) and of one shape; got {tuple(new.shape)} and {tuple(old.shape)}."
        )
    if heads is not None:
        new, old = new[..., heads], old[..., heads]
    return _DIVERGENCES[divergence](new, old, weights=weights)


def gated_distance(
    forward: Forward,
    reference: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    x: Tensor,
    sites: Sequence[ActivationSite | None] | None = None,
    *,
    divergence: str = "kl",
    heads: Heads | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Function-space distance with the activations linearised around the reference, and nothing else.

    .. math:: D(\theta_0, \theta_1) = \sum_s w_s\, \rho\bigl(f(x_s; \theta_0), \tilde f(x_s; \theta_1)\bigr), \qquad
        a_1' = \phi(s_0) + \phi'(s_0) \odot (s_1 - s_0) \text{ in } \tilde f

    For ReLU, :math:`\tilde f` is the network with weights :math:`\theta_1` and the reference's activation pattern. In
    contrast to the linearisation in :math:`\theta` (the tangent kernel), products of changes in different layers stay.
    Exact if no unit switches, if only the last layer changes, and at :math:`\theta_1 = \theta_0`, where it is 0.

    Args:
        forward: ``(parameters, inputs) -> outputs`` ``(S, ..., C)``, in evaluation mode, without side effects.
        reference: :math:`\theta_0` by name, treated as constant.
        current: :math:`\theta_1`, differentiable.
        x: inputs, batch first: stored ones, or draws of an `InputModel`.
        sites: what `gates` gives for drawn gates: both networks are then run with them. Default: the reference's own
            activations on ``x``.
        divergence: ``"kl"``, ``"mse"`` or ``"softmax_l2"``, see `output_divergence`.
        heads: which outputs count. Default all.
        weights: ``(S,)``; default :math:`1/S`.

    Returns:
        A scalar, at least 0 up to rounding, in nats for ``"kl"``, else in squared units of the outputs.

    Raises:
        RuntimeError: If there is no activation function, the networks do not call the same ones, or activations are
            checkpointed without re-entry.
        ValueError: If an argument does not fit the outputs.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519), LAFTR with real activations (``sites`` None) and with
    Bernoulli gates.

    >>> forward = lambda p, x: (x @ p["w"]).relu() @ p["v"]
    >>> reference = {"w": torch.tensor([[1.0]]), "v": torch.tensor([[1.0]])}
    >>> current = {"w": torch.tensor([[3.0]]), "v": torch.tensor([[2.0]])}
    >>> gated_distance(forward, reference, current, torch.tensor([[1.0]]), divergence="mse")  # (6 - 1)^2 / 2
    tensor(12.5000)

    Note:
        One forward pass of each network, and a backward pass of one. Nothing is drawn here and nothing is reduced over
        ranks.
    """
    with torch.no_grad(), RecordActivations(sites or (), watch=False, own=reference.values()) as tape:
        old = forward(reference, x)
    with ReplayActivations(tape.sites, own=current.values()), recomputation_refused():
        new = forward(current, x)
    return output_divergence(new, old, divergence, heads, weights)
