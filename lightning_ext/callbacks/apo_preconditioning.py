"""Feeds an :class:`~lightning_ext.optim.APOPreconditioner` with look-aheads while a Trainer trains."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, refuse_sharded
from lightning_ext.callbacks._apo_divergence import Divergence
from lightning_ext.callbacks._apo_lookahead import (
    BatchFn,
    LookAhead,
    check_indices,
    chosen_optimizers,
    publish,
)
from lightning_ext.optim import APOPreconditioner

__all__ = ["APOPreconditioning"]

_FSD_FRACTION, _FSD_ROWS = 0.25, 128


class APOPreconditioning(Callback):
    r"""Let the :class:`~lightning_ext.optim.APOPreconditioner` of a module learn its preconditioner.

    Whenever the optimizer's meta-step is due, the callback gives it the proximal objective of the step: the training
    loss on the batch B of the step and the divergence of the outputs on another batch :math:`B'`, see
    :class:`APOLearningRate`. The optimizer looks ahead, updates the preconditioner, and steps with the new one.

    Args:
        fsd_batch: where :math:`B'` comes from: the ``"previous"`` batch, random examples of the training ``"loader"``'s
            data, or of another DataLoader's.
        fsd_fraction: the part of :math:`B'` that is used, in (0, 1]; default a quarter, but 128 rows where
            there are as many: on fewer, a step may fit B and change what nobody looks at.
        loss_fraction: the part of :math:`B` on which the loss before and after the look-ahead is taken, in (0, 1]; a
            smaller one makes look-aheads on large batches cheaper, and noisier.
        output_fn: ``(module, batch) -> outputs``; default ``module(batch[0])``.
        loss_fn: ``(module, batch) -> loss``; default the module's ``training_step``. Needed under manual optimisation.
        divergence: as in :class:`APOLearningRate`.
        optimizers: ``"all"`` that are an ``APOPreconditioner``, or the indices of those to feed.
        seed: of the dropout masks on :math:`B'` and of its draws.

    Raises:
        ValueError: For arguments out of range.
        MisconfigurationException: When training starts: no ``APOPreconditioner`` among the module's optimizers, FSDP,
            DeepSpeed, manual optimisation without ``loss_fn``.

    Logs, of the last meta-step, whenever the Trainer logs and at the end of an epoch: ``apo/Q``,
    ``apo/loss_lookahead``, ``apo/loss_before``, ``apo/fsd``, ``apo/wsd``, ``apo/slope`` (of Q along the step), and
    ``apo/rejected`` (1 where the last meta-step was rejected).
    Optimizers after the first have their index appended.

    Note:
        Cost per meta-step: a forward and backward pass on the part of B (and a forward pass more where that is not all
        of it), two forward and one backward on the part of B'.
        Distributed: the optimizer averages the meta-gradient over ranks.

    Source: Bae, Vicol, HaoChen, Grosse 2022, arXiv:2203.00089, section 4.
    """

    def __init__(
        self,
        fsd_batch: Literal["previous", "loader"] | DataLoader = "previous",  # type: ignore[type-arg]
        fsd_fraction: float | None = None,
        loss_fraction: float = 1.0,
        output_fn: BatchFn | None = None,
        loss_fn: BatchFn | None = None,
        divergence: str | Divergence = "auto",
        optimizers: Literal["all"] | list[int] = "all",
        seed: int = 0,
    ) -> None:
        self.optimizers = check_indices(optimizers)
        self.look_ahead = LookAhead(
            type(self).__name__,
            output_fn=output_fn,
            loss_fn=loss_fn,
            divergence=divergence,
            fsd_batch=fsd_batch,
            fsd_fraction=_FSD_FRACTION if fsd_fraction is None else fsd_fraction,
            fsd_rows=_FSD_ROWS if fsd_fraction is None else 2,
            loss_fraction=loss_fraction,
            seed=seed,
        )
        self._fed: dict[int, tuple[int, APOPreconditioner]] = {}
        self._report: dict[str, float] = {}
        self._loss: Tensor | None = None
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Tells two instances apart by the optimizers they feed."""
        return self._generate_state_key(optimizers=self.optimizers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters."""
        if stage == "fit":
            refuse_sharded(trainer, type(self).__name__, "moves and restores whole parameters")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the optimizers before anything runs."""
        self._chosen(trainer)
        self.look_ahead.check(pl_module)

    def _chosen(self, trainer: Trainer) -> dict[int, tuple[int, APOPreconditioner]]:
        indices: Sequence[int] = chosen_optimizers(trainer, self.optimizers, type(self).__name__)
        ours = {i: o for i in indices if isinstance(o := trainer.optimizers[i], APOPreconditioner)}
        wrong = [type(trainer.optimizers[i]).__name__ for i in indices if i not in ours]
        if not ours or (wrong and self.optimizers != "all"):
            raise MisconfigurationException(
                f"{type(self).__name__} feeds an APOPreconditioner, and the module's optimizers are "
                f"{', '.join(wrong)}. Return lightning_ext.optim.APOPreconditioner(self) from configure_optimizers, or "
                "use APOLearningRate with the optimizer as it is."
            )
        return {id(optimizer): (index, optimizer) for index, optimizer in ours.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a restored batch back."""
        self._fed = self._chosen(trainer)
        self._report = {}
        self.look_ahead.start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep B, and the random state with which the training pass on it will start."""
        due = any(optimizer.meta_step_due for _, optimizer in self._fed.values())
        self.look_ahead.observe(batch, batch_idx, pl_module.device, keep_rng=due)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, which the optimizer compares its look-ahead with."""
        if self.look_ahead.loss_fn is None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._loss = loss.detach() * (trainer.accumulate_grad_batches / scale)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Hand the coming step its objective."""
        index, ours = self._fed.get(id(optimizer), (0, None))
        if ours is None:
            return
        self.look_ahead.step_made = True
        if not ours.meta_step_due:
            return
        uses_outputs = any(group["lam_f"] > 0 for group in ours.param_groups)
        address = (index, trainer.global_step)
        objective = self.look_ahead.objective(
            trainer, pl_module, outputs=uses_outputs, address=address, loss_before=self._loss
        )
        if objective is not None:
            self._loss = None
            objective.anchor()
            ours.look_ahead = objective

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the last meta-step found, and keep the batch for the next one."""
        self.look_ahead.batch_done()
        for index, optimizer in self._fed.values():
            found, optimizer.last_meta_step = optimizer.last_meta_step, None
            if found is not None:
                suffix = f"/{index}" if index else ""
                self._report |= {f"apo/{_KEYS.get(name, name)}{suffix}": float(v) for name, v in found.items()}
        if publish(trainer, self._report):
            self._report = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of batches and optimizers."""
        self._leave(collective=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of batches and optimizers."""
        self._leave(collective=False)

    def _leave(self, collective: bool) -> None:
        if self._fed:
            self._state = self.look_ahead.state_dict(collective=collective)
        for _, optimizer in self._fed.values():
            optimizer.look_ahead = None
        self._fed, self._loss = {}, None
        self.look_ahead.forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A checkpoint that was loaded for a test is none for the next training."""
        if stage != "fit":
            self.look_ahead.drop_restored()

    def state_dict(self) -> dict[str, Any]:
        """The previous batch while it is small; everything else is in the optimizer's state."""
        return self.look_ahead.state_dict() if self._fed else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's state; the batch moves to its device when training starts."""
        self._state = state_dict
        if state_dict:
            self.look_ahead.load_state_dict(state_dict)


_KEYS = {"loss": "loss_lookahead", "value": "Q"}
