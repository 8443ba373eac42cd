"""Linear solvers behind a matrix-vector product, and dense ones, for blocks of right-hand sides.

A right-hand side is a row: ``matvec`` takes rows ``(R, D)`` and returns A times each. Every solver returns
``(x, SolveInfo)`` with the residual recomputed from x; one that misses its tolerance says so with a
`ConvergenceWarning`. No solver draws random numbers on its own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lightning_ext.functional.krylov import conjugate_gradients
from lightning_ext.functional.linear_system import BlockProduct, Check, LinAlgError, LinearSystem, Matvec, SolveInfo

__all__ = ["block_cg", "cg", "direct", "direct_dual", "normal_cg"]


def cg(
    matvec: Matvec,
    rhs: Tensor,
    *,
    preconditioner: Matvec | None = None,
    tol: float = 1e-2,
    atol: float = 0.0,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    max_rows: int | None = None,
    check: Check = "rows",
) -> tuple[Tensor, SolveInfo]:
    r"""Conjugate gradients for a symmetric positive definite operator, all right-hand sides at once.

    .. math:: x_{k+1} = x_k + \alpha_k p_k, \quad \alpha_k = \frac{r_k^\top z_k}{p_k^\top A p_k}, \quad
        z_k = M^{-1} r_k, \quad p_{k+1} = z_{k+1} + \frac{r_{k+1}^\top z_{k+1}}{r_k^\top z_k} p_k

    with a step :math:`\alpha` for each row. A row that is solved is frozen and takes no further part in the products.
    At the end the residual is recomputed; rows whose recursion lost touch with it go on from the true residual.

    Args:
        matvec: A times rows ``(r, D)``; see `LinearSystem`.
        rhs: ``(R, D)``, float32 or float64. A zero row has the solution 0, whatever ``x0`` is.
        preconditioner: :math:`M^{-1}` times rows, symmetric positive definite; None for the identity.
        tol: relative tolerance :math:`\lVert r \rVert \le \text{tol} \lVert b \rVert`.
        atol: absolute tolerance; the weaker of the two counts.
        max_iterations: at least 1; None for 10 D, but no more than 1000.
        x0: ``(R, D)``, where to start; None for 0.
        max_rows: the most rows in one product, to bound memory.
        check: "rows" recomputes the residual of every row at the end; "probe" that of one combination of them, see
            `LinearSystem.solve`.

    Returns:
        The solutions ``(R, D)`` and a `SolveInfo`.

    Raises:
        ValueError: If an argument has the wrong shape or range, or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If A or the preconditioner is not positive definite on the way, or yields NaN.

    Source: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952.

    >>> x, info = cg(lambda rows: 4 * rows, torch.tensor([[8.0, 4.0]]))
    >>> x, info.iterations, info.converged
    (tensor([[2., 1.]]), 1, True)

    Note:
        One product with the unsolved rows per iteration, one with all rows at the end and one at the start if ``x0``
        is given. Keeps five blocks of R rows. Ranks that see equal products take equal decisions.
    """
    system = LinearSystem(BlockProduct(matvec, max_rows), rhs, tol=tol, atol=atol)
    x, info = conjugate_gradients(
        system, preconditioner=preconditioner, max_iterations=max_iterations, x0=x0, check=check
    )
    info.warn_unless_converged("raise max_iterations, tol or the damping, or precondition")
    return x, info


def block_cg(
    matvec: Matvec,
    rhs: Tensor,
    *,
    preconditioner: Matvec | None = None,
    tol: float = 1e-2,
    atol: float = 0.0,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    max_rows: int | None = None,
    check: Check = "rows",
    basis_bytes: int = 2**30,
) -> tuple[Tensor, SolveInfo]:
    r"""Conjugate gradients for a symmetric positive definite operator, in one search space for all right-hand sides.

    With the residuals and the search directions as rows of :math:`R_k` and :math:`P_k`,

    .. math:: X_{k+1} = X_k + \alpha_k^\top P_k, \quad \alpha_k = (P_k A P_k^\top)^{-1} P_k R_k^\top, \quad
        P_{k+1} = Z_{k+1} - \sum_{j \le k} \beta_j^\top P_j, \quad \beta_j = (P_j A P_j^\top)^{-1} P_j A Z_{k+1}^\top

    where the rows of Z are :math:`M^{-1}` times a basis of the residuals of the unsolved rows. Each solution is optimal
    over the directions of all of them, so that many right-hand sides need far fewer products than `cg` takes; a single
    one takes the same. Principal directions of the residuals that no row needs to meet half its tolerance are left out:
    products become fewer as rows are solved, and dependent or repeated rows cost nothing.

    Args:
        matvec: A times rows ``(r, D)``; see `BlockProduct`.
        rhs: ``(R, D)``, float32 or float64. A zero row has the solution 0, whatever ``x0`` is.
        preconditioner: :math:`M^{-1}` times rows, symmetric positive definite; None for the identity.
        tol: relative tolerance :math:`\lVert r \rVert \le \text{tol} \lVert b \rVert`.
        atol: absolute tolerance; the weaker of the two counts.
        max_iterations: at least 1; None for 10 D, but no more than 1000.
        x0: ``(R, D)``, where to start; None for 0.
        max_rows: the most rows in one product, to bound memory.
        check: "rows" recomputes the residual of every row at the end; "probe" that of one combination of them, see
            `LinearSystem.solve`.
        basis_bytes: what to keep of the earlier directions and their images. The new ones are made conjugate to all
            that are kept, always to the last ones, since leaving directions out breaks the short recurrence.

    Returns:
        The solutions ``(R, D)`` and a `SolveInfo`.

    Raises:
        ValueError: If an argument has the wrong shape or range, or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If A is not positive definite on the way, or yields NaN.

    Source: O'Leary, The block conjugate gradient algorithm and related methods, 1980.

    >>> x, info = block_cg(lambda rows: rows * torch.tensor([1.0, 4.0]), torch.tensor([[2.0, 4.0], [2.0, -4.0]]))
    >>> x, info.iterations
    (tensor([[ 2.,  1.],
            [ 2., -1.]]), 1)

    Note:
        At most R products in an iteration, one or R at the end (``check``). Per iteration about eight multiplications
        of a block with an (R, R) matrix, and two for each earlier block. Keeps five blocks of R rows, and the basis.
    """
    system = LinearSystem(BlockProduct(matvec, max_rows), rhs, tol=tol, atol=atol)
    x, info = conjugate_gradients(
        system,
        preconditioner=preconditioner,
        max_iterations=max_iterations,
        x0=x0,
        method="block_cg",
        shared=True,
        basis_bytes=basis_bytes,
        check=check,
    )
    info.warn_unless_converged("raise max_iterations, tol or the damping, or precondition")
    return x, info


def normal_cg(
    matvec: Matvec,
    rhs: Tensor,
    *,
    transpose: Matvec | None = None,
    tol: float = 1e-2,
    atol: float = 0.0,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    max_rows: int | None = None,
) -> tuple[Tensor, SolveInfo]:
    r"""Conjugate gradients on the normal equations, for operators that are singular, indefinite or not symmetric.

    .. math:: A^\top A x = A^\top b

    From ``x0=None`` it converges to the pseudo-inverse :math:`A^+ b`. Tolerances and the reported residual are those of
    the normal equations, since :math:`\lVert b - A x \rVert` stays positive where b leaves the range of A. Their
    condition number is the square of A's.

    Args:
        matvec: A times rows; see `LinearSystem`.
        rhs: ``(R, D)``, float32 or float64.
        transpose: :math:`A^\top` times rows; None says that A is symmetric.
        tol: relative tolerance :math:`\lVert A^\top r \rVert \le \text{tol} \lVert A^\top b \rVert`.
        atol: absolute tolerance on :math:`\lVert A^\top r \rVert`.
        max_iterations: at least 1; None for 10 D, but no more than 1000.
        x0: ``(R, D)``, where to start; None for 0.
        max_rows: the most rows in one product.

    Returns:
        The solutions ``(R, D)`` and a `SolveInfo`.

    Raises:
        ValueError: If an argument has the wrong shape or range, or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If the products are not finite.

    Source: Hestenes & Stiefel 1952, section 10.

    >>> rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> normal_cg(lambda v: v @ rotation.T, torch.tensor([[0.0, 2.0]]), transpose=lambda v: v @ rotation)[0]
    tensor([[2., 0.]])

    Note:
        Two products per iteration (``info.products`` counts both), two at the end.
    """
    forward = BlockProduct(matvec, max_rows)
    backward = forward if transpose is None else BlockProduct(transpose, max_rows)
    normal = BlockProduct(lambda rows: backward(forward(rows)))
    LinearSystem(forward, rhs)  # refuses rows that are no right-hand sides before anything is multiplied
    system = LinearSystem(normal, backward(rhs.detach()), tol=tol, atol=atol)
    x, info = conjugate_gradients(system, max_iterations=max_iterations, x0=x0, method="normal_cg", semidefinite=True)
    info = replace(info, products=2 * info.products + len(rhs))
    info.warn_unless_converged("raise max_iterations or tol, or add damping and use cg")
    return x, info


def direct(matrix: Tensor, rhs: Tensor, *, tol: float = 1e-3) -> tuple[Tensor, SolveInfo]:
    r"""Solve with a dense symmetric positive definite matrix by its Cholesky factor.

    Args:
        matrix: ``(D, D)``, symmetric, damping included.
        rhs: ``(R, D)``, of the same dtype.
        tol: the relative residual that counts as converged.

    Returns:
        The solutions ``(R, D)`` and a `SolveInfo` with 0 iterations.

    Raises:
        ValueError: If the shapes do not fit or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If the matrix is not positive definite.

    >>> direct(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 2.0]]))[0]
    tensor([[1.0000, 0.5000]])

    Note:
        :math:`D^3 / 3 + 2 R D^2` multiplications, two matrices of memory.
    """
    size = rhs.shape[-1]
    if matrix.shape != (size, size):
        raise ValueError(f"matrix must be ({size}, {size}) for rhs {tuple(rhs.shape)}; got {tuple(matrix.shape)}.")
    system = LinearSystem(lambda rows: rows @ matrix, rhs, tol=tol)
    factor = _cholesky("direct", matrix.detach())
    x, info = system.finish("direct", torch.cholesky_solve(system.rhs.mT, factor).mT.contiguous(), 0)
    info.warn_unless_converged("add damping or use float64: the matrix is close to singular")
    return x, info


def direct_dual(rows: Tensor, rhs: Tensor, damping: float, *, tol: float = 1e-3) -> tuple[Tensor, SolveInfo]:
    r"""Solve with :math:`R^\top R + \lambda I` through the small matrix :math:`R R^\top + \lambda I`.

    .. math:: (R^\top R + \lambda I)^{-1} v = \tfrac1\lambda \left[ v - R^\top (R R^\top + \lambda I)^{-1} R v \right]

    For fewer rows than parameters (Woodbury). The subtraction cancels at small damping: the residual grows like
    :math:`\epsilon \lambda_{\max} / \lambda`.

    Args:
        rows: R, ``(M, D)``, for example the rows :math:`H_i^{1/2} J_i / \sqrt N` of a Gauss-Newton matrix.
        rhs: ``(K, D)``, of the same dtype.
        damping: :math:`\lambda > 0`.
        tol: the relative residual that counts as converged.

    Returns:
        The solutions ``(K, D)`` and a `SolveInfo` with 0 iterations.

    Raises:
        ValueError: If the shapes do not fit, the damping is not positive or ``rhs`` is not finite.
        torch.linalg.LinAlgError: If the damping is lost in rounding next to :math:`R R^\top`.

    >>> direct_dual(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]]), damping=1.0)[0]
    tensor([[1., 2.]])

    Note:
        :math:`M^2 D + M^3 / 3 + 2 K M D` multiplications and ``(M, M)`` memory.
    """
    if rows.ndim != 2 or rows.shape[1] != rhs.shape[-1]:
        raise ValueError(f"rows must be (M, {rhs.shape[-1]}) for rhs {tuple(rhs.shape)}; got {tuple(rows.shape)}.")
    if not damping > 0:
        raise ValueError(f"damping must be positive: R^T R is singular without it; got {damping}.")
    rows = rows.detach()
    system = LinearSystem(lambda x: torch.addmm(x, x @ rows.mT, rows, beta=damping), rhs, tol=tol)
    gram = rows @ rows.mT
    gram.diagonal().add_(damping)
    factor = _cholesky("direct_dual", gram)
    x = system.rhs - torch.cholesky_solve(rows @ system.rhs.mT, factor).mT @ rows
    x, info = system.finish("direct_dual", x.div_(damping), 0)
    info.warn_unless_converged("raise the damping or use float64")
    return x, info


def _cholesky(method: str, matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, status = torch.linalg.cholesky_ex(matrix)
    if int(status) != 0 or not bool(factor.diagonal().isfinite().all()):
        raise LinAlgError(
            f"{method}: the matrix is not positive definite (order {int(status)} of {len(matrix)}); add damping."
        )
    return factor
