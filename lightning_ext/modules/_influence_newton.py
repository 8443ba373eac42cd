"""Quasi-Newton steps for many copies, behind the damped Gauss-Newton matrix of the trained network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ext.functional import GGNOperator, InfluenceObjective, ParameterView, cg, nystrom
from lightning_ext.modules._influence_data import Shard

_RANK, _TOL, _MEMORY = 100, 1e-3, 10
_ARMIJO, _FLATTER, _ROUNDING, _SHORTEST = 1e-4, 0.9, 100.0, 2.0**-10
_REACH = 10.0  # times the first step's length: how far a copy may go


class Newton(nn.Module):
    r"""L-BFGS for each copy apart, from :math:`(G + \lambda I)^{-1}` as the first guess of the inverse Hessian.

    The first step from the reference is the influence function's estimate. Later ones learn how the curvature differs:
    a removed sample's own share, and that of a network that has moved. A step that does not lower the objective is
    halved, one evaluation each; a copy that rounding keeps from going down stays. The removed loss is not bounded, and
    in a deep network damping may not outweigh it: steps farther from the trained network than ten times the first one
    are refused like those that lead uphill, and the copy stays where it is. All state is in buffers, so that a resumed
    run goes on alike: 23 blocks ``(G, D)``.

    Attributes:
        held: ``(G,)``, copies of which a step was refused for leading too far, and none was accepted since.

    Args:
        num_copies: G.
        size: D.
        dtype: of the parameters.
    """

    point: Tensor
    gradient: Tensor
    direction: Tensor
    value: Tensor
    slope: Tensor
    length: Tensor
    moves: Tensor
    bends: Tensor
    steps: Tensor
    reach: Tensor
    held: Tensor

    def __init__(self, num_copies: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("point", "gradient", "direction"):
            self.register_buffer(name, torch.zeros(num_copies, size, dtype=dtype))
        for name in ("value", "slope", "length", "reach"):
            self.register_buffer(name, torch.zeros(num_copies, dtype=dtype))
        for name in ("moves", "bends"):
            self.register_buffer(name, torch.zeros(_MEMORY, num_copies, size, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("held", torch.zeros(num_copies, dtype=torch.bool))
        self.solve: Callable[[Tensor], Tensor] | None = None

    def build(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        view: ParameterView,
        shard: Shard,
        damping: float,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Prepare the solves: conjugate gradients behind a random sketch of the matrix."""
        operator = GGNOperator(
            module, objective, shard, view, damping=damping, num_samples=shard.num_samples, reduce=reduce
        )
        generator = torch.Generator(view.device).manual_seed(0)  # the same sketch on every rank
        sketch = nystrom(
            lambda rows: operator(rows).sub_(rows, alpha=damping),
            view.numel,
            min(_RANK, view.numel),
            generator=generator,
            dtype=view.dtype,
            device=view.device,
        )
        preconditioner = sketch.preconditioner(damping)
        self.solve = lambda rows: cg(operator, rows, preconditioner=preconditioner, tol=_TOL)[0]

    def step(self, point: Tensor, gradient: Tensor, value: Tensor, scale: Tensor, done: Tensor) -> Tensor:
        """Where to evaluate next, ``(G, D)``, given value and gradient at ``point``; ``done`` copies stay there.

        Values are sums of terms of size ``scale``, ``(G,)``, and so is their rounding.
        """
        accepted = done | self._accepts(point, gradient, value, scale)
        if int(self.steps):
            self._remember(point - self.point, gradient - self.gradient, accepted)
        self.length.copy_(torch.where(accepted, 1.0, 0.5 * self.length))
        for kept, new in ((self.point, point), (self.gradient, gradient)):
            kept.copy_(torch.where(accepted[:, None], new, kept))
        self.value.copy_(torch.where(accepted, value, self.value))
        downhill = -self._inverse_times(self.gradient)
        self.direction.copy_(torch.where(accepted[:, None], downhill, self.direction))
        self.slope.copy_(torch.linalg.vecdot(self.gradient, self.direction))
        if not int(self.steps):
            self.reach.copy_(_REACH * torch.linalg.vector_norm(self.direction, dim=1))
        self.steps += 1
        going = self.length * (~done & (self.length >= _SHORTEST))
        return self.point + going[:, None] * self.direction

    def _accepts(self, point: Tensor, gradient: Tensor, value: Tensor, scale: Tensor) -> Tensor:
        """A sufficient decrease within reach; or, where rounding would hide one, a smaller slope along the step."""
        if not int(self.steps):
            return torch.ones_like(value, dtype=torch.bool)
        decrease = value <= self.value + _ARMIJO * self.length * self.slope
        flatter = torch.linalg.vecdot(gradient, self.direction).abs() <= _FLATTER * self.slope.abs()
        lower = decrease | (flatter & self._is_no_higher(value, scale))
        near = self._within_reach(point)
        accepted: Tensor = lower & near & (self.length >= _SHORTEST)
        self.held.copy_((self.held | (lower & ~near)) & ~accepted)
        return accepted

    def _is_no_higher(self, value: Tensor, scale: Tensor) -> Tensor:
        rounding = _ROUNDING * torch.finfo(value.dtype).eps * self.value.abs().clamp(min=scale)
        no_higher: Tensor = value <= self.value + rounding
        return no_higher

    def _within_reach(self, point: Tensor) -> Tensor:
        near: Tensor = torch.linalg.vector_norm(point, dim=1) <= self.reach
        return near

    def keeps(self, point: Tensor, gradient: Tensor, value: Tensor, scale: Tensor) -> Tensor:
        """Whether a point that no step follows, ``(G, D)``, is a better end than the last that was accepted, (G,)."""
        flatter = torch.linalg.vector_norm(gradient, dim=1) <= torch.linalg.vector_norm(self.gradient, dim=1)
        kept: Tensor = flatter & self._is_no_higher(value, scale) & self._within_reach(point)
        return kept

    def _remember(self, move: Tensor, bend: Tensor, accepted: Tensor) -> None:
        """Keep what an accepted step says about the curvature; zeros, which change nothing, for a rejected one."""
        place = (int(self.steps) - 1) % _MEMORY
        self.moves[place] = torch.where(accepted[:, None], move, 0.0)
        self.bends[place] = torch.where(accepted[:, None], bend, 0.0)

    def _inverse_times(self, rows: Tensor) -> Tensor:
        assert self.solve is not None
        known = min(int(self.steps), _MEMORY)
        order = [(int(self.steps) - 1 - k) % _MEMORY for k in range(known)]  # newest first
        curvature = torch.linalg.vecdot(self.moves, self.bends)
        sound = curvature > 1e-6 * self.moves.norm(dim=2) * self.bends.norm(dim=2)
        weight = torch.where(sound, 1 / curvature, 0.0)
        rest, parts = rows.clone(), {}
        for k in order:
            parts[k] = weight[k] * torch.linalg.vecdot(self.moves[k], rest)
            rest -= parts[k][:, None] * self.bends[k]
        result = self.solve(rest)
        for k in reversed(order):
            correction = parts[k] - weight[k] * torch.linalg.vecdot(self.bends[k], result)
            result = result + correction[:, None] * self.moves[k]
        return result
