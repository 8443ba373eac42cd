r"""Function-space distance in closed form for any network that is linear between its gates, convolutional or not."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_ext.functional.activation_replay import RecordActivations, ReplayActivations
from lightning_ext.functional.activation_sites import ActivationSite
from lightning_ext.functional.activation_sites import gates as gate_sites
from lightning_ext.functional.laftr_moments import OutputMoments

__all__ = ["mean_gate_distance", "mean_gate_moments"]

Forward = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Heads = slice | Tensor | Sequence[int]


def mean_gate_moments(
    forward: Forward,
    reference: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    mean: Tensor,
    factor: Tensor | None,
    gates: Sequence[Tensor],
    *,
    covariance: Tensor | None = None,
    heads: Heads | None = None,
) -> OutputMoments:
    r"""Moments of the change of the outputs, over the inputs, of networks with mean gates.

    With every gate at its mean :math:`\mu`, the change of the outputs is affine in the input,
    :math:`\Delta z(x) = c + A (x - m)`, and only the inputs' first two moments count:

    .. math:: \mathbb E\, \Delta z = c, \qquad
        \mathbb E\, \Delta z\, \Delta z^\top = c\, c^\top + A (\Sigma + L L^\top) A^\top

    Args:
        forward: ``(parameters, inputs) -> outputs`` ``(B, ..., C)``, in evaluation mode, without side effects. Its only
            nonlinearities are ReLU and leaky ReLU; convolution, batch normalisation, average pooling and residual sums
            are linear.
        reference: :math:`\theta_0` by name, treated as constant.
        current: :math:`\theta_1`, differentiable. Inputs are given in its type.
        mean: of the inputs, ``(G, *input)``, one for each of G groups, such as classes.
        factor: :math:`L`, ``(G, d, r)`` for d numbers in an input, or None.
        gates: mean gates in [0, 1], ``(G, *units)``, one tensor for each call of an activation, in order.
        covariance: :math:`\Sigma`, ``(G, d, d)``, or only its diagonal ``(G, d)``. Default 0.
        heads: which outputs count, an index into the last dimension. Default all.

    Returns:
        :class:`OutputMoments` of all outputs that count, ``(G, C)`` and ``(G, C, C)``; outputs with more dimensions are
        flattened.

    Raises:
        NotImplementedError: If the network calls something that is neither linear nor such a gate, like max-pooling.
        ValueError: If a shape does not fit, or an activation is smooth.
        RuntimeError: If the two networks do not call the same activations.

    Source: derived from Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519).

    >>> forward = lambda p, x: (x @ p["w"]).relu() @ p["v"]
    >>> reference = {"w": torch.tensor([[1.0]]), "v": torch.tensor([[1.0]])}
    >>> current = {"w": torch.tensor([[3.0]]), "v": torch.tensor([[2.0]])}
    >>> m, s, mu = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[0.5]])
    >>> mean_gate_moments(forward, reference, current, m, None, [mu], covariance=s)  # mu^2 (6 - 1)^2 (2 + 1)
    OutputMoments(mean=tensor([[2.5000]]), second=tensor([[[18.7500]]]))

    Note:
        For each group, r + 1 passes of each network where that is fewer than C outputs and there is no ``covariance``;
        else one pass and C backward passes. In float32 the relative error grows as the networks approach, with the
        inverse of their distance; parameters in float64 are the remedy. Equal on every rank without communication.
    """
    weight = next(tensor for tensor in current.values() if tensor.is_floating_point())
    frozen = {name: tensor.detach() for name, tensor in reference.items()}
    _require_fitting(mean, factor, covariance, gates)
    mean = mean.detach().to(weight.dtype)
    factor, covariance = (None if t is None else t.detach().to(weight.dtype) for t in (factor, covariance))
    values = [gate.detach().to(weight.dtype) for gate in gates]

    def group(mean: Tensor, factor: Tensor | None, covariance: Tensor | None, values: list[Tensor]) -> OutputMoments:
        sites = [site for site in gate_sites(template, values) if site is not None]

        def change(x: Tensor) -> Tensor:
            with ReplayActivations(sites, own=frozen.values()):
                old = forward(frozen, x)
            with ReplayActivations(sites, own=current.values()):
                new = forward(current, x)
            step = new - old
            return (step if heads is None else step[..., heads]).flatten(1)

        if covariance is None and (factor is None or factor.shape[-1] < outputs):
            return _by_columns(change, mean, factor)
        return _by_outputs(change, mean, factor, covariance)

    with torch.autocast(weight.device.type, enabled=False):
        template, outputs = _gated_calls(forward, frozen, mean[:1], heads)
        axes = (0, None if factor is None else 0, None if covariance is None else 0, 0)
        centre, second = torch.vmap(group, axes)(mean, factor, covariance, values)
        return OutputMoments(centre, second)


def mean_gate_distance(
    forward: Forward,
    reference: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    mean: Tensor,
    factor: Tensor | None,
    gates: Sequence[Tensor],
    *,
    covariance: Tensor | None = None,
    metric: Tensor | None = None,
    heads: Heads | None = None,
) -> Tensor:
    r"""Function-space distance of two networks with mean gates, in closed form.

    .. math:: D_\mu = \tfrac12 c^\top H c + \tfrac12 \operatorname{tr}\bigl(H A (\Sigma + L L^\top) A^\top\bigr)

    By Jensen's inequality at most the distance with random gates of these means, of which :func:`moment_distance` is
    the closed form for fully connected chains.

    Args:
        forward: as in :func:`mean_gate_moments`, which also describes the other arguments.
        reference: likewise.
        current: likewise.
        mean: likewise.
        factor: likewise.
        gates: likewise.
        covariance: likewise.
        metric: :math:`H`, ``(C, C)`` or ``(G, C, C)``, such as :func:`class_hessians`; default the identity.
        heads: likewise.

    Returns:
        ``(G,)``, one distance for each group, to be averaged with the groups' shares; at least 0. In nats under a
        metric of :func:`class_hessians`, else in squared units of the outputs.

    Raises:
        NotImplementedError: As in :func:`mean_gate_moments`.
        ValueError: Likewise, or if the metric does not fit the outputs.
        RuntimeError: Likewise.

    Source: derived; see :func:`mean_gate_moments`.

    >>> forward = lambda p, x: (x @ p["w"]).relu() @ p["v"]
    >>> reference = {"w": torch.tensor([[1.0]]), "v": torch.tensor([[1.0]])}
    >>> current = {"w": torch.tensor([[3.0]]), "v": torch.tensor([[2.0]])}
    >>> m, root, mu = torch.tensor([[1.0]]), torch.tensor([[[2.0]]]).sqrt(), torch.tensor([[0.5]])
    >>> mean_gate_distance(forward, reference, current, m, root, [mu])  # random gates: 18.75
    tensor([9.3750])

    Note:
        Differentiable in ``current`` to any order. See :func:`mean_gate_moments` for cost.
    """
    moments = mean_gate_moments(forward, reference, current, mean, factor, gates, covariance=covariance, heads=heads)
    return moments.distance(metric)


def _by_columns(change: Callable[[Tensor], Tensor], mean: Tensor, factor: Tensor | None) -> OutputMoments:
    """Pass the mean, and the mean plus each column: for an affine map the differences are its exact derivatives."""
    if factor is None:
        centre = change(mean[None])[0]
        return OutputMoments(centre, centre[:, None] * centre)
    columns = factor.mT.reshape(-1, *mean.shape)
    z = change(torch.cat([mean[None], mean + columns]))
    root = torch.cat([z[:1], z[1:] - z[:1]])
    return OutputMoments(z[0], root.mT @ root)


def _by_outputs(
    change: Callable[[Tensor], Tensor], mean: Tensor, factor: Tensor | None, covariance: Tensor | None
) -> OutputMoments:
    """Pull each output back to the input."""
    z, pull = torch.func.vjp(change, mean[None])[:2]
    rows = torch.vmap(pull)(torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None])[0].flatten(1)
    second = z.mT @ z
    if factor is not None:
        root = rows @ factor
        second = second + root @ root.mT
    if covariance is not None:
        spread = rows * covariance if covariance.ndim == 1 else rows @ covariance
        second = second + spread @ rows.mT
    return OutputMoments(z[0], second)


def _gated_calls(
    forward: Forward, reference: Mapping[str, Tensor], x: Tensor, heads: Heads | None
) -> tuple[list[ActivationSite], int]:
    """The network's calls of activations, and how many outputs count."""
    with torch.no_grad(), RecordActivations(own=reference.values(), inputs=x) as tape:
        out = forward(reference, x)
    curved = sorted({site.name for site in tape.sites if site.push is not None} | tape.others)
    if curved:
        raise NotImplementedError(
            f"mean gates need a network that is linear between ReLU calls, but it calls {', '.join(curved)}. Take "
            'sampled inputs with the activations linearised, mode="relu".'
        )
    return tape.sites, (out if heads is None else out[..., heads]).flatten(1).shape[1]


def _require_fitting(mean: Tensor, factor: Tensor | None, covariance: Tensor | None, gates: Sequence[Tensor]) -> None:
    groups, d = len(mean), mean[:1].numel()
    if factor is not None and (factor.ndim != 3 or factor.shape[:2] != (groups, d)):
        raise ValueError(f"factor must have shape ({groups}, {d}, r); got {tuple(factor.shape)}.")
    if covariance is not None and covariance.shape not in ((groups, d), (groups, d, d)):
        raise ValueError(
            f"covariance must have shape ({groups}, {d}, {d}), or ({groups}, {d}) if diagonal; got "
            f"{tuple(covariance.shape)}."
        )
    if any(len(gate) != groups for gate in gates):
        raise ValueError(
            f"gates must have {groups} groups as mean has, one row each; got shapes {[tuple(g.shape) for g in gates]}."
        )
