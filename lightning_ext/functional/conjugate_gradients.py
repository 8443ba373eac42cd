"""The recursion of conjugate gradients on a block of rows, for the solvers that are made of it."""

import torch
from torch import Tensor

from lightning_ext.functional.linear_system import Check, LinAlgError, LinearSystem, Matvec, SolveInfo

__all__ = ["conjugate_gradients"]


def conjugate_gradients(
    system: LinearSystem,
    *,
    preconditioner: Matvec | None = None,
    max_iterations: int | None = None,
    x0: Tensor | None = None,
    method: str = "cg",
    semidefinite: bool = False,
    check: Check = "rows",
) -> tuple[Tensor, SolveInfo]:
    r"""Preconditioned conjugate gradients on a `LinearSystem`; `cg` with the system made by the caller, and no warning.

    Args:
        system: right-hand sides, product and tolerances.
        preconditioner: :math:`M^{-1}` times rows, symmetric positive definite; None for the identity.
        max_iterations: at least 1; None for 10 D, but no more than 1000.
        x0: ``(R, D)``, where to start; None for 0.
        method: the name in the report and in errors.
        semidefinite: stop a row at a direction of no curvature instead of refusing the operator.
        check: how the final residual is recomputed, see `LinearSystem.solve`.

    Returns:
        The solutions ``(R, D)`` and a `SolveInfo`.

    Raises:
        ValueError: If ``max_iterations`` or the shape of ``x0`` does not fit.
        torch.linalg.LinAlgError: If the operator or the preconditioner is not positive definite on the way, or yields
            NaN.

    Source: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952.

    >>> system = LinearSystem(lambda rows: 4 * rows, torch.tensor([[8.0, 4.0]]))
    >>> conjugate_gradients(system)[0]
    tensor([[2., 1.]])
    """
    recursion = _Recursion(method, system, preconditioner, semidefinite)
    return system.solve(method, recursion.run, max_iterations=max_iterations, x0=x0, check=check)


class _Recursion:
    def __init__(self, method: str, system: LinearSystem, preconditioner: Matvec | None, semidefinite: bool) -> None:
        self.method = method
        self.system = system
        self.preconditioner = preconditioner
        self.semidefinite = semidefinite

    def run(self, x: Tensor, residual: Tensor, budget: int) -> int:
        """Move x and its residual in place until every row meets its limit; returns the iterations used."""
        limit = self.system.limit
        r, rows = residual, torch.arange(len(x), device=x.device)
        going = torch.linalg.vector_norm(r, dim=1) > limit
        if not bool(going.all()):
            rows, r, limit = rows[going], r[going], limit[going]
        z, rz = self._precondition(r)
        p = z.clone()
        for iteration in range(budget):
            if len(rows) == 0:
                return iteration
            image = self.system.product(p)
            curvature = torch.linalg.vecdot(p, image)
            sound = (curvature > 0) & curvature.isfinite() & (rz > 0)
            step = torch.where(sound, rz / curvature, 0.0)[:, None]
            if len(rows) == len(x):
                x.addcmul_(step, p)
            else:
                x.index_add_(0, rows, step * p)
            r.addcmul_(step, image, value=-1)
            going = torch.linalg.vector_norm(r, dim=1) > limit
            flags = torch.stack((sound, going)).cpu()  # the one wait for the device in an iteration
            if not bool(flags[0].all()):
                self._refuse(curvature, rz, rows, iteration)
            if not bool(flags.all()):
                keep = going & sound
                if r is not residual:
                    residual[rows] = r
                rows, r, p, rz, limit = rows[keep], r[keep], p[keep], rz[keep], limit[keep]
            z, new = self._precondition(r)
            torch.addcmul(z, p, (new / rz)[:, None], out=p)
            rz = new
        if r is not residual:
            residual[rows] = r
        return budget

    def _precondition(self, r: Tensor) -> tuple[Tensor, Tensor]:
        z = r if self.preconditioner is None or len(r) == 0 else self.preconditioner(r).detach()
        return z, torch.linalg.vecdot(r, z)

    def _refuse(self, curvature: Tensor, rz: Tensor, rows: Tensor, iteration: int) -> None:
        if not bool((curvature.isfinite() & rz.isfinite()).all()):
            raise LinAlgError(f"{self.method}: the products of the operator are NaN or infinite.")
        if not bool((rz > 0).all()):
            raise LinAlgError(
                f"{self.method}: the preconditioner is not positive definite: r^T M^-1 r = {rz.min().item():.3g}."
            )
        if not self.semidefinite:
            worst = int(curvature.argmin())
            raise LinAlgError(
                f"{self.method}: the operator is not positive definite: p^T A p = {curvature[worst].item():.3g} in "
                f"iteration {iteration + 1} for row {rows[worst].item()}. Add damping, take the Gauss-Newton matrix in "
                "place of the Hessian, or use normal_cg."
            )
