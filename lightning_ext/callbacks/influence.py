"""TracIn: influence of training samples summed over a training's checkpoints, collected while it runs.

Source: Pruthi, Liu, Sundararajan, Kale, *Estimating Training Data Influence by Tracing Gradient Descent*, NeurIPS 2020,
arXiv 2002.08484.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, refuse_sharded
from lightning_ext.callbacks._influence_samples import blocks, naming, query_batches, training_samples
from lightning_ext.callbacks._quiet import beside
from lightning_ext.functional import (
    InfluenceObjective,
    LayerGradients,
    ParameterView,
    Projection,
    SampleGradients,
    fold_in,
    tracin_self_influence,
)
from lightning_ext.modules._influence_data import Shard
from lightning_ext.modules._influence_input import check_batches

__all__ = ["TracInCallback"]

_BLOCK_NUMBERS = 2**27  # of query gradients held at once; one pass over the samples for each block


class TracInCallback(Callback):
    r"""Scores every training sample's influence on queries along the training itself (TracInCP).

    .. math:: \tau(q, z) = \sum_c \sum_d \eta_{cd}\; \partial_d m_q(\theta_c)\; \partial_d L_z(\theta_c)

    over checkpoints c, with the learning rate :math:`\eta_{cd}` that parameter d had in the last step before. Positive:
    steps on z lowered the measurement m of q; for a loss, z is helpful, as everywhere in this library. A sum and no
    mean: there is no factor 1/N. What steps on z took off m while the network trained is, to first order,
    ``every_n_epochs`` / batch size times the score; with momentum or Adam the score leaves their scaling out.

    When hooks fire: ``on_before_optimizer_step`` notes the learning rates; ``on_train_epoch_end``, after the last step
    of every n-th epoch, is a checkpoint; ``on_train_end`` writes the file. Samples are those of the training loader's
    data set in its own order, also those that ``drop_last`` and ``limit_train_batches`` leave out; a sampler that takes
    some only is refused, then pass ``samples``. Networks run in eval mode. Nothing about the training changes: without
    the callback it is bit-identical, unless the data set has a random generator of its own, which every reading moves.

    Results: ``callback.scores`` ``(Q, N)``, a row per query, ``callback.self_influence`` ``(N,)``, both on the CPU and
    ``None`` before the first checkpoint, and ``callback.num_checkpoints``, how many were added up.

    Args:
        objective: loss, outputs, targets and measurement; default cross-entropy of ``module(batch[0])`` against
            ``batch[1]``, measured by the same loss. Weight decay is no part of it.
        queries: loader or list of batches at which the measurement is taken. Default: the trainer's validation loaders.
            An empty list asks for self-influence alone.
        samples: loader whose data set is scored. Default: the trainer's only training loader. Needed where that one
            has no data set with a length (``IterableDataset``), or to score some samples only.
        every_n_epochs: checkpoints are at the end of every n-th training epoch.
        include: regular expression; only parameters whose name it finds, such as those of the last layer.
        project_dim: keep the queries' gradients as random projections to so many numbers, another projection at every
            checkpoint. Scores are then right on average; queries need that much less memory.
        self_influence: also sum :math:`\sum_d \eta_d (\partial_d L_z)^2` of each sample; large where a label is wrong.
        filename: ``scores``, ``self_influence`` and ``num_checkpoints`` are saved at the end of the training in
            ``<log dir>/<filename>``. None: they are not; after ``ddp_spawn``, ``ddp_fork`` or in a notebook they are
            then in checkpoints only.
        seed: of the projections.

    Raises:
        ValueError: an argument is out of range; a gradient is not finite, with the samples' positions.
        MisconfigurationException: no queries, or no batches of them; several training loaders, or one without positions
            or that takes some samples only, and no ``samples``; a resumed run with other numbers of queries or samples;
            a strategy that shards parameters.

    Logged: ``influence/tracin_mean``, the mean score so far, and ``influence/tracin_self_mean``.

    Note:
        A checkpoint costs a pass over the samples (a forward, a backward without weights, :math:`Q D` multiplications
        per sample) and one over the queries; where the queries' gradients are more than 2**27 numbers, a pass over the
        samples for each such block. Checkpoints of the Trainer hold the scores. Distributed: ranks share the samples
        out and each holds all scores. Manual optimisation works; where it steps past Lightning's optimizers, the rates
        are those at the end of the epoch. A run resumed from the very last step of an epoch lacks that epoch, whose end
        Lightning then skips.
    """

    def __init__(
        self,
        objective: InfluenceObjective | None = None,
        queries: Iterable[Any] | None = None,
        samples: Iterable[Any] | None = None,
        every_n_epochs: int = 1,
        include: str | None = None,
        project_dim: int | None = None,
        self_influence: bool = True,
        filename: str | None = "tracin.pt",
        seed: int = 0,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}.")
        if project_dim is not None and project_dim < 1:
            raise ValueError(f"project_dim must be at least 1, or None for exact products; got {project_dim}.")
        if isinstance(queries, Iterator) or isinstance(samples, Iterator):
            raise ValueError("queries and samples are read at every checkpoint: pass loaders or lists, no iterators.")
        check_batches(queries)
        self.objective = InfluenceObjective.of(objective)
        self.queries, self.samples = queries, samples
        self.every_n_epochs, self.include, self.project_dim, self.seed = every_n_epochs, include, project_dim, seed
        self.with_self_influence, self.filename = self_influence, filename
        self._forget()

    def _forget(self) -> None:
        self.scores: Tensor | None = None
        self.self_influence: Tensor | None = None
        self.num_checkpoints = 0
        self._rates: dict[int, list[float]] = {}  # of the last step of each optimizer

    @property
    def state_key(self) -> str:
        """Different settings are different callbacks in a checkpoint."""
        return self._generate_state_key(
            every_n_epochs=self.every_n_epochs, include=self.include, project_dim=self.project_dim, seed=self.seed,
            filename=self.filename,
        )  # fmt: skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, and start anew where a training does."""
        refuse_sharded(trainer, type(self).__name__, "takes whole parameters apart")
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at one sample and one query, so that what does not fit is said before the training."""
        with beside(trainer, pl_module), torch.no_grad():
            view = ParameterView(pl_module, self.include)
            shard = self._shard(trainer, pl_module, view)
            if self.scores is not None and self.scores.shape[1] != shard.num_samples:
                raise MisconfigurationException(
                    f"TracInCallback resumes with scores of {self.scores.shape[1]} samples, and there are "
                    f"{shard.num_samples} now. Resume with the same data."
                )
            batch = shard.get([0])
            self.objective.losses(self.objective.outputs(pl_module, batch), self.objective.targets(batch))
            for batch in query_batches(trainer, pl_module, view, self.queries):
                self.objective.measure(self.objective.outputs(pl_module, batch), self.objective.targets(batch))
                break

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note the learning rates that this step uses; schedulers change them before the epoch's end."""
        for index, known in enumerate(trainer.optimizers):
            if known is getattr(optimizer, "optimizer", optimizer):
                self._rates[index] = [float(group["lr"]) for group in known.param_groups]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a checkpoint and log the means."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        with beside(trainer, pl_module):
            self._add(*self._checkpoint(trainer, pl_module))
        means = {"tracin_mean": self.scores, "tracin_self_mean": self.self_influence}
        pl_module.log_dict(
            {
                f"influence/{name}": value.mean().float().to(pl_module.device)
                for name, value in means.items()
                if value is not None and value.numel()
            },
            sync_dist=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if not self.num_checkpoints:
            rank_zero_warn(
                f"TracInCallback has no scores: no {self.every_n_epochs}-th epoch came to its end. Lower "
                "every_n_epochs, or train longer."
            )
            return
        folder = trainer.log_dir  # a collective: asked for on every rank
        if self.filename is None or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            path = Path(folder) / self.filename
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    torch.save(self._results(), file)
            except OSError as error:  # a training must not end for a file whose content the callback still holds
                rank_zero_warn(f"the scores could not be written to {path}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """The sums so far; the same on every rank."""
        return {**self._results(), "rates": {index: list(rates) for index, rates in self._rates.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved sums."""
        self.scores, self.self_influence = state_dict["scores"], state_dict["self_influence"]
        self.num_checkpoints, self._rates = state_dict["num_checkpoints"], dict(state_dict["rates"])

    def _results(self) -> dict[str, Any]:
        return {
            "scores": self.scores, "self_influence": self.self_influence, "num_checkpoints": self.num_checkpoints,
        }  # fmt: skip

    def _shard(self, trainer: Trainer, pl_module: LightningModule, view: ParameterView) -> Shard:
        return training_samples(trainer, pl_module, view, self.samples, type(self).__name__)

    def _add(self, scores: Tensor, own: Tensor | None) -> None:
        if self.scores is not None and self.scores.shape != scores.shape:
            raise MisconfigurationException(
                f"TracInCallback has scores {tuple(self.scores.shape)} of queries and samples, and this checkpoint "
                f"{tuple(scores.shape)}: both must stay the same during a training."
            )
        self.scores = scores if self.scores is None else self.scores + scores
        if own is not None:
            self.self_influence = own if self.self_influence is None else self.self_influence + own
        self.num_checkpoints += 1

    def _checkpoint(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor | None]:
        """The scores ``(Q, N)`` and the self-influence ``(N,)`` of the parameters as they are."""
        view = ParameterView(pl_module, self.include)
        rates, shard = self._learning_rates(trainer, view), self._shard(trainer, pl_module, view)
        gradients = SampleGradients(pl_module, self.objective, view)
        sketch = None
        if self.project_dim is not None:
            sketch = Projection(view.numel, self.project_dim, seed=fold_in(self.seed, self.num_checkpoints))
        measurements = SampleGradients(pl_module, self.objective, view, quantity="measurement")
        batches = query_batches(trainer, pl_module, view, self.queries)
        pieces = (piece for batch in batches for piece in _query_rows(measurements, batch, rates, sketch))
        width = view.numel if sketch is None else sketch.dim
        tables: list[Tensor] = []
        for rows in blocks(pieces, _at_once(width), rates.new_empty(0, width)):
            weights = rates if self.with_self_influence and not tables else None
            table: Any = trainer.strategy.reduce(_table(shard, gradients, rows, weights, sketch), reduce_op="sum")
            tables.append(table.cpu())
        if not self.with_self_influence:
            return torch.cat(tables), None
        own = tables[0][-1].clone()
        return torch.cat([tables[0][:-1], *tables[1:]]), own

    def _learning_rates(self, trainer: Trainer, view: ParameterView) -> Tensor:
        """The rate of every chosen parameter, ``(D,)``; 0 for one that no optimizer has."""
        rate_of: dict[Tensor, float] = {}
        for index, optimizer in enumerate(trainer.optimizers):
            noted = self._rates.get(index, [])
            for number, group in enumerate(optimizer.param_groups):
                rate = noted[number] if number < len(noted) else float(group["lr"])
                for parameter in group["params"]:
                    rate_of[parameter] = rate_of.get(parameter, 0.0) + rate
        rates = torch.zeros(view.numel, dtype=torch.promote_types(view.dtype, torch.float32), device=view.device)
        for name, part in view.slices().items():
            rates[part] = rate_of.get(view.module.get_parameter(name), 0.0)
        if not bool(rates.any()):
            rank_zero_warn("TracInCallback: every chosen parameter has learning rate 0, so this checkpoint adds 0.")
        return rates


def _at_once(width: int) -> int:
    """How many rows of so many numbers fit a block."""
    return max(1, _BLOCK_NUMBERS // width)


def _query_rows(
    measurements: SampleGradients, batch: Any, rates: Tensor, sketch: Projection | None
) -> Iterator[Tensor]:
    """Pieces of the measurements' gradients times the learning rates."""
    most = _at_once(len(rates))
    for part in measurements.parts(batch):
        for start in range(0, len(part), most):
            rows = part[start : start + most].explicit() * rates
            yield rows if sketch is None else sketch(rows)


def _table(
    shard: Shard, gradients: SampleGradients, rows: Tensor, rates: Tensor | None, sketch: Projection | None
) -> Tensor:
    """This rank's columns of ``(q, N)``, zeros elsewhere; with ``rates`` self-influence is one more row."""
    table = rows.new_zeros(len(rows) + (rates is not None), shard.num_samples)
    for indices, batch in shard.indexed():
        with naming(indices):
            columns = [_columns(part, rows, rates, sketch) for part in gradients.parts(batch)]
        table[:, indices] = torch.cat(columns, dim=1)
    return table


def _columns(part: LayerGradients, rows: Tensor, rates: Tensor | None, sketch: Projection | None) -> Tensor:
    if sketch is None:
        products = part.project(rows)
    else:
        most = _at_once(part.size)
        projected = [sketch(part[start : start + most].explicit()) for start in range(0, len(part), most)]
        products = rows @ torch.cat(projected).mT
    return products if rates is None else torch.cat([products, tracin_self_influence(part, rates)[None]])
