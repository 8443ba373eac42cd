"""TracIn's self-influence: squared gradients weighted by the learning rates they were used with."""

from torch import Tensor

from lightning_ext.functional.layer_gradients import LayerGradients

__all__ = ["tracin_self_influence"]


def tracin_self_influence(gradients: LayerGradients, rates: Tensor) -> Tensor:
    r"""What a step on a sample alone takes off its own loss, to first order.

    .. math:: s_b = \sum_d \eta_d\, g_{bd}^2

    Args:
        gradients: Of B samples' losses, as factors.
        rates: Learning rate :math:`\eta_d \ge 0` of each of the D parameters, ``(D,)``, one value within each tensor.

    Returns:
        ``(B,)``, in nats for a loss in nats.

    Raises:
        ValueError: If ``rates`` has another size.

    Source: Pruthi et al. 2020 (arXiv 2002.08484), sections 3 and 4.

    >>> import torch
    >>> from lightning_ext.functional import ExplicitRows
    >>> rows = ExplicitRows((slice(0, 1), slice(1, 3)), (torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]])))
    >>> tracin_self_influence(LayerGradients([rows], 3), torch.tensor([1.0, 0.1, 0.1]))  # 4 + 0.1 * 25
    tensor([6.5000])

    Note:
        No row of D numbers per sample where the parameters of a layer share a rate; where they do not, a few at a time.
    """
    if rates.shape != (gradients.size,):
        raise ValueError(f"rates must have shape ({gradients.size},), got {tuple(rates.shape)}.")
    total = rates.new_zeros(len(gradients), dtype=gradients.blocks[0].sample().dtype)
    for block in gradients.blocks:
        own = [rates[part.start] for part in block.slices]
        if all(bool(rate == own[0]) for rate in own):
            total += own[0] * block.squared_norms()
            continue
        for chunk in block.chunks():
            for rate, rows in zip(own, block[chunk].explicit(), strict=True):
                total[chunk] += rate * rows.square().sum(1)
    return total
