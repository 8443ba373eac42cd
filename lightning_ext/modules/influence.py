"""Influence of training samples as a LightningModule: ``trainer.predict`` gives the scores."""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ext._lightning import LightningModule, MisconfigurationException, refuse_sharded
from lightning_ext.data import RowStore
from lightning_ext.functional import InfluenceObjective, LayerGradients, ParameterView, batch_size, differentiable
from lightning_ext.modules._influence_data import Shard, batches_of, joined, plain
from lightning_ext.modules._influence_engine import Engine, Options, state_of
from lightning_ext.modules._influence_identity import digest
from lightning_ext.modules._influence_input import TargetCheck, as_model, check_queries, check_recordable
from lightning_ext.modules._influence_source import CurvatureSource
from lightning_ext.modules._influence_table import ScoreTable, told, warn_unless_kept

__all__ = ["InfluenceModule"]

Mode = Literal["pairwise", "self", "gradients"]
Solver = Literal[
    "auto", "direct", "dual", "block_cg", "nystrom_cg", "cg", "normal_cg", "nystrom", "lanczos", "neumann", "lissa",
    "ekfac", "kfac", "trak", "identity",
]  # fmt: skip


class InfluenceModule(LightningModule):
    r"""Scores every training sample's influence on measurements at query samples, through ``trainer.predict``.

    .. math:: \tau(m, z) = \tfrac1N\, \nabla m^\top (G + \lambda I)^{-1} \nabla L(z), \qquad
        G = \tfrac1N \sum_{i=1}^{N} J_i^\top H_i J_i,

    the change of measurement m when z is removed, to first order in the proximal Bregman objective (what damped
    influence estimates in a network; Bae et al. 2022). **Positive: removing z raises m; for a loss, z is helpful.**
    G is the Gauss-Newton matrix over the loader's whole data set; it is read in order, whatever the loader's order.
    What was prepared for a data set serves until the module's parameters or the data set object change; samples that
    are overwritten in place go unnoticed, so make a new module for them.

    ``trainer.predict(influence, train_loader)`` first solves for the queries, then gives for each batch a dict:
    ``"scores"``, ``(Q, B)`` in the measurement's units (``(1, B)`` with ``mode="self"``); ``"indices"``, ``(B,)``,
    the samples' positions in the data set; and ``"num_samples"``, N. :meth:`InfluenceScores.gather
    <lightning_ext.metrics.InfluenceScores.gather>` makes a matrix of them. Without a Trainer: :meth:`scores`,
    :meth:`self_influence`, :meth:`leave_out`.

    Args:
        base: the trained model, used in eval mode and left as it is.
        objective: loss, outputs, targets and measurement; default cross-entropy of ``base(batch[0])`` against
            ``batch[1]``, measured by the same loss.
        queries: loader or list of batches at which the measurement is taken. Not needed for ``mode="self"`` and
            ``"gradients"``.
        mode: ``"pairwise"``; ``"self"`` for :math:`s(z) = \nabla L(z)^\top K^{-1} \nabla L(z)` without 1/N;
            ``"gradients"`` to write the samples' gradients to ``output_dir``, for queries to come.
        solver: exact to ``tol``: ``"direct"``, ``"dual"``, ``"block_cg"`` (conjugate gradients in one space for all
            queries), ``"nystrom_cg"`` (the same behind a sketch, for small damping), ``"cg"`` (each query by itself),
            ``"normal_cg"``. Approximate: ``"ekfac"``, ``"kfac"``, ``"nystrom"`` and ``"lanczos"`` (low rank),
            ``"neumann"``, ``"lissa"`` (stochastic), ``"trak"`` (random projection), ``"identity"`` (inner products of
            gradients). ``"auto"``: direct or dual where a matrix of 3,000 or 4,000 rows does (dual only while that
            takes seconds), else block conjugate gradients while their blocks fit 2 GiB, else EK-FAC; for the Hessian
            ``"normal_cg"``.
        curvature: ``"ggn"``; ``"hessian"`` (indefinite in most networks: then ``"normal_cg"``) or
            ``"empirical_fisher"``, for comparison.
        damping: :math:`\lambda \ge 0`, on the scale of the mean loss; ``"auto"`` for a tenth of G's mean eigenvalue.
        weight_decay: L2 coefficient of the training objective, added to the damping.
        rank: of a sketch, and dimension of TRAK's projection.
        tol: relative residual at which iterations stop.
        max_iterations: of an iterative solver, default 200; terms of ``"neumann"`` (default 5,000, fewer where ``tol``
            is met) and of ``"lissa"`` (default what the damping asks for, up to 5,000; judged by a residual of 0.1).
        normalize: None; ``"parameter"`` divides by :math:`\lVert K^{-1} \nabla L(z) \rVert`, ``"loss"`` by
            :math:`\sqrt{s(z)}` (RelatIF). Solves for every sample.
        rescale: let z leave the curvature too, the :math:`1/(1 - h)` of exact leave-one-out. Solves for every sample
            and output.
        include: regular expression; only parameters whose name it finds.
        output_dir: folder for a :class:`~lightning_ext.data.RowStore` with one row per sample. Results of ``mode``
            stream there, with and without a Trainer. A run that was cut off solves for its queries again and goes on
            with the rows that are missing; where none is, nothing is solved.
        double: compute in float64, on a copy.
        seed: of sketches, projections and drawn batches.
        cache_bytes: memory for linearised batches; what does not fit is linearised again in every pass.
        fisher: for factors, and for the traces of ``damping="auto"`` and ``"lissa"``: ``"type2"``, all outputs of a
            sample; ``"mc"``, labels drawn from the model (each rank its own); ``"auto"``, the former up to 256 outputs.

    Raises:
        ValueError: An argument out of range; a loader or queries without a batch; a damping of 0 with a singular
            curvature that is factorised (iterative solvers warn); classes that there are not, and gradients that are
            not finite, with the samples' indices.
        MisconfigurationException: FSDP, DeepSpeed and other sharding strategies; a loader without indices, or whose
            sampler takes some samples only; half precision weights.

    Source: Koh and Liang 2017; Bae, Ng, Lo, Ghassemi, Grosse 2022 (arXiv:2209.05364); RelatIF, Barshan et al. 2020.

    Note:
        Cost of ``"block_cg"``: at most Q Gauss-Newton products per iteration and one more, each one forward and one
        backward pass over the data; then one backward pass and B Q D multiply-adds per batch. Memory: some seven blocks
        of Q x D, and 1 GiB for earlier directions. Data, products and scores are sharded over ranks, products are
        summed over them; solutions are on every rank. What an answer is worth stands in ``report`` after the run:
        solver, residual, damping.
    """

    def __init__(
        self,
        base: nn.Module,
        objective: InfluenceObjective | None = None,
        queries: Iterable[Any] | None = None,
        mode: Mode = "pairwise",
        solver: Solver = "auto",
        curvature: Literal["ggn", "hessian", "empirical_fisher"] = "ggn",
        damping: float | Literal["auto"] = 1e-2,
        weight_decay: float = 0.0,
        rank: int = 100,
        tol: float = 1e-2,
        max_iterations: int | None = None,
        normalize: Literal["parameter", "loss"] | None = None,
        rescale: bool = False,
        include: str | None = None,
        output_dir: str | Path | None = None,
        double: bool = False,
        seed: int = 0,
        cache_bytes: int = 2**30,
        fisher: Literal["auto", "type2", "mc"] = "auto",
    ) -> None:
        super().__init__()
        if mode == "gradients" and output_dir is None:
            raise ValueError("mode='gradients' writes one row per sample; say where with output_dir.")
        if mode not in ("pairwise", "self", "gradients"):
            raise ValueError(f"mode must be 'pairwise', 'self' or 'gradients'; got {mode!r}.")
        as_model(base)
        check_queries(queries)
        self.base = copy.deepcopy(base).double() if double else base
        self.objective = InfluenceObjective.of(objective)
        self.queries = queries
        self.mode = mode
        self.include = include
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.options = Options(
            solver, curvature, damping, weight_decay, rank, tol, max_iterations, normalize, rescale, seed, cache_bytes,
            fisher,
        )  # fmt: skip
        self._table: ScoreTable | None = None
        self._solved: Tensor | None = None
        self._query_gradients: Tensor | None = None
        self._factors: list[LayerGradients] | None = None
        self._engine: Engine | None = None
        self._key: Any = None
        self._round = self._rounds = 0

    @property
    def report(self) -> dict[str, Any]:
        """Solver, damping, and of all solves with this curvature the worst residual and whether all converged.

        Where another process solved, as under strategies that fork, or nobody had to: what stands in ``output_dir``.
        """
        return told(self.output_dir) if self._engine is None else dict(self._engine.report)

    @property
    def solved(self) -> Tensor | None:
        """The queries' gradients times the inverse curvature, ``(Q, D)``, of the last run that had to solve."""
        if self._factors is not None:
            return torch.cat([rows.explicit() for rows in self._factors])
        return self._solved

    @property
    def store(self) -> RowStore | None:
        """The table that the last run wrote, where it had an ``output_dir``."""
        return None if self._table is None else self._table.store

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds open files and graphs; a copy builds its own."""
        return {**super().__getstate__(), "_engine": None, "_key": None, "_table": None}

    # -- with a Trainer ----------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Any]:
        """Say what to do instead where it is not predict that runs; the first hook that there is."""
        asked = self.trainer.state.fn
        if asked is not None and asked.value != "predict":
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing for trainer.{asked.value}: it scores what base was trained on. "
                "Call trainer.predict(influence, train_loader)."
            )
        given = self.trainer.predict_loop._data_source.instance  # before Lightning puts its own in place of it
        for loader in given if isinstance(given, list) else [given]:
            check_recordable(loader)
        return []

    def teardown(self, stage: str) -> None:
        """Say so where Lightning passed the run over."""
        if self.trainer.predict_dataloaders is not None and not sum(self.trainer.num_predict_batches):
            raise ValueError(
                "The loader holds no batch, so there was nothing to score: its data set is empty, or its batch_sampler "
                "gives none."
            )

    def on_predict_start(self) -> None:
        """Look at the data, and solve for the queries."""
        trainer = self.trainer
        refuse_sharded(trainer, type(self).__name__, "takes whole parameters apart")
        if self.output_dir is None:
            warn_unless_kept(trainer)
        loader: Any = trainer.predict_dataloaders
        if isinstance(loader, list):
            if len(loader) != 1:
                raise MisconfigurationException(f"Pass one loader to trainer.predict; got {len(loader)}.")
            loader = loader[0]
        with differentiable(None):
            engine = self._engine_for(loader, trainer.global_rank, trainer.world_size)
            self._begin(engine, self.mode, trainer.is_global_zero, trainer.strategy.broadcast)
            self._round, self._rounds = 0, engine.most(int(trainer.num_predict_batches[0]))
        report = {f"influence/{name}": value for name, value in self.report.items() if isinstance(value, float)}
        for logger in trainer.loggers:
            logger.log_metrics(report)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Score a batch; see the class for what comes back."""
        indices = self._positions(batch_idx, batch)
        self._round += 1
        with differentiable(None):
            batch = plain(batch, self.view.device, self.view.dtype)
            self._prepared.shard.check(batch, indices)
            return self._result(batch, indices, self.mode)

    def on_predict_epoch_end(self) -> None:
        """Take part in what ranks with a batch more still solve."""
        while self._solves_batches and self._round < self._rounds:
            self._round += 1
            with differentiable(None):
                self._prepared.join()
        if self._table is not None:
            self._table.tell(self.report)

    @property
    def _solves_batches(self) -> bool:
        if self._table is not None and self._table.complete:
            return False
        return self.mode == "self" or (self.mode == "pairwise" and self._prepared.solves_batches)

    @property
    def _prepared(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("Run trainer.predict, scores or self_influence first.")
        return self._engine

    @property
    def view(self) -> ParameterView:
        """The chosen parameters of the base."""
        return self._prepared.view

    def _result(self, batch: Any, indices: Tensor, mode: Mode) -> dict[str, Tensor]:
        table, engine = self._table, self._prepared
        about = {"indices": indices, "num_samples": torch.tensor(engine.num_samples)}
        if table is not None and table.has(indices):
            if self._solves_batches:
                engine.join()
        else:
            rows = self._rows(engine, batch, indices, mode)
            if table is None:
                return {"scores": rows.mT, **about}
            table.store.write(indices, rows)
        return about if mode == "gradients" else {"scores": table.store.read(indices).mT, **about}

    def _rows(self, engine: Engine, batch: Any, indices: Tensor, mode: Mode) -> Tensor:
        """One row per sample of the batch."""
        with engine.naming([(indices, batch)]):
            if mode == "gradients":
                return engine.losses.explicit(batch)
            if mode == "self":
                return engine.own(batch)[:, None]
            if self._factors is not None:
                return engine.products(batch, self._factors).mT
            assert self._query_gradients is not None
            assert self._solved is not None
            return engine.pairwise(batch, self._query_gradients, self._solved).mT

    def _positions(self, batch_idx: int, batch: Any) -> Tensor:
        loader: Any = self.trainer.predict_dataloaders
        loader = loader[0] if isinstance(loader, list) else loader
        seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
        if seen is None or len(seen[batch_idx]) != batch_size(batch):
            raise MisconfigurationException(
                "The loader does not tell which samples are in a batch. Pass trainer.predict a plain DataLoader."
            )
        return torch.tensor(seen[batch_idx])

    def _begin(self, engine: Engine, mode: Mode, first: bool = True, agree: Callable[[int], int] | None = None) -> None:
        """Open the table, and solve for the queries unless all their scores are there."""
        batches = self._query_batches(engine) if mode == "pairwise" else []
        self._table = None
        if self.output_dir is not None and mode == self.mode:
            number = sum(map(batch_size, batches))
            asked = {"queries": digest(batches)} if mode == "pairwise" else {}
            self._table = ScoreTable(
                self.output_dir, first, agree or (lambda found: found), num_samples=engine.num_samples,
                dim={"pairwise": number, "self": 1, "gradients": engine.view.numel}[mode],
                dtype=str(engine.view.dtype).removeprefix("torch."),
                fingerprint={"mode": mode, "include": self.include, **engine.identity(), **asked},
            )  # fmt: skip
            if self._table.complete:
                engine.report |= self._table.store.report
                batches = []
        self._factors = None
        if batches and engine.factored:
            self._factors, _ = engine.query_factors(batches), engine.inverse  # which writes the report
        elif batches:
            self._solve_queries(engine, batches)
        if not batches or self._factors is not None:
            self._query_gradients = self._solved = None
        if self._table is not None:
            self._table.tell(engine.report)

    # -- without a Trainer -------------------------------------------------------------------------------------------

    def scores(self, loader: Any) -> Tensor:
        """Removal effects of every sample, without a Trainer.

        Args:
            loader: DataLoader over the training set; read in the data set's own order.

        Returns:
            ``(Q, N)``, on the base's device.
        """
        return self._all(loader, "pairwise")

    def solve(self, loader: Any) -> Tensor:
        """The queries' gradients times the inverse curvature, without a Trainer: for stores of gradients.

        Args:
            loader: DataLoader over the training set.

        Returns:
            ``(Q, D)``; its inner products with samples' gradients, over N, are the scores.
        """
        with differentiable(None):
            engine = self._engine_for(loader)
            return self._solve_queries(engine, self._query_batches(engine))

    def self_influence(self, loader: Any) -> Tensor:
        r"""How much each sample's own loss depends on its being there, :math:`s(z) \ge 0`, without a Trainer.

        Large for samples that the rest of the data contradicts: rank by it to find wrong labels.

        Args:
            loader: DataLoader over the training set.

        Returns:
            ``(N,)`` in the order of the data set.
        """
        return self._all(loader, "self")[0]

    def _all(self, loader: Any, mode: Mode) -> Tensor:
        """The scores of all samples."""
        if self.output_dir is not None and mode != self.mode:
            rank_zero_warn(
                f"output_dir is for mode={self.mode!r}, and the scores asked for here are those of mode={mode!r}: they "
                "are returned and not written."
            )
        with differentiable(None):
            engine = self._engine_for(loader)
            self._begin(engine, mode)
            if self._table is not None and self._table.complete:
                return self._table.store.read().mT.to(engine.view.device)
            found = [self._result(batch, indices, mode)["scores"] for indices, batch in engine.shard.indexed()]
        if self._table is not None:
            self._table.tell(engine.report)
        return joined(found, dim=-1).to(engine.view.device)

    def leave_out(self, groups: Sequence[Sequence[int]], loader: Any, rescale: bool = True) -> Tensor:
        """Effects of removing whole groups of samples on the queries' measurement.

        Args:
            groups: positions of each group's samples in the data set.
            loader: DataLoader over the training set.
            rescale: let the group leave the curvature too (exact for a quadratic objective); False sums the members'
                first-order scores.

        Returns:
            ``(Q, len(groups))`` in the measurement's units.
        """
        if isinstance(groups, DataLoader):
            raise ValueError("groups comes first, then the loader: leave_out(groups, loader).")
        with differentiable(None):
            engine = self._engine_for(loader)
            return engine.leave_out(groups, engine.query_gradients(self._query_batches(engine)), rescale)

    def _engine_for(self, loader: Any, rank: int = 0, world: int = 1) -> Engine:
        """The engine for a data set; the one that is there when neither data nor parameters changed."""
        view = ParameterView(self.base, self.include)
        if view.dtype in (torch.float16, torch.bfloat16):
            raise MisconfigurationException(
                f"Curvature needs float32 or float64 parameters; they are {view.dtype}. Pass double=True or "
                "base.float(); and where it is the Trainer that casts them, precision='32-true' or 'bf16-mixed'."
            )
        check = TargetCheck(self.base, self.objective)
        shard = Shard(loader, lambda batch: plain(batch, view.device, view.dtype), rank, world, check)
        about = (view.names, view.device, self.objective, self.options, state_of(self.base), self._source_state())
        key = (id(shard.dataset), shard.batch_size, rank, world, *about)
        if self._engine is None or key != self._key:
            source = self._source(view, rank, world)
            self._engine = Engine(self.base, self.objective, view, shard, self.options, rank, world, source)
            self._key = key
        return self._engine

    def _source(self, view: ParameterView, rank: int, world: int) -> CurvatureSource | None:
        """Where the curvature comes from; None for the base on the data set itself."""
        return None

    def _source_state(self) -> Any:
        """What the curvature depends on beside the base and the data set."""
        return None

    def _query_batches(self, engine: Engine) -> list[Any]:
        if self.queries is None:
            raise ValueError("queries is None: give InfluenceModule the batches at which the measurement is taken.")
        check_queries(self.queries)
        batches = [plain(batch, engine.view.device, engine.view.dtype) for batch in batches_of(self.queries)]
        if not batches:
            raise ValueError("queries holds no batch: give a loader or a list, which can be gone through many times.")
        return batches

    def _solve_queries(self, engine: Engine, batches: list[Any]) -> Tensor:
        queries = engine.query_gradients(batches)
        if self._query_gradients is None or self._solved is None or engine.solved_for != digest(queries):
            self._solved = engine.solve_replicated(queries)
            self._query_gradients = queries
            engine.solved_for = digest(queries)
        return self._solved
