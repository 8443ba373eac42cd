"""The mean curvature of a loss in the outputs, group by group: the metric of second-order divergences."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["class_hessians"]


def class_hessians(
    logits: Tensor, groups: Tensor | None = None, num_groups: int = 1, reduction: str = "mean"
) -> Tensor:
    r"""Hessian of the cross-entropy in the logits, averaged over each group.

    .. math:: H_c = \frac{1}{n_c} \sum_{i : c_i = c} \operatorname{diag}(p_i) - p_i p_i^\top, \quad
        p_i = \operatorname{softmax}(z_i)

    :math:`\tfrac12 \Delta z^\top H \Delta z` is the Kullback-Leibler divergence to second order, in either direction.

    Args:
        logits: ``(B, C)``, treated as constant.
        groups: the group of each example, ``(B,)``, in [0, ``num_groups``). Default: all in group 0.
        num_groups: how many groups there are.
        reduction: ``"mean"``, or ``"sum"`` for batches to be added up.

    Returns:
        ``(num_groups, C, C)``, in nats by squared logit; 0 for a group without examples.

    Raises:
        ValueError: If a shape or the reduction is not one of these.

    >>> class_hessians(torch.zeros(3, 2))
    tensor([[[ 0.2500, -0.2500],
             [-0.2500,  0.2500]]])

    Note:
        A sum over ranks of ``reduction="sum"``, divided by the counts, is that of the whole.
    """
    if logits.ndim != 2 or reduction not in ("mean", "sum"):
        raise ValueError(
            f'logits must be (B, C) and reduction "mean" or "sum"; got {tuple(logits.shape)} and {reduction!r}.'
        )
    if groups is None:
        groups = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    if groups.shape != logits.shape[:1]:
        raise ValueError(f"groups must have shape ({len(logits)},); got {tuple(groups.shape)}.")
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    member = F.one_hot(groups, num_groups).to(p.dtype)
    sums = torch.diag_embed(member.mT @ p) - torch.stack([(p * row[:, None]).mT @ p for row in member.mT])
    return sums if reduction == "sum" else sums / member.sum(0).clamp(min=1)[:, None, None]
