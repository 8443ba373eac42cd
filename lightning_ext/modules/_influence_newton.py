"""Steps behind the damped Gauss-Newton matrix of the trained network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ext.functional import InfluenceObjective, ParameterView, cg, nystrom
from lightning_ext.modules._influence_data import Shard

_RANK, _TOL = 100, 1e-3


class Newton(nn.Module):
    """Preconditions the copies' gradients by the curvature at the reference, with a step length for each copy.

    A step length starts at 1 and is halved whenever the copy's gradient grew: far from the reference the curvature may
    be larger than the matrix says. Buffers, so that a resumed run goes on alike.

    Args:
        num_copies: G.
    """

    scale: Tensor
    last_ratio: Tensor

    def __init__(self, num_copies: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_copies))
        self.register_buffer("last_ratio", torch.full((num_copies,), torch.finfo(torch.float32).max))
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
        from lightning_ext.functional import GGNOperator

        operator = GGNOperator(module, objective, shard, view, num_samples=shard.num_samples, reduce=reduce)
        generator = torch.Generator(view.device).manual_seed(0)  # the same sketch on every rank
        rank = min(_RANK, view.numel)
        sketch = nystrom(operator, view.numel, rank, generator=generator, dtype=view.dtype, device=view.device)
        preconditioner = sketch.preconditioner(damping)

        def damped(rows: Tensor) -> Tensor:
            return operator(rows) + damping * rows

        self.solve = lambda rows: cg(damped, rows, preconditioner=preconditioner, tol=_TOL)[0]

    def step(self, gradient: Tensor, ratio: Tensor) -> Tensor:
        """The step of each copy, to be subtracted."""
        assert self.solve is not None
        self.scale.copy_(torch.where(ratio > self.last_ratio, 0.5 * self.scale, self.scale))
        self.last_ratio.copy_(ratio)
        return self.scale.to(gradient)[:, None] * self.solve(gradient)
