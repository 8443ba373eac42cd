"""The ways to multiply by an inverse curvature, behind one call: rows in, solved rows and a report out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ext.functional import (
    SolveInfo,
    batch_size,
    block_cg,
    cg,
    direct,
    direct_dual,
    lanczos,
    neumann,
    normal_cg,
    nystrom,
)
from lightning_ext.modules._influence_approximate import Ekfac, Kfac, Lissa, Trak
from lightning_ext.modules._influence_problem import (
    MOST_TERMS,
    OPERATORS,
    Inverse,
    Problem,
    own_words,
    root_fits,
    solved_with,
)

DENSE_LIMIT, DUAL_LIMIT, DUAL_WORK = (
    3000,
    4000,
    10**11,
)  # parameters, and samples times outputs, up to which "auto" forms a matrix
BLOCK_BYTES = 2**31  # what the blocks of one solve may take; more right-hand sides are solved one part after the other


_ADVICE = "raise max_iterations, tol or damping, or use solver='nystrom_cg'"


class Identity(Inverse):
    """Inner products of gradients: K = I."""

    data_free = True
    approximate = True

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Return the rows."""
        return rows, None


class Direct(Inverse):
    """The damped matrix."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        rooted = problem.curvature != "hessian" and root_fits(problem)
        self.matrix = self._sum_of_squares(problem) if rooted else problem.operator.dense()
        self.matrix.diagonal().add_(problem.damping)

    @staticmethod
    def _sum_of_squares(problem: Problem) -> Tensor:
        """The matrix from its square root, one batch after the other: several times faster than D products."""
        p = problem
        kind: Any = OPERATORS[p.curvature]
        size = p.view.numel
        matrix = torch.zeros(size, size, dtype=p.view.dtype, device=p.view.device)
        for batch in p.shard:
            rows = kind(p.module, p.objective, [batch], p.view).square_root_rows()
            matrix.addmm_(rows.mT, rows, alpha=batch_size(batch) / p.shard.num_samples)
        return p.total(matrix)

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Solve by Cholesky factors."""
        return solved_with(self.problem, lambda: direct(self.matrix, rows, tol=self.problem.tol))


class Dual(Inverse):
    """The matrix of samples and outputs instead of that of parameters, by the Woodbury identity."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.world > 1:
            raise ValueError("solver='dual' holds every sample's rows on one rank; use 'nystrom_cg' on several.")
        self.factor = problem.operator.square_root_rows()

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Solve by Cholesky factors."""
        return direct_dual(self.factor, rows, self.problem.damping, tol=self.problem.tol)


class ConjugateGradients(Inverse):
    """Conjugate gradients."""

    collective = True

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Iterate to the tolerance."""
        p = self.problem
        with own_words():
            solved, info = cg(p.damped, rows, tol=p.tol, max_iterations=p.budget)
        info.warn_unless_converged(_ADVICE)
        return solved, info


class BlockConjugateGradients(Inverse):
    """Conjugate gradients in one search space for all rows."""

    collective = True
    preconditioner: Callable[[Tensor], Tensor] | None = None

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Iterate to the tolerance."""
        p = self.problem
        with own_words():
            solved, info = block_cg(
                p.damped, rows, preconditioner=self.preconditioner, tol=p.tol, max_iterations=p.budget, check="probe"
            )
        info.warn_unless_converged(_ADVICE if self.preconditioner is None else "raise max_iterations, rank or damping")
        return solved, info


class NormalConjugateGradients(Inverse):
    """Conjugate gradients on the squared operator, which may be indefinite."""

    collective = True

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Iterate until the residual of the operator itself, and not only of its square, meets the tolerance."""
        p = self.problem
        solved, tol, spent, products = None, p.tol, 0, 0
        norms = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
        while True:
            with own_words():
                solved, info = normal_cg(p.damped, rows, tol=tol, max_iterations=p.budget - spent, x0=solved)
            residual = (rows - p.damped(solved)).norm(dim=1) / norms
            spent, products = spent + max(1, info.iterations), products + info.products + len(rows)
            worst = float(residual.max()) if len(rows) else 0.0
            if worst <= p.tol or spent >= p.budget or tol < torch.finfo(rows.dtype).eps:
                break
            tol *= max(0.01, 0.5 * p.tol / worst)
        found = dataclasses.replace(
            info, iterations=spent, residual=residual, converged=worst <= p.tol, products=products
        )
        found.warn_unless_converged("raise max_iterations, tol or damping")
        return solved, found


class Nystrom(Inverse):
    """A random sketch instead of the matrix."""

    approximate = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        operator = problem.operator
        generator = torch.Generator().manual_seed(problem.seed)
        self.sketch = nystrom(
            problem.product,
            operator.size,
            problem.rank,
            generator=generator,
            dtype=operator.dtype,
            device=operator.device,
        )
        self.facts["lambda_max"] = float(self.sketch.eigenvalues[0])
        if problem.damping > 0:
            self.facts["effective_dimension"] = float(self.sketch.effective_dimension(problem.damping))

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Multiply by the sketch's damped inverse."""
        return self.sketch.inverse(rows, self.problem.damping), None


class NystromCG(BlockConjugateGradients, Nystrom):
    """Block conjugate gradients behind the sketch."""

    approximate = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.preconditioner = self.sketch.preconditioner(problem.damping)


class Lanczos(Inverse):
    """The leading eigenvectors alone; what lies outside of them counts as zero (Schioppa et al. 2022)."""

    approximate = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        operator = problem.operator
        values, self.vectors, _ = lanczos(
            problem.product, self.random(1, operator.size), min(problem.rank, operator.size)
        )
        self.values = values + problem.damping
        self.facts["lambda_max"] = float(values.max())

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Multiply by the inverse within the subspace."""
        return (rows @ self.vectors.mT / self.values) @ self.vectors, None


class Neumann(Inverse):
    """The Neumann series over the whole data set."""

    collective = True

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Sum terms."""
        p = self.problem
        with own_words():
            solved, info = neumann(p.damped, rows, depth=p.max_iterations or MOST_TERMS, tol=p.tol)
        info.warn_unless_converged("raise max_iterations or damping, or use solver='nystrom_cg'")
        return solved, info


INVERSES: dict[str, type[Inverse]] = {
    "direct": Direct,
    "dual": Dual,
    "block_cg": BlockConjugateGradients,
    "nystrom_cg": NystromCG,
    "cg": ConjugateGradients,
    "normal_cg": NormalConjugateGradients,
    "nystrom": Nystrom,
    "lanczos": Lanczos,
    "neumann": Neumann,
    "lissa": Lissa,
    "ekfac": Ekfac,
    "kfac": Kfac,
    "trak": Trak,
    "identity": Identity,
}
BLOCKS = 7  # of right-hand sides that preconditioned conjugate gradients hold at once


def chosen_solver(solver: str, problem: Problem) -> str:
    """The method behind "auto": a matrix where it is small, then iterations, then factors."""
    if solver != "auto":
        return solver
    size = problem.view.numel
    if problem.indefinite:
        return "normal_cg"
    if size <= DENSE_LIMIT and (problem.curvature == "hessian" or root_fits(problem)):
        return "direct"
    if problem.curvature == "hessian":
        return "block_cg"
    if problem.world == 1 and problem.damping > 0 and _dual_pays(problem.shard.num_samples * problem.outputs, problem):
        return "dual"
    blocks = 4 * problem.rank * size * problem.operator.dtype.itemsize
    return "block_cg" if blocks <= BLOCK_BYTES else "ekfac"


def _dual_pays(rows: int, problem: Problem) -> bool:
    """Whether products of all samples' rows take seconds, and the rows fit."""
    size = problem.view.numel
    held = 2 * rows * size * problem.operator.dtype.itemsize
    return rows <= DUAL_LIMIT and rows**2 * size <= DUAL_WORK and held <= BLOCK_BYTES


def build_inverse(method: str, problem: Problem) -> Inverse:
    """Build a method, after what it cannot do was refused."""
    kind = INVERSES[method]
    curvature = problem.curvature
    only_ggn = ("ekfac", "kfac", "trak")
    if problem.semidefinite and method in ("dual", "lissa", *only_ggn):
        raise ValueError(
            f"solver={method!r} takes the curvature of single samples, of which there are none here: use 'direct', "
            "'block_cg' or 'nystrom_cg'."
        )
    if curvature != "ggn" and method in only_ggn:
        raise ValueError(f"solver={method!r} is built on the Gauss-Newton matrix; curvature is {curvature!r}.")
    if problem.indefinite and method not in ("direct", "cg", "normal_cg", "identity"):
        raise ValueError(
            f"solver={method!r} needs a positive definite operator, which a network's Hessian is not. Use 'normal_cg', "
            "or the curvature 'ggn'."
        )
    if problem.damping == 0 and method in ("dual", "nystrom", "nystrom_cg", "lanczos"):
        raise ValueError(f"solver={method!r} divides by the damping; damping and weight_decay are 0.")
    if problem.damping == 0 and method in ("cg", "block_cg", "normal_cg", "neumann"):
        rank_zero_warn(
            f"damping and weight_decay are 0: where the curvature is singular, solver={method!r} gives the answer of "
            "its pseudo-inverse, and none for queries outside its range. Give a damping unless it is invertible."
        )
    return kind(problem)
