"""Newton steps for several minimisations at once, each by truncated conjugate gradients on its own Hessian."""

from collections.abc import Callable

import torch
from torch import Tensor

_PRODUCTS, _HALVINGS, _ARMIJO, _FORCING = 250, 30, 1e-4, 0.1

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def newton_steps(
    evaluate: Evaluate, product: Callable[[Tensor, Tensor, Tensor], Tensor], point: Tensor, pull: Tensor,
    tolerance: Tensor, max_steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Go down from ``point`` ``(R, D)`` until the gradients' norms are at most ``tolerance`` ``(R,)``.

    Steps follow directions of negative curvature out of saddle points, and are halved until they lower the objective.

    Args:
        evaluate: ``(points, pulls)`` to gradients ``(R, D)`` and values ``(R,)``.
        product: ``(points, pulls, rows)`` to each row times its own Hessian.
        point: where to start.
        pull: what tells the minimisations apart, ``(R, D)``.
        tolerance: see above.
        max_steps: Newton steps.

    Returns:
        Points, and the norms of their gradients, ``(R,)``.
    """
    point = point.clone()
    gradient, value = evaluate(point, pull)
    for _ in range(max_steps):
        norm = gradient.norm(dim=1)
        rows = (norm > tolerance).nonzero().flatten()
        if not len(rows):
            break
        here, there, slope = point[rows], pull[rows], gradient[rows]
        step = _truncated(lambda v, x=here, b=there: product(x, b, v), slope)  # type: ignore[misc]
        descent = torch.linalg.vecdot(step, slope)
        length, low = torch.ones_like(descent), torch.zeros_like(descent, dtype=torch.bool)
        for _ in range(_HALVINGS):
            trial = here + length[:, None] * step
            new_gradient, new_value = evaluate(trial, there)
            low = new_value <= value[rows] + _ARMIJO * length * descent
            near = (new_gradient.norm(dim=1) < 0.5 * norm[rows]) & (new_value <= value[rows] + _rounding(value[rows]))
            low |= near
            if bool(low.all()):
                break
            length = torch.where(low, length, 0.5 * length)
        better = rows[low]
        if not len(better):
            break
        point[better], gradient[better], value[better] = trial[low], new_gradient[low], new_value[low]
    return point, gradient.norm(dim=1)


def _rounding(value: Tensor) -> Tensor:
    return 100 * torch.finfo(value.dtype).eps * value.abs()


def _truncated(product: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    """Solve for minus the gradient, row by row, up to where curvature is not positive any more."""
    step, residual = torch.zeros_like(gradient), gradient.clone()
    direction, norms = -gradient, gradient.norm(dim=1)
    square, going = residual.square().sum(1), torch.ones_like(norms, dtype=torch.bool)
    for number in range(min(_PRODUCTS, gradient.shape[1])):
        image = product(direction)
        curvature = torch.linalg.vecdot(direction, image)
        sound = curvature > 0
        if number == 0:
            step = torch.where((going & ~sound)[:, None], direction, step)
        going &= sound
        size = torch.where(going, square / curvature, 0.0)[:, None]
        step, residual = step + size * direction, residual + size * image
        new = residual.square().sum(1)
        going &= new.sqrt() > _FORCING * norms
        if not bool(going.any()):
            break
        direction = torch.where(going[:, None], (new / square)[:, None] * direction - residual, direction)
        square = new
    return step
