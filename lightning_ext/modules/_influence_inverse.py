"""The ways to multiply by an inverse curvature, behind one call: rows in, solved rows and a report out."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext.functional import (
    ConvergenceWarning,
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    InfluenceObjective,
    ParameterView,
    Projection,
    SampleGradients,
    SolveInfo,
    batch_size,
    block_cg,
    cg,
    direct,
    direct_dual,
    fold_in,
    kronecker_curvature,
    lanczos,
    lissa,
    neumann,
    normal_cg,
    nystrom,
)
from lightning_ext.modules._influence_data import Shard

OPERATORS: dict[str, type[CurvatureOperator]] = {
    "ggn": GGNOperator,
    "hessian": HessianOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
DENSE_LIMIT, DUAL_LIMIT, DUAL_WORK = (
    3000,
    4000,
    10**11,
)  # parameters, and samples times outputs, up to which "auto" forms a matrix
BLOCK_BYTES = 2**31  # what the blocks of one solve may take; more right-hand sides are solved one part after the other


@dataclasses.dataclass
class Problem:
    """What an inverse may use. ``damping`` includes the weight decay; ``operator`` has no damping."""

    module: nn.Module
    objective: InfluenceObjective
    view: ParameterView
    shard: Shard
    curvature: str
    semidefinite: bool  # whether a Hessian is known to be
    operator: Any  # of the kind that OPERATORS says
    product: Callable[[Tensor], Tensor]  # the operator's, with a bar that counts
    outputs: int  # numbers in one sample's outputs
    damping: float
    rank: int
    tol: float
    max_iterations: int
    seed: int
    reduce: Callable[[Tensor], Tensor] | None = None
    rank_of_process: int = 0
    world: int = 1

    @property
    def indefinite(self) -> bool:
        """Whether there may be negative eigenvalues."""
        return self.curvature == "hessian" and not self.semidefinite

    def damped(self, rows: Tensor) -> Tensor:
        """K times rows."""
        return self.product(rows).add_(rows, alpha=self.damping)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""
        return tensor if self.reduce is None else self.reduce(tensor)


class Inverse:
    """:math:`K^{-1}` times rows.

    Attributes:
        collective: whether a solve runs collectives, so that all ranks must solve together.
        data_free: whether it never asks for the curvature.
        facts: what building it found out, by name.
    """

    collective = False
    data_free = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.facts: dict[str, float] = {}

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Solve for rows ``(R, D)``; None instead of a report where the method knows no residual."""
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        """Normal numbers that are the same on every rank."""
        generator = torch.Generator().manual_seed(self.problem.seed)
        operator = self.problem.operator
        return torch.randn(*shape, generator=generator, dtype=operator.dtype).to(operator.device)


class Identity(Inverse):
    """Inner products of gradients: K = I."""

    data_free = True

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Return the rows."""
        return rows, None


class Direct(Inverse):
    """The damped matrix."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.matrix = problem.operator.dense() if problem.curvature == "hessian" else self._sum_of_squares(problem)
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
        return direct(self.matrix, rows, tol=self.problem.tol)


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
        return cg(p.damped, rows, tol=p.tol, max_iterations=p.max_iterations)


class BlockConjugateGradients(Inverse):
    """Conjugate gradients in one search space for all rows."""

    collective = True
    preconditioner: Callable[[Tensor], Tensor] | None = None

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Iterate to the tolerance."""
        p = self.problem
        return block_cg(
            p.damped,
            rows,
            preconditioner=self.preconditioner,
            tol=p.tol,
            max_iterations=p.max_iterations,
            check="probe",
        )


class NormalConjugateGradients(Inverse):
    """Conjugate gradients on the squared operator, which may be indefinite."""

    collective = True

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Iterate until the residual of the operator itself, and not only of its square, meets the tolerance."""
        p = self.problem
        solved, tol, spent, products = None, p.tol, 0, 0
        norms = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                solved, info = normal_cg(p.damped, rows, tol=tol, max_iterations=p.max_iterations - spent, x0=solved)
            residual = (rows - p.damped(solved)).norm(dim=1) / norms
            spent, products = spent + max(1, info.iterations), products + info.products + len(rows)
            worst = float(residual.max()) if len(rows) else 0.0
            if worst <= p.tol or spent >= p.max_iterations or tol < torch.finfo(rows.dtype).eps:
                break
            tol *= max(0.01, 0.5 * p.tol / worst)
        found = dataclasses.replace(
            info, iterations=spent, residual=residual, converged=worst <= p.tol, products=products
        )
        found.warn_unless_converged("raise max_iterations, tol or damping")
        return solved, found


class Nystrom(Inverse):
    """A random sketch instead of the matrix."""

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

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.preconditioner = self.sketch.preconditioner(problem.damping)


class Lanczos(Inverse):
    """The leading eigenvectors alone; what lies outside of them counts as zero (Schioppa et al. 2022)."""

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
        return neumann(p.damped, rows, depth=p.max_iterations, tol=p.tol)


class Lissa(Inverse):
    """The Neumann series over drawn batches."""

    collective = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.drawn = min(problem.shard.batch_size, problem.shard.num_samples)
        self.trace = problem.operator.trace_bound / (self.drawn * problem.world)

    def _sampled(self, rows: Tensor, step: int) -> Tensor:
        p = self.problem
        generator = torch.Generator().manual_seed(fold_in(p.seed, step, p.rank_of_process))
        chosen = torch.randint(p.shard.num_samples, (self.drawn,), generator=generator)  # with replacement
        operator = OPERATORS[p.curvature](p.module, p.objective, [p.shard.get(chosen.tolist())], p.view)
        product = p.total(operator(rows)).div_(p.world)
        return product.add_(rows, alpha=p.damping)

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Sum terms."""
        p = self.problem
        return lissa(self._sampled, rows, matvec=p.damped, batch_trace=self.trace, depth=p.max_iterations)


class Kfac(Inverse):
    """Kronecker factors of each layer."""

    corrected = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        p = problem
        self.curvature = kronecker_curvature(
            p.module, p.objective, p.shard, p.view, corrected=self.corrected, reduce=p.reduce
        )
        values = self.curvature.eigenvalues()
        self.facts["lambda_max"] = float(values.max())
        if p.damping > 0:
            self.facts["effective_dimension"] = float((values / (values + p.damping)).sum())

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Multiply by the factors' damped inverse."""
        return self.curvature.solve(rows, self.problem.damping, factored=not self.corrected), None


class Ekfac(Kfac):
    """Kronecker factors' eigenvectors with corrected eigenvalues."""

    corrected = True


class Trak(Inverse):
    r"""A random projection of the margins' gradients, :math:`P (\Phi^\top \Phi / N + \lambda I)^{-1} P^\top`.

    TRAK (Park et al. 2023, arXiv:2303.14186) weights a training sample's margin gradient by one minus its probability:
    that is its loss gradient, up to the sign.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        p = problem
        self.projection = Projection(p.view.numel, p.rank, seed=p.seed)
        objective = InfluenceObjective(p.objective.loss, p.objective.forward, p.objective.target, "margin")
        margins = SampleGradients(p.module, objective, p.view, quantity="measurement")
        kernel = torch.zeros(p.rank, p.rank, dtype=p.view.dtype, device=p.view.device)
        for batch in p.shard:
            features = self.projection(margins.explicit(batch))
            kernel.addmm_(features.mT, features)
        kernel = p.total(kernel) / p.shard.num_samples
        kernel.diagonal().add_(p.damping)
        self.kernel = kernel

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Project, solve and lift."""
        solved, _ = direct(self.kernel, self.projection(rows))
        return self.projection.transpose(solved), None


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
    if size <= DENSE_LIMIT:
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
    return kind(problem)
