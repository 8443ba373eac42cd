"""Inverses that stay approximate however long one computes: drawn batches, Kronecker factors, random projections."""

import math

import torch
from torch import Tensor

from lightning_ext.functional import (
    InfluenceObjective,
    Projection,
    SampleGradients,
    SolveInfo,
    direct,
    fixed_direction,
    fold_in,
    kronecker_curvature,
    lissa,
    lissa_scale,
    power_iteration,
)
from lightning_ext.modules._influence_problem import MOST_TERMS, OPERATORS, Inverse, Problem, own_words, solved_with

LISSA_TOL = 0.1


class Lissa(Inverse):
    """The Neumann series over drawn batches, the same ones on any number of ranks."""

    collective = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        p = problem
        self.drawn = min(p.shard.batch_size, p.shard.num_samples)
        largest = torch.zeros(p.world, dtype=p.view.dtype, device=p.view.device)
        largest[p.rank_of_process] = max(p.sample_traces().tolist(), default=0.0)
        start = fixed_direction(p.view.numel, like=largest)
        with own_words():
            values, _, _ = power_iteration(p.damped, start, max_iterations=20, tol=1e-2)
        self.scale = lissa_scale(float(values), float(p.total(largest).max()) / self.drawn)
        enough = math.ceil(math.log(1 / LISSA_TOL) * self.scale / p.damping)  # for the smallest eigenvalue
        self.depth = p.max_iterations or min(MOST_TERMS, enough)
        self.facts |= {"scale": self.scale, "lambda_max": float(values) - p.damping}

    def _sampled(self, rows: Tensor, step: int) -> Tensor:
        p = self.problem
        generator = torch.Generator().manual_seed(fold_in(p.seed, step))
        chosen = torch.randint(p.shard.num_samples, (self.drawn,), generator=generator)  # with replacement
        mine = chosen[p.rank_of_process :: p.world].tolist()
        product = torch.zeros_like(rows)
        if mine:
            operator = OPERATORS[p.curvature](p.module, p.objective, [p.shard.get(mine)], p.view)
            product = operator(rows).mul_(len(mine) / self.drawn)
        return p.total(product).add_(rows, alpha=p.damping)

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Sum terms."""
        with own_words():
            solved, info = lissa(
                self._sampled, rows, matvec=self.problem.damped, scale=self.scale, depth=self.depth, tol=LISSA_TOL
            )
        info.warn_unless_converged(
            f"raise max_iterations (terms, here {self.depth}), the damping or the loader's batch size, or use "
            "solver='nystrom_cg'"
        )
        return solved, info


class Kfac(Inverse):
    """Kronecker factors of each layer."""

    approximate = True
    corrected = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        p = problem
        self.curvature = kronecker_curvature(
            p.module, p.objective, p.shard, p.view, corrected=self.corrected, fisher=p.fisher, reduce=p.reduce,
            generator=p.generator(),
        )  # fmt: skip
        self.facts["fisher"] = p.fisher
        self.facts["diagonal"] = [n for n, place in p.view.slices().items() if place in self.curvature.places]
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

    approximate = True

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
        solved, _ = solved_with(self.problem, lambda: direct(self.kernel, self.projection(rows)))
        return self.projection.transpose(solved), None
