r"""Influence scores from solved gradients: removal effects, groups, relative scores, and exact leave-out steps.

One sign and scale for the whole library. With :math:`K = G + \lambda I`, the damped Gauss-Newton matrix of the mean
training loss over N samples, the score of training sample z for a measurement m is

.. math:: \tau(m, z) = \tfrac1N\, g_m^\top K^{-1} g_z,

the change of m to first order when z is removed. For a loss, a positive score means that removing z makes it worse: z
is helpful. Koh and Liang's influence of up-weighting has the opposite sign; kronfluence, captum, pyDVL and dattri leave
out the factor :math:`1/N`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["group_scores", "influence_scores", "leave_out_step", "relative_influence", "self_influence"]


def influence_scores(solved: Tensor, gradients: Tensor, num_samples: int) -> Tensor:
    r"""Removal effects of training samples on measurements.

    .. math:: \tau_{qb} = \tfrac1N\, s_q^\top g_b, \qquad s_q = K^{-1} g_{m_q}

    Args:
        solved: ``(Q, D)``, gradients of the measurements times the inverse curvature.
        gradients: ``(B, D)``, gradients of the training samples' losses, without weight decay.
        num_samples: N, the number of samples that the curvature is a mean over.

    Returns:
        ``(Q, B)`` in units of the measurement (nats for a cross-entropy); positive where removing raises it.

    Raises:
        ValueError: Sizes that do not fit, or ``num_samples < 1``.

    Source: Koh and Liang 2017; Bae et al. 2022 (arXiv:2209.05364, section 2).

    >>> influence_scores(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [-2.0, 5.0]]), num_samples=2)
    tensor([[ 1., -1.]])
    """
    if solved.ndim != 2 or gradients.ndim != 2 or solved.shape[1] != gradients.shape[1]:
        raise ValueError(
            f"solved and gradients must be (Q, D) and (B, D); got {tuple(solved.shape)} and {tuple(gradients.shape)}."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}.")
    return solved @ gradients.mT / num_samples


def self_influence(gradients: Tensor, solved: Tensor) -> Tensor:
    r""":math:`s(z) = g_z^\top K^{-1} g_z`, at least 0: how much a sample's own loss depends on its being there.

    Without the factor :math:`1/N`, as the literature on mislabelled data has it; divide by N for the removal effect.

    Args:
        gradients: ``(B, D)``.
        solved: ``(B, D)``, :math:`K^{-1} g_z`.

    Returns:
        ``(B,)``, in :math:`[0, \lVert g \rVert^2 / \lambda]` for an exact solve.

    >>> self_influence(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.5, 2.0]]))  # K = 2 I
    tensor([12.5000])
    """
    if gradients.shape != solved.shape:
        raise ValueError(
            f"gradients and solved must have one shape; got {tuple(gradients.shape)} and {tuple(solved.shape)}."
        )
    return (gradients * solved).sum(1)


def group_scores(scores: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Removal effects of groups, the sums of their members': exact for a first-order estimate.

    Args:
        scores: ``(Q, N)``, one column per training sample in the order of their indices.
        groups: indices of each group's members, each at most once.

    Returns:
        ``(Q, len(groups))``.

    Raises:
        ValueError: An index that is out of range or stands twice in a group.

    >>> group_scores(torch.tensor([[1.0, 2.0, 4.0]]), [[0, 2], [1]])
    tensor([[5., 2.]])
    """
    for i, group in enumerate(groups):
        if len(set(group)) < len(group) or not all(0 <= index < scores.shape[1] for index in group):
            raise ValueError(
                f"groups[{i}] must name samples 0 to {scores.shape[1] - 1}, each at most once; got {list(group)[:20]}."
            )
    if not groups:
        return scores.new_zeros(len(scores), 0)
    return torch.stack([scores[:, list(group)].sum(1) for group in groups], dim=1)


def relative_influence(scores: Tensor, norms: Tensor) -> Tensor:
    r"""Scores per unit of change that a removal causes: samples with large gradients everywhere no longer lead.

    Args:
        scores: ``(Q, B)``.
        norms: ``(B,)``: :math:`\lVert K^{-1} g_z \rVert` for the parameter-relative score, :math:`\sqrt{s(z)}` for the
            loss-relative one.

    Returns:
        ``(Q, B)``, 0 where the norm is 0: such a sample changes nothing.

    Source: Barshan, Brunet, Dziugaite 2020, RelatIF (arXiv:2003.11630).

    >>> relative_influence(torch.tensor([[6.0, 0.0]]), torch.tensor([3.0, 0.0]))
    tensor([[2., 0.]])
    """
    return torch.where(norms > 0, scores / norms.where(norms > 0, torch.ones_like(norms)), torch.zeros_like(scores))


def leave_out_step(solved_gradient: Tensor, factor: Tensor, solved_factor: Tensor, num_samples: int) -> Tensor:
    r"""The change of the parameters when samples leave both the loss and the curvature.

    With :math:`R` the rows :math:`H_z^{1/2} J_z / \sqrt N` of the samples that leave, and :math:`C = K^{-1}`,

    .. math:: \Delta\theta = \tfrac1N \bigl[ C + C R^\top (I - R C R^\top)^{-1} R C \bigr] g
            = \tfrac1N (K - R^\top R)^{-1} g.

    Exact for the quadratic objective whose curvature K is: for one output and one sample it divides by
    :math:`1 - h`, h the leverage. First-order influence keeps the samples' curvature and is too small by that factor.

    Args:
        solved_gradient: ``(D,)``, C g, with g the summed gradient of the samples' losses.
        factor: ``(M, D)``, the rows R; M is the number of samples times outputs.
        solved_factor: ``(M, D)``, the rows of R C.
        num_samples: N.

    Returns:
        ``(D,)``.

    Raises:
        ValueError: Sizes that do not fit; samples whose curvature is all there is (a leverage of 1 or more), where no
            damping is left to hold the parameters.

    Source: Sherman-Morrison-Woodbury; ridge regression's exact leave-one-out formula is the case M = 1.

    >>> C, R = torch.tensor([[0.5]]), torch.tensor([[1.0]])  # K = 2, the sample's curvature is 1
    >>> leave_out_step(C @ torch.tensor([3.0]), R, R @ C, num_samples=1)  # 3 / (2 - 1)
    tensor([3.])
    """
    if factor.shape != solved_factor.shape or factor.shape[1:] != solved_gradient.shape:
        raise ValueError(
            "solved_gradient, factor and solved_factor must be (D,), (M, D) and (M, D); got "
            f"{tuple(solved_gradient.shape)}, {tuple(factor.shape)} and {tuple(solved_factor.shape)}."
        )
    remaining = torch.eye(len(factor), dtype=factor.dtype, device=factor.device) - factor @ solved_factor.mT
    cholesky, failed = torch.linalg.cholesky_ex((remaining + remaining.mT) / 2)
    # what rounding has left of 0 is no curvature either
    smallest = 8 * len(factor) * torch.finfo(factor.dtype).eps
    if bool(failed) or bool((cholesky.diagonal().square() <= smallest).any()):
        raise ValueError(
            "The samples that leave carry all of the curvature in some direction (leverage 1 or more). "
            "Raise damping, or leave out fewer samples at once."
        )
    correction = torch.cholesky_solve((factor @ solved_gradient)[:, None], cholesky)[:, 0]
    return (solved_gradient + solved_factor.mT @ correction) / num_samples
