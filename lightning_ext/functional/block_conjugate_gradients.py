"""Conjugate gradients whose right-hand sides share one Krylov space."""

import torch
from torch import Tensor

from lightning_ext.functional.linear_system import BlockProduct, Check, LinAlgError, LinearSystem, Matvec, SolveInfo

__all__ = ["block_cg"]


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
) -> tuple[Tensor, SolveInfo]:
    r"""Conjugate gradients for a symmetric positive definite operator, in one search space for all right-hand sides.

    With the residuals and the search directions as rows of :math:`R_k` and :math:`P_k`,

    .. math:: X_{k+1} = X_k + \alpha_k^\top P_k, \quad \alpha_k = (P_k A P_k^\top)^{-1} P_k R_k^\top, \quad
        P_{k+1} = Z_{k+1} - \beta_k^\top P_k, \quad \beta_k = (P_k A P_k^\top)^{-1} P_k A Z_{k+1}^\top

    where the rows of :math:`Z M` span the residuals of the unsolved rows. Each solution is optimal over the directions
    of all of them, so that many right-hand sides need far fewer iterations than `cg` takes for each; a single one takes
    the same. Principal directions of the residuals that no row needs to meet half its tolerance are left out, which
    makes products fewer as rows are solved, and lets dependent or repeated rows cost nothing.

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
        At most R products in an iteration; in memory five blocks of R rows, and in time about eight multiplications of
        such a block with an (R, R) matrix.
    """
    system = LinearSystem(BlockProduct(matvec, max_rows), rhs, tol=tol, atol=atol)
    recursion = _SharedRecursion(system, preconditioner)
    x, info = system.solve("block_cg", recursion.run, max_iterations=max_iterations, x0=x0, check=check)
    info.warn_unless_converged("raise max_iterations, tol or the damping, or precondition")
    return x, info


class _SharedRecursion:
    def __init__(self, system: LinearSystem, preconditioner: Matvec | None) -> None:
        self.system = system
        self.preconditioner = preconditioner

    def run(self, x: Tensor, residual: Tensor, budget: int) -> int:
        """Move x and its residual in place until every row meets its limit; returns the iterations used."""
        before: tuple[Tensor, Tensor, Tensor] | None = None
        for iteration in range(budget):
            z = self._directions(residual)
            if len(z) == 0:
                return iteration
            if self.preconditioner is not None:
                z = self.preconditioner(z).detach()
            if before is not None:
                p, image, factor = before
                z = torch.addmm(z, torch.cholesky_solve(image @ z.mT, factor).mT, p, alpha=-1)
            p, image = z, self.system.product(z)
            factor = self._factor(p @ image.mT, iteration)
            before = p, image, factor
            step = torch.cholesky_solve(p @ residual.mT, factor).mT
            x.addmm_(step, p)
            residual.addmm_(step, image, alpha=-1)
        return budget

    def _directions(self, residual: Tensor) -> Tensor:
        """Orthonormal rows that span the unsolved residuals as far as their tolerances need it."""
        norms = torch.linalg.vector_norm(residual, dim=1)
        unsolved = ~(norms <= self.system.limit)
        limits, norms = self.system.limit[unsolved], norms[unsolved]
        if len(norms) == 0:
            return residual[:0]
        rows = residual[unsolved].div_(norms[:, None])
        energies, axes = torch.linalg.eigh(_gram(rows))
        energies = energies.clamp_min(0.0)
        # What each row loses with the first k directions, the weakest ones.
        lost = (axes.square() * energies).cumsum(dim=1)
        spare = (lost <= (0.5 * limits / norms).double().square()[:, None]).all(dim=0)
        spare |= energies <= torch.finfo(torch.float64).eps * len(rows) * energies[-1]
        kept = ~spare
        mixing: Tensor = axes[:, kept] / energies[kept].sqrt()
        return mixing.mT.to(rows) @ rows

    def _factor(self, gram: Tensor, iteration: int) -> Tensor:
        factor: Tensor
        factor, status = torch.linalg.cholesky_ex((gram + gram.mT) / 2)
        if not bool(gram.isfinite().all()):
            raise LinAlgError("block_cg: the products of the operator are NaN or infinite.")
        if int(status) != 0:
            raise LinAlgError(
                f"block_cg: the operator is not positive definite on the directions of iteration {iteration + 1}. Add "
                "damping, take the Gauss-Newton matrix in place of the Hessian, or use normal_cg."
            )
        return factor


def _gram(rows: Tensor) -> Tensor:
    """Inner products in float64, by pieces, so that no float64 copy of all the rows is made."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], 2**16):
        wide = rows[:, start : start + 2**16].double()
        gram.addmm_(wide, wide.mT)
    return gram
