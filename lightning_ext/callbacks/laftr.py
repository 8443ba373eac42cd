"""A penalty on how far the outputs on past tasks move, added to the loss of a training on the next one."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_ext._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    refuse_sharded,
    submodule,
)
from lightning_ext.callbacks._laftr_arguments import check_choice, check_heads, check_number, check_readers
from lightning_ext.callbacks._laftr_diagnostics import Diagnostics, Loaders
from lightning_ext.callbacks._laftr_memory import Heads, TaskMemory, prototype_of
from lightning_ext.callbacks._laftr_rotation import Rotation
from lightning_ext.callbacks._laftr_samples import first_batch, one_pass, only_loader, reading, sum_over_ranks
from lightning_ext.callbacks._laftr_step import add_term, remove_term
from lightning_ext.nn import FunctionSpaceEstimator

__all__ = ["FunctionSpaceRegularizer"]


class FunctionSpaceRegularizer(Callback):
    r"""Keeps what a network says about past tasks, without their data, while a Trainer fits it to the next one.

    .. math:: \mathcal{L} = \mathcal{L}_{\text{step}} + \lambda \, \frac1t \sum_{i<t} D_i(\theta_i, \theta)

    where :math:`\mathcal{L}_{\text{step}}` is what ``training_step`` returns and :math:`D_i` an estimate, from stored
    statistics, of the distance between the outputs of the network as task i left it, :math:`\theta_i`, and of the
    network as it is.

    When a fit begins, the first batch of the data set is tried, so that what cannot be learned from is said before the
    training. When it ends, after every callback has had its last word about the weights, one pass in eval mode over the
    training loader's data set, each sample once, collects the statistics; a fit that is interrupted leaves none. With
    past tasks, ``training_step`` is wrapped from ``on_fit_start`` until the fit ends or fails. The sum is formed before
    the loss is scaled or divided, so accumulation, clipping and mixed precision need no care; what the module logs as
    its loss is its own. A step that returns ``None`` stays without penalty. The network runs in eval mode on the side:
    running statistics and dropout masks of the training are left alone.

    Args:
        estimator: a name (see :func:`lightning_ext.nn.function_space_estimator`), or an estimator that has not been
            fitted; each task gets its own copy.
        weight: :math:`\lambda \ge 0`. With 0 the distances are logged and the training is left bit-identical.
        heads: which outputs belong to a task: ``heads(task)`` or ``heads[task]``, a slice or a list of indices into the
            last dimension of the outputs. Default: all, for every task.
        average_over_tasks: the mean over past tasks, or with ``False`` their sum.
        fit_at: ``"fit_end"``, or ``"manual"``: statistics are collected where :meth:`end_task` is called.
        epochs_per_task: learn all tasks in one fit: after so many epochs the task ends and the data module's next one
            begins (``task``, ``num_tasks``, ``set_task``, as in :class:`lightning_ext.data.ContinualDataModule`), with
            ``Trainer(reload_dataloaders_every_n_epochs=1)``. The optimizer's state goes on. Default: one fit, one task.
        consolidate: ``"all"``: every task keeps its own reference :math:`\theta_i`. ``"last"``: all tasks refer to the
            weights after the last one, of which there is one copy; each keeps its own input statistics, and the samples
            of a step are shared out among tasks. ``"merge"``: one pool of statistics too; memory does not grow, and
            ``"online-ewc"`` is made for it.
        add_to_loss: with ``False`` nothing is wrapped; add :meth:`penalty` to the loss yourself. Manual optimisation
            needs this.
        forward: ``(module, x) -> outputs``; default ``module(x)``.
        inputs: the network's inputs in a batch: a key, or a function of the batch; default ``batch[0]``, or the batch
            where it is a tensor.
        target: the classes in a batch, for class-conditional statistics: a key or a function; default ``batch[1]``.
        diagnostics_loader: held-out data of past tasks, to check the estimate against: a loader for all tasks, or a
            function ``task -> loader`` (or ``None``). The outputs on it are kept with the task.
        log_every_n_steps: steps between two lines in the logs, at least 1.
        seed: of the draws; ranks draw differently, so their mean has the samples of all.
        memory_file: written when a task ends, and taken up when a fit starts and it holds tasks that the callback does
            not: for runs one by one, and for ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook``, whose processes end with
            the fit. Delete it to begin anew.
        estimator_options: further arguments for an estimator that is given by name.

    Attributes:
        current_task: the number of the task that is being learned, which is never penalised. ``None``: one more than
            the last one. Set it before a fit. A task that ends again replaces what was stored.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: when a fit starts: manual optimisation without ``add_to_loss=False``; FSDP or
            DeepSpeed; several training loaders with ``fit_at="fit_end"``.

    Logs, every n-th step: ``laftr/penalty``, the mean (or sum) of distances; ``laftr/weighted``, what was added to the
    loss; ``laftr/task_{i}``; ``laftr/stats_bytes``. After every epoch, with a ``diagnostics_loader``: ``laftr/true``,
    the distance on it, and ``laftr/log_ratio``, the logarithm of estimate over truth; beyond 1 either way it warns.

    Source: Dhawan et al. 2023, arXiv:2302.03519.

    Note:
        Cost per step: a forward and backward pass per past task over the estimator's samples; one in all with
        ``consolidate="last"`` or ``"merge"``. Distributed: ranks share the samples of a task out, without padding;
        sums are reduced, so every rank holds the same statistics. The memory is part of checkpoints as tensors and
        plain values, the position in the stream of draws included: a resumed run is the uninterrupted one bit for bit.

    >>> FunctionSpaceRegularizer("laftr", weight=10.0, heads=lambda task: slice(2 * task, 2 * task + 2)).tasks
    []
    """

    def __init__(
        self,
        estimator: str | FunctionSpaceEstimator = "laftr",
        weight: float = 1.0,
        heads: Callable[[int], Heads | None] | Sequence[Heads] | None = None,
        average_over_tasks: bool = True,
        fit_at: Literal["fit_end", "manual"] = "fit_end",
        epochs_per_task: int | None = None,
        consolidate: Literal["all", "last", "merge"] = "all",
        add_to_loss: bool = True,
        forward: Callable[[Any, Any], Tensor] | None = None,
        inputs: str | Callable[[Any], Any] | None = None,
        target: str | Callable[[Any], Tensor] | None = None,
        diagnostics_loader: Loaders | None = None,
        log_every_n_steps: int = 50,
        seed: int = 0,
        memory_file: str | Path | None = None,
        estimator_options: dict[str, Any] | None = None,
    ) -> None:
        check_number("weight", weight, 0, whole=False)
        check_number("log_every_n_steps", log_every_n_steps, 1)
        check_number("seed", seed, 0)
        check_choice("fit_at", fit_at, ("fit_end", "manual"))
        check_choice("consolidate", consolidate, ("all", "last", "merge"))
        check_choice("average_over_tasks", average_over_tasks, (True, False))
        check_choice("add_to_loss", add_to_loss, (True, False))
        check_readers(forward=forward, inputs=inputs, target=target)
        check_heads(heads)
        if not isinstance(memory_file, str | Path | None):
            raise ValueError(f"memory_file must be a path; got {memory_file!r}.")
        if not isinstance(estimator_options, dict | None):
            raise ValueError(f"estimator_options must be a dict of arguments; got {estimator_options!r}.")
        self.weight, self.heads, self.average_over_tasks = weight, heads, average_over_tasks
        self.fit_at, self.consolidate, self.add_to_loss = fit_at, consolidate, add_to_loss
        self.log_every_n_steps, self.seed = log_every_n_steps, seed
        self.memory_file = None if memory_file is None else str(memory_file)
        self.epochs_per_task = epochs_per_task
        self._rotation = None if epochs_per_task is None else Rotation(epochs_per_task)
        self.current_task: int | None = None
        prototype = prototype_of(
            estimator, {"forward": forward, "inputs": inputs, "target": target}, estimator_options or {}
        )
        self._name = estimator if isinstance(estimator, str) else type(estimator).__name__
        self._memory = TaskMemory(prototype, consolidate)
        self._diagnostics = Diagnostics(prototype, diagnostics_loader)
        self._draws = 0  # how often the penalty was asked for: the position in the stream of draws
        self._report: dict[str, Tensor] = {}
        self._logged = -1
        self._warned = False

    @property
    def tasks(self) -> list[int]:
        """The numbers of the tasks that are remembered."""
        return self._memory.tasks

    @property
    def stats_bytes(self) -> int:
        """Bytes of the memory: references and statistics."""
        return self._memory.nbytes

    @property
    def state_key(self) -> str:
        """Another estimator, or another way to keep it, is another callback in a checkpoint."""
        return self._generate_state_key(estimator=self._name, consolidate=self.consolidate, fit_at=self.fit_at)

    # -- the penalty

    def penalty(self, pl_module: LightningModule) -> Tensor:
        r""":math:`\lambda \frac1t \sum_i D_i(\theta_i, \theta)`, what the callback adds to a loss; 0 without a past.

        Args:
            pl_module: the module as it is; gradients reach its parameters.

        Returns:
            A scalar on the module's device, in float32 or wider.

        Raises:
            ValueError: the module's outputs do not fit those of the reference.
        """
        past = self._past()
        if not past:
            return torch.zeros((), device=pl_module.device)
        address = (self.seed, _rank(), self._draws)
        self._draws += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
            total, single = self._memory.distance(pl_module, past, address, average=self.average_over_tasks)
        weighted = self.weight * total
        self._report = {"laftr/penalty": total.detach(), "laftr/weighted": weighted.detach()}
        self._report |= {f"laftr/task_{task}": value.detach() for task, value in single.items()}
        return weighted

    def _past(self) -> list[int]:
        return [task for task in self.tasks if task != self.current_task]

    # -- around a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters; take up the file where the callback is empty."""
        refuse_sharded(trainer, type(self).__name__, "runs the module on whole parameters, old and new")
        if stage == "fit" and self.memory_file is not None and Path(self.memory_file).is_file():
            self._take_up(self.memory_file)

    def _take_up(self, file: str) -> None:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if set(saved["memory"]["tasks"]) > set(self.tasks):
                self.load_state_dict(saved)
                rank_zero_info(f"{type(self).__name__}: took up tasks {self.tasks} from {file}.")
        except Exception as error:
            raise ValueError(
                f"memory_file={file!r} holds no memory of such a callback: {error} Delete the file, or name another."
            ) from error

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the penalty to the loss, where there are past tasks."""
        if self.add_to_loss and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} cannot add to the loss of a module with manual optimisation. Pass "
                "add_to_loss=False and, in training_step, add callback.penalty(pl_module) to the loss before "
                "manual_backward."
            )
        if self._rotation is not None:
            self.current_task = self._rotation.data(trainer).task
        if self.fit_at == "fit_end":
            self._task_heads(self._number())
        self._memory.to(pl_module.device)
        self._logged, self._report = -1, {}
        self._attach(pl_module)

    def _attach(self, pl_module: LightningModule) -> None:
        if self.add_to_loss and self._past():
            add_term(pl_module, self, lambda: self.penalty(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before the training what would be refused when it ends."""
        if self.fit_at == "fit_end":
            loader = only_loader(trainer, type(self).__name__)
            with reading(trainer, pl_module), torch.inference_mode(False), torch.enable_grad():
                batches = first_batch(trainer, pl_module, loader)
                self._memory.rehearse(pl_module, batches, self._task_heads(self._number()))
        if self._rotation is not None:
            self._rotation.check(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty of the step."""
        step = max(0, trainer.global_step - 1)
        if self._report and step // self.log_every_n_steps > self._logged // self.log_every_n_steps:
            self._logged = step
            numbers = torch.stack([value.double() for value in self._report.values()])
            numbers = torch.as_tensor(trainer.strategy.reduce(numbers, reduce_op="mean"))
            found = dict(zip(self._report, numbers.tolist(), strict=True))
            if not math.isfinite(found["laftr/penalty"]):
                self._warn(f"the penalty is {found['laftr/penalty']} at step {step}: the training has diverged.")
            _publish(trainer, {**found, "laftr/stats_bytes": float(self.stats_bytes)})
        self._report = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the estimate against the truth, where there is a loader; begin the next task, where it is time."""
        self._diagnose(trainer, pl_module)
        following = None if self._rotation is None else self._rotation.next(trainer)
        if self._rotation is not None and following is not None:
            self.end_task(trainer, pl_module)
            self._rotation.data(trainer).set_task(following)
            self.current_task = following
            self._attach(pl_module)

    def _diagnose(self, trainer: Trainer, pl_module: LightningModule) -> None:
        past = [task for task in self._past() if self._diagnostics.knows(task)]
        if not past:
            return
        with reading(trainer, pl_module), torch.no_grad():
            true = self._diagnostics.distance(trainer, pl_module, past, self._task_heads)
            address = (self.seed, -1, trainer.current_epoch, 0)  # the same on ranks, and none of the training's
            estimate, _ = self._memory.distance(pl_module, past, address, average=True)
        found, estimated = {"laftr/true": true}, float(estimate)
        if true > 0 and estimated > 0:
            found["laftr/log_ratio"] = math.log(estimated / true)
        if abs(found.get("laftr/log_ratio", 0.0)) > 1 and not self._warned:
            self._warned = True
            self._warn(
                f"the estimated distance on past tasks is {estimated:.3g}, the true one {true:.3g}. Use "
                "class-conditional statistics, more samples, or another estimator."
            )
        _publish(trainer, found)

    def _warn(self, what: str) -> None:
        rank_zero_warn(f"{type(self).__name__}: {what}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the statistics of the task that has ended; other callbacks are done with the weights by now."""
        remove_term(pl_module, self)
        if self.fit_at == "fit_end":
            home = pl_module.device  # the Trainer has put the module back on the CPU
            pl_module.to(trainer.strategy.root_device)
            try:
                self.end_task(trainer, pl_module)
            finally:
                pl_module.to(home)
            ends = submodule("strategies.launchers.multiprocessing")._MultiProcessingLauncher
            if self.memory_file is None and isinstance(trainer.strategy.launcher, ends):
                self._warn(
                    "the processes of this strategy end with the fit, and what the callback has collected ends with "
                    "them. Pass memory_file=..., or use strategy='ddp'."
                )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own ``training_step`` back."""
        remove_term(pl_module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own ``training_step`` back."""
        remove_term(pl_module, self)

    # -- the end of a task

    def end_task(self, trainer: Trainer | None, pl_module: LightningModule, loader: Iterable[Any] | None = None) -> int:
        """Collect the statistics of a task with the weights as they are.

        Args:
            trainer: whose device, ranks and batch hooks are used; ``None`` for none.
            pl_module: the module; it is left as it was.
            loader: the task's data. Default: the Trainer's training loader.

        Returns:
            The number of the task.

        Raises:
            ValueError: a weight is not finite; what the estimator refuses, such as inputs that are no floats.
        """
        task = self._number()
        odd = [name for name, value in pl_module.named_parameters() if not bool(value.isfinite().all())]
        if odd:
            raise ValueError(f"{type(self).__name__}: {odd[0]} is not finite, so task {task} has no reference.")
        if loader is None:
            if trainer is None:
                raise ValueError("end_task needs a loader where there is no Trainer.")
            loader = only_loader(trainer, type(self).__name__)
        heads = self._task_heads(task)
        with reading(trainer, pl_module), torch.inference_mode(False), torch.enable_grad():
            batches = one_pass(trainer, pl_module, loader, shared=True)
            self._memory.remember(task, pl_module, batches, heads, reduce=lambda t: sum_over_ranks(trainer, t))
            renewed = [task] if self.consolidate == "all" else self.tasks  # whose reference are these weights?
            self._diagnostics.record(trainer, pl_module, renewed)
        self._keep(trainer)
        return task

    def _number(self) -> int:
        if self.current_task is not None:
            return self.current_task
        return max(self.tasks, default=-1) + 1

    def _task_heads(self, task: int) -> Heads | None:
        if self.heads is None:
            return None
        if callable(self.heads):
            return self.heads(task)
        if not 0 <= task < len(self.heads):
            raise ValueError(f"heads has {len(self.heads)} entries, and there is none for task {task}.")
        return self.heads[task]

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """References, statistics and counters: tensors and plain values; the same on every rank."""
        return {
            "version": 1,
            "draws": self._draws,
            "warned": self._warned,
            "memory": self._memory.state_dict(),
            "diagnostics": self._diagnostics.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved memory."""
        self._draws, self._warned = state_dict["draws"], state_dict["warned"]
        self._memory.load_state_dict(state_dict["memory"])
        self._diagnostics.load_state_dict(state_dict["diagnostics"])

    def _keep(self, trainer: Trainer | None) -> None:
        if self.memory_file is not None and (trainer is None or trainer.is_global_zero):
            Path(self.memory_file).parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.state_dict(), self.memory_file)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _publish(trainer: Trainer, found: dict[str, float]) -> None:
    """Give loggers and ``callback_metrics`` numbers that are equal on ranks, whatever the Trainer's own rhythm."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in found.items()})
    for logger in trainer.loggers:
        logger.log_metrics(found, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
