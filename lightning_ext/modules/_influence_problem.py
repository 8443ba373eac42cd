"""What an inverse curvature is made of: operator, data, damping, and what may be spent; and what every inverse is."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

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
    SolveInfo,
    seeded_generator,
)
from lightning_ext.modules._influence_data import Shard

OPERATORS: dict[str, type[CurvatureOperator]] = {
    "ggn": GGNOperator,
    "hessian": HessianOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
MOST_TERMS = 5000  # of a Neumann series
ROOT_BYTES = 2**31  # rows of a batch's square root that are held
EXACT_OUTPUTS = 256  # of a sample, up to which "auto" takes all of them
_DRAWS = 4  # random vectors for the trace of a sample's curvature


@dataclasses.dataclass
class Problem:
    """What an inverse may use; what takes a look at the data is found when it is first asked for.

    ``operator`` has no damping.
    """

    module: nn.Module
    objective: InfluenceObjective
    view: ParameterView
    shard: Shard
    curvature: str
    semidefinite: bool  # whether a Hessian is known to be
    operator: Any  # of the kind that OPERATORS says
    product: Callable[[Tensor], Tensor]  # the operator's, with a bar that counts
    asked_damping: float | Literal["auto"]
    weight_decay: float
    asked_fisher: Literal["auto", "type2", "mc"]
    rank: int
    tol: float
    max_iterations: int | None
    seed: int
    reduce: Callable[[Tensor], Tensor] | None = None
    rank_of_process: int = 0
    world: int = 1

    @cached_property
    def outputs(self) -> int:
        """How many numbers one sample's outputs are."""
        with torch.no_grad():
            outputs = self.objective.outputs(self.module, self.shard.get([0]))
        return int(outputs[0].numel())

    @property
    def fisher(self) -> Literal["type2", "mc"]:
        """Whether the output Hessian's root is drawn: the exact one costs a backward pass for each output."""
        if self.asked_fisher != "auto":
            return self.asked_fisher
        return "type2" if self.outputs <= EXACT_OUTPUTS else "mc"

    @cached_property
    def damping(self) -> float:
        """With the weight decay."""
        chosen = self.asked_damping
        if chosen == "auto":
            if self.curvature == "hessian":
                raise ValueError("damping='auto' is a tenth of the mean eigenvalue, which a Hessian may have below 0.")
            trace = float(self.total(self.sample_traces().sum()))
            chosen = 0.1 * trace / self.shard.num_samples / self.view.numel
        return float(chosen) + self.weight_decay

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

    @property
    def budget(self) -> int:
        """The most iterations of a Krylov solver."""
        return self.max_iterations or 200

    def generator(self) -> torch.Generator:
        """Of this rank's draws."""
        return seeded_generator(self.seed, self.rank_of_process, device=self.view.device)

    def sample_traces(self) -> Tensor:
        """Traces of this rank's samples' curvature."""
        traces: Tensor = self.operator.per_sample_traces(0 if self.fisher == "type2" else _DRAWS, self.generator())
        return traces


def root_fits(problem: Problem) -> bool:
    """Whether the rows of a batch's square root fit the memory: one for each output of a sample."""
    rows = problem.shard.batch_size * problem.outputs
    return int(rows * problem.view.numel * problem.operator.dtype.itemsize) <= ROOT_BYTES


def solved_with(problem: Problem, solve: Callable[[], tuple[Tensor, SolveInfo]]) -> tuple[Tensor, SolveInfo]:
    """Solve with a matrix; where it has no Cholesky factor, say which argument mends that."""
    try:
        return solve()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # documented, untyped
        raise ValueError(
            f"the curvature is not positive definite with damping + weight_decay = {problem.damping:g}: give a larger "
            "damping"
            + (
                ", or solver='normal_cg'."
                if problem.indefinite
                else ", or double=True if this is a matter of rounding."
            )
        ) from error


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """Keep quiet what a solver advises, whose arguments are not those that were given here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


class Inverse:
    """:math:`K^{-1}` times rows.

    Attributes:
        collective: whether a solve runs collectives, so that all ranks must solve together.
        data_free: whether it never asks for the curvature.
        approximate: whether it inverts another matrix, however long it computes.
        facts: what building it found out, by name.
    """

    collective = False
    data_free = False
    approximate = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.facts: dict[str, Any] = {}

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveInfo | None]:
        """Solve for rows ``(R, D)``; None instead of a report where the method knows no residual."""
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        """Normal numbers that are the same on every rank."""
        generator = torch.Generator().manual_seed(self.problem.seed)
        operator = self.problem.operator
        return torch.randn(*shape, generator=generator, dtype=operator.dtype).to(operator.device)
