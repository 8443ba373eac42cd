"""APO-P: an optimizer that learns a structured preconditioner while it trains, by matrix products alone."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ext.functional.apo import ProximalObjective, ProximalStep, inner_products
from lightning_ext.optim._apo_blocks import Block, Prepared, at_least_single, has_gradient
from lightning_ext.optim._apo_options import check_group

__all__ = ["APOPreconditioner"]

_MATRIX_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# A meta-step mends a small rise by itself, and a batch or a 16-bit loss shows one where there is none: halving at
# every rise keeps the steps of noisy training far too short.
_TOLERATED_RISE = 0.1
_META_LR = {"multiplicative": 0.3, "adam": 3e-3}
_STEP_LIMIT = 3.0
_PATIENCE = 3  # due steps without an objective before the warning


class APOPreconditioner(Optimizer):
    r"""Stochastic gradient descent with a learned preconditioner, :math:`\Delta = -\eta\,(P\,\hat m + w\,\theta)`.

    :math:`\hat m` is the bias-corrected moving average of the gradient, w the weight decay, and P has one block per
    weight matrix, :math:`P = (A \otimes B) \operatorname{diag}(\operatorname{vec} S)^2 (A \otimes B)^\top`, the
    identity at first: the first step is that of SGD with learning rate ``lr``. Every ``every_n_steps`` steps, if it is
    given a :class:`~lightning_ext.functional.ProximalObjective`, the optimizer looks one step ahead, takes the gradient
    of

    .. math:: Q = J_B(\theta + \Delta) + \lambda_F D_F(\theta + \Delta, \theta; B')
        + \tfrac{\lambda_W}{2} \lVert \Delta \rVert^2

    with respect to A, B and S in closed form, moves them, and makes the step with the new preconditioner (with
    ``apply="after"``, the next one). If Q exceeds :math:`J_B(\theta)` by more than a tenth or is not finite, P is
    halved instead. No matrix is inverted or decomposed, so everything runs in bfloat16 and float16 too.

    Args:
        params: a module, or what any optimizer takes: parameters, or groups of them. Given a module (also as
            ``{"params": module}``), the bias of a ``Linear`` or ``Conv`` layer is the last input column of its weight's
            matrix, embeddings get a diagonal, and frozen parameters are left out. Given parameters, those of fewer than
            two dimensions get a diagonal. A convolution's weight counts as ``(out, rest)``.
        lr: :math:`\eta > 0`. The preconditioner is relative to it and learns the length of the step: it follows a
            schedule's change with one of its own, so prefer a constant. While a group's is 0 its P stays as it is.
        lam_f: :math:`\lambda_F \ge 0`, weight of the function-space discrepancy; default 10, which small
            batches need: the loss on a batch just fitted says little. With hundreds of examples 2 is faster.
        lam_w: :math:`\lambda_W \ge 0`, weight of the weight-space discrepancy, which acts as damping.
        structure: ``"kron"`` (S a scalar), ``"ekfac"`` (S of the shape of the weight) or ``"diag"`` (S alone). With
            multiplicative updates ``"kron"`` holds :math:`AA^\top` and :math:`BB^\top`, see
            :func:`~lightning_ext.functional.kronecker_meta_step`.
        meta_lr: rate of the meta-updates, at least 0 and, for ``"multiplicative"``, below 1 (``"kron"``: below
            0.5), which in exact arithmetic keeps P positive; 16-bit products may turn its smallest eigenvalues
            slightly negative. 0 keeps P. Default 0.3 for ``"multiplicative"`` (take 0.03 for full batches at
            ``every_n_steps=1``), 0.003 for ``"adam"``.
        meta_update: ``"multiplicative"`` steps of known relative size on the group of invertible matrices, or
            ``"adam"`` on the entries as in the paper.
        momentum: decay of the moving average, in [0, 1).
        every_n_steps: steps between meta-updates, at least 1. ``lam_f``, ``lam_w``, ``apply`` and this one hold for
            all groups.
        weight_decay: decoupled, at least 0; part of the displacement that the objective sees.
        max_dim: a side wider than this gets a diagonal factor (``"kron"``) or none (``"ekfac"``).
        precond_dtype: dtype of the matrix products by name, such as ``"bfloat16"``; default that of the parameter. What
            is accumulated (factors, scales, norms, the moments of ``"adam"``) has float32 at least.
        apply: ``"before"`` makes the step with the new preconditioner, as in the paper; ``"after"`` keeps the step that
            was looked at and saves preconditioning a second time, the better choice at ``every_n_steps=10`` and wide
            layers. With ``every_n_steps=1`` on full batches it learned an ill-conditioned problem markedly slower.
        step_limit: a step, relative to ``lr``, moves no weight (with its bias) further than this multiple of the last
            look-ahead that was not rejected; at least 1, or ``None`` for no limit. Nothing judges the steps between two
            meta-steps, and a batch unlike the others may be the end of the training. Weight decay comes on top, a
            schedule that raises ``lr`` raises the limit, and with ``meta_lr=0`` there is none.

    Raises:
        ValueError: For arguments out of range, complex parameters, groups that differ in an option for all.
        RuntimeError: For sparse gradients.

    Attributes:
        look_ahead: an anchored :class:`~lightning_ext.functional.ProximalObjective` for the next step, which takes it
            away; the other way is ``step(look_ahead=...)``.
        last_meta_step: figures of the last meta-step (``loss``, ``loss_before`` where known, ``fsd``, ``wsd``,
            ``value``, ``slope`` :math:`= \mathrm d Q / \mathrm d \log \eta`, ``rejected``), or ``None``.

    Source: Bae, Vicol, HaoChen, Grosse 2022 (arXiv:2203.00089), section 4; the momentum and the multiplicative
    updates are ours.

    Note:
        Cost: two matrix products per weight and step (``"kron"``) or four (``"ekfac"``); a meta-step adds two forward
        and backward passes and six products (``"kron"``; ``"ekfac"`` as many and the cube of each side), with
        ``apply="before"`` those of a step more. Memory: A and B, a moving average, two more copies of the parameters
        during a meta-step; A once more where the weight's columns, bias included, are no multiple of eight, to which
        they are rounded up for speed, or the products have another dtype (then B too). A step with gradients that are
        not finite is left out, with a warning, as a ``GradScaler`` would do it. Distributed: what the objective returns
        is averaged over all ranks, so P stays equal on them and a meta-step is rejected on all or none; gradients are
        expected to be averaged already, as ``DistributedDataParallel`` does. Evaluate the objective on the module
        itself, not on its wrapper. Sharded parameters are not supported.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> optimizer = APOPreconditioner(net, lr=0.25)
    >>> (3 * net.weight).sum().backward()
    >>> optimizer.step()
    >>> net.weight.item()
    0.25
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.1,
        *,
        lam_f: float = 10.0,
        lam_w: float = 1e-3,
        structure: Literal["kron", "ekfac", "diag"] = "kron",
        meta_lr: float | None = None,
        meta_update: Literal["multiplicative", "adam"] = "multiplicative",
        momentum: float = 0.9,
        every_n_steps: int = 10,
        weight_decay: float = 0.0,
        max_dim: int = 4096,
        precond_dtype: str | None = None,
        apply: Literal["before", "after"] = "before",
        step_limit: float | None = _STEP_LIMIT,
    ) -> None:
        self.look_ahead: ProximalObjective | None = None
        self.last_meta_step: dict[str, float] | None = None
        self._bias_of: dict[Tensor, Tensor] = {}
        self._elementwise: set[Tensor] = set()
        self._prepared: dict[Tensor, Prepared] = {}
        self._missed = 0
        defaults = {
            "lr": lr,
            "lam_f": lam_f,
            "lam_w": lam_w,
            "structure": structure,
            "meta_lr": _META_LR.get(meta_update, 0.0) if meta_lr is None else meta_lr,
            "meta_update": meta_update,
            "momentum": momentum,
            "every_n_steps": every_n_steps,
            "weight_decay": weight_decay,
            "max_dim": max_dim,
            "precond_dtype": precond_dtype,
            "apply": apply,
            "step_limit": step_limit,
        }
        super().__init__([{"params": params}] if isinstance(params, nn.Module) else params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Keep which bias belongs to which weight."""
        kept = ("_bias_of", "_elementwise", "last_meta_step")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("step_limit", _STEP_LIMIT)  # states from before there was one
        self._prepared, self.look_ahead, self._missed = {}, None, 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, or of a module's parameters, with its own options."""
        group = dict(param_group)
        if isinstance(module := group["params"], nn.Module):
            group["params"] = self._of_module(module)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            check_group(added, self.param_groups[0])
        except ValueError:
            del self.param_groups[-1]
            raise
        added.setdefault("reference_lr", float(added["lr"]))
        added.setdefault("step", self.param_groups[0].get("step", 0))

    def _of_module(self, module: nn.Module) -> list[Tensor]:
        taken: set[Tensor] = set()
        for layer in module.modules():
            own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
            weight, bias = own.get("weight"), own.get("bias")
            if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and weight is not None:
                self._elementwise.add(weight)
            if not isinstance(layer, _MATRIX_MODULES) or weight is None or bias is None:
                continue
            if weight not in self._bias_of and bias not in taken:
                self._bias_of[weight] = bias
                taken.add(bias)
        trainable: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(f"the {type(module).__name__} given as params has no parameter that requires a gradient.")
        return trainable

    @property
    def meta_step_due(self) -> bool:
        """Whether the next step moves the preconditioner if it is given an objective."""
        first = self.param_groups[0]
        moves = any(group["lr"] > 0 for group in self.param_groups)  # a step of no length teaches nothing
        return bool(moves and first["step"] % first["every_n_steps"] == 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, look_ahead: ProximalObjective | None = None) -> Any:
        """Make a step, with a meta-step before it where one is due and an objective is at hand.

        Args:
            closure: evaluates the loss and its gradients; called once, with gradients enabled.
            look_ahead: the objective, anchored at the parameters of now; default the attribute ``look_ahead``, which
                may be set within the closure. It is used if :attr:`meta_step_due`, and let go in any case.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        objective, self.look_ahead = look_ahead or self.look_ahead, None
        blocks = self._blocks()
        if not self._finite(blocks):
            return loss
        due = self.meta_step_due
        directions = self._directions(blocks)
        made = due and bool(blocks) and self._meta_step(blocks, directions, objective)
        if not made:
            self._move(blocks, directions)
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _move(self, blocks: list[Block], directions: list[list[Tensor]], *, keep: bool = False) -> None:
        """Make the step in place."""
        for block, direction in zip(blocks, directions, strict=True):
            lr, decay = float(block.group["lr"]), block.group["weight_decay"]
            for p, update in zip(block.params, block.precondition(direction, self._prepared, keep=keep), strict=True):
                if decay:
                    p.mul_(1 - lr * decay)
                p.add_(update, alpha=-lr)

    def _blocks(self) -> list[Block]:
        blocks = []
        for group in self.param_groups:
            paired = {self._bias_of[p] for p in group["params"] if self._has_matrix(p, group) and p in self._bias_of}
            for weight in group["params"]:
                structure = group["structure"] if self._has_matrix(weight, group) else "diag"
                bias = self._bias_of.get(weight) if structure != "diag" else None
                if weight not in paired and (has_gradient(weight) or (bias is not None and has_gradient(bias))):
                    blocks.append(Block(weight, bias, structure, group, self.state[weight]))
        return blocks

    def _has_matrix(self, p: Tensor, group: dict[str, Any]) -> bool:
        return p.ndim >= 2 and group["structure"] != "diag" and p not in self._elementwise

    def _finite(self, blocks: list[Block]) -> bool:
        grads = [grad for block in blocks for grad in block.gradients]
        if not grads:
            return True
        sums = torch.stack([g.sum(dtype=at_least_single(g.dtype)).to(grads[0].device) for g in grads])
        if finite := bool(sums.isfinite().all()):
            return finite
        warnings.warn(
            "APOPreconditioner left out a step: a gradient is not finite. If this goes on, lower lr, clip the "
            "gradients, or look for the first loss that is not finite.",
            stacklevel=5,
        )
        return False

    def _directions(self, blocks: list[Block]) -> list[list[Tensor]]:
        """Update the moving averages and return one direction per parameter of each block."""
        jobs: dict[tuple[float, torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        directions = []
        for block in blocks:
            momentum, averages = block.group["momentum"], []
            for p, grad in zip(block.params, block.gradients, strict=True):
                if momentum == 0:
                    averages.append(grad)
                    continue
                state = self.state[p]
                averages.append(state.setdefault("momentum", torch.zeros_like(p)))
                state["step"] = count = state.get("step", 0) + 1
                weight = (1 - momentum) / (1 - momentum**count)  # 1 at first: the average is the gradient, exactly
                old, new = jobs.setdefault((weight, grad.dtype, grad.device), ([], []))
                old.append(averages[-1])
                new.append(grad)
            directions.append(averages)
        for (weight, _, _), (old, new) in jobs.items():
            torch._foreach_lerp_(old, new, weight)
        return directions

    def _meta_step(
        self, blocks: list[Block], directions: list[list[Tensor]], objective: ProximalObjective | None
    ) -> bool:
        """Look one step ahead and learn from it; whether the step is made already."""
        if objective is None:
            self._missed += 1
            if self._missed == _PATIENCE:
                warnings.warn(
                    f"APOPreconditioner was due for a meta-step {_PATIENCE} times without an objective and makes plain "
                    "steps. Add the callback APOPreconditioning to the Trainer, or in a loop of your own call "
                    "step(look_ahead=objective) where meta_step_due.",
                    stacklevel=5,
                )
            return False
        self._missed = 0
        params = [p for block in blocks for p in block.params]
        before, group = [p.clone() for p in params], self.param_groups[0]
        stays = False
        try:
            self._move(blocks, directions, keep=True)
            displacement = list(torch._foreach_sub(params, before))
            found = objective.gradient(params, displacement, lam_f=group["lam_f"], lam_w=group["lam_w"])
            gradient, rejected = self._judge(found, displacement, objective.loss_at_anchor)
            stays = group["apply"] == "after" and not rejected
        finally:
            if not stays:
                torch._foreach_copy_(params, before)
        scalars = [value for name, value in (self.last_meta_step or {}).items() if name != "slope"]
        if rejected and objective.grad_scale != 1.0 and all(map(math.isfinite, scalars)) and not self._worse():
            return False  # the gradient overflowed at the current loss scale, the look-ahead itself is sound
        remaining = iter(gradient)
        for block in blocks:
            cotangents = [next(remaining) for _ in block.params]
            if rejected:
                block.shrink()
            else:
                block.meta_step(cotangents)
        return stays

    def _judge(
        self, found: ProximalStep, displacement: list[Tensor], loss_before: Tensor | None
    ) -> tuple[list[Tensor], bool]:
        """Average the objective over ranks, keep its figures, and tell whether the meta-step is to be rejected."""
        scalars = {"loss": found.loss, "fsd": found.fsd, "wsd": found.wsd, "value": found.value}
        if loss_before is not None:
            scalars["loss_before"] = loss_before
        wide, device = at_least_single(found.value.dtype), found.value.device
        figures = torch.stack([x.detach().to(device, wide).reshape(()) for x in scalars.values()])
        gradient = found.gradient
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            figures, *gradient = _average_over_ranks([figures, *gradient])
        slopes = [inner_products([v], [d]).to(figures) for v, d in zip(gradient, displacement, strict=True)]
        values = torch.cat([figures, torch.cat(slopes).sum(0, keepdim=True)]).tolist()
        report = dict(zip([*scalars, "slope"], values, strict=True))
        # One that is not finite in a gradient shows in the slope, whatever it is multiplied by.
        finite = all(map(math.isfinite, report.values()))
        self.last_meta_step = report
        report["rejected"] = float(not finite or self._worse())
        return gradient, bool(report["rejected"])

    def _worse(self) -> bool:
        """Whether the last look-ahead raised the loss by more than its noise."""
        report = self.last_meta_step or {}
        before = report.get("loss_before", math.inf)
        return report.get("value", math.inf) > before + _TOLERATED_RISE * abs(before)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; factors, norms and moments keep the dtypes they were saved with.

        Raises:
            ValueError: If a preconditioner was saved for another shape, as when a bias was part of its matrix then.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):  # the base class casts what it loads to the dtype of the parameter
                    self.state[p][name] = value.detach().clone().to(p.device)
        for group in self.param_groups:
            for p in group["params"]:
                self._check_loaded(p, group)

    def _check_loaded(self, p: Tensor, group: dict[str, Any]) -> None:
        structure = group["structure"] if self._has_matrix(p, group) else "diag"
        expected = Block.factor_shapes(p, self._bias_of.get(p), structure, group)
        state, names = self.state.get(p, {}), ("A", "B", "AA", "BB", "S")
        found = {name: tuple(state[name].shape) for name in names if name in state}
        if found and found != expected:
            raise ValueError(
                f"the loaded preconditioner of a parameter of shape {tuple(p.shape)} has factors of shapes {found}, "
                f"and this optimizer needs {expected}. Build the optimizer as it was built when it was saved: from the "
                "module, or from parameters."
            )


def _average_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Average tensors over ranks, with one collective per dtype; half precision travels as float32."""
    buckets: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        buckets.setdefault(at_least_single(tensor.dtype), []).append(i)
    averages = list(tensors)
    for dtype, bucket in buckets.items():
        flat = torch.cat([tensors[i].reshape(-1).to(tensors[bucket[0]].device, dtype) for i in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        start = 0
        for i in bucket:
            old, end = tensors[i], start + tensors[i].numel()
            averages[i] = flat[start:end].view(old.shape).to(old.device, old.dtype)
            start = end
    return averages
