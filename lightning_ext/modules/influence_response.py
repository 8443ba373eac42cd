r"""What a trained network becomes without some samples: retrained, or held near by the proximal Bregman objective.

Source: Bae, Ng, Lo, Ghassemi, Grosse, *If Influence Functions are the Answer, Then What is the Question?*, NeurIPS
2022, arXiv 2209.05364.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_ext._lightning import MisconfigurationException, refuse_sharded
from lightning_ext.data import IndexedBatch
from lightning_ext.functional import (
    DataTerm,
    InfluenceObjective,
    ResponseObjective,
    ResponseTerms,
    batch_size,
    response_terms_and_gradients,
)
from lightning_ext.modules._influence_copies import StackedCopies
from lightning_ext.modules._influence_data import Shard, plain
from lightning_ext.modules._influence_end import advise_on_risen, advise_on_the_end
from lightning_ext.modules._influence_newton import Newton
from lightning_ext.modules._influence_removal import Groups, Removal, as_groups, as_masks, starting_change

__all__ = ["ResponseModule"]

OptimizerChoice = Literal["sgd", "adam", "newton"] | Callable[[Any], Optimizer]
_COUPLING = (torch.optim.LBFGS, torch.optim.Adafactor, *filter(None, [getattr(torch.optim, "Muon", None)]))


class ResponseModule(StackedCopies):
    r"""Trains G copies of a network at once, each without samples of its own, all on the same batches in one order.

    The parameters are stacked changes :math:`\delta_g = \theta_g - \theta^s`, ``(G, D)``, from the trained network;
    copies never mix, so one elementwise optimizer serves them all. What a copy minimises and where it starts:

    ============== ==================== ===============================================================================
    ``response``   start                objective, see :class:`lightning_ext.functional.ResponseObjective`
    ============== ==================== ===============================================================================
    ``"cold"``     fresh, from ``seed`` training objective less the loss of the removed samples
    ``"warm"``     :math:`\theta^s`     the same
    ``"proximal"`` :math:`\theta^s`     the same, plus :math:`\frac\lambda2 \lVert\delta\rVert^2`
    ``"pbrf"``     :math:`\theta^s`     proximal Bregman objective, see :class:`PBRFModule`
    ============== ==================== ===============================================================================

    The removed samples' loss, times 1/N, is subtracted in **every** step, not only when a batch has them, so that its
    variance is of order 1/N. Dropout is off and BatchNorm frozen all along: the copies differ in nothing but the above.

    Args:
        base: the trained network, a module of any kind; a frozen copy of it is kept.
        objective: loss, outputs, targets and measurement; default cross-entropy of ``base(batch[0])`` against
            ``batch[1]``.
        response: see the table.
        remove: for each copy the position in the training data set of the sample that is removed, or a list of them.
        keep: instead of ``remove``, for each copy the positions that stay, or a mask ``(G, N)``; the copy minimises the
            mean over these. The loader must be over an :class:`lightning_ext.data.IndexedDataset`. Not for the PBRF.
        damping: :math:`\lambda`, for ``"proximal"`` and ``"pbrf"``.
        weight_decay: :math:`w` of :math:`\frac w2 \lVert\theta\rVert^2` in the training objective; do not give it to
            the optimizer, which sees :math:`\delta`.
        optimizer: ``"sgd"``, ``"adam"``, a function from the parameters to an elementwise optimizer, or, for the PBRF
            on one batch per epoch, ``"newton"``: steps behind :math:`(G + \lambda I)^{-1}`, the first of which is the
            influence function's estimate.
        lr: learning rate; the Newton step is always 1.
        momentum: of ``"sgd"``.
        schedule: ``"constant"``, or ``"cosine"`` to 0 over the whole training.
        seed: of a cold start, one for all copies or one for each; with no ``remove`` and no ``keep``, as many copies.
        include: regular expression; only parameters whose name it finds move.
        initialize: draws fresh parameters in place for a cold start; default ``reset_parameters`` of every layer.
        tolerance: stop once the gradient's norm is ``tolerance`` times that of the removed samples' gradient, on the
            whole training set for every copy, and warn if that was not reached; None never looks.
        check_every_n_epochs: how often, where an epoch has several batches. Costs one pass through the data.
        dataset: where removed samples come from, if the loader has no ``dataset`` of its own.
        chunk_size: copies computed at once, which bounds the memory; None for all.

    Logs, under the response's name, ``pbrf/loss``, ``pbrf/bregman`` (for the others ``/data``, the mean loss),
    ``pbrf/prox`` (weight decay included), ``pbrf/removed_loss`` (mean per removed sample), means over the copies, and
    ``pbrf/grad_rel``, the largest relative gradient, when it was looked at. Validation and test log ``/val_change`` and
    ``/test_change``, the mean absolute change of the measurement. ``predict`` gives the changes, ``(B, G)``.

    Raises:
        ValueError: an argument is out of range or does not fit another; a gradient is not finite.
        MisconfigurationException: a strategy that shards parameters; a loader whose data set is not known.

    Note:
        A step costs one forward and one backward pass of G networks and one forward pass of the base. Gradients are
        averaged over ranks; removal counts once. Clipping by norm clips each copy by itself. Under mixed precision
        the copies are computed in the parameters' own type: a response is a small difference.
    """

    def __init__(
        self,
        base: nn.Module,
        objective: InfluenceObjective | None = None,
        response: Literal["cold", "warm", "proximal", "pbrf"] = "warm",
        remove: Groups | Tensor | None = None,
        keep: Sequence[Sequence[int]] | Tensor | None = None,
        damping: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerChoice = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        schedule: Literal["constant", "cosine"] = "constant",
        seed: int | Sequence[int] = 0,
        include: str | None = None,
        initialize: Callable[[nn.Module], Any] | None = None,
        tolerance: float | None = None,
        check_every_n_epochs: int = 10,
        dataset: Dataset[Any] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(base, objective, include, chunk_size)
        self.terms = ResponseObjective(self.objective.loss, response, damping, weight_decay)
        _check(response, remove, keep, optimizer, schedule, tolerance)
        self.keep = None if keep is None else as_masks(keep)
        removed = None if remove is None else as_groups(remove)
        seeds = [seed] if isinstance(seed, int) else [int(s) for s in seed]
        self.num_copies = len(removed or (seeds if self.keep is None else self.keep))
        self.groups = removed or [[] for _ in range(self.num_copies)]
        self.response_name, self.dataset = response, dataset
        self.optimizer_choice, self.lr, self.momentum, self.schedule = optimizer, lr, momentum, schedule
        self.tolerance, self.check_every_n_epochs = tolerance, check_every_n_epochs
        self.change = nn.Parameter(self._start(seeds, initialize))
        self.newton = Newton(self.num_copies, self.view.numel, self.view.dtype) if optimizer == "newton" else None
        self.gradient_ratio: Tensor | None = None
        self._removal: Removal | None = None
        self._totals = self.change.detach()[:, 0]
        self._full_batch, self._converged, self._steps = False, False, 0.0

    def _start(self, seeds: list[int], initialize: Callable[[nn.Module], Any] | None) -> Tensor:
        if len(seeds) not in (1, self.num_copies):
            raise ValueError(f"seed must be one number, or one for each of {self.num_copies} copies; got {len(seeds)}.")
        seeds = seeds * self.num_copies if len(seeds) == 1 else seeds
        if self.response_name == "cold":
            return starting_change(self.base, self.view, seeds, initialize)
        if len(set(seeds)) > 1:
            raise ValueError(f"seeds are for response='cold'; response={self.response_name!r} draws nothing.")
        return torch.zeros(self.num_copies, self.view.numel, dtype=self.view.dtype, device=self.view.device)

    def setup(self, stage: str) -> None:
        """Refuse strategies that shard parameters."""
        refuse_sharded(self.trainer, type(self).__name__, "trains whole stacked copies")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # it is meant to be

    def on_train_start(self) -> None:
        """Fetch the removed samples and what progress is measured against."""
        self._sync_view()
        trainer, shard = self.trainer, self._shard(self.trainer.train_dataloader)
        self._removal = Removal(self.groups, self.keep, shard, self.base, self.view, self.objective, self.chunk_size)
        if self.response_name == "pbrf":
            self._require_convex(shard)
        batches = int(trainer.num_training_batches)
        padded = -shard.num_samples % trainer.world_size
        self._full_batch = (
            batches * trainer.accumulate_grad_batches == 1
            and shard.batch_size * trainer.world_size >= shard.num_samples
            and not padded
        )
        if padded and self.newton is None:
            rank_zero_warn(
                f"{shard.num_samples} samples do not share out evenly over {trainer.world_size} processes: the sampler "
                f"gives {padded} of them twice, and they count twice in the response."
            )
        self._converged = False
        self._steps = float(trainer.estimated_stepping_batches)
        if self.schedule == "cosine" and not 0 < self._steps < math.inf:
            raise MisconfigurationException("schedule='cosine' needs an end: give the Trainer max_epochs or max_steps.")
        if self.newton is not None:
            if not self._full_batch:
                raise MisconfigurationException(
                    "optimizer='newton' needs the whole training set in one batch and one batch per step, the same "
                    f"number of samples on every process; got {batches} batches per epoch for {shard.num_samples} "
                    f"samples on {trainer.world_size} processes."
                )
            damping = self.terms.damping + self.terms.weight_decay
            self.newton.build(
                self.base, self.objective, self.view, shard, damping, lambda tensor: self._over_ranks(tensor, "sum")
            )

    @torch.no_grad()
    def _require_convex(self, shard: Shard) -> None:
        values = self.view.values()
        for batch in shard:
            outputs = self.objective.function(self.base, self.view, batch)(values)
            self.objective.loss.require_convex(outputs, self.objective.targets(batch))

    def _over_ranks(self, tensor: Tensor, how: str) -> Tensor:
        result: Any = self.trainer.strategy.reduce(tensor, reduce_op=how)
        reduced: Tensor = result
        return reduced

    def _shard(self, loader: Any) -> Shard:
        if self.dataset is not None:
            loader = DataLoader(self.dataset, batch_size=getattr(loader, "batch_size", None) or 256)
        elif not isinstance(loader, DataLoader):
            raise MisconfigurationException(
                f"{type(self).__name__} looks up removed samples by position, and {type(loader).__name__} does not say "
                "in which data set. Train with one DataLoader, or pass dataset=."
            )

        def move(batch: Any) -> Any:
            batch = batch.batch if isinstance(batch, IndexedBatch) else batch
            return plain(batch, self.change.device, self.change.dtype)

        return Shard(loader, move, self.trainer.global_rank, self.trainer.world_size)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step; it depends on nothing but the step."""
        if self.schedule == "cosine":
            done = min(1.0, self.trainer.global_step / self._steps)
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * 0.5 * (1 + math.cos(math.pi * done))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum over the copies' objectives, whose gradient is each copy's own."""
        batch = batch if isinstance(batch, IndexedBatch) else IndexedBatch(-1, batch)
        terms, gradient = self._terms_and_gradient(batch)
        total = terms.total
        bad = ~(gradient.isfinite().all(1) & total.isfinite())
        if bool(bad.any()):
            copies = bad.nonzero().flatten().tolist()[:8]
            raise ValueError(
                f"The objective or its gradient is not finite for copies {copies}, which remove the samples "
                f"{[self.groups[g][:8] for g in copies]}. Lower lr, raise damping, or look at the data."
            )
        self._totals = total
        self._log_terms(terms, batch_size(batch.batch))
        return _with_gradient(total.sum(), self.change, gradient)

    def _terms_and_gradient(self, batch: IndexedBatch) -> tuple[ResponseTerms, Tensor]:
        assert self._removal is not None
        with torch.no_grad(), torch.autocast(self.change.device.type, enabled=False):
            content = plain(batch.batch, self.change.device, self.change.dtype)
            function, reference = self.objective.function(self.base, self.view, content), self.view.values()
            reference_outputs = function(reference) if self.response_name == "pbrf" else None
            data = DataTerm(
                function, self.objective.targets(content), reference_outputs, self._removal.weights_of(batch.indices)
            )
            change = self.view.unflatten(self.change.detach())
            terms, gradients = response_terms_and_gradients(
                self.terms, change, reference, data, self._removal.term, chunk_size=self.chunk_size
            )
            return terms, self.view.flatten(gradients)

    def _log_terms(self, terms: ResponseTerms, size: int) -> None:
        assert self._removal is not None
        name = self.response_name
        values = {
            f"{name}/loss": terms.total,
            f"{name}/{'bregman' if name == 'pbrf' else 'data'}": terms.data,
            f"{name}/prox": terms.decay + terms.proximity,
        }
        if self._removal.term is not None:
            values[f"{name}/removed_loss"] = terms.removed * self._removal.per_sample
        means = torch.stack(list(values.values())).mean(1)
        logged = dict(zip(values, self._over_ranks(means, "mean"), strict=True))  # one message for all of them
        if self.gradient_ratio is not None:
            logged[f"{name}/grad_rel"] = self.gradient_ratio.max()
        self.log_dict(logged, batch_size=size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Look at the gradient where it is that of the whole set; precondition it for a Newton step."""
        gradient = self.change.grad
        if gradient is None or not self._full_batch or (self.newton is None and self.tolerance is None):
            return
        ratio = self._ratio(gradient)
        if self.newton is not None:
            point = self.change.detach()
            assert self._removal is not None
            value, done = self._over_ranks(self._totals, "mean"), ratio <= (self.tolerance or 0.0)
            self.change.grad = point - self.newton.step(point, gradient, value, 1 / self._removal.per_sample, done)
        self._judge(ratio)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, but stay where the gradient was found small enough."""
        judged = self.change.detach().clone() if self._full_batch and self.tolerance is not None else None
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if judged is not None and self._converged:
            self.change.data.copy_(judged)

    def on_train_epoch_end(self) -> None:
        """Look at the gradient of the whole training set, now and then."""
        due = (self.current_epoch + 1) % self.check_every_n_epochs == 0
        if self.tolerance is not None and due and not self._full_batch:
            self._judge(self._ratio(self._whole_value_and_gradient()[1]))

    def _ratio(self, gradient: Tensor) -> Tensor:
        assert self._removal is not None
        norm = self._removal.gradient_norm
        ratio: Tensor = torch.linalg.vector_norm(gradient.detach(), dim=1)
        return ratio / norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def _whole_value_and_gradient(self) -> tuple[Tensor, Tensor]:
        assert self._removal is not None
        value, gradient = self.change.new_zeros(len(self.change)), torch.zeros_like(self.change, requires_grad=False)
        for index, batch in self._removal.shard.indexed():
            terms, rows = self._terms_and_gradient(IndexedBatch(index, batch))
            share = len(index) / self._removal.shard.num_samples
            value += terms.total * share
            gradient += rows * share
        return self._over_ranks(value, "sum"), self._over_ranks(gradient, "sum")

    def _judge(self, ratio: Tensor) -> None:
        self.gradient_ratio = ratio
        self._converged = self.tolerance is not None and bool((ratio <= self.tolerance).all())
        if self._converged:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Say how good the minimum is, on the whole training set."""
        if self.newton is not None and not self._converged:
            self._leave_a_worse_end(self.newton)
        if self.tolerance is not None and not self._converged:
            self.gradient_ratio = self._ratio(self._whole_value_and_gradient()[1])
            advise_on_the_end(type(self).__name__, self.gradient_ratio, self.tolerance, self.newton)
        if self.response_name == "pbrf" and self._removal is not None:
            advise_on_risen(self._removal.risen(self.view.unflatten(self.change.detach())))

    def _leave_a_worse_end(self, newton: Newton) -> None:
        """The last step was never looked at: where it led uphill or too far, go back to where it came from."""
        assert self._removal is not None
        value, gradient = self._whole_value_and_gradient()
        worse = ~newton.keeps(self.change.detach(), gradient, value, 1 / self._removal.per_sample)
        self.change.data[worse] = newton.point[worse]

    def teardown(self, stage: str) -> None:
        """Let go of the data."""
        self._removal = None
        if self.newton is not None:
            self.newton.solve = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each copy's gradient by its own norm, as if it were trained alone."""
        gradient = self.change.grad
        if gradient_clip_val and gradient is not None:
            if gradient_clip_algorithm == "value":
                gradient.clamp_(-gradient_clip_val, gradient_clip_val)
            else:
                norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
                gradient.mul_((gradient_clip_val / norm.clamp(min=1e-30)).clamp(max=1.0))

    def configure_optimizers(self) -> Optimizer:
        """One optimizer for all copies."""
        choice = self.optimizer_choice
        if choice == "sgd":
            return torch.optim.SGD([self.change], lr=self.lr, momentum=self.momentum)
        if choice == "adam":
            return torch.optim.Adam([self.change], lr=self.lr)
        if choice == "newton":
            return torch.optim.SGD([self.change], lr=1.0)
        optimizer = choice([self.change])
        if isinstance(optimizer, _COUPLING):
            raise ValueError(f"optimizer must act elementwise, or copies mix; got {type(optimizer).__name__}.")
        if any(group.get("weight_decay") for group in optimizer.param_groups):
            raise ValueError("the optimizer's weight_decay would pull to the trained network: give weight_decay here.")
        return optimizer


def _with_gradient(value: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
    """The number ``value`` with the derivative ``gradient``: backward, DDP and scalers work as ever."""
    inner = (parameter * gradient).sum()
    return value.detach() + (inner - inner.detach())


def _check(response: str, remove: Any, keep: Any, optimizer: Any, schedule: str, tolerance: Any) -> None:
    if remove is not None and keep is not None:
        raise ValueError("give remove or keep, not both: keep already says which samples are gone.")
    if response == "pbrf" and remove is None:
        raise ValueError("the PBRF is a response to removal: give remove (keep is for retraining).")
    if isinstance(optimizer, str) and optimizer not in ("sgd", "adam", "newton"):
        raise ValueError(f"optimizer must be 'sgd', 'adam', 'newton' or a function; got {optimizer!r}.")
    if optimizer == "newton" and response != "pbrf":
        raise ValueError(f"optimizer='newton' is for the PBRF, whose curvature is G; got response={response!r}.")
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule must be 'constant' or 'cosine'; got {schedule!r}.")
    if tolerance is not None and (remove is None or not tolerance >= 0):
        raise ValueError(f"tolerance must be at least 0 and needs remove; got {tolerance}.")
