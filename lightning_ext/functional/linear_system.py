"""What every solver shares: a block of right-hand sides, products in bounded memory, an honest report at the end."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BlockProduct", "ConvergenceWarning", "LinearSystem", "SolveInfo", "fixed_direction"]

Matvec = Callable[[Tensor], Tensor]
Recursion = Callable[[Tensor, Tensor, int], int]
Check = Literal["rows", "probe"]
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # documented, untyped


class ConvergenceWarning(UserWarning):
    """A solver returned an answer whose recomputed residual misses the tolerance that was asked for."""


@dataclass(frozen=True)
class SolveInfo:
    r"""How a solver ended.

    Args:
        method: the solver's name.
        iterations: passes of the solver's loop, the longest over all rows.
        residual: ``(R,)``, relative, recomputed from the answer: :math:`\lVert b - A x \rVert / \lVert b \rVert`, and
            0 where b is 0. `normal_cg` reports that of the normal equations, `power_iteration` and `lanczos`
            :math:`\lVert A v - \mu v \rVert / \max |\mu|`, one entry for each pair.
        converged: whether the recomputed residual of every row meets the tolerance.
        products: rows that went through the operator, the cost of the answer.
        scale: the scale of a Neumann series, None for the other methods.
    """

    method: str
    iterations: int
    residual: Tensor
    converged: bool
    products: int
    scale: float | None = None

    def warn_unless_converged(self, advice: str) -> None:
        """Give a `ConvergenceWarning` with the worst residual, unless the solver converged."""
        if not self.converged:
            warnings.warn(
                f"{self.method} stopped after {self.iterations} iterations at a relative residual of "
                f"{self.residual.max().item():.2e}, above the tolerance; {advice}.",
                ConvergenceWarning,
                stacklevel=3,
            )


class BlockProduct:
    """A times rows, in calls of bounded size; checks what comes back and counts the rows.

    Args:
        matvec: rows ``(r, D)`` to rows ``(r, D)``, linear, for any r. Must not change its input, which the solver
            overwrites after the call. Sums over ranks belong in here.
        max_rows: the most rows in one call; None for no limit.

    Raises:
        ValueError: If ``max_rows`` is not positive; in a call, if the operator returns another shape or dtype.

    >>> product = BlockProduct(lambda rows: 2 * rows, max_rows=1)
    >>> product(torch.ones(2, 1)).flatten(), product.rows
    (tensor([2., 2.]), 2)
    """

    def __init__(self, matvec: Matvec, max_rows: int | None = None) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1 or None; got {max_rows}.")
        self.rows = 0
        self._matvec = matvec
        self._max_rows = max_rows

    def __call__(self, rows: Tensor) -> Tensor:
        """The products with ``rows``; may share memory with what the operator keeps."""
        self.rows += len(rows)
        step = self._max_rows or len(rows)
        if len(rows) <= step:
            return self._checked(rows)
        image = torch.empty_like(rows)
        for start in range(0, len(rows), step):
            image[start : start + step] = self._checked(rows[start : start + step])
        return image

    def _checked(self, rows: Tensor) -> Tensor:
        image = self._matvec(rows).detach()
        if image.shape != rows.shape or image.dtype != rows.dtype:
            raise ValueError(
                f"matvec must return rows like those it gets, {tuple(rows.shape)} of {rows.dtype}; "
                f"it returned {tuple(image.shape)} of {image.dtype}."
            )
        return image


class LinearSystem:
    r"""The systems :math:`A x_j = b_j`, one per row, with their tolerances.

    Each row is divided by its largest entry, so that gradients as small as 1e-30 neither underflow in float32 nor pass
    for zero; `finish` multiplies the answer back. Solvers work on the scaled rows throughout, and decide from them and
    the products alone: ranks with equal ones stop together.

    Args:
        matvec: A times rows, best a `BlockProduct`.
        rhs: ``(R, D)``, float32 or float64.
        tol: relative tolerance, at least 0.
        atol: absolute tolerance, at least 0. A row is solved when its residual is at most
            :math:`\max(\text{tol} \lVert b \rVert, \text{atol})`.

    Raises:
        ValueError: If ``rhs`` is not a block of finite float32 or float64 rows or a tolerance is negative.

    >>> system = LinearSystem(lambda rows: 2 * rows, torch.tensor([[0.0, 4.0]]))
    >>> system.finish("guess", torch.tensor([[0.0, 0.5]]), iterations=0)[0]
    tensor([[0., 2.]])
    """

    def __init__(self, matvec: Matvec, rhs: Tensor, *, tol: float = 1e-2, atol: float = 0.0) -> None:
        self.product = matvec if isinstance(matvec, BlockProduct) else BlockProduct(matvec)
        if rhs.ndim != 2 or rhs.shape[1] == 0 or rhs.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"rhs must be rows (R, D) of float32 or float64; got shape {tuple(rhs.shape)} of {rhs.dtype}."
            )
        if not (tol >= 0 and atol >= 0):
            raise ValueError(f"tol and atol must be at least 0; got tol={tol}, atol={atol}.")
        rhs = rhs.detach()
        largest = torch.linalg.vector_norm(rhs, float("inf"), dim=1)
        finite = largest.isfinite()
        if not bool(finite.all()):
            raise ValueError(f"rhs has NaN or infinite entries in rows {(~finite).nonzero().flatten().tolist()[:8]}.")
        self.row_scale = torch.where(largest > 0, largest, 1.0)[:, None]
        self.rhs = rhs / self.row_scale
        self.rhs_norm = torch.linalg.vector_norm(self.rhs, dim=1)
        self.limit = torch.maximum(tol * self.rhs_norm, atol / self.row_scale[:, 0])

    def start(self, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scaled first iterate, zero in rows whose right-hand side is zero, and its residual: new memory both."""
        if x0 is None:
            return torch.zeros_like(self.rhs), self.rhs.clone()
        if x0.shape != self.rhs.shape:
            raise ValueError(f"x0 must have the shape of rhs, {tuple(self.rhs.shape)}; got {tuple(x0.shape)}.")
        x = torch.where(self.rhs_norm[:, None] > 0, x0.detach().to(self.rhs) / self.row_scale, 0.0)
        return x, self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        """The true residual of the scaled rows, b - A x."""
        return self.rhs - self.product(x)

    def solve(
        self,
        method: str,
        recursion: Recursion,
        *,
        max_iterations: int | None = None,
        x0: Tensor | None = None,
        check: Check = "rows",
    ) -> tuple[Tensor, SolveInfo]:
        """Run a recursion until the recomputed residuals meet the limits, from the true residual again if need be.

        Args:
            method: the solver's name.
            recursion: ``(x, residual, budget)`` to the iterations used; moves both in place, for rows above `limit`.
            max_iterations: at least 1; None for 10 D, but no more than 1000.
            x0: ``(R, D)``, where to start; None for 0.
            check: "rows" recomputes the residual of each row. "probe" recomputes that of one combination of all rows,
                and adds what it differs from the recursion's to each; it turns to "rows" where that decides.

        Returns:
            The answer and its report.
        """
        budget = min(10 * self.rhs.shape[1], 1000) if max_iterations is None else max_iterations
        if budget < 1 or check not in ("rows", "probe"):
            raise ValueError(
                f'max_iterations must be at least 1 or None, check "rows" or "probe"; got {max_iterations}, {check!r}.'
            )
        x, residual = self.start(x0)
        norms = torch.linalg.vector_norm(residual, dim=1)
        iterations = 0
        while True:
            iterations += recursion(x, residual, budget - iterations)
            before = norms
            residual, norms = self._true(x, residual, check)
            # What the recursion promised may not hold in finite precision: go on while a new start gains a factor 2.
            regained = (norms > self.limit) & (norms < before / 2)
            if iterations >= budget or not bool(regained.any()):
                return self.finish(method, x, iterations, norms=norms)

    def _true(self, x: Tensor, residual: Tensor, check: Check) -> tuple[Tensor, Tensor]:
        if check == "probe":
            norms = torch.linalg.vector_norm(residual, dim=1)
            weights = fixed_direction(len(x), like=x).sign() / torch.where(self.rhs_norm > 0, self.rhs_norm, 1.0)
            gap = torch.linalg.vector_norm(weights @ (self.rhs - residual) - self.product(weights @ x))
            bounds = norms + gap * self.rhs_norm
            if not bool(((norms <= self.limit) & ~(bounds <= self.limit)).any()):
                return residual, bounds
        residual = self.residual(x)
        return residual, torch.linalg.vector_norm(residual, dim=1)

    def finish(
        self, method: str, x: Tensor, iterations: int, *, norms: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        """Scale the answer back (in place) and report its recomputed residual.

        Args:
            method: the solver's name.
            x: the scaled answer ``(R, D)``.
            iterations: passes of the solver's loop.
            norms: the norms of the true residuals of ``x`` if they are known; None computes them.
            scale: passed on to `SolveInfo`.

        Returns:
            The answer and its report.

        Raises:
            torch.linalg.LinAlgError: If the answer or its residual is not finite.
        """
        if norms is None:
            norms = torch.linalg.vector_norm(self.residual(x), dim=1)
        if not bool(norms.isfinite().all()):
            raise LinAlgError(f"{method}: the operator's products are NaN or infinite.")
        relative = torch.where(self.rhs_norm > 0, norms / self.rhs_norm, norms)
        converged = bool((norms <= self.limit).all())
        return x.mul_(self.row_scale), SolveInfo(method, iterations, relative, converged, self.product.rows, scale)


def fixed_direction(size: int, index: int = 0, *, like: Tensor) -> Tensor:
    r"""A unit row without period or symmetry, to start eigensolvers alike on all ranks and without random numbers.

    .. math:: v_i \propto \cos(2 \pi \varphi (k + 1) i^2), \quad \varphi = (\sqrt5 - 1) / 2, \quad i = 1 \dots D

    Args:
        size: D, at least 1.
        index: k, at least 0; another direction for each.
        like: gives dtype and device.

    Returns:
        ``(1, D)``, of norm 1.

    >>> fixed_direction(3, like=torch.empty(0))
    tensor([[-0.4792, -0.6399, -0.6007]])
    """
    square = torch.arange(1, size + 1, dtype=torch.float64).square()
    turns = (square * ((5**0.5 - 1) / 2 * (index + 1))).frac()
    row = (2 * torch.pi * turns).cos()[None]
    unit: Tensor = row / torch.linalg.vector_norm(row)
    return unit.to(like)
