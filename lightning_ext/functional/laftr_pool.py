r"""Several tasks that share one reference, measured in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional.activation_replay import RecordActivations, ReplayActivations
from lightning_ext.functional.activation_sites import ActivationSite
from lightning_ext.functional.input_statistics import InputModel
from lightning_ext.functional.laftr import Forward, Heads, output_divergence

__all__ = ["pooled_distance", "pooled_inputs"]


def pooled_inputs(models: Sequence[InputModel], shares: Sequence[float] | None = None) -> tuple[InputModel, Tensor]:
    r"""One model whose groups are those of all tasks: :math:`\pi = (q_1 \pi_1, \dots, q_T \pi_T)`.

    Args:
        models: of the tasks, with inputs of one shape and one kind of covariance.
        shares: :math:`q_i \ge 0`, the weight of each task; default :math:`1/T`.

    Returns:
        The model, and the task of each of its groups, ``(G,)``.

    Raises:
        ValueError: If there is no model, or inputs, gates or covariances are not of one kind.

    >>> one = InputModel(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
    >>> model, task = pooled_inputs([one, one])
    >>> model.weights, task
    (tensor([0.5000, 0.5000]), tensor([0, 1]))
    """
    if not models:
        raise ValueError("models must hold one model or more.")
    kinds = {(m.means.shape[1:], m.factors.ndim, m.units) for m in models}
    if len(kinds) > 1:
        raise ValueError("models must be of inputs of one shape, with one kind of covariance and the same gates.")
    shares = [1.0 / len(models)] * len(models) if shares is None else shares
    rank = max(m.factors.shape[-1] for m in models)
    factors = [torch.nn.functional.pad(m.factors, (0, rank - m.factors.shape[-1])) for m in models]
    task = torch.repeat_interleave(torch.arange(len(models)), torch.tensor([len(m.weights) for m in models]))
    model = InputModel(
        torch.cat([share * m.weights for share, m in zip(shares, models, strict=True)]),
        torch.cat([m.means for m in models]),
        torch.cat(factors),
        tuple(torch.cat(gates) for gates in zip(*(m.gates for m in models), strict=True)),
        models[0].units,
    )
    return model, task.to(model.weights.device)


def pooled_distance(
    forward: Forward,
    reference: Any,
    current: Any,
    x: Tensor,
    task: Tensor,
    heads: Sequence[Heads | None],
    sites: Sequence[ActivationSite | None] | None = None,
    *,
    divergence: str = "kl",
    weights: Tensor,
) -> Tensor:
    r"""`gated_distance` of samples of several tasks, each with its own heads, in one pass of each network.

    .. math:: D = \sum_s w_s \, \rho\bigl(z_{0,s}[h_{t(s)}], \tilde z_s[h_{t(s)}]\bigr)

    Args:
        forward: as in `gated_distance`, and likewise ``reference``, ``current``, ``x``, ``sites`` and ``divergence``.
        task: ``(S,)``, :math:`t(s)`, integers.
        heads: :math:`h_t` for each task.
        weights: ``(S,)``.

    Returns:
        A scalar, in nats for ``"kl"``, else in squared units of the outputs.

    Note:
        One forward pass of each network whatever the number of tasks, and one divergence for each different entry of
        ``heads``.

    >>> forward = lambda p, x: (x * p["w"]).relu()
    >>> w = {"w": torch.ones(2)}, {"w": torch.tensor([2.0, 3.0])}
    >>> x, task = torch.ones(2, 2), torch.tensor([0, 1])
    >>> pooled_distance(forward, *w, x, task, [[0], [1]], divergence="mse", weights=torch.ones(2))  # (1 + 4) / 2
    tensor(2.5000)
    """
    with torch.no_grad(), RecordActivations(sites or ()) as tape:
        old = forward(reference, x)
    with ReplayActivations(tape.sites):
        new = forward(current, x)
    groups: dict[str, tuple[Heads | None, list[int]]] = {}
    for number, index in enumerate(heads):
        key = repr(index.tolist() if isinstance(index, Tensor) else index)
        groups.setdefault(key, (index, []))[1].append(number)
    total = new.new_zeros(())
    for index, tasks in groups.values():
        rows = slice(None) if len(groups) == 1 else torch.isin(task, task.new_tensor(tasks))
        total = total + output_divergence(new[rows], old[rows], divergence, index, weights[rows])
    return total
