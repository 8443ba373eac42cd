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
    shared: bool = False,
    semidefinite: bool = False,
    basis_bytes: int = 2**30,
    check: Check = "rows",
) -> tuple[Tensor, SolveInfo]:
    r"""Preconditioned conjugate gradients on a `LinearSystem`: `cg` and `block_cg` without their warnings.

    Args:
        system: right-hand sides, product and tolerances.
        preconditioner: :math:`M^{-1}` times rows, symmetric positive definite; None for the identity.
        max_iterations: at least 1; None for 10 D, but no more than 1000.
        x0: ``(R, D)``, where to start; None for 0.
        method: the name in the report and in errors.
        shared: one search space for all rows, as in `block_cg`, instead of one for each.
        semidefinite: stop a row at a direction without curvature, up to rounding, instead of refusing the
            operator; not with ``shared``.
        basis_bytes: what a shared search space may keep of its earlier directions.
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
    recursion: _RowRecursion | _SharedRecursion
    if shared:
        recursion = _SharedRecursion(method, system, preconditioner, basis_bytes)
    else:
        recursion = _RowRecursion(method, system, preconditioner, semidefinite)
    return system.solve(method, recursion.run, max_iterations=max_iterations, x0=x0, check=check)


class _RowRecursion:
    """Each row with a search space of its own."""

    def __init__(self, method: str, system: LinearSystem, preconditioner: Matvec | None, semidefinite: bool) -> None:
        self.method = method
        self.system = system
        self.preconditioner = preconditioner
        self.semidefinite = semidefinite
        self.largest = system.rhs.new_zeros(())

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
            sound = (curvature > self._least_curvature(p, curvature)) & curvature.isfinite() & (rz > 0)
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

    def _least_curvature(self, p: Tensor, curvature: Tensor) -> Tensor:
        """0, or what rounding makes of a direction in the null space of a semidefinite operator."""
        if not self.semidefinite:
            return curvature.new_zeros(())
        length = torch.linalg.vecdot(p, p)
        self.largest = torch.maximum(self.largest, (curvature / length).amax())
        least: Tensor = self.largest * length * (10 * torch.finfo(p.dtype).eps)
        return least

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


class _SharedRecursion:
    """All rows in one search space, conjugate to as many earlier directions as ``basis_bytes`` hold."""

    def __init__(self, method: str, system: LinearSystem, preconditioner: Matvec | None, basis_bytes: int) -> None:
        self.method = method
        self.system = system
        self.preconditioner = preconditioner
        self.most_rows = basis_bytes // (2 * system.rhs.shape[1] * system.rhs.element_size())

    def run(self, x: Tensor, residual: Tensor, budget: int) -> int:
        """Move x and its residual in place until every row meets its limit; returns the iterations used."""
        earlier: list[tuple[Tensor, Tensor, Tensor]] = []
        for iteration in range(budget):
            z = self._directions(residual)
            if len(z) == 0:
                return iteration
            if self.preconditioner is not None:
                z = self.preconditioner(z).detach()
            for p, image, factor in earlier:
                z = torch.addmm(z, torch.cholesky_solve(image @ z.mT, factor).mT, p, alpha=-1)
            p, image = z, self.system.product(z)
            factor = self._factor(p @ image.mT, iteration)
            earlier.append((p, image, factor))
            while len(earlier) > 1 and sum(len(factor) for _, _, factor in earlier) > self.most_rows:
                earlier.pop(0)
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
            raise LinAlgError(f"{self.method}: the products of the operator are NaN or infinite.")
        if int(status) != 0:
            raise LinAlgError(
                f"{self.method}: the operator is not positive definite on the directions of iteration {iteration + 1}. "
                "Add damping, take the Gauss-Newton matrix in place of the Hessian, or use normal_cg."
            )
        return factor


def _gram(rows: Tensor) -> Tensor:
    """Inner products in float64, by pieces, so that no float64 copy of all the rows is made."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, rows.shape[1], 2**16):
        wide = rows[:, start : start + 2**16].double()
        gram.addmm_(wide, wide.mT)
    return gram
