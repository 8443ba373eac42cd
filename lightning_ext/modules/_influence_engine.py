"""Everything about a trained module and a data set that influence needs, on one rank or on several together."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_ext.functional import (
    GGNOperator,
    InfluenceObjective,
    LayerGradients,
    ParameterView,
    SampleGradients,
    SolveInfo,
    batch_size,
    evaluating,
    influence_scores,
    leave_out_step,
    relative_influence,
    select,
    self_influence,
)
from lightning_ext.modules._influence_data import Shard, joined
from lightning_ext.modules._influence_identity import described, digest, sum_of_digests
from lightning_ext.modules._influence_input import TargetCheck
from lightning_ext.modules._influence_inverse import BLOCK_BYTES, BLOCKS, INVERSES, build_inverse, chosen_solver
from lightning_ext.modules._influence_problem import OPERATORS, Inverse, Problem
from lightning_ext.modules._influence_source import CurvatureSource


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user chose."""

    solver: str
    curvature: Literal["ggn", "hessian", "empirical_fisher"]
    damping: float | Literal["auto"]
    weight_decay: float
    rank: int
    tol: float
    max_iterations: int | None
    normalize: Literal["parameter", "loss"] | None
    rescale: bool
    seed: int
    cache_bytes: int
    fisher: Literal["auto", "type2", "mc"] = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.damping != "auto" and not (isinstance(self.damping, int | float) and 0 <= self.damping < math.inf):
            raise ValueError(f"damping must be at least 0, or 'auto'; got {self.damping!r}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0; got {self.weight_decay!r}.")
        for name in ("rank", "max_iterations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol is a relative residual between 0 and 1; got {self.tol!r}.")
        known = {
            "normalize": (None, "parameter", "loss"), "curvature": (*OPERATORS,), "solver": ("auto", *INVERSES),
            "fisher": ("auto", "type2", "mc"),
        }  # fmt: skip
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}.")
        if self.rescale and self.curvature != "ggn":
            raise ValueError(f"rescale takes a sample's Gauss-Newton matrix away; curvature is {self.curvature!r}.")


def state_of(module: nn.Module) -> str:
    """A short name of everything in a module that its outputs depend on."""
    return digest(list(module.parameters()), list(module.buffers()))


class Engine:
    """Solves and scores for one state of a module and one data set.

    Args:
        base: the module.
        objective: what is asked of it.
        view: its chosen parameters.
        shard: this rank's part of the data.
        options: what the user chose.
        rank: this process.
        world: number of processes that work together; they call every method together.
        source: where the curvature comes from; default the module on the data.
    """

    def __init__(
        self, base: nn.Module, objective: InfluenceObjective, view: ParameterView, shard: Shard, options: Options,
        rank: int = 0, world: int = 1, source: CurvatureSource | None = None,
    ) -> None:  # fmt: skip
        self.base, self.objective, self.view, self.shard, self.options = base, objective, view, shard, options
        self.rank, self.world, self.num_samples = rank, world, shard.num_samples
        self.source = source or CurvatureSource(base, objective, shard, shard.num_samples)
        self.num_train = self.source.num_train
        self.losses = SampleGradients(base, objective, view)
        same = objective.measurement == "loss"
        self.measurements = self.losses if same else SampleGradients(base, objective, view, quantity="measurement")
        self.report: dict[str, Any] = {}
        self.solved_for: str | None = None  # digest of the queries that were solved last
        self._inverse: Inverse | None = None
        self._doubted = False

    @property
    def solves_batches(self) -> bool:
        """Whether pairwise scores need a solve for every sample."""
        return self.options.rescale or self.options.normalize is not None

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self._gather(torch.tensor([number], device=self.view.device)).max()) if self.world > 1 else number

    def identity(self) -> dict[str, Any]:
        """Plain values that differ when scores would; the same on every rank."""
        options = dataclasses.asdict(self.options)
        del options["cache_bytes"]
        return {
            **options,
            "num_samples": self.num_samples,
            **({"batch_size": self.shard.batch_size} if self.options.solver == "lissa" else {}),
            "objective": hashlib.sha256(described(self.objective).encode()).hexdigest()[:16],
            "module": hashlib.sha256(repr(self.base).encode()).hexdigest()[:16],
            "parameters": state_of(self.base),
            "data": self._data(),
            **({} if self.source.name is None else {"curvature_of": self.source.name}),
        }

    def _data(self) -> str:
        mine = sum(sum_of_digests(positions, batch) for positions, batch in self.shard.indexed())
        return f"{int(self._sum(torch.tensor(mine, device=self.view.device))):x}"

    @contextlib.contextmanager
    def naming(self, batches: Iterable[tuple[Tensor, Any]] | None = None) -> Iterator[None]:
        """Let errors that samples cause name their positions in the data set; default: any of this rank's samples."""
        try:
            yield
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # documented, untyped
            unsound = self._unsound(self.shard.indexed() if batches is None else batches)
            if not unsound:
                raise
            raise ValueError(
                f"Samples {unsound[:20]} of the data set have no finite gradient: look at their inputs and targets."
            ) from error

    def _unsound(self, batches: Iterable[tuple[Tensor, Any]]) -> list[int]:
        """Positions of the samples without a finite gradient, in the first batch that has any."""

        def sound(batch: Any) -> bool:
            with contextlib.suppress(ValueError):
                self.losses(batch)
                return True
            return False

        for positions, batch in batches:
            if not sound(batch):
                return [p for i, p in enumerate(positions.tolist()) if not sound(select(batch, [i]))]
        return []

    # -- solving -----------------------------------------------------------------------------------------------------

    @property
    def inverse(self) -> Inverse:
        """The inverse curvature, built when it is first asked for."""
        if self._inverse is None:
            with evaluating(self.base):
                self._inverse = self._build()
        return self._inverse

    @property
    def together(self) -> bool:
        """Whether every solve needs all ranks at once."""
        return self.world > 1 and self.inverse.collective

    def _build(self) -> Inverse:
        o, source = self.options, self.source
        reduce = self._sum if self.world > 1 else None
        kind = OPERATORS[o.curvature]
        operator = kind(
            source.module, source.objective, source.shard, self.view, num_samples=source.shard.num_samples,
            reduce=reduce, cache_bytes=o.cache_bytes,
        )  # fmt: skip
        bar = tqdm(desc="curvature", unit=" products", leave=False, delay=2, disable=None if self.rank == 0 else True)

        def product(rows: Tensor) -> Tensor:
            bar.update(len(rows))
            return operator(rows)

        problem = Problem(
            module=source.module, objective=source.objective, view=self.view, shard=source.shard,
            curvature=o.curvature, semidefinite=source.semidefinite, operator=operator, product=product,
            asked_damping=o.damping, weight_decay=o.weight_decay, asked_fisher=o.fisher, rank=o.rank, tol=o.tol,
            max_iterations=o.max_iterations, seed=o.seed, reduce=reduce, rank_of_process=self.rank, world=self.world,
        )  # fmt: skip
        method, damping, samples = chosen_solver(o.solver, problem), problem.damping, source.shard.num_samples
        if damping == 0 and not INVERSES[method].data_free and self.view.numel > samples * problem.outputs:
            raise ValueError(
                f"damping and weight_decay are 0, and with {self.view.numel} parameters the curvature of "
                f"{samples} samples is singular. Give a positive damping."
            )
        inverse = build_inverse(method, problem)
        self.report |= {
            "solver": method, "curvature": o.curvature, "damping": damping, "samples": samples,
            "parameters": self.view.numel, "iterations": None, "residual": None, "converged": None, **inverse.facts,
        }  # fmt: skip
        return inverse

    def solve(self, rows: Tensor) -> Tensor:
        """The inverse curvature times this rank's rows."""
        if self.together:
            return self._solve_together(rows)
        return self.solve_replicated(rows)

    def solve_replicated(self, rows: Tensor) -> Tensor:
        """The inverse curvature times rows that are the same on every rank, in parts that fit the memory."""
        most = max(1, BLOCK_BYTES // (BLOCKS * rows.shape[1] * rows.element_size()))
        parts = []
        with evaluating(self.base), self.naming():
            for part in torch.split(rows, most):
                solved, info = self.inverse.solve(part)
                parts.append(solved)
                self._note(info)
        return torch.cat(parts) if parts else rows

    def _note(self, info: SolveInfo | None) -> None:
        if info is None:
            return
        worst = float(info.residual.max()) if info.residual.numel() else 0.0
        self.report["iterations"] = max(self.report["iterations"] or 0, info.iterations)
        self.report["residual"] = max(self.report["residual"] or 0.0, worst)
        self.report["converged"] = self.report["converged"] is not False and info.converged

    def _solve_together(self, rows: Tensor) -> Tensor:
        """All ranks' rows at once: a product with the curvature sums over ranks, so they must take the same steps."""
        counts = self._gather(torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
        most = max(counts)
        if most == 0:
            return rows
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        everyone = self._gather(padded)
        solved = self.solve_replicated(torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)]))
        start = sum(counts[: self.rank])
        return solved[start : start + len(rows)]

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def _gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    # -- scoring -----------------------------------------------------------------------------------------------------

    @property
    def factored(self) -> bool:
        """Whether scores are inner products of gradients that need not be written out."""
        written_out = self.losses.fallback or self.measurements.fallback
        return self.options.solver == "identity" and not self.solves_batches and not written_out

    def query_gradients(self, batches: Iterable[Any]) -> Tensor:
        """Gradients ``(Q, D)`` of the measurements."""
        gradients = torch.cat([rows.explicit() for rows in self._query_factors(batches)])
        self._doubt_saturated((gradients == 0).all(1))
        return gradients

    def query_factors(self, batches: Iterable[Any]) -> list[LayerGradients]:
        """The same, not written out."""
        found = self._query_factors(batches)
        self._doubt_saturated(torch.cat([rows.norms() for rows in found]) == 0)
        return found

    def _query_factors(self, batches: Iterable[Any]) -> list[LayerGradients]:
        found: list[LayerGradients] = []
        check = TargetCheck(self.base, self.objective)
        for number, batch in enumerate(batches):
            try:
                if not batch_size(batch):
                    raise ValueError("there is no sample.")
                if not callable(self.objective.measurement):  # else it may do with targets of any kind
                    check(batch)
                found += self.measurements.parts(batch)
            except ValueError as error:
                raise ValueError(f"In batch {number} of the queries, {error}") from error
        return found

    @staticmethod
    def _doubt_saturated(flat: Tensor) -> None:
        if bool(flat.any()):
            rank_zero_warn(
                f"The measurement has no gradient at queries {flat.nonzero().flatten().tolist()[:20]}: their scores "
                "are 0 for every sample."
            )

    def products(self, batch: Any, factors: Sequence[LayerGradients]) -> Tensor:
        """Inner products ``(Q, B)`` of the queries' gradients with those of a batch, over the number of samples."""
        columns = []
        for part in self.losses.parts(batch):
            if self.losses.fallback:  # found out on the way: these are rows of another layout
                columns.append(part.project(joined([rows.explicit() for rows in factors])))
            else:
                columns.append(joined([rows.dot(part) for rows in factors]))
        return joined(columns, 1).div_(self.num_train)

    def pairwise(self, batch: Any, queries: Tensor, solved: Tensor) -> Tensor:
        """Removal effects ``(Q, B)`` of a batch, from the measurements' gradients and these solved."""
        o = self.options
        if not o.rescale and o.normalize is None:
            return self.losses.project(batch, solved) / self.num_train
        gradients, moves = self._moves(batch)
        scores = influence_scores(queries, moves, self.num_train)
        if o.normalize is None:
            return scores
        return relative_influence(
            scores,
            moves.norm(dim=1) if o.normalize == "parameter" else self_influence(gradients, moves).clamp(0).sqrt(),
        )

    def own(self, batch: Any) -> Tensor:
        """Self-influence ``(B,)`` of a batch."""
        return self_influence(*self._moves(batch))

    def join(self) -> None:
        """Take part in a round of solves without rows of one's own."""
        if self.together:
            self._solve_together(torch.zeros(0, self.view.numel, dtype=self.view.dtype, device=self.view.device))

    def _moves(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Gradients of a batch, and N times how the parameters change when a sample leaves, ``(B, D)`` both."""
        gradients = self.losses.explicit(batch)
        if not self.options.rescale:
            return gradients, self.solve(gradients)
        factors = self.factors(batch)  # (B, K, D)
        solved = self.solve(torch.cat([gradients, factors.flatten(0, 1)]))
        solved_factors = solved[len(gradients) :].view_as(factors)
        moves = [leave_out_step(solved[b], factors[b], solved_factors[b], 1) for b in range(len(gradients))]
        return gradients, torch.stack(moves)

    def factors(self, batch: Any) -> Tensor:
        r"""The rows :math:`H^{1/2} J / \sqrt N` of each sample, ``(B, K, D)``."""
        size = batch_size(batch)
        self._doubt_rescaling()
        with evaluating(self.base):
            rows = GGNOperator(self.base, self.objective, [batch], self.view, num_samples=size).square_root_rows()
        return rows.view(-1, size, self.view.numel).transpose(0, 1) * math.sqrt(size / self.num_train)

    def _doubt_rescaling(self) -> None:
        if self.inverse.approximate and not self._doubted:
            self._doubted = True
            rank_zero_warn(
                f"rescale takes a sample's exact curvature out of an approximate one (solver="
                f"{self.report['solver']!r}): the size of the scores is not that of leaving samples out. Use 'direct', "
                "'block_cg' or 'nystrom_cg', or rescale=False."
            )

    def leave_out(self, groups: Sequence[Sequence[int]], queries: Tensor, rescale: bool) -> Tensor:
        """Effects ``(Q, len(groups))`` of removing groups of samples."""
        if rescale and self.options.curvature != "ggn":
            raise ValueError(
                f"rescale takes the group's Gauss-Newton matrix away; curvature is {self.options.curvature!r}."
            )
        columns = []
        for group in groups:
            if len(set(group)) < len(group):
                raise ValueError(f"A sample can leave only once; got the group {list(group)[:20]}.")
            batch = self.shard.get(group)
            with self.naming([(torch.tensor(group), batch)]):
                gradient = self.losses.explicit(batch).sum(0, keepdim=True)
            if rescale:
                factor = self.factors(batch).flatten(0, 1)
                solved = self.solve_replicated(torch.cat([gradient, factor]))
                step = leave_out_step(solved[0], factor, solved[1:], self.num_train)
            else:
                step = self.solve_replicated(gradient)[0] / self.num_train
            columns.append(queries @ step)
        return torch.stack(columns, dim=1) if columns else queries.new_zeros(len(queries), 0)
