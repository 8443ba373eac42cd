"""The learning rates of one optimizer, adapted after the step that they made."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext.callbacks._apo_options import WEIGHT, NoLoss, RateOptions, small_batch_weight
from lightning_ext.functional import (
    ProximalObjective,
    inner_products,
    rmsprop_log_step,
    secant_log_step,
    sgd_log_step,
    trust_region_weight,
)

REJECTED = 0.5  # factor on step and learning rate when a look-ahead is not finite


@dataclass(frozen=True)
class Block:
    """Parameters that share one learning rate."""

    name: str
    group: int
    params: list[Tensor]


@dataclass
class Pending:
    """A step that is being made: the old weights, and what asks about them."""

    objective: ProximalObjective | None
    params: list[Tensor]
    old: list[Tensor]
    grads: list[Tensor] | None
    skippable: bool


def blocks_of(optimizer: Optimizer, names: dict[int, str], by_layer: bool) -> list[Block]:
    """One block per parameter group, or per group and layer (the module that owns the parameters)."""
    blocks: dict[tuple[int, str], Block] = {}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            layer = names.get(id(param), "parameters").rpartition(".")[0] or "root"
            key = (index, layer if by_layer else str(index))
            blocks.setdefault(key, Block(key[1], index, [])).params.append(param)
    return list(blocks.values())


def _own_rates(optimizer: Optimizer) -> None:
    """Give each group its own tensor: torch puts one learning rate, given as a tensor, into all groups."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if group["lr"].data_ptr() in seen:
                group["lr"] = group["lr"].clone()
            seen.add(group["lr"].data_ptr())


class RateController:
    """Adapts the learning rates of one optimizer.

    ``before_step`` and ``after_step`` stand around ``optimizer.step``. The learning rate of a parameter group lives in
    ``param_groups``; ``multiplier`` holds what cannot live there: a factor per layer, or per group beside a scheduler.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        index: int,
        names: dict[int, str],
        options: RateOptions,
        *,
        beside_scheduler: bool,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        self.optimizer, self.index, self.options, self.reduce = optimizer, index, options, reduce
        self.names = names
        self.blocks = blocks_of(optimizer, names, options.granularity == "layer")
        _own_rates(optimizer)
        self.by_layer = options.granularity == "layer"
        self.scales_group = beside_scheduler and not self.by_layer
        width = 1 if options.granularity == "global" else len(self.blocks)
        self.second_moment = torch.zeros(width, dtype=torch.float64)
        self.multiplier = torch.ones(len(self.blocks), dtype=torch.float64)
        self.lam_f = WEIGHT if options.lam_f is None or options.lam_f == "auto" else options.lam_f
        self._least_lam_f = 0.0
        self.count = self.meta_count = self.rms_count = self.rejections = 0
        self.report: dict[str, float] = {}
        self.paused = False  # another component has taken the learning rate over
        self._pending: Pending | None = None
        self._carried: tuple[list[Tensor], list[float]] | None = None  # the last step, and the rates that made it
        self._scheduled: list[Any] = []
        self.made_at: list[float] = []

    # -- learning rates

    def rates(self) -> list[float]:
        """The effective learning rate of every block."""
        groups = self.optimizer.param_groups
        base = [float(group["lr"]) for group in groups] if not self._scheduled else [float(r) for r in self._scheduled]
        return [base[b.group] * float(m) for b, m in zip(self.blocks, self.multiplier, strict=True)]

    def _scale(self, ratios: Sequence[float]) -> None:
        """Multiply the blocks' learning rates."""
        for i, (block, ratio) in enumerate(zip(self.blocks, ratios, strict=True)):
            if ratio == 1.0:
                continue
            if self.by_layer or self.scales_group:
                self.multiplier[i] *= ratio
                if self._scheduled:  # within a step that is still to be made
                    self._set(block.group, self._scheduled[block.group] * float(self.multiplier[i]))
            else:
                self._set(block.group, float(self.optimizer.param_groups[block.group]["lr"]) * ratio)

    def _set(self, group: int, rate: Any) -> None:
        """Keep the kind of number: fused and capturable optimizers may hold the learning rate as a tensor."""
        entry = self.optimizer.param_groups[group]
        if isinstance(entry["lr"], Tensor):
            entry["lr"].fill_(float(rate))
        else:
            entry["lr"] = float(rate)

    def enter_step(self) -> None:
        """Put the multiplier on top of what the scheduler asks for, for the length of one step."""
        if self.scales_group and not self._scheduled:
            self._scheduled = [float(group["lr"]) for group in self.optimizer.param_groups]
            for block, multiplier in zip(self.blocks, self.multiplier, strict=True):
                self._set(block.group, self._scheduled[block.group] * float(multiplier))

    def leave_step(self) -> None:
        """Remember the rates of the step, and give the scheduler its own number back."""
        self.made_at = self.rates()
        scheduled, self._scheduled = self._scheduled, []
        for group, rate in enumerate(scheduled):
            self._set(group, rate)

    def _follow_groups(self) -> None:
        """Take parameter groups in that were added since, as gradual unfreezing does."""
        if len(self.optimizer.param_groups) > self.blocks[-1].group + 1:
            self.blocks = blocks_of(self.optimizer, self.names, self.by_layer)
            new = len(self.blocks) - len(self.multiplier)
            self.multiplier = torch.cat([self.multiplier, torch.ones(new, dtype=torch.float64)])
            if self.options.granularity != "global":
                self.second_moment = torch.cat([self.second_moment, torch.zeros(new, dtype=torch.float64)])
            self._carried = None
            _own_rates(self.optimizer)

    # -- the step

    @property
    def warming_up(self) -> bool:
        """Whether the next step is one of the first ``warmup_steps``."""
        return self.count < self.options.warmup_steps

    @property
    def due(self) -> bool:
        """Whether the next step is followed by a meta-step."""
        return not self.paused and (self.warming_up or self.count % self.options.every_n_steps == 0)

    @property
    def uses_outputs(self) -> bool:
        return self.lam_f > 0

    @property
    def _weight(self) -> float:
        """What the change of the outputs of the coming step weighs."""
        given = isinstance(self.options.lam_f, (int, float))
        return self.lam_f if given else max(self.lam_f, self._least_lam_f)

    @property
    def needs_gradient(self) -> bool:
        """Whether the meta-step compares the slopes at both ends of the step."""
        return self.options.loss_batch == "same" and (self.warming_up or self.options.meta_optimizer == "secant")

    def before_step(
        self,
        make_objective: Callable[[], ProximalObjective | None],
        grad_scale: float,
        skippable: bool,
        examples: int | None = None,
    ) -> None:
        """The gradient is there, the weights have not moved yet; a gradient scaler may still skip the step.

        ``examples``: how many the gradient is the mean of, where that is known.
        """
        self._pending = None
        self._follow_groups()
        params = [p for block in self.blocks for p in block.params if p.grad is not None and p.requires_grad]
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise RuntimeError(
                f"APOLearningRate needs dense gradients, and optimizer {self.index} has sparse ones. Use "
                "nn.Embedding(..., sparse=False), or leave it out with optimizers=[...]."
            )
        if self._carried is not None and params:
            self._meta_step_on_next_gradient(grad_scale)
        objective = None
        self._least_lam_f = small_batch_weight(examples)
        if self.due and params and self.options.loss_batch == "same":
            objective = make_objective()
            if objective is not None:
                objective.anchor(evaluate_loss=False)
        watched = objective is not None or (self.due and self.options.loss_batch == "next")
        if params and (watched or (self.by_layer and not self.paused)):
            grads = None
            if objective is not None and self.needs_gradient:
                grads = [p.grad.detach() / grad_scale for p in params if p.grad is not None]
            old = [p.detach().clone() for p in params]
            self._pending = Pending(objective, params, old, grads, skippable)

    @torch.no_grad()
    def after_step(self) -> None:
        """The weights have moved: look, adapt, and move them again in proportion."""
        pending, self._pending = self._pending, None
        if pending is not None:
            moved = list(torch._foreach_sub([p.detach() for p in pending.params], pending.old))
            if self.by_layer and not self.paused:
                self._rescale(pending.params, moved, [float(m) for m in self.multiplier])
            if pending.objective is not None:
                self._look(pending, moved, pending.objective)
            elif self.due and self.options.loss_batch == "next":
                self._carry(pending.params, moved)
        self.count += 1

    def _rescale(self, params: list[Tensor], moved: list[Tensor], ratios: Sequence[float]) -> None:
        r"""Scale the step of every block, :math:`\theta \leftarrow \theta_t + r \Delta`, and :math:`\Delta` with it."""
        where = {id(p): ratio for block, ratio in zip(self.blocks, ratios, strict=True) for p in block.params}
        for ratio in set(ratios) - {1.0}:
            chosen = [(p, m) for p, m in zip(params, moved, strict=True) if where[id(p)] == ratio]
            if chosen:
                torch._foreach_add_([p for p, _ in chosen], [m for _, m in chosen], alpha=ratio - 1.0)
                torch._foreach_mul_([m for _, m in chosen], ratio)

    def _per_block(self, params: Sequence[Tensor], products: Tensor) -> Tensor:
        """Sum one number per parameter within each block, in float64 where the device has it."""
        where = {id(p): i for i, block in enumerate(self.blocks) for p in block.params}
        wide = products.to(torch.float32 if products.device.type == "mps" else torch.float64)
        index = torch.tensor([where[id(p)] for p in params], device=wide.device)
        return wide.new_zeros(len(self.blocks)).index_add(0, index, wide)

    def _look(self, pending: Pending, moved: list[Tensor], objective: ProximalObjective) -> None:
        params, lam_w = pending.params, self.options.lam_w
        if pending.skippable and not any(bool(m.any()) for m in moved):
            return  # fused optimizers are called even where the scaler has found infinite gradients
        # Without lam_w in the gradient: its part of the slopes follows from the squares, a pass over the weights less.
        try:
            step = objective.gradient(params, moved, lam_f=self._weight, lam_w=0.0)
        except NoLoss:  # training_step had none for this micro-batch either
            return
        slopes = [self._per_block(params, inner_products(step.gradient, moved) + lam_w * step.squares)]
        if pending.grads is not None:
            slopes.append(self._per_block(params, inner_products(pending.grads, moved)))
        wide = slopes[0].dtype
        scalars = torch.stack([t.to(wide) for t in (step.loss, step.fsd, step.wsd)])
        # Sums over parameters are linear, so the mean of the ranks' products is the product with the mean gradient; a
        # rank that is not finite makes the mean so, and all ranks decide alike.
        numbers = self.reduce(torch.cat([*slopes, scalars])).double().cpu()
        n = len(self.blocks)
        loss, fsd, wsd = numbers[-3:].tolist()
        value = loss + self._weight * fsd + lam_w * wsd
        if not numbers.isfinite().all():
            if pending.skippable and numbers[-3:].isfinite().all():
                return  # the gradient overflowed at the current loss scale, the look-ahead itself is sound
            self._reject(pending, moved, loss, value)
            return
        if wsd == 0.0:
            self._grow_rounded_step(params)
            return
        before = numbers[n : 2 * n] if pending.grads is not None else None
        ratios = self._adapt(numbers[:n], before)
        if self.options.apply == "before":
            self._rescale(params, moved, ratios)
        if self.options.lam_f == "auto" and not self.warming_up:  # a rate still far from its place says nothing
            self.lam_f = trust_region_weight(self.lam_f, fsd, self.options.trust_radius * max(abs(loss), 1e-12))
        self._tell(loss, fsd, wsd, value, numbers[:n])

    def _grow_rounded_step(self, params: Sequence[Tensor]) -> None:
        """In 16 bits a step may be too short to move any weight: a longer one will, unless there is no gradient."""
        high = self.options.lr_bounds[1]
        if self.options.meta_lr > 0 and any(p.grad is not None and bool(p.grad.any()) for p in params):
            self._scale([min(2.0, high / rate) if 0 < rate < high else 1.0 for rate in self.rates()])

    def _adapt(self, slope: Tensor, slope_before: Tensor | None, made_by: list[float] | None = None) -> list[float]:
        """Make a meta-step; returns by how much every block's learning rate changed.

        ``made_by``: the rates of the step that the slope belongs to, where they are not those of now.
        """
        options, n = self.options, len(self.blocks)
        tied = options.granularity == "global"
        if tied:
            slope = slope.sum(0, keepdim=True)
            slope_before = None if slope_before is None else slope_before.sum(0, keepdim=True)
        self.meta_count += 1
        ceiling = self._ceiling()
        nominal = torch.tensor(self.rates(), dtype=torch.float64)
        rates = nominal.clamp_max(ceiling)
        if options.meta_lr == 0:
            change = torch.zeros_like(slope)
        elif slope_before is not None:
            change = secant_log_step(slope_before, slope)
        elif options.space == "linear":
            made = rates if made_by is None else torch.tensor(made_by, dtype=torch.float64)
            tiny = torch.finfo(torch.float64).tiny
            ratio = 1 - options.meta_lr * slope.expand(n) / (made * rates).clamp_min(tiny)
            change = ratio.clamp_min(tiny).log()
        elif options.meta_optimizer == "sgd":
            change = sgd_log_step(slope, options.meta_lr)
        else:
            self.rms_count += 1  # of its own: the second moment stands still while rates warm up
            change, self.second_moment = rmsprop_log_step(slope, self.second_moment, self.rms_count, options.meta_lr)
        change = change.clamp(-options.max_log_step, options.max_log_step).expand(n)
        low, high = options.lr_bounds
        # A rate that a schedule has taken beyond a bound is not pulled back: the factor would leap.
        wanted = rates * change.exp()
        wanted = wanted.maximum(rates.clamp_max(low)).minimum(rates.clamp_min(min(high, ceiling)))
        moves = (change != 0) & (rates > 0)  # a schedule may hold a group at 0
        self._scale([float(w / r) if m else 1.0 for m, w, r in zip(moves, wanted, nominal, strict=True)])
        return [float(w / r) if m else 1.0 for m, w, r in zip(moves, wanted, rates, strict=True)]

    def _ceiling(self) -> float:
        r"""Adafactor takes :math:`\min(\eta, 1 / \sqrt t)`; beyond that its step is free of the learning rate."""
        if self.by_layer or type(self.optimizer).__name__ != "Adafactor":
            return math.inf
        steps = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return max(steps) ** -0.5 if steps else math.inf

    def _reject(self, pending: Pending, moved: list[Tensor], loss: float, value: float) -> None:
        """Take the step back to a shorter one, or wholly where it led to nothing finite."""
        if self.options.meta_lr == 0:
            return
        self.rejections += 1
        if all(bool(m.isfinite().all()) for m in moved):
            self._rescale(pending.params, moved, [REJECTED] * len(self.blocks))
        else:
            if not all(bool(old.isfinite().all()) for old in pending.old):
                rates = ", ".join(f"{rate:.3g}" for rate in self.rates())
                raise RuntimeError(
                    f"APOLearningRate: the weights of optimizer {self.index} were not finite any more before the "
                    f"look-ahead at step {self.count}; its learning rate is {rates}. Training broke down "
                    "between two meta-steps: raise lam_f (more cautious), lower every_n_steps, or lower the upper end "
                    "of lr_bounds."
                )
            for param, old in zip(pending.params, pending.old, strict=True):
                param.copy_(old)
                state = self.optimizer.state.get(param, {})
                if any(isinstance(v, Tensor) and not v.isfinite().all() for v in state.values()):
                    del self.optimizer.state[param]  # its averages can never recover
        low = self.options.lr_bounds[0]
        self._scale([max(REJECTED, low / rate) if rate > low else 1.0 for rate in self.rates()])
        self._tell(loss, math.nan, math.nan, value, None)

    # -- hypergradient: the slope on the next batch's gradient

    def _carry(self, params: list[Tensor], moved: list[Tensor]) -> None:
        moves = {id(p): m for p, m in zip(params, moved, strict=True)}
        every = [p for block in self.blocks for p in block.params]
        self._carried = [moves.get(id(p), torch.zeros_like(p)) for p in every], self.made_at

    def _meta_step_on_next_gradient(self, grad_scale: float) -> None:
        (carried, made_by), self._carried = self._carried or ([], []), None
        every = [p for block in self.blocks for p in block.params]
        pairs = [(p, m) for p, m in zip(every, carried, strict=True) if p.grad is not None]
        params, moved = [p for p, _ in pairs], [m for _, m in pairs]
        grads = [p.grad.detach() / grad_scale for p in params if p.grad is not None]
        square = inner_products(moved, moved)
        slope = self._per_block(params, inner_products(grads, moved) + self.options.lam_w * square)
        numbers = self.reduce(slope).double().cpu()
        wsd = float(square.sum()) / 2
        if wsd == 0.0 or not numbers.isfinite().all():
            return  # no step was made, or the new gradient is not finite and says nothing about the last step
        self._adapt(numbers, None, made_by)
        self._tell(math.nan, math.nan, wsd, math.nan, numbers)

    # -- what is seen and saved

    def _tell(self, loss: float, fsd: float, wsd: float, value: float, slope: Tensor | None) -> None:
        rates = self.rates()
        named = {f"apo/lr/{self.index}/{b.name}": rate for b, rate in zip(self.blocks, rates, strict=True)}
        found = {"apo/loss_lookahead": loss, "apo/fsd": fsd, "apo/wsd": wsd, "apo/Q": value}
        if slope is not None:
            found["apo/meta_grad"] = float(slope.sum())
        if self.options.lam_f is None or self.options.lam_f == "auto":
            found["apo/lam_f"] = self._weight
        suffix = f"/{self.index}" if self.index else ""
        kept = {f"{k}{suffix}": v for k, v in found.items() if not math.isnan(v)}
        self.report = {**named, **kept, f"apo/rejected{suffix}": float(self.rejections)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next meta-step depends on; learning rates themselves are in the optimizer's state."""
        return {
            "count": self.count,
            "meta_count": self.meta_count,
            "rms_count": self.rms_count,
            "rejections": self.rejections,
            "lam_f": float(self.lam_f),
            "second_moment": self.second_moment.clone(),
            "multiplier": self.multiplier.clone(),
            "carried": None if self._carried is None else [m.detach().cpu().clone() for m in self._carried[0]],
            "made_by": None if self._carried is None else list(self._carried[1]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["multiplier"]) > len(self.blocks) or len(state["second_moment"]) > len(self.second_moment):
            raise ValueError(
                f"the checkpoint has {len(state['multiplier'])} learning rates for optimizer {self.index}, this run "
                f"has {len(self.blocks)}: granularity, optimizers or param groups have changed."
            )
        self.count, self.meta_count, self.rejections = state["count"], state["meta_count"], state["rejections"]
        self.rms_count = state["rms_count"]
        self.second_moment[: len(state["second_moment"])] = state["second_moment"]  # groups may have been added since
        self.multiplier[: len(state["multiplier"])] = state["multiplier"]
        if self.options.lam_f == "auto":
            self.lam_f = state["lam_f"]
        every = [p for block in self.blocks for p in block.params]
        carried = state["carried"]
        if carried is not None and len(carried) == len(every):
            self._carried = [m.to(p.device) for p, m in zip(every, carried, strict=True)], state["made_by"]
