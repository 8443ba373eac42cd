r"""Structured preconditioners and their closed-form meta-gradients: matrix products only, no inverse anywhere.

For a layer with gradient matrix :math:`G \in \mathbb{R}^{\text{out} \times \text{in}}` (columns stacked by vec),

.. math::
    P = (A \otimes B)\, \operatorname{diag}(\operatorname{vec} S)^2 \,(A \otimes B)^\top, \qquad
    P \operatorname{vec} G = \operatorname{vec}\!\big( B\,[\,S^2 \circ (B^\top G A)\,]\,A^\top \big)

with :math:`A` on the input side, :math:`B` on the output side and :math:`S` elementwise. It is positive semi-definite
whatever the factors are. A scalar :math:`S = s` makes it a Kronecker product, :math:`P = s^2 AA^\top \otimes BB^\top`;
without :math:`A` and :math:`B` it is a diagonal. A factor is a square matrix, a vector (a diagonal factor, for a side
too wide for a matrix) or ``None`` (the identity).
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KroneckerStep",
    "MetaStep",
    "PreconditionerGradients",
    "apply_preconditioner",
    "kronecker_meta_step",
    "multiplicative_meta_step",
    "preconditioner_gradients",
    "rotate_gradient",
]


class PreconditionerGradients(NamedTuple):
    """Gradients with respect to the factors of a preconditioner; ``None`` where there is no factor."""

    A: Tensor | None
    """Of the shape of the input factor."""
    B: Tensor | None
    """Of the shape of the output factor."""
    S: Tensor
    """Of the shape of the scale."""


def multiply_left(factor: Tensor | None, x: Tensor) -> Tensor:
    """Multiply by a matrix, a diagonal or the identity."""
    if factor is None:
        return x
    return factor @ x if factor.ndim == 2 else factor[:, None] * x


def multiply_right(x: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply by a matrix, a diagonal or the identity."""
    if factor is None:
        return x
    return x @ factor if factor.ndim == 2 else x * factor


def rotate_gradient(x: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
    r"""Take a gradient to the coordinates in which the preconditioner is diagonal, :math:`B^\top X A`.

    Args:
        x: X of shape ``(out, in)``, or of any shape if there are no factors.
        A: Input factor ``(in, in)``, diagonal ``(in,)`` or ``None``.
        B: Output factor ``(out, out)``, diagonal ``(out,)`` or ``None``.

    Returns:
        The shape of ``x``.

    >>> rotate_gradient(torch.ones(1, 2), torch.tensor([2.0, 3.0]), None)
    tensor([[2., 3.]])
    """
    return multiply_right(multiply_left(B if B is None else B.mT if B.ndim == 2 else B, x), A)


def apply_preconditioner(
    gradient: Tensor, A: Tensor | None, B: Tensor | None, S: Tensor, *, rotated: Tensor | None = None
) -> Tensor:
    r"""Precondition a gradient matrix, :math:`B\,[\,S^2 \circ (B^\top G A)\,]\,A^\top`.

    Args:
        gradient: G of shape ``(out, in)``, or of any shape if there are no factors.
        A: Input factor ``(in, in)``, diagonal ``(in,)`` or ``None``.
        B: Output factor ``(out, out)``, diagonal ``(out,)`` or ``None``.
        S: Scale, a scalar or of the shape of the gradient.
        rotated: ``rotate_gradient(gradient, A, B)`` if it is known already.

    Returns:
        :math:`P \operatorname{vec} G` in the shape of the gradient.

    Source: Bae, Vicol, HaoChen, Grosse 2022 (arXiv:2203.00089), section 4.

    Note:
        Four matrix products. With a scalar scale two are enough once :math:`AA^\top` and :math:`BB^\top` are known.

    >>> apply_preconditioner(torch.ones(1, 2), torch.tensor([2.0, 3.0]), None, torch.tensor(0.5))
    tensor([[1.0000, 2.2500]])
    """
    rotated = rotate_gradient(gradient, A, B) if rotated is None else rotated
    scaled = (rotated * S.square()).to(rotated.dtype)
    return multiply_right(multiply_left(B, scaled), A if A is None else A.mT if A.ndim == 2 else A)


def preconditioner_gradients(
    gradient: Tensor, cotangent: Tensor, A: Tensor | None, B: Tensor | None, S: Tensor
) -> PreconditionerGradients:
    r"""Gradient of the meta-objective with respect to the factors.

    For the step :math:`\Delta = -P \operatorname{vec} G`, with :math:`M = B^\top G A`, :math:`N = B^\top V A`,
    :math:`T = S^2 \circ M`, :math:`U = S^2 \circ N`,

    .. math::
        \frac{\partial Q}{\partial A} = -(V^\top B T + G^\top B U), \quad
        \frac{\partial Q}{\partial B} = -(V A T^\top + G A U^\top), \quad
        \frac{\partial Q}{\partial S} = -2\, S \circ M \circ N .

    Args:
        gradient: G, what the preconditioner was applied to; a constant.
        cotangent: V, the gradient of the objective at the look-ahead weights, in the shape of G.
        A: Input factor ``(in, in)``, diagonal ``(in,)`` or ``None``.
        B: Output factor ``(out, out)``, diagonal ``(out,)`` or ``None``.
        S: Scale, a scalar or of the shape of the gradient.

    Returns:
        :class:`PreconditionerGradients`; for a diagonal factor the diagonal of the matrix, for a scalar scale the sum.

    Source: Bae, Vicol, HaoChen, Grosse 2022 (arXiv:2203.00089), section 4, differentiated by hand.

    Note:
        Eight matrix products, no graph.

    >>> g, v = torch.tensor([1.0]), torch.tensor([3.0])  # Q = V . Delta = -3 S^2
    >>> preconditioner_gradients(g, v, None, None, torch.tensor([2.0])).S
    tensor([-12.])
    """
    M, N = rotate_gradient(gradient, A, B), rotate_gradient(cotangent, A, B)
    T, U = S.square() * M, S.square() * N
    dA = dB = None
    if A is not None and A.ndim == 2:
        dA = -(cotangent.mT @ multiply_left(B, T) + gradient.mT @ multiply_left(B, U))
    elif A is not None:  # the rows of M and N carry one factor a already
        dA = -2 * (rotate_gradient(cotangent, None, B) * T).sum(0)
    if B is not None and B.ndim == 2:
        dB = -(multiply_right(cotangent, A) @ T.mT + multiply_right(gradient, A) @ U.mT)
    elif B is not None:
        dB = -2 * (rotate_gradient(cotangent, A, None) * T).sum(1)
    product = M * N
    dS = -2 * S * (product if S.shape == product.shape else product.sum())
    return PreconditionerGradients(dA, dB, dS)


class MetaStep(NamedTuple):
    """What :func:`multiplicative_meta_step` returns: the factors after the step and the norms it was measured by."""

    A: Tensor | None
    """Of the shape of the input factor."""
    B: Tensor | None
    """Of the shape of the output factor."""
    S: Tensor
    """Of the shape of the scale."""
    norms: Tensor
    """Decaying maxima of the norms of the three meta-gradients, ``(3,)`` in the order A, B, S."""


def _group_gradient(factor: Tensor, M: Tensor, N: Tensor, S: Tensor, *, rows: bool) -> Tensor:
    """Return a positive multiple of ``-sym(factor.T @ dQ/dfactor)``, for a diagonal factor of its diagonal."""
    T = M if S.ndim == 0 else (M * S.square()).to(M.dtype)
    if factor.ndim == 1:
        return (T * N).sum(1 if rows else 0)
    half = N @ T.mT if rows else N.mT @ T
    if S.ndim:  # for a scalar the second product is the transpose of the first
        U = (N * S.square()).to(N.dtype)
        half = half.addmm_(M, U.mT) if rows else half.addmm_(M.mT, U)
    return half + half.mT


def multiplicative_meta_step(
    M: Tensor,
    N: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    S: Tensor,
    norms: Tensor,
    meta_lr: float,
    *,
    magnitude: float | Tensor = 1.0,
    decay: float = 0.9,
) -> MetaStep:
    r"""Move the factors along the group of invertible matrices by a step of known relative size.

    With :math:`Z_A = \operatorname{sym}(A^\top \partial Q / \partial A)`, likewise :math:`Z_B`, and
    :math:`Z_S = S \circ \partial Q / \partial S`,

    .. math::
        A \leftarrow A \, (I - \beta Z_A / n_A), \quad B \leftarrow B \, (I - \beta Z_B / n_B), \quad
        S \leftarrow S \circ \exp(-\beta \operatorname{sign} \textstyle\sum Z_S - \beta Z_S / n_S),
        \qquad n \leftarrow \max(\text{decay} \cdot n, \lVert Z \rVert),

    with Frobenius norms for the factors and the largest entry for :math:`Z_S`; a scalar scale takes the sign alone. The
    step does not change when the loss, the gradient or the coordinates are rescaled, the factors stay
    invertible as long as :math:`\beta < 1`, and condition numbers can grow exponentially.

    Args:
        M: ``rotate_gradient(gradient, A, B)``; of 16 bits, if that is the dtype to calculate in.
        N: ``rotate_gradient(cotangent, A, B)``; a common factor on it or on M changes nothing but ``norms``.
        A: Input factor ``(in, in)``, diagonal ``(in,)`` or ``None``.
        B: Output factor ``(out, out)``, diagonal ``(out,)`` or ``None``.
        S: Scale, a scalar or of the shape of the gradient.
        norms: Decaying maxima of before, ``(3,)``; zeros at first.
        meta_lr: :math:`\beta` in [0, 1).
        magnitude: What M and N together were divided by so that their products fit a half-precision type; the norms
            are those without the division. Default 1.
        decay: How much of the largest norm seen remains per meta-step, in [0, 1].

    Returns:
        :class:`MetaStep` with new tensors.

    Note:
        Two to four products for the meta-gradients and one per factor. No inverse, no eigenvalues.

    >>> one = torch.ones(1, 1)
    >>> multiplicative_meta_step(one, one, one, None, torch.tensor(1.0), torch.zeros(3), 0.5).A  # Q falls along it
    tensor([[1.5000]])
    """
    found = [torch.zeros((), dtype=norms.dtype, device=norms.device)] * 3
    steps: list[Tensor | None] = [None, None]
    for i, factor in enumerate((A, B)):
        if factor is not None:
            steps[i] = step = _group_gradient(factor, M, N, S, rows=i == 1)
            found[i] = torch.linalg.vector_norm(step, dtype=norms.dtype)
    M, N = M.to(S.dtype), N.to(S.dtype)
    scale = M * N * S.square() if S.ndim else torch.sum(M * N)
    found[2] = scale.abs().amax().to(norms.dtype)
    norms = torch.maximum(norms * decay, torch.stack(found) * magnitude)
    rates = meta_lr * magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    growth = meta_lr * scale.sum().sign()
    if S.ndim:
        growth = growth + scale * rates[2].to(S.dtype)
    return MetaStep(_moved(A, steps[0], rates[0]), _moved(B, steps[1], rates[1]), S * growth.exp(), norms)


def _moved(factor: Tensor | None, step: Tensor | None, rate: Tensor) -> Tensor | None:
    if factor is None or step is None:
        return factor
    step = step.mul_(rate.to(step.dtype))
    if factor.ndim == 1:
        return factor + factor * step
    if factor.dtype == step.dtype:
        return torch.addmm(factor, factor, step)
    return factor + factor.to(step.dtype) @ step


class KroneckerStep(NamedTuple):
    """What :func:`kronecker_meta_step` returns: the preconditioner after the step and the norms it was measured by."""

    AA: Tensor
    """Of the shape of the input side."""
    BB: Tensor
    """Of the shape of the output side."""
    S: Tensor
    """The scale."""
    norms: Tensor
    """Decaying maxima of the norms of the three meta-gradients, ``(3,)`` in the order A, B, S."""


def _norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=dtype)
    return norm


def _inner(x: Tensor, y: Tensor, *, rows: bool, dense: bool) -> Tensor:
    """Return ``x.T @ y`` or, for the output side, ``x @ y.T``; for a diagonal side its diagonal."""
    if not dense:
        return (x * y).sum(1 if rows else 0)
    return x @ y.mT if rows else x.mT @ y


def kronecker_meta_step(
    gradient: Tensor,
    cotangent: Tensor,
    AA: Tensor,
    BB: Tensor,
    S: Tensor,
    norms: Tensor,
    meta_lr: float,
    *,
    products: tuple[Tensor, Tensor] | None = None,
    magnitude: float | Tensor = 1.0,
    decay: float = 0.9,
) -> KroneckerStep:
    r"""Make :func:`multiplicative_meta_step` for a Kronecker product without ever knowing its factors.

    Of :math:`P = s^2\, \mathcal A \otimes \mathcal B` only :math:`\mathcal A = AA^\top` and
    :math:`\mathcal B = BB^\top` are needed, to precondition and to learn. To first order in :math:`\beta` the step
    :math:`A \leftarrow A (I - \beta Z_A / n_A)` is

    .. math::
        \mathcal A \leftarrow \mathcal A + \frac{2 \beta}{n_A} \mathcal A E_A \mathcal A, \qquad
        E_A = V^\top \mathcal B G + G^\top \mathcal B V, \qquad
        \lVert Z_A \rVert^2 = \langle \mathcal A E_A \mathcal A, E_A \rangle,

    likewise for :math:`\mathcal B` with :math:`E_B = V \mathcal A G^\top + G \mathcal A V^\top`, and with what the
    step itself has calculated, :math:`\mathcal B G` and :math:`\mathcal B G \mathcal A`, all of it is six
    products of the size of the gradient: none is the cube of a side. Eigenvalues stay positive for
    :math:`\beta < 1/2`.

    Args:
        gradient: G of shape ``(out, in)``; its dtype is the one to calculate in, 16 bits included.
        cotangent: V, the gradient of the objective at the look-ahead weights, in the shape of G.
        AA: Input side, symmetric ``(in, in)`` or diagonal ``(in,)``.
        BB: Output side, symmetric ``(out, out)`` or diagonal ``(out,)``.
        S: The scale s, a scalar.
        norms: Decaying maxima of before, ``(3,)``; zeros at first.
        meta_lr: :math:`\beta` in [0, 0.5).
        products: :math:`\mathcal B G` and :math:`\mathcal B G \mathcal A`, if they are known already.
        magnitude: What G, V, AA and BB together were divided by so that products fit a half-precision type; the norms
            are those without the division. Default 1.
        decay: How much of the largest norm seen remains per meta-step, in [0, 1].

    Returns:
        :class:`KroneckerStep` with new tensors.

    Source: ours; the structure is that of Bae, Vicol, HaoChen, Grosse 2022 (arXiv:2203.00089), section 4.

    Note:
        Six products, eight without ``products``. In exact arithmetic the norms are those of
        :func:`multiplicative_meta_step`.

    >>> one = torch.ones(1, 1)
    >>> kronecker_meta_step(one, -one, one, one, torch.tensor(1.0), torch.zeros(3), 0.25).AA  # Q rises along the step
    tensor([[0.5000]])
    """
    left, both = products or (None, None)
    across, along = AA.to(gradient.dtype), BB.to(gradient.dtype)
    if left is None or both is None:
        left = multiply_left(along, gradient)
        both = multiply_right(left, across)
    right, down = multiply_right(cotangent, across), multiply_left(along, cotangent)
    slope = torch.sum(cotangent * both, dtype=norms.dtype)
    sides = ((AA, right, both, cotangent, left), (BB, down, both, right, gradient))
    moves, found = [], []
    for i, (side, x, y, u, w) in enumerate(sides):
        move = _inner(x, y, rows=i == 1, dense=side.ndim == 2)
        moves.append(move + move.mT if side.ndim == 2 else 2 * move)
        slopes = _inner(u, w, rows=i == 1, dense=side.ndim == 2)  # its transpose has the same product with a symmetric
        square = 2 * torch.dot(moves[i].flatten().to(norms.dtype), slopes.flatten().to(norms.dtype))
        # Where nothing but rounding is left of them: in exact arithmetic the norm is never below this.
        least = _norm(moves[i], norms.dtype) / _norm(side, norms.dtype)
        found.append(torch.maximum(square.clamp_min(0).sqrt(), least))
    norms = torch.maximum(norms * decay, torch.stack([*found, slope.abs()]) * magnitude)
    rates = 2 * meta_lr * magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    AA, BB = (
        side + move.to(side.dtype).mul_(rate.to(side.dtype))
        for side, move, rate in zip((AA, BB), moves, rates, strict=False)
    )
    return KroneckerStep(AA, BB, S * (meta_lr * slope.sign()).exp().to(S.dtype), norms)
