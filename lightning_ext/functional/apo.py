r"""Amortized proximal optimisation: the proximal objective and the meta-steps on learning rates.

After a step from :math:`\theta` to :math:`\theta' = u(\theta, \phi, B)`, with :math:`\Delta = \theta' - \theta`,

.. math:: Q(\phi) = J_B(\theta') + \lambda_F \, D_F(\theta', \theta; B') + \tfrac{\lambda_W}{2} \lVert \Delta \rVert^2

asks whether other optimiser parameters :math:`\phi` would have lowered the batch loss more without moving the outputs
on another batch :math:`B'`, or the weights, too far (Bae, Vicol, HaoChen, Grosse 2022, arXiv:2203.00089). The gradient
that made the step is a constant here, so one ordinary backward pass at :math:`\theta'` gives everything:
:math:`V = \nabla_{\theta'} Q`, and :math:`\mathrm d Q / \mathrm d \log \eta = \langle V, \Delta \rangle`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ProximalObjective",
    "ProximalStep",
    "inner_products",
    "rmsprop_log_step",
    "secant_log_step",
    "sgd_log_step",
    "trust_region_weight",
]


@dataclass(frozen=True)
class ProximalStep:
    r"""The proximal objective at a look-ahead point, and its gradient there.

    Attributes:
        loss: :math:`J_B(\theta')`, a scalar.
        fsd: :math:`D_F(\theta', \theta; B')`, the function-space discrepancy; 0 where there is no output function.
        wsd: :math:`\tfrac12 \lVert \Delta \rVert^2`, the weight-space discrepancy.
        squares: squared length of each parameter's displacement, ``(params,)``; ``wsd`` is half their sum.
        value: :math:`Q = J_B + \lambda_F D_F + \lambda_W D_W`.
        gradient: :math:`V = \nabla_{\theta'} Q`, one tensor per parameter; zeros where a parameter takes no part.
    """

    loss: Tensor
    fsd: Tensor
    wsd: Tensor
    squares: Tensor
    value: Tensor
    gradient: list[Tensor]


class ProximalObjective:
    r"""The proximal objective of one step, evaluated on the live parameters.

    Use: ``anchor()`` while the parameters hold :math:`\theta`; make the step; ``gradient(...)`` while they hold
    :math:`\theta'`. Both functions are called without arguments and must see the live parameters; where they draw
    random numbers (dropout) they must draw the same ones in every call.

    Args:
        loss_fn: returns the batch loss :math:`J_B`, a scalar.
        output_fn: returns the outputs :math:`f(B', \cdot)`; ``None`` leaves the function-space term out.
        divergence: ``(new, old) -> scalar``, see :mod:`lightning_ext.functional.divergences`.
        loss_at_anchor: :math:`J_B(\theta)` where it is known already.
        grad_scale: factor on the objective during the backward pass, taken out again afterwards; as in loss scaling
            for float16.

    Note:
        Cost: ``anchor`` one forward pass on :math:`B'` (and one on :math:`B` where the loss there is not known and
        asked for); ``gradient`` a forward and a backward pass on each batch. ``.grad`` is not touched, and nothing is
        reduced over ranks: average ``gradient`` or its inner products, not the step.
    """

    def __init__(
        self,
        loss_fn: Callable[[], Tensor],
        output_fn: Callable[[], Tensor] | None,
        divergence: Callable[[Tensor, Tensor], Tensor],
        *,
        loss_at_anchor: Tensor | None = None,
        grad_scale: float = 1.0,
    ) -> None:
        self.loss_fn, self.output_fn, self.divergence = loss_fn, output_fn, divergence
        self.loss_at_anchor = loss_at_anchor
        self.grad_scale = grad_scale
        self._outputs: Tensor | None = None

    def anchor(self, *, evaluate_loss: bool = True) -> None:
        r"""Keep the outputs at :math:`\theta`, and with ``evaluate_loss`` the loss there unless it is known."""
        with torch.no_grad():
            if self.output_fn is not None:
                self._outputs = self.output_fn()
            if evaluate_loss and self.loss_at_anchor is None:
                self.loss_at_anchor = self.loss_fn()

    def gradient(
        self, params: Sequence[Tensor], displacement: Sequence[Tensor], *, lam_f: float, lam_w: float
    ) -> ProximalStep:
        r"""Evaluate :math:`Q` and :math:`V` at the parameters as they are now.

        Args:
            params: the parameters that the step moved, holding :math:`\theta'`.
            displacement: :math:`\Delta`, one tensor per parameter.
            lam_f: :math:`\lambda_F \ge 0`; at 0 the outputs are not evaluated.
            lam_w: :math:`\lambda_W \ge 0`.

        Raises:
            RuntimeError: If outputs are needed and ``anchor`` was not called.
            ValueError: If the loss is not a scalar, or nothing depends on the parameters.
        """
        with torch.enable_grad():
            loss = self.loss_fn()
            if loss.numel() != 1:
                raise ValueError(f"loss_fn must return a scalar; got shape {tuple(loss.shape)}.")
            loss = loss.reshape(())
            fsd, total = loss.new_zeros(()), loss
            if lam_f and self.output_fn is not None:
                if self._outputs is None:
                    raise RuntimeError("call anchor() at the old parameters before gradient() at the new ones.")
                fsd = self.divergence(self.output_fn(), self._outputs)
                total = total + lam_f * fsd
            grads = torch.autograd.grad(total * self.grad_scale, list(params), allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError(
                "neither the loss nor the outputs depend on these parameters; check loss_fn and output_fn."
            )
        with torch.no_grad():
            moved = [d.to(p.dtype) for p, d in zip(params, displacement, strict=True)]
            v = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
            if self.grad_scale != 1.0:
                v = list(torch._foreach_div(v, self.grad_scale))
            squares = inner_products(moved, moved)
            wsd = 0.5 * squares.sum()
            if lam_w and v:  # not in place: autograd may return one tensor for two parameters
                v = list(torch._foreach_add(v, moved, alpha=lam_w))
            return ProximalStep(loss.detach(), fsd.detach(), wsd, squares, total.detach() + lam_w * wsd, v)


def inner_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    r"""Inner product of each pair of tensors, :math:`\langle a_i, b_i \rangle`.

    Args:
        a: n tensors of any shapes on one device.
        b: n tensors of the same shapes.

    Returns:
        Shape ``(n,)``, float32 or wider; the sum of a block's entries is the block's inner product.

    >>> inner_products([torch.ones(2, 2), torch.ones(1)], [torch.full((2, 2), 3.0), torch.ones(1)])
    tensor([12.,  1.])
    """
    if not a:
        return torch.zeros(0)
    dtype = torch.promote_types(a[0].dtype, torch.float32)
    return torch.stack([torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(dtype)) for x, y in zip(a, b, strict=True)])


def sgd_log_step(slope: Tensor, meta_lr: float) -> Tensor:
    r"""Plain gradient step on log learning rates, :math:`-\alpha \, \mathrm d Q / \mathrm d \log \eta`.

    Args:
        slope: ``(groups,)``, :math:`\mathrm d Q / \mathrm d \log \eta`.
        meta_lr: :math:`\alpha \ge 0`.

    Returns:
        ``(groups,)``, what to add to :math:`\log \eta`.
    """
    return -meta_lr * slope


def rmsprop_log_step(
    slope: Tensor, second_moment: Tensor, count: int, meta_lr: float, decay: float = 0.99
) -> tuple[Tensor, Tensor]:
    r"""RMSprop step on log learning rates, with the second moment corrected for its start at zero.

    .. math:: v \leftarrow \beta v + (1 - \beta) h^2, \qquad
        \delta = -\alpha \, h \, / \sqrt{v / (1 - \beta^{k})}

    Without the correction the first step is ten times :math:`\alpha`, and a learning rate that starts far too low
    overshoots.

    Args:
        slope: h of shape ``(groups,)``.
        second_moment: v, of the same shape; zeros at first.
        count: k, the number of meta-steps including this one, at least 1.
        meta_lr: :math:`\alpha \ge 0`.
        decay: :math:`\beta` in ``[0, 1)``.

    Returns:
        The step to add to :math:`\log \eta`, and the new second moment. A slope of 0 gives a step of 0.

    >>> rmsprop_log_step(torch.tensor([-5.0, 0.0]), torch.zeros(2), 1, meta_lr=0.5)[0]
    tensor([0.5000, -0.0000])
    """
    second_moment = decay * second_moment + (1 - decay) * slope.square()
    scale = (second_moment / (1 - decay**count)).sqrt()
    step = -meta_lr * slope / scale.clamp_min(torch.finfo(slope.dtype).tiny)
    return step, second_moment


def secant_log_step(slope_before: Tensor, slope_after: Tensor, rate: float = 0.3, limit: float = math.log(4)) -> Tensor:
    r"""Secant step on log learning rates: exact on a quadratic with ``rate=1``, and without a meta learning rate.

    With the step scaled by s, :math:`Q'(0) = \langle g, \Delta \rangle` and :math:`Q'(1) = \langle V, \Delta \rangle`
    place the minimum at :math:`s^* = Q'(0) / (Q'(0) - Q'(1))`, and the step is
    :math:`\rho \operatorname{clip}(\log s^*, \pm \ell)`.

    Args:
        slope_before: ``(groups,)``, :math:`Q'(0)`; negative for a descent direction.
        slope_after: ``(groups,)``, :math:`Q'(1)`.
        rate: :math:`\rho` in ``(0, 1]``.
        limit: :math:`\ell > 0`.

    Returns:
        ``(groups,)``. Where the objective falls with negative or no curvature the step is :math:`\rho \ell`; where the
        direction does not descend at all, :math:`-\rho \ell` if it rises and 0 if both slopes are 0.

    >>> torch.exp(secant_log_step(torch.tensor([-2.0]), torch.tensor([2.0]), rate=1.0)).tolist()
    [0.5]
    """
    curvature = slope_after - slope_before
    newton = torch.log((-slope_before / curvature).clamp_min(torch.finfo(curvature.dtype).tiny))
    step = torch.where(curvature > 0, newton, torch.where(slope_after < 0, limit, -limit))
    step = torch.where(slope_before < 0, step, -limit * torch.sign(slope_after).clamp_min(0.0))
    return rate * step.clamp(-limit, limit)


def trust_region_weight(lam_f: float, fsd: float, budget: float, rate: float = 0.1, limit: float = 0.2) -> float:
    r"""Move :math:`\lambda_F` so that the realised function-space discrepancy per step approaches a budget.

    .. math:: \log \lambda_F \leftarrow \log \lambda_F
        + \operatorname{clip}(\rho \log (D_F / \text{budget}), \pm \ell)

    Args:
        lam_f: :math:`\lambda_F > 0`.
        fsd: :math:`D_F \ge 0` of the step that was made.
        budget: the wanted discrepancy, above 0, in the units of ``fsd``.
        rate: :math:`\rho`; slower than the learning rate it steers through, or the two swing.
        limit: :math:`\ell`.

    Returns:
        The new weight, within ``[1e-4, 1e4]``.

    >>> trust_region_weight(2.0, fsd=1e-3, budget=1e-3), trust_region_weight(1.0, fsd=1.024, budget=1e-3)
    (2.0, 1.2214027581601699)
    """
    change = -limit if fsd <= 0 else max(-limit, min(limit, rate * math.log(fsd / budget)))
    return min(max(lam_f * math.exp(change), 1e-4), 1e4)
