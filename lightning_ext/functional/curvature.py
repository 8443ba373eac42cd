r"""Curvature of the training loss over a whole data set, as operators that are multiplied and never formed.

With outputs :math:`f(\theta, x_i)`, their Jacobians :math:`J_i` in the parameters and the output Hessians
:math:`H_i = \nabla_y^2 L`,

.. math:: G = \frac1N \sum_i J_i^\top H_i J_i, \quad
    \nabla^2 \bar L = G + \frac1N \sum_{ik} \frac{\partial L_i}{\partial y_{ik}} \nabla_\theta^2 f_k(\theta, x_i), \quad
    F = \frac1N \sum_i \nabla_\theta L_i \nabla_\theta L_i^\top

are the Gauss-Newton matrix, the Hessian and the empirical Fisher matrix. All are means over samples, whatever the sizes
of the batches; vectors are rows of a block ``(R, D)``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional.batches import batch_size, differentiable
from lightning_ext.functional.influence_objective import InfluenceObjective
from lightning_ext.functional.layer_gradients import LayerGradients
from lightning_ext.functional.linearized import LinearizedBatch, LinearizedGradient
from lightning_ext.functional.parameters import ParameterView
from lightning_ext.functional.per_sample import SampleGradients

__all__ = ["CurvatureOperator", "EmpiricalFisherOperator", "GGNOperator", "HessianOperator"]

_BLOCK_BYTES = 2**26  # what the output tangents of rows that are multiplied together may take

Function = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class _Share:
    """One batch's part of the sum, ready for many products."""

    product: Callable[[Tensor], Tensor]
    outputs: Tensor  # (B, ...), the loss's inputs or its values
    nbytes: Callable[[], int]


class CurvatureOperator(ABC):
    r"""A symmetric matrix :math:`C + \lambda I` of D rows; ``operator(rows)`` multiplies a block ``(R, D)``.

    Args:
        module: the network, in evaluation mode.
        objective: outputs, targets and loss.
        batches: all of the data, a list of batches or a loader, on the parameters' device. It is gone through again for
            every product unless all batches fit into ``cache_bytes``, and must give the same batches each time. Under
            ``reduce`` these are this rank's batches; there may be none.
        view: the parameters; default all that require gradients. Their values are copied when the operator is made.
        damping: :math:`\lambda \ge 0`, weight decay included; default 0.
        num_samples: N where it is known; the batches of all ranks must then hold as many. Default: counted.
        reduce: sums a tensor over ranks and returns the sum. It is called once for every block of rows, and once more
            for N. Default: one rank.
        cache_bytes: memory for linearised batches, at least 0; the rest are linearised anew for every product.
        backend: how Jacobians are multiplied, see :class:`LinearizedBatch`.

    Attributes:
        view: the parameters.
        size: D.
        dtype: the parameters' type, float32 or float64.
        device: where they are.
        damping: :math:`\lambda`.

    Raises:
        ValueError: For parameters of another type, batches that can be gone through only once, a negative damping.
            From a product: if outputs or products are not finite (naming the batch), if the batches changed, or hold
            other than ``num_samples`` samples.

    Note:
        A product with one row costs about two backward passes over the data, the first one a forward pass more. R rows
        cost R times as much, and are reduced over ranks together.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        batches: Iterable[Any],
        view: ParameterView | None = None,
        *,
        damping: float = 0.0,
        num_samples: int | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 2**30,
        backend: Literal["auto", "linearize", "double_backward"] = "auto",
    ) -> None:
        self.module, self.objective, self.batches = module, objective, batches
        self.view = ParameterView(module) if view is None else view
        self.size, self.dtype, self.device = self.view.numel, self.view.dtype, self.view.device
        self.damping, self.reduce, self.cache_bytes, self.backend = damping, reduce, cache_bytes, backend
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"curvature needs float32 or float64, not {self.dtype}: use module.float().")
        if not damping >= 0:
            raise ValueError(f"damping must be at least 0; got {damping}.")
        if isinstance(batches, Iterator):
            raise ValueError("batches must be gone through many times: give a list or a loader, not an iterator.")
        self._claimed = num_samples
        self._counted: int | None = None
        self._params = {name: value.clone() for name, value in self.view.values().items()}
        self._cache: list[_Share] = []
        self._cache_left: float = cache_bytes
        self._sizes: list[int] = []
        self._marks: list[Tensor] = []
        self._gone_through = False

    @abstractmethod
    def _share(self, function: Function, targets: Tensor, *, check: bool) -> _Share:
        """Linearise one batch; with ``check`` see that its derivatives are those of the function."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, damping={self.damping}, {self.view!r})"

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply a block ``(R, D)`` of finite rows."""
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(f"rows must have the shape (R, {self.size}); got {tuple(rows.shape)}.")
        rows = rows.to(self.dtype)
        total = torch.zeros_like(rows)
        for share in self._shares():
            total += share.product(rows)
        if self.reduce is not None:
            total = self.reduce(total)
        total = total.div_(self.num_samples).add_(rows, alpha=self.damping)
        if not bool(total.isfinite().all()):
            self._explain(rows)
        return total

    @property
    def num_samples(self) -> int:
        """N over all ranks. Its first use is a collective, like a product."""
        if self._counted is None:
            if not self._gone_through:
                for _ in self._shares():
                    pass
            count = torch.tensor([sum(self._sizes)], device=self.device)
            self._counted = int(count if self.reduce is None else self.reduce(count))
            if not self._counted:
                raise ValueError("batches hold no samples.")
            if self._claimed not in (None, self._counted):
                raise ValueError(f"num_samples is {self._claimed}, but the batches hold {self._counted} samples.")
        return self._counted

    def dense(self, rows_at_once: int = 64) -> Tensor:
        """Return the matrix ``(D, D)``, by D products; for small D.

        Args:
            rows_at_once: rows of a block, at least 1. Default 64.
        """
        blocks = torch.split(torch.eye(self.size, dtype=self.dtype, device=self.device), rows_at_once)
        matrix = torch.cat([self(block) for block in blocks])
        return 0.5 * (matrix + matrix.mT)

    def _shares(self) -> Iterator[_Share]:
        """Yield every batch's share: those in the cache, the rest linearised on the way."""
        if self._gone_through and len(self._cache) == len(self._sizes):
            yield from self._cache
            return
        number = -1
        for number, batch in enumerate(self.batches):
            size = batch_size(batch)
            known = number < len(self._sizes)
            if (known and size != self._sizes[number]) or (not known and self._gone_through):
                raise self._changed(number)
            if not known:
                self._sizes.append(size)
            yield self._cache[number] if number < len(self._cache) else self._linearized(number, batch)
        if self._gone_through and number + 1 != len(self._sizes):
            raise self._changed(number + 1)
        self._gone_through = True

    def _linearized(self, number: int, batch: Any) -> _Share:
        with differentiable(batch) as plain:
            function, targets = self.objective.function(self.module, self.view, plain), self.objective.targets(plain)
            share = self._share(function, targets, check=not self._marks)
        finite = share.outputs.flatten(1).isfinite().all(1) if share.outputs.ndim > 1 else share.outputs.isfinite()
        if not bool(finite.all()):
            samples = finite.logical_not().nonzero().flatten().tolist()
            raise ValueError(f"outputs or losses of samples {samples[:10]} of batch {number} are not finite.")
        mark = share.outputs.abs().mean()
        if number == len(self._marks):
            self._marks.append(mark)
        elif not torch.isclose(mark, self._marks[number], rtol=1e-3):
            raise self._changed(number)
        if number == len(self._cache) and self._cache_left > 0:
            self._cache_left -= share.nbytes()
            if self._cache_left >= 0:
                self._cache.append(share)
        return share

    def _changed(self, number: int) -> ValueError:
        return ValueError(
            f"batches gave other samples the second time, at batch {number}: switch off shuffling and random "
            "transformations, or give a list."
        )

    def _explain(self, rows: Tensor) -> None:
        """Say why a product is not finite."""
        if not bool(rows.isfinite().all()):
            raise ValueError("rows must be finite.")
        for number, share in enumerate(self._shares()):
            if not bool(share.product(rows).isfinite().all()):
                raise ValueError(f"the {type(self).__name__} product of batch {number} is not finite.")
        raise ValueError("the product is not finite, by overflow of the sum or because of another rank's batches.")


class _ThroughOutputs(CurvatureOperator):
    """Curvature of the form J^T B J, where B, positive semidefinite, belongs to each sample's outputs."""

    @abstractmethod
    def _between(self, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Multiply output tangents (R, *y.shape) by B."""

    @abstractmethod
    def _columns(self, y: Tensor, t: Tensor) -> Tensor:
        """Return (S, *y.shape), the columns of a square root of B."""

    def _share(self, function: Function, targets: Tensor, *, check: bool) -> _Share:
        linearized = LinearizedBatch(function, self._params, self.backend, check=check)
        y = linearized.outputs
        at_once = max(1, _BLOCK_BYTES // max(1, y.numel() * y.element_size()))

        def product(rows: Tensor) -> Tensor:
            parts = torch.split(rows, at_once)
            return torch.cat([linearized.vjp(self._between(y, targets, linearized.jvp(part))) for part in parts])

        return _Share(product, y, lambda: linearized.nbytes)

    def _sample_columns(self, columns: Callable[[Tensor, Tensor], Tensor]) -> Iterator[list[Tensor | LayerGradients]]:
        """Yield for each batch the samples' J^T c, one set of gradients for every column c."""
        gradients = SampleGradients(self.module, self.objective, self.view)
        now = self.view.values()
        if any(not torch.equal(value, now[name]) for name, value in self._params.items()):
            raise ValueError("the module's parameters changed since the operator was made; make a new one.")
        for batch in self.batches:
            with gradients.recording(batch) as (plain, outputs):
                y = self.objective.outputs(self.module, plain) if outputs is None else outputs
                found: list[Tensor | LayerGradients] = []
                for column in columns(y.detach(), self.objective.targets(plain)):
                    others = gradients.others(plain, column)
                    if outputs is None:
                        found.append(self.view.flatten(others))
                    else:
                        found.append(gradients.recorder.backward(outputs, column, others))
                yield found

    def per_sample_traces(self, draws: int = 0, generator: torch.Generator | None = None) -> Tensor:
        r"""Return :math:`\operatorname{tr} J_i^\top B_i J_i` of this rank's samples, without damping, ``(n,)``.

        Args:
            draws: 0 for the exact trace, by one backward pass for each output of a sample; or the number of random
                vectors :math:`g` with :math:`\mathbb E[g g^\top] = B_i` to estimate it from without bias, for many
                outputs.
            generator: of the random vectors.
        """

        def columns(y: Tensor, t: Tensor) -> Tensor:
            if not draws:
                return self._columns(y, t)
            drawn = torch.stack([self._draw(y, t, generator) for _ in range(draws)])
            return drawn.div_(math.sqrt(draws))

        found = self._sample_columns(columns)
        traces = [torch.stack([_squared_norms(g) for g in gradients]).sum(0) for gradients in found]
        return torch.cat([torch.zeros(0, dtype=self.dtype, device=self.device), *traces])

    def _draw(self, y: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.objective.loss.sample_gradient(y, t, generator)

    @property
    def trace_bound(self) -> float:
        r"""At least :math:`\max_i \operatorname{tr} J_i^\top B_i J_i` over the samples of all ranks.

        Exact on one rank; on W ranks at most :math:`W^{1/16}` times as large. A collective.
        """
        traces = self.per_sample_traces().double()
        largest = traces.max() if len(traces) else traces.new_zeros(())
        if self.reduce is None:
            return float(largest)
        return float(self.reduce(largest.pow(16).reshape(1)) ** (1 / 16))

    def square_root_rows(self, max_rows: int | None = None) -> Tensor:
        r"""Return R with :math:`C = R^\top R` (without damping), ``(n S, D)`` for n samples of S outputs each.

        Over several ranks each has its own samples' rows, and the products :math:`R^\top R` add up.

        Args:
            max_rows: refuse to return more. Default ``None``: return as many as there are.

        Raises:
            ValueError: If there would be more than ``max_rows``.
        """
        root, blocks, count = self.num_samples**0.5, [], 0
        for found in self._sample_columns(self._columns):
            blocks += [(g if isinstance(g, Tensor) else g.explicit()) / root for g in found]
            count += sum(map(len, blocks[-len(found) :]))
            if max_rows is not None and count > max_rows:
                raise ValueError(f"the square root has more than {max_rows} rows: use an iterative solver.")
        return torch.cat([torch.zeros(0, self.size, dtype=self.dtype, device=self.device), *blocks])


def _squared_norms(gradients: Tensor | LayerGradients) -> Tensor:
    return (gradients.norm(dim=1) if isinstance(gradients, Tensor) else gradients.norms()).square()


class GGNOperator(_ThroughOutputs):
    r"""The generalised Gauss-Newton matrix :math:`G + \lambda I`, :math:`G = \frac1N \sum_i J_i^\top H_i J_i`.

    Positive semidefinite for a convex loss, and the Fisher matrix for a log-likelihood in its natural parameters. It is
    what damped influence functions invert (Bae et al. 2022, arXiv:2209.05364). See :class:`CurvatureOperator`.

    Raises:
        ValueError: If the loss is not convex in the outputs.

    >>> layer = nn.Linear(2, 1, bias=False).eval()
    >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)), (torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))]
    >>> GGNOperator(layer, InfluenceObjective("half_squared_error"), data).dense()  # mean of x x^T
    tensor([[5., 1.],
            [1., 2.]])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.objective.loss.convex:
            raise ValueError(
                f"the Gauss-Newton matrix needs a loss that is convex in the outputs; {self.objective.loss} is not. "
                "Use HessianOperator with a solver for indefinite systems."
            )

    def _between(self, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self.objective.loss.hessian_product(y, t, u)

    def _columns(self, y: Tensor, t: Tensor) -> Tensor:
        return self.objective.loss.hessian_sqrt(y, t)


class EmpiricalFisherOperator(_ThroughOutputs):
    r"""The empirical Fisher matrix :math:`F + \lambda I`, :math:`F = \frac1N \sum_i g_i g_i^\top`, at the true labels.

    It is not the Fisher matrix, and at a good fit not close to it (Kunstner et al. 2019, arXiv:1905.12558). See
    :class:`CurvatureOperator`.

    >>> layer = nn.Linear(1, 1, bias=False).eval()
    >>> data = [(torch.ones(1, 1), layer.weight.detach() - 3.0)]
    >>> EmpiricalFisherOperator(layer, InfluenceObjective("half_squared_error"), data).dense()  # residual squared
    tensor([[9.]])
    """

    def _between(self, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
        gradient = self.objective.loss.gradient(y, t)
        along = (u * gradient).flatten(2).sum(2) if y.ndim > 1 else u * gradient
        return along.reshape(*along.shape, *[1] * (y.ndim - 1)) * gradient

    def _columns(self, y: Tensor, t: Tensor) -> Tensor:
        return self.objective.loss.gradient(y, t).unsqueeze(0)

    def _draw(self, y: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.objective.loss.gradient(y, t)


class HessianOperator(CurvatureOperator):
    r"""The Hessian of the mean training loss, plus :math:`\lambda I`; indefinite where the network is not at a minimum.

    See :class:`CurvatureOperator`; ``backend`` does not matter here.

    >>> layer = nn.Linear(1, 1, bias=False).eval()
    >>> data = [(torch.full((1, 1), 2.0), torch.zeros(1, 1))]
    >>> HessianOperator(layer, InfluenceObjective("half_squared_error"), data, damping=0.5).dense()  # x^2 + damping
    tensor([[4.5000]])
    """

    def _share(self, function: Function, targets: Tensor, *, check: bool) -> _Share:
        linearized = LinearizedGradient(lambda p: self.objective.losses(function(p), targets), self._params)
        return _Share(linearized.product, linearized.outputs, lambda: linearized.nbytes)
