r"""Why influence and retraining disagree: the five gaps between them, measured on a model of yours.

Source: Bae, Ng, Lo, Ghassemi, Grosse, *If Influence Functions are the Answer, Then What is the Question?*, NeurIPS
2022, arXiv 2209.05364.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ext._lightning import Trainer
from lightning_ext.data import EpochSampler
from lightning_ext.functional import (
    ConvergenceWarning,
    GGNOperator,
    InfluenceObjective,
    LinearizedBatch,
    ParameterView,
    SolveInfo,
    fold_in,
    influence_gaps,
    lissa,
    nystrom_cg,
    removal_gradients,
    row_correlation,
)
from lightning_ext.modules._influence_copies import StackedCopies
from lightning_ext.modules._influence_data import Shard, plain
from lightning_ext.modules._influence_gap_plot import plot_gaps
from lightning_ext.modules._influence_input import TargetCheck, as_model, check_batches, check_dataset
from lightning_ext.modules._influence_removal import Groups, as_groups, removal_term
from lightning_ext.modules.influence_pbrf import PBRFModule
from lightning_ext.modules.influence_response import OptimizerChoice, ResponseModule

__all__ = ["InfluenceGapAnalyzer", "InfluenceGaps"]

_QUIET = {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


@dataclass(frozen=True)
class InfluenceGaps:
    r"""What :meth:`InfluenceGapAnalyzer.run` found for G removals, D parameters and M queries.

    Args:
        steps: changes of the parameters ``(G, D)`` at ``"cold"``, ``"warm"``, ``"proximal"``, ``"pbrf"``, ``"linear"``
            (exact influence) and ``"estimate"``.
        parameter_gaps: :math:`\lVert \Delta\theta \rVert_2` of the five terms, ``(G,)`` each.
        output_gaps: root mean square distance of the queries' outputs, ``(G,)`` each: the norm over a query's outputs,
            averaged over queries.
        measured: change of the measurement ``(G, M)`` at each stage.
        influence: what exact influence predicts for it, ``(G, M)``.
        correlations: of ``influence`` with the ``"cold"``, ``"warm"``, ``"proximal"`` and ``"pbrf"`` change over the
            removals, ``"pearson"`` and ``"spearman"``, averaged over queries.
        solved: how the exact solve and the estimate ended, by stage.
        gradient_ratio: ``(G,)``, relative gradient at which the PBRF was left.
    """

    steps: Mapping[str, Tensor]
    parameter_gaps: Mapping[str, Tensor]
    output_gaps: Mapping[str, Tensor]
    measured: Mapping[str, Tensor]
    influence: Tensor
    correlations: Mapping[str, Mapping[str, float]]
    solved: Mapping[str, SolveInfo] = field(default_factory=dict)
    gradient_ratio: Tensor | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One row per gap, means over the removals; ``pandas.DataFrame(gaps.rows())`` makes a table."""
        return [
            {"gap": name, "parameters": self.parameter_gaps[name].mean().item(), "outputs": gap.mean().item()}
            for name, gap in self.output_gaps.items()
        ]

    def ratio(self) -> float:
        """How many times the change of question (the first three gaps) outweighs the error (the last two)."""
        question, error = (sum(row["outputs"] for row in part) for part in (self.rows()[:3], self.rows()[3:]))
        return float(question / error)

    def plot(self, axes: Sequence[Any] | None = None) -> tuple[Any, Any]:
        """Draw the gaps as bars, and influence against the cold, the warm and the Bregman response.

        Changes are each query's, less their mean over the removals, which no correlation sees. Points far beyond the
        others are drawn at the edge and counted.

        Args:
            axes: four matplotlib axes to draw on; default a new figure.

        Returns:
            Figure and axes.
        """
        return plot_gaps(self, axes)


class InfluenceGapAnalyzer:
    r"""Measures the five terms that separate retraining from an influence estimate.

    .. math:: \theta_{cold} - \theta_{est} = (\theta_{cold} - \theta_{warm}) + (\theta_{warm} - \theta_{prox})
        + (\theta_{prox} - \theta_{pbrf}) + (\theta_{pbrf} - \theta_{lin}) + (\theta_{lin} - \theta_{est})

    warm-start, proximity, non-convergence, linearization and solver gap: the first three change the question, the last
    two are error. The stages, for all removals at once: retraining from fresh parameters; from the trained ones; the
    same held near them by the damping; the proximal Bregman response; its linearization
    :math:`\theta^s + (G + \lambda I)^{-1} \nabla L / N`, solved in float64 to 1e-8; and the estimator's answer. The
    three retrainings see the same batches in the same order.

    Args:
        base: the trained network.
        objective: loss, outputs, targets and measurement; default cross-entropy.
        remove: for each removal a position in the data set, or a list of them. Ten to twenty give stable means.
        damping: :math:`\lambda > 0`.
        weight_decay: of the training objective; part of the damping where influence is solved.
        epochs: of each retraining; take those that ``base`` was trained with, and likewise:
        batch_size: of each retraining.
        optimizer: see :class:`ResponseModule`.
        lr: of each retraining.
        momentum: of ``"sgd"``.
        seed: of the cold start, the order and the estimator's batches.
        estimator: ``"lissa"``, or a function from right-hand sides ``(G, D)`` to solutions of
            :math:`(G + (\lambda + w) I) x = b`.
        depth: steps of LiSSA, each with a batch of ``batch_size``.
        pbrf_epochs: most steps of the Bregman response on the whole set; it stops at a relative gradient of 1e-4.
        include: regular expression; only parameters whose name it finds.
        initialize: see :class:`ResponseModule`.
        chunk_size: copies computed at once.
        collate_fn: of the loaders over the data set; default PyTorch's.
        trainer: Trainer arguments, for the device or the progress bar.

    >>> analyzer = InfluenceGapAnalyzer(nn.Linear(2, 2), remove=[0, 3])
    >>> analyzer
    InfluenceGapAnalyzer(Linear, 2 removals, damping=0.01)

    Note:
        Cost: three times the training of G copies, some ten full passes of G networks for the response, and
        ``depth`` products of G rows for LiSSA. One process.
    """

    def __init__(
        self,
        base: nn.Module,
        objective: InfluenceObjective | None = None,
        remove: Groups | Tensor = (),
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        epochs: int = 50,
        batch_size: int = 50,
        optimizer: OptimizerChoice = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        seed: int = 0,
        estimator: Literal["lissa"] | Callable[[Tensor], Tensor] = "lissa",
        depth: int = 1000,
        pbrf_epochs: int = 60,
        include: str | None = None,
        initialize: Callable[[nn.Module], Any] | None = None,
        chunk_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        if not damping > 0:
            raise ValueError(f"damping must be positive: the gaps are about damped influence; got {damping}.")
        if min(epochs, batch_size, depth, pbrf_epochs) < 1:
            raise ValueError(
                "epochs, batch_size, depth and pbrf_epochs must be at least 1; got "
                f"{epochs}, {batch_size}, {depth} and {pbrf_epochs}."
            )
        if not callable(estimator) and estimator != "lissa":
            raise ValueError(f"estimator must be 'lissa' or a function; got {estimator!r}.")
        self.base, self.objective = as_model(base), InfluenceObjective.of(objective)
        self.remove = as_groups(remove)
        self.damping, self.weight_decay = damping, weight_decay
        self.epochs, self.batch_size = epochs, batch_size
        self.optimizer, self.lr, self.momentum, self.seed = optimizer, lr, momentum, seed
        self.estimator, self.depth, self.pbrf_epochs = estimator, depth, pbrf_epochs
        self.include, self.initialize, self.chunk_size = include, initialize, chunk_size
        self.collate_fn, self.trainer = collate_fn, {**_QUIET, **(trainer or {})}

    def __repr__(self) -> str:
        name = type(self.base).__name__
        return f"{type(self).__name__}({name}, {len(self.remove)} removals, damping={self.damping:g})"

    def run(self, dataset: Dataset[Any], queries: Iterable[Any]) -> InfluenceGaps:
        """Run all stages.

        Args:
            dataset: the training set of ``base``, with positions and a length.
            queries: a loader in fixed order, or a list of batches, at which outputs and measurement are compared.

        Returns:
            The gaps, the responses and how they correlate.

        Raises:
            ValueError: A position out of range, targets that do not fit the outputs, or what a stage raises.
            MisconfigurationException: A loader in the place of the data set, a data set in that of the queries.
        """
        queries = self._checked(dataset, queries)
        modules: dict[str, StackedCopies] = {
            name: self._retrained(name, dataset) for name in ("cold", "warm", "proximal")
        }
        modules["pbrf"] = pbrf = self._bregman(dataset)
        steps = {name: module.response().double().cpu() for name, module in modules.items()}
        linear, estimate, solved = self._solve(dataset)
        steps |= {"linear": linear, "estimate": estimate}
        outputs, measured = {}, {}
        for name, step in steps.items():
            pbrf.change.data.copy_(step)  # the float64 copies compute what every stage does
            outputs[name], measured[name] = pbrf.outputs(queries).flatten(2), pbrf.measure(queries)
        influence = self._predicted(pbrf, linear, queries)
        gaps = influence_gaps(outputs)
        correlations = {
            name: {kind: _correlation(influence, measured[name], kind) for kind in ("pearson", "spearman")}
            for name in modules
        }
        return InfluenceGaps(
            steps,
            {name: gap.norm(dim=1) for name, gap in influence_gaps(steps).items()},
            {name: gap.norm(dim=2).square().mean(1).sqrt() for name, gap in gaps.items()},
            measured,
            influence,
            correlations,
            solved,
            pbrf.gradient_ratio,
        )

    def _checked(self, dataset: Dataset[Any], queries: Iterable[Any]) -> list[Any]:
        """The queries; what does not fit is found before anything is trained."""
        check_dataset(dataset)
        check_batches(queries, once=True)
        found, base = list(queries), copy.deepcopy(self.base).eval()
        view, check = ParameterView(base, self.include), TargetCheck(base, self.objective)
        for batch in found:
            check(plain(batch, view.device, view.dtype))
        shard = self._shard(dataset, view)
        outside = [i for group in self.remove for i in group if i >= shard.num_samples]
        if outside:
            raise ValueError(f"remove must name samples 0 to {shard.num_samples - 1}; got {outside[:20]}.")
        for positions, batch in shard.indexed():
            check(batch, positions)
        return found

    def _fit(self, module: ResponseModule, loader: DataLoader[Any], epochs: int) -> None:
        Trainer(max_epochs=epochs, **self.trainer).fit(module, loader)

    def _retrained(self, response: Literal["cold", "warm", "proximal"], dataset: Dataset[Any]) -> ResponseModule:
        module = ResponseModule(
            self.base,
            self.objective,
            response,
            self.remove,
            damping=self.damping,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            lr=self.lr,
            momentum=self.momentum,
            seed=self.seed,
            include=self.include,
            initialize=self.initialize,
            chunk_size=self.chunk_size,
        )
        sampler = EpochSampler(dataset, self.seed)  # type: ignore[arg-type]  # a length is asked for
        loader = DataLoader(dataset, self.batch_size, sampler=sampler, collate_fn=self.collate_fn)
        self._fit(module, loader, self.epochs)
        return module

    def _bregman(self, dataset: Dataset[Any]) -> PBRFModule:
        module = PBRFModule(
            copy.deepcopy(self.base).double(),
            self.objective,
            self.remove,
            self.damping,
            self.weight_decay,
            optimizer="newton",
            schedule="constant",
            tolerance=1e-4,
            include=self.include,
            chunk_size=self.chunk_size,
        )
        size = len(dataset)  # type: ignore[arg-type]
        self._fit(module, DataLoader(dataset, size, collate_fn=self.collate_fn), self.pbrf_epochs)
        return module

    def _shard(self, dataset: Dataset[Any], view: ParameterView) -> Shard:
        loader = DataLoader(dataset, self.batch_size, collate_fn=self.collate_fn)
        return Shard(loader, lambda batch: plain(batch, view.device, view.dtype))

    def _solve(self, dataset: Dataset[Any]) -> tuple[Tensor, Tensor, dict[str, SolveInfo]]:
        """The exact solve and the estimate, both for the gradients of the removed samples."""
        module = copy.deepcopy(self.base).double().eval()
        view = ParameterView(module, self.include)
        shard = self._shard(dataset, view)
        removal = removal_term(self.remove, shard, module, view, self.objective)
        if removal is None:
            raise ValueError("remove names no sample.")
        rows = view.flatten(
            removal_gradients(self.objective.loss, view.values(), removal, chunk_size=self.chunk_size)
        ).detach()
        damping = self.damping + self.weight_decay
        operator = GGNOperator(module, self.objective, shard, view, num_samples=shard.num_samples)
        generator = torch.Generator(view.device).manual_seed(self.seed)
        rank = min(100, view.numel)
        linear, exact = nystrom_cg(operator, rows, damping=damping, rank=rank, generator=generator, tol=1e-8)
        if callable(self.estimator):
            return linear.cpu(), self.estimator(rows).detach().double().cpu(), {"linear": exact}
        estimate, info = self._lissa(operator, shard, module, view, rows, damping)
        return linear.cpu(), estimate.cpu(), {"linear": exact, "estimate": info}

    def _lissa(
        self, operator: GGNOperator, shard: Shard, module: nn.Module, view: ParameterView, rows: Tensor, damping: float
    ) -> tuple[Tensor, SolveInfo]:
        drawn = min(self.batch_size, shard.num_samples)

        def sampled(block: Tensor, step: int) -> Tensor:
            generator = torch.Generator().manual_seed(fold_in(self.seed, step))
            chosen = torch.randint(shard.num_samples, (drawn,), generator=generator).tolist()
            return GGNOperator(module, self.objective, [shard.get(chosen)], view, damping=damping)(block)

        def damped(block: Tensor) -> Tensor:
            return operator(block) + damping * block

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # its error is what is measured here
            return lissa(sampled, rows, matvec=damped, batch_trace=operator.trace_bound / drawn, depth=self.depth)

    def _predicted(self, copies: PBRFModule, linear: Tensor, queries: list[Any]) -> Tensor:
        """First-order change of the measurement along the exact influence step, ``(G, M)``."""
        view, objective = copies.view, copies.objective
        found = []
        for batch in queries:
            content = plain(batch, view.device, view.dtype)
            batch_of = LinearizedBatch(objective.function(copies.base, view, content), view.values())
            y, targets = batch_of.outputs, objective.targets(content)
            slope = torch.func.grad(lambda out, t=targets: objective.measure(out, t).sum())(y)
            moved = batch_of.jvp(linear.to(view.device))
            found.append((moved * slope).flatten(2).sum(2) if y.ndim > 1 else moved * slope)
        return torch.cat(found, 1)


def _correlation(influence: Tensor, actual: Tensor, kind: Literal["pearson", "spearman"]) -> float:
    found = row_correlation(influence.mT, actual.mT, kind)
    known = found[found.isfinite()]
    if len(known) < len(found):
        rank_zero_warn(
            f"{len(found) - len(known)} of {len(found)} queries do not change, or there are fewer than two removals: "
            "they have no correlation and are left out of the mean."
        )
    return known.mean().item()
