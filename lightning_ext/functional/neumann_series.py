"""Linear solvers made of a truncated Neumann series, deterministic or on a fresh batch each step (LiSSA)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ext.functional.linear_system import (
    BlockProduct,
    LinAlgError,
    LinearSystem,
    Matvec,
    SolveInfo,
    fixed_direction,
)

__all__ = ["lissa", "lissa_scale", "neumann", "power_iteration"]

_HEADROOM = 1.1  # power iteration approaches the largest eigenvalue from below
_GUARD_EVERY = 16


def power_iteration(
    matvec: Matvec, start: Tensor, *, max_iterations: int = 100, tol: float = 1e-3
) -> tuple[Tensor, Tensor, SolveInfo]:
    r"""The eigenvalue of largest magnitude of a symmetric operator, with its eigenvector, for each start.

    .. math:: v \leftarrow A v / \lVert A v \rVert, \quad \mu = v^\top A v

    Args:
        matvec: A times rows; see `BlockProduct`.
        start: ``(R, D)``, rows that are not zero; random ones or `fixed_direction`.
        max_iterations: at least 1.
        tol: stop when :math:`\lVert A v - \mu v \rVert \le \text{tol} |\mu|`. The error of :math:`\mu` is then smaller,
            of the order of its square.

    Returns:
        Eigenvalues ``(R,)``, unit eigenvectors ``(R, D)``, and a `SolveInfo`.

    Raises:
        ValueError: If ``start`` is not a block of finite rows that are not zero, or ``max_iterations`` is below 1.
        torch.linalg.LinAlgError: If the products are not finite.

    >>> power_iteration(lambda rows: rows * torch.tensor([1.0, -3.0]), torch.ones(1, 2))[0]
    tensor([-3.0000])

    Note:
        One product with all rows per iteration; the residual is that of the last one.
    """
    values, vectors, info = _power_iteration(BlockProduct(matvec), start, max_iterations, tol)
    info.warn_unless_converged("raise max_iterations or tol, or use lanczos")
    return values, vectors, info


def _power_iteration(
    product: BlockProduct, start: Tensor, max_iterations: int, tol: float
) -> tuple[Tensor, Tensor, SolveInfo]:
    system = LinearSystem(product, start)
    if max_iterations < 1 or not bool((system.rhs_norm > 0).all()):
        raise ValueError(f"start must have no zero row and max_iterations be at least 1; got {max_iterations}.")
    vectors = system.rhs / system.rhs_norm[:, None]
    for iteration in range(1, max_iterations + 1):
        image = product(vectors)
        norm = torch.linalg.vector_norm(image, dim=1)
        values = torch.linalg.vecdot(vectors, image)
        residual = torch.linalg.vector_norm(image - values[:, None] * vectors, dim=1)
        if not bool(norm.isfinite().all()):
            raise LinAlgError("power_iteration: the products of the operator are NaN or infinite.")
        converged = bool((residual <= tol * values.abs()).all())
        if converged or iteration == max_iterations:
            break
        vectors = torch.where(norm[:, None] > 0, image / norm[:, None], vectors)
    relative = residual / values.abs().clamp_min(torch.finfo(values.dtype).tiny)
    return values, vectors, SolveInfo("power_iteration", iteration, relative, converged, product.rows)


def _largest_eigenvalue(method: str, product: BlockProduct, rhs: Tensor) -> float:
    start = fixed_direction(rhs.shape[1], like=rhs)
    values, _, _ = _power_iteration(product, start, max_iterations=20, tol=1e-2)
    if not bool(values > 0):
        raise LinAlgError(
            f"{method}: the operator is not positive definite: it has the eigenvalue {values.item():.3g}. Add damping, "
            "or take the Gauss-Newton matrix in place of the Hessian."
        )
    return values.item()


def neumann(
    matvec: Matvec,
    rhs: Tensor,
    *,
    scale: float | None = None,
    depth: int = 1000,
    tol: float = 1e-2,
    atol: float = 0.0,
    x0: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, SolveInfo]:
    r"""Truncated Neumann series: gradient descent on the quadratic whose minimum is the solution.

    .. math:: x_T = \frac1\sigma \sum_{t=0}^{T} \left(I - \frac A\sigma\right)^t b
        = A^{-1} \left[ I - \left(I - \frac A\sigma\right)^{T+1} \right] b

    T is ``depth``: T products and T + 1 terms. Truncation acts as a damping of about :math:`\sigma / (T + 1)`. A row
    stops early when it meets the tolerance; ``tol=0`` asks for the whole series.

    Args:
        matvec: A times rows, eigenvalues in :math:`(0, 2 \sigma)`; see `BlockProduct`. A may be singular or not
            symmetric.
        rhs: ``(R, D)``, float32 or float64.
        scale: :math:`\sigma`; None for 1.1 times the largest eigenvalue by at most 20 power iterations, for a
            symmetric A.
        depth: T, at least 0.
        tol: relative tolerance on the residual.
        atol: absolute tolerance; the weaker of the two counts.
        x0: ``(R, D)``, where to start; None for 0. The series then applies to b - A x0.
        max_rows: the most rows in one product.

    Returns:
        The truncated solutions ``(R, D)`` and a `SolveInfo` with the ``scale``.

    Raises:
        ValueError: If an argument has the wrong shape or range, or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If the series diverges, or the scale is to be found and A has a negative eigenvalue.

    Source: Lorraine, Vicol & Duvenaud 2020 (arXiv:1911.02590), algorithm 3.

    >>> x, info = neumann(lambda rows: rows / 2, torch.tensor([[8.0]]), scale=1.0, depth=2, tol=0.2)
    >>> x, info.residual
    (tensor([[14.]]), tensor([0.1250]))

    Note:
        ``depth`` products with the unsolved rows, one with all rows at the end, 20 with one row to find the scale.
    """
    if depth < 0 or (scale is not None and not scale > 0):
        raise ValueError(f"depth must be at least 0 and scale positive or None; got depth={depth}, scale={scale}.")
    product = BlockProduct(matvec, max_rows)
    system = LinearSystem(product, rhs, tol=tol, atol=atol)
    if scale is None:
        scale = _HEADROOM * _largest_eigenvalue("neumann", product, system.rhs)
    x, r = system.start(x0)
    rows, start_norm, limit = torch.arange(len(x), device=x.device), torch.linalg.vector_norm(r, dim=1), system.limit
    norm = start_norm
    iterations = 0
    while True:
        going = norm > limit
        if not bool(going.all()):
            rows, r, start_norm, limit = rows[going], r[going], start_norm[going], limit[going]
        if len(rows) == 0:
            break
        x.index_add_(0, rows, r, alpha=1 / scale)
        if iterations == depth:
            break
        r.add_(product(r), alpha=-1 / scale)
        norm = torch.linalg.vector_norm(r, dim=1)
        iterations += 1
        if not bool((norm <= 10 * start_norm).all()):
            _refuse_divergence(product, r, scale)
    x, info = system.finish("neumann", x, iterations, scale=scale)
    info.warn_unless_converged("raise depth or tol, or use cg: the series forgets slowly along small eigenvalues")
    return x, info


def _refuse_divergence(product: BlockProduct, r: Tensor, scale: float) -> None:
    r = r / torch.linalg.vector_norm(r, dim=1, keepdim=True)
    quotients = torch.linalg.vecdot(r, product(r))
    if not bool(quotients.isfinite().all()):
        raise LinAlgError("neumann: the products of the operator are NaN or infinite.")
    worst = quotients[(quotients - scale).abs().argmax()].item()
    raise LinAlgError(
        f"neumann diverges at scale {scale:.3g} along a direction of curvature {worst:.3g}. "
        + ("The operator is not positive definite: add damping." if worst <= 0 else f"Take a scale above {worst:.3g}.")
    )


def lissa_scale(largest_eigenvalue: float, batch_trace: float) -> float:
    r"""A scale at which `lissa` is stable in mean square, with a margin of two.

    .. math:: \sigma = 1.1\, (\lambda_{\max}(A) + \max_i \operatorname{tr} G_i / B), \qquad
        \text{sufficient: } \sigma > \tfrac12 [\lambda_{\max}(A) + \max_i \operatorname{tr} G_i / B]

    The margin keeps the stationary noise low. For samples of curvature :math:`G_i` drawn with replacement.

    Args:
        largest_eigenvalue: of the damped operator A, above 0.
        batch_trace: the largest trace of one sample's curvature over the batch size B, at least 0.

    Returns:
        :math:`\sigma`.

    Raises:
        ValueError: If an argument is out of range or not finite.

    >>> lissa_scale(1.0, 9.0)
    11.0
    """
    if not (0 < largest_eigenvalue < float("inf") and 0 <= batch_trace < float("inf")):
        raise ValueError(
            "largest_eigenvalue must be positive, batch_trace at least 0, both finite; got "
            f"{largest_eigenvalue} and {batch_trace}."
        )
    return _HEADROOM * (largest_eigenvalue + batch_trace)


def lissa(
    sample_matvec: Callable[[Tensor, int], Tensor],
    rhs: Tensor,
    *,
    matvec: Matvec,
    scale: float | None = None,
    batch_trace: float | None = None,
    depth: int = 1000,
    repeats: int = 1,
    tol: float = 0.1,
    atol: float = 0.0,
    max_rows: int | None = None,
) -> tuple[Tensor, SolveInfo]:
    r"""Stochastic Neumann series (LiSSA): each step multiplies with the curvature of a fresh batch.

    .. math:: h_0 = b, \quad h_t = b + (I - \tilde A_t / \sigma) h_{t-1}, \quad
        x = \frac{1}{\sigma M} \sum_{m=1}^{M} h_T^{(m)}

    With independent unbiased :math:`\tilde A_t` the mean of x is the truncated series of `neumann`. The noise shrinks
    with the batch, the scale and the number M of ``repeats``, not with the depth.

    Args:
        sample_matvec: ``(rows, step)`` to :math:`\tilde A_t` times rows, damping included; ``step`` counts from 0
            through all repeats and names the batch: equal steps must give equal operators.
        rhs: ``(R, D)``, float32 or float64.
        matvec: the exact A times rows, for the residual at the end and the scale.
        scale: :math:`\sigma`; None for `lissa_scale` with the largest eigenvalue by at most 20 power iterations.
        batch_trace: needed to find the scale: the largest trace of one sample's curvature over the batch size.
        depth: T, at least 0.
        repeats: M, at least 1.
        tol: relative tolerance on the residual, by which the answer is judged; the depth does not depend on it.
        atol: absolute tolerance; the weaker of the two counts.
        max_rows: the most rows in one product.

    Returns:
        The mean solutions ``(R, D)`` and a `SolveInfo` with the ``scale``; ``products`` counts sampled and exact ones.

    Raises:
        ValueError: If an argument has the wrong shape or range, ``rhs`` is not finite, or scale and batch_trace are
            both None.
        torch.linalg.LinAlgError: If the recursion diverges or becomes NaN.

    Source: Agarwal, Bullins & Hazan 2017 (arXiv:1602.03943); Koh & Liang 2017 (arXiv:1703.04730).

    >>> x, info = lissa(lambda v, step: 2 * v, torch.ones(1, 1), matvec=lambda v: 2 * v, scale=4.0, depth=2, tol=0.2)
    >>> x, info.residual
    (tensor([[0.4375]]), tensor([0.1250]))

    Note:
        ``depth * repeats`` sampled products and one exact one, 20 more with one row to find the scale.
    """
    if depth < 0 or repeats < 1 or (scale is not None and not scale > 0):
        raise ValueError(
            "depth must be at least 0, repeats at least 1 and scale positive or None; got "
            f"depth={depth}, repeats={repeats}, scale={scale}."
        )
    product = BlockProduct(matvec, max_rows)
    system = LinearSystem(product, rhs, tol=tol, atol=atol)
    if scale is None:
        if batch_trace is None:
            raise ValueError("lissa needs a scale, or batch_trace to find one.")
        scale = lissa_scale(_largest_eigenvalue("lissa", product, system.rhs), batch_trace)
    step = 0
    sampled = BlockProduct(lambda rows: sample_matvec(rows, step), max_rows)
    x = torch.zeros_like(system.rhs)
    for _ in range(repeats):
        h = system.rhs.clone()
        for t in range(1, depth + 1):
            h.add_(sampled(h), alpha=-1 / scale).add_(system.rhs)
            step += 1
            if t % _GUARD_EVERY == 0 or t == depth:
                _guard(h, system.rhs_norm, t, scale)
        x.add_(h, alpha=1 / (scale * repeats))
    x, info = system.finish("lissa", x, depth * repeats, scale=scale)
    info = replace(info, products=product.rows + sampled.rows)
    info.warn_unless_converged("raise depth, repeats or the batch size, or use nystrom_cg")
    return x, info


def _guard(h: Tensor, rhs_norm: Tensor, t: int, scale: float) -> None:
    # A positive definite operator within the scale never lengthens h by more than the right-hand side in a step.
    if not bool((torch.linalg.vector_norm(h, dim=1) <= 10 * (t + 1) * rhs_norm).all()):
        raise LinAlgError(
            f"lissa diverges at scale {scale:.3g}, by step {t}. Raise the scale (see lissa_scale) or the batch size; a "
            "negative eigenvalue needs damping."
        )
