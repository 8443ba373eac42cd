"""Learning rates that find themselves while a Trainer trains."""

import math
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ext._lightning import Callback, LightningModule, MisconfigurationException, Trainer, refuse_sharded
from lightning_ext.callbacks._apo_divergence import Divergence
from lightning_ext.callbacks._apo_linear import check_linear
from lightning_ext.callbacks._apo_lookahead import (
    BatchFn,
    LookAhead,
    check_indices,
    chosen_optimizers,
    publish,
)
from lightning_ext.callbacks._apo_options import RateOptions, as_bounds, check, one_of
from lightning_ext.callbacks._apo_rates import RateController

__all__ = ["APOLearningRate", "HypergradientLR"]


class APOLearningRate(Callback):
    r"""Adapt the learning rates of the optimizers that a module already has, while it trains.

    After every K-th optimizer step :math:`\theta' = \theta + \Delta` the callback looks at

    .. math:: Q = J_B(\theta') + \lambda_F \, D_F(\theta', \theta; B') + \tfrac{\lambda_W}{2} \lVert \Delta \rVert^2

    where :math:`J_B` is the training loss on the batch of that step, :math:`D_F` the divergence between the outputs
    before and after on another batch :math:`B'`, and moves each learning rate :math:`\eta` along
    :math:`\mathrm d Q / \mathrm d \log \eta = \langle \nabla_{\theta'} Q, \Delta \rangle`. The step itself is then
    rescaled to the new learning rate. This needs nothing of the optimizer but that its step is linear in ``lr``, so
    momentum, weight decay, clipping, accumulation, mixed precision and fused kernels are part of :math:`\Delta`.

    Accepted: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, Adafactor, Muon, and any other that
    proves linear on a tiny tensor. One forward and backward pass of the module's ``training_step`` is repeated per
    meta-step with logging muted, the same dropout masks, and random states, buffers, modes and metrics put back.

    Args:
        lam_f: :math:`\lambda_F \ge 0`, the weight of the change of the outputs; larger is more cautious. Default 0.3
            where the gradient is the mean of a hundred examples or more, and :math:`0.3\,(100/B)^2` where it is of
            :math:`B` fewer (over ranks and accumulation; 0.3 where the batch's tensors disagree on their number of
            rows): a long step can fit a small batch and nothing else. ``"auto"`` steers it so that the change per step
            is ``trust_radius`` times the loss, not below that weight for small batches.
        lam_w: :math:`\lambda_W \ge 0`, the weight of the change of the weights. It holds what the outputs do not see:
            weights before a normalisation, whose scale changes no output.
        trust_radius: for ``lam_f="auto"`` the wanted :math:`D_F / J_B`, above 0.
        every_n_steps: K, optimizer steps per meta-step, at least 1.
        warmup_steps: for so many first steps a secant meta-step follows each of them, so that a start far off is
            corrected within an epoch. 0 leaves that out.
        meta_lr: step size of the meta-optimizer in :math:`\log \eta`, at least 0; at 0 training is left as it is.
        meta_optimizer: ``"rmsprop"`` (the paper's), ``"sgd"``, or ``"secant"`` throughout.
        max_log_step: bound on :math:`|\Delta \log \eta|` of a meta-step, above 0.
        granularity: one learning rate per ``"group"`` of the optimizer, one factor for all groups (``"global"``), or
            one per ``"layer"``. Layers keep their factor beside ``param_groups``, for a copy of the weights per step.
        lr_bounds: smallest and largest learning rate.
        apply: ``"before"`` rescales the step just made, as in the paper; ``"after"`` changes the next one.
        loss_batch: ``"same"``, or ``"next"`` for the slope on the gradient of the next batch, which costs no extra pass
            and needs ``lam_f=0``: hypergradient descent.
        fsd_batch: where :math:`B'` comes from: the ``"previous"`` batch, random examples of the training ``"loader"``'s
            data, or of another DataLoader's.
        fsd_fraction: the part of :math:`B'` that is used, in (0, 1].
        loss_fraction: the part of :math:`B` on which the loss after the step is taken, in (0, 1]; a smaller one makes
            look-aheads on large batches cheaper, and noisier. Secant meta-steps take all of it.
        output_fn: ``(module, batch) -> outputs``; default ``module(batch[0])``.
        loss_fn: ``(module, batch) -> loss``; default the module's ``training_step``. Needed under manual optimisation.
        divergence: ``"kl"``, ``"bernoulli_kl"``, ``"mse"``, ``"squared_error"``, a function ``(new, old) -> scalar``,
            or ``"auto"``: recognised by the value of the loss. ``"kl"`` has the classes last.
        optimizers: ``"all"``, or the indices of those to adapt. With several under manual optimisation use one callback
            for each, with its own ``loss_fn``.
        on_scheduler: what to do with a learning-rate scheduler on the same optimizer: ``"error"``, or ``"multiply"``: a
            learned factor on top of the schedule (``LearningRateMonitor`` then shows the schedule's part).
        seed: of the dropout masks on :math:`B'` and of its draws.

    Raises:
        ValueError: For arguments out of range, where the callback is made.
        MisconfigurationException: When training starts: an optimizer that is not linear in lr (LBFGS, Rprop, ASGD,
            schedule-free, Prodigy, D-Adaptation), a scheduler without ``on_scheduler="multiply"``, FSDP, DeepSpeed,
            manual optimisation without ``loss_fn``. At the first look-ahead: outputs or a loss that cannot be had.

    Logs, of the last meta-step, whenever the Trainer logs and at the end of an epoch:
    ``apo/lr/<optimizer>/<group or layer>``, ``apo/Q``, ``apo/loss_lookahead``, ``apo/fsd`` (nats, or squared units),
    ``apo/wsd``, ``apo/meta_grad``, ``apo/rejected`` (count), and ``apo/lam_f`` unless it was given. Optimizers after
    the first have their index appended.

    Note:
        Cost per meta-step: one forward and backward pass on the part of :math:`B`, two forward and one backward on
        that of :math:`B'`, and while it lasts three copies of the weights. Distributed: every rank looks at its own
        batches; a small vector is averaged per meta-step, so that learning rates and weights stay equal on ranks, and a
        look-ahead that is not finite on one rank is taken back on all. With accumulation :math:`B` is the last
        micro-batch. Interrupted and resumed equals uninterrupted where the loaders resume; the previous batch is saved
        up to 16 MiB over all ranks, beyond that the first meta-step after a resume may be left out.

        A ``StochasticWeightAveraging`` callback takes the learning rate over when it begins; from there on this one
        stands back. Averages of the weights (``EMAWeightAveraging``) need nothing.

    Source: Bae, Vicol, HaoChen, Grosse 2022, "Amortized Proximal Optimization", arXiv:2203.00089, sections 3 and 4;
    clipping, rejection, the secant warm-up and ``lam_f="auto"`` are ours.

    >>> callback = APOLearningRate(every_n_steps=10)
    >>> callback.options.every_n_steps
    10
    """

    def __init__(
        self,
        lam_f: float | Literal["auto"] | None = None,
        lam_w: float = 0.1,
        trust_radius: float = 0.05,
        every_n_steps: int = 10,
        warmup_steps: int = 50,
        meta_lr: float = 0.1,
        meta_optimizer: Literal["rmsprop", "sgd", "secant"] = "rmsprop",
        max_log_step: float = math.log(2),
        granularity: Literal["global", "group", "layer"] = "group",
        lr_bounds: tuple[float, float] = (1e-8, 10.0),
        apply: Literal["before", "after"] = "before",
        loss_batch: Literal["same", "next"] = "same",
        fsd_batch: Literal["previous", "loader"] | DataLoader = "previous",  # type: ignore[type-arg]
        fsd_fraction: float = 0.125,
        loss_fraction: float = 1.0,
        output_fn: BatchFn | None = None,
        loss_fn: BatchFn | None = None,
        divergence: str | Divergence = "auto",
        optimizers: Literal["all"] | list[int] = "all",
        on_scheduler: Literal["error", "multiply"] = "error",
        seed: int = 0,
    ) -> None:
        self.options = RateOptions(
            lam_f=lam_f,
            lam_w=lam_w,
            trust_radius=trust_radius,
            every_n_steps=every_n_steps,
            warmup_steps=warmup_steps if loss_batch == "same" else 0,
            meta_lr=meta_lr,
            meta_optimizer=meta_optimizer,
            max_log_step=max_log_step,
            granularity=granularity,
            lr_bounds=as_bounds(lr_bounds),
            apply=apply,
            loss_batch=loss_batch,
            space="log",
        )
        check(self.options)
        one_of("on_scheduler", on_scheduler, ("error", "multiply"))
        self.optimizers, self.on_scheduler = check_indices(optimizers), on_scheduler
        self.look_ahead = LookAhead(
            type(self).__name__,
            output_fn=output_fn,
            loss_fn=loss_fn,
            divergence=divergence,
            fsd_batch=fsd_batch,
            fsd_fraction=fsd_fraction,
            loss_fraction=loss_fraction,
            seed=seed,
        )
        self._controllers: dict[int, RateController] = {}
        self._hooks: list[Any] = []
        self._state: dict[str, Any] = {}
        self._restored = False
        self._schedulers: set[int] = set()

    @property
    def state_key(self) -> str:
        """Tells two instances apart by the optimizers they adapt."""
        return self._generate_state_key(optimizers=self.optimizers)

    # -- setting up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard parameters."""
        if stage == "fit":
            refuse_sharded(trainer, type(self).__name__, "moves and restores whole parameters")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module, its optimizers and schedulers before anything runs."""
        self._check_alone(trainer)
        if self.options.loss_batch == "same":
            self.look_ahead.check(pl_module)
        for index in chosen_optimizers(trainer, self.optimizers, type(self).__name__):
            optimizer = trainer.optimizers[index]
            check_linear(optimizer, type(self).__name__)
            self._check_scheduler(trainer, optimizer)
            self._check_rates(optimizer, index)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand around every step of the chosen optimizers; their state is restored by now."""
        self._release()
        names = {id(p): name.replace("_orig_mod.", "") for name, p in pl_module.named_parameters()}
        self._schedulers = {id(config.scheduler) for config in trainer.lr_scheduler_configs}
        self.look_ahead.start(trainer, pl_module)
        for index in chosen_optimizers(trainer, self.optimizers, type(self).__name__):
            optimizer = trainer.optimizers[index]
            controller = RateController(
                optimizer,
                index,
                names,
                self.options,
                beside_scheduler=self.on_scheduler == "multiply",
                reduce=lambda t: _mean(trainer, t),
            )
            if self._restored and str(index) in self._state.get("optimizers", {}):
                controller.load_state_dict(self._state["optimizers"][str(index)])
            self._controllers[id(optimizer)] = controller
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_, c=controller: c.enter_step()))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_, c=controller: self._after(c)))
        self._restored = False

    def _check_alone(self, trainer: Trainer) -> None:
        """Two of them on one optimizer would each rescale what the other has just rescaled."""
        name = type(self).__name__
        mine = set(chosen_optimizers(trainer, self.optimizers, name))
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, APOLearningRate) and other is not self:
                both = mine & set(chosen_optimizers(trainer, other.optimizers, type(other).__name__))
                if both:
                    raise MisconfigurationException(
                        f"{name} and {type(other).__name__} both adapt optimizer {min(both)}. Keep one of them, or "
                        "give each its own with optimizers=[...]."
                    )

    def _check_scheduler(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self.on_scheduler == "multiply":
            return
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer:
                raise MisconfigurationException(
                    f"{type(self).__name__}: {type(config.scheduler).__name__} sets the learning rate of the same "
                    f"{type(optimizer).__name__}. Remove the scheduler, or pass on_scheduler='multiply' to learn a "
                    "factor on top of it."
                )

    def _check_rates(self, optimizer: Optimizer, index: int) -> None:
        low, high = self.options.lr_bounds
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            raise MisconfigurationException(
                f"{type(self).__name__}: optimizer {index} has complex parameters, whose slopes are not defined here. "
                "Train their real view (torch.view_as_real), or leave it out with optimizers=[...]."
            )
        trainable = any(p.requires_grad for group in optimizer.param_groups for p in group["params"])
        if not trainable:
            raise MisconfigurationException(f"{type(self).__name__}: optimizer {index} has no trainable parameter.")
        if self.on_scheduler == "error" and not all(low <= rate <= high for rate in rates):
            raise MisconfigurationException(
                f"{type(self).__name__}: optimizer {index} starts with lr={rates}, outside lr_bounds=({low}, {high}). "
                "Start inside the bounds, above 0, or widen them."
            )

    # -- training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep B, and the random state with which the training pass on it will start."""
        due = any(controller.due for controller in self._controllers.values())
        if {id(config.scheduler) for config in trainer.lr_scheduler_configs} != self._schedulers:
            self._stand_back()
        self.look_ahead.observe(batch, batch_idx, pl_module.device, keep_rng=due)

    def _stand_back(self) -> None:
        if self.on_scheduler == "error" and not all(c.paused for c in self._controllers.values()):
            rank_zero_warn(
                f"{type(self).__name__}: another callback has installed a learning-rate scheduler (weight averaging "
                "does when it begins); the learning rate is left to it from here on."
            )
            for controller in self._controllers.values():
                controller.paused = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the outputs before the weights move."""
        controller = self._controllers.get(id(optimizer))
        if controller is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        rows = self.look_ahead.rows if controller.due else None
        still_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        controller.before_step(
            lambda: self.look_ahead.objective(
                trainer,
                pl_module,
                outputs=controller.uses_outputs,
                address=(controller.index, controller.count),
                whole=controller.needs_gradient,
            ),
            grad_scale=float(scaler.get_scale()) if scaler is not None and still_scaled else 1.0,
            skippable=scaler is not None,
            examples=None if rows is None else rows * trainer.accumulate_grad_batches * trainer.world_size,
        )

    def _after(self, controller: RateController) -> None:
        controller.leave_step()
        controller.after_step()
        self.look_ahead.step_made = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the last meta-step found, and keep the batch for the next one."""
        self.look_ahead.batch_done(keep=self.options.lam_f != 0)
        if publish(trainer, {key: value for c in self._controllers.values() for key, value in c.report.items()}):
            for controller in self._controllers.values():
                controller.report = {}

    # -- leaving

    def _release(self, collective: bool = True) -> None:
        if self._controllers:
            self._state = self._current_state(collective)
        for controller in self._controllers.values():
            controller.leave_step()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._controllers.clear()
        self.look_ahead.forget()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizers alone again."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone again, without a collective that a broken rank could not join."""
        self._release(collective=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers alone again; a checkpoint that was loaded for a test is none for the next training."""
        self._release()
        if stage != "fit":
            self._restored = False
            self.look_ahead.drop_restored()

    # -- state

    def _current_state(self, collective: bool = True) -> dict[str, Any]:
        return {
            "optimizers": {str(c.index): c.state_dict() for c in self._controllers.values()},
            "look_ahead": self.look_ahead.state_dict(collective=collective),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counters, moments, factors, and the previous batch while it is small: tensors and plain values only."""
        return self._current_state() if self._controllers else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint's state; it goes to the optimizers when training starts."""
        self._state = state_dict
        self._restored = bool(state_dict)
        if state_dict:
            self.look_ahead.load_state_dict(state_dict["look_ahead"])


class HypergradientLR(APOLearningRate):
    r"""Hypergradient descent: the learning rate follows the product of successive gradients.

    .. math:: \eta \leftarrow \eta + \beta \, \langle g_{t+1}, d_t \rangle, \qquad \theta_{t+1} = \theta_t - \eta d_t

    It is :class:`APOLearningRate` without proximal terms, with the loss of the next batch, at every step. One update
    per parameter group, kept within bounds.

    Args:
        meta_lr: :math:`\beta \ge 0`, in units of the learning rate.
        multiplicative: update :math:`\log \eta` by :math:`\beta \eta \langle g_{t+1}, d_t \rangle` instead, which keeps
            :math:`\eta` positive by itself.
        max_log_step: bound on the change of :math:`\log \eta` per step; infinite by default.
        granularity: as in :class:`APOLearningRate`.
        lr_bounds: smallest and largest learning rate.
        optimizers: as in :class:`APOLearningRate`.
        on_scheduler: as in :class:`APOLearningRate`.

    Raises:
        ValueError: For arguments out of range.

    Logs as :class:`APOLearningRate`, without loss and discrepancies.

    Note:
        Cost: two copies of the weights and one inner product per step, no extra pass. The last step is part of the
        checkpoint, a copy of the weights. Distributed: gradients are equal on ranks already.

    Source: Baydin et al. 2018, arXiv:1703.04782, equation 8; as a special case in the setting of arXiv:2203.00089.

    >>> HypergradientLR(meta_lr=1e-3).options.loss_batch
    'next'
    """

    def __init__(
        self,
        meta_lr: float = 1e-3,
        multiplicative: bool = False,
        max_log_step: float = math.inf,
        granularity: Literal["global", "group", "layer"] = "group",
        lr_bounds: tuple[float, float] = (1e-8, 10.0),
        optimizers: Literal["all"] | list[int] = "all",
        on_scheduler: Literal["error", "multiply"] = "error",
    ) -> None:
        super().__init__(
            lam_f=0.0,
            lam_w=0.0,
            every_n_steps=1,
            meta_lr=meta_lr,
            meta_optimizer="sgd",
            max_log_step=max_log_step,
            granularity=granularity,
            lr_bounds=lr_bounds,
            loss_batch="next",
            optimizers=optimizers,
            on_scheduler=on_scheduler,
        )
        if not multiplicative:
            self.options = RateOptions(**{**vars(self.options), "space": "linear"})


def _mean(trainer: Trainer, numbers: Tensor) -> Tensor:
    reduced = trainer.strategy.reduce(numbers, reduce_op="mean")
    return torch.as_tensor(reduced)
