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
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional.curvature_operator import CurvatureOperator, Share
from lightning_ext.functional.layer_gradients import LayerGradients
from lightning_ext.functional.layer_products import LayerProducts
from lightning_ext.functional.linearized import LinearizedBatch, LinearizedGradient
from lightning_ext.functional.per_sample import SampleGradients

__all__ = ["CurvatureOperator", "EmpiricalFisherOperator", "GGNOperator", "HessianOperator"]

_BLOCK_BYTES = 2**26  # what the output tangents of rows that are multiplied together may take
_LEAST_BLOCK = 4  # rows for which products of whole layers are worth their set-up


class _OutputShare:
    """J^T B J of one batch: by derivatives through the network, or from its layers where blocks pay for that."""

    def __init__(self, operator: "_ThroughOutputs", batch: Any, check: bool) -> None:
        self._operator, self._batch, self._rows_seen = operator, batch, 0
        self._targets = operator.objective.targets(batch)
        self._linearized = operator.linearize(batch, check)
        self.outputs = self._linearized.outputs
        self._columns = operator.columns_per_sample(self.outputs)
        self._between: Callable[[Tensor], Tensor] | None = None
        self._layers: LayerProducts | None = None
        self._by_layers = operator.backend == "auto"

    @property
    def nbytes(self) -> int:
        between = 2 * self.outputs.nbytes  # at most
        return between + self._linearized.nbytes + (self._layers.nbytes if self._layers else 0)

    def product(self, rows: Tensor) -> Tensor:
        self._rows_seen += len(rows)
        if self._by_layers and len(rows) >= _LEAST_BLOCK and self._rows_seen >= 2 * self._columns:
            if self._layers is None:
                self._layers = self._affordable(self._operator.layer_products(self._batch, self._columns))
            if self._layers is not None:
                return self._layers.product(rows)
            self._by_layers = False
        y, linearized = self.outputs, self._linearized
        between = self._between = self._between or self._operator.between(y, self._targets)
        parts = torch.split(rows, max(1, _BLOCK_BYTES // max(1, y.numel() * y.element_size())))
        products = [linearized.vjp(between(linearized.jvp(part))) for part in parts]
        return products[0] if len(products) == 1 else torch.cat(products)

    def _affordable(self, layers: LayerProducts | None) -> LayerProducts | None:
        return layers if layers is not None and self._operator.affords(self, layers.nbytes) else None


class _ThroughOutputs(CurvatureOperator):
    """Curvature of the form J^T B J, where B, positive semidefinite, belongs to each sample's outputs."""

    @abstractmethod
    def between(self, y: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what multiplies output tangents ``(R, *y.shape)`` by B."""

    @abstractmethod
    def columns(self, y: Tensor, t: Tensor) -> Tensor:
        """Return ``(S, *y.shape)``, the columns of a square root of B."""

    @cached_property
    def _gradients(self) -> SampleGradients:
        return SampleGradients(self.module, self.objective, self.view)

    def _share(self, batch: Any, *, check: bool) -> Share:
        return _OutputShare(self, batch, check)

    def linearize(self, batch: Any, check: bool) -> LinearizedBatch:
        """Linearise the outputs of a batch."""
        function = self.objective.function(self.module, self.view, batch)
        return LinearizedBatch(function, self._params, self.backend, check=check)

    def columns_per_sample(self, y: Tensor) -> int:
        """Return S."""
        return max(1, y[:1].numel())

    def layer_products(self, batch: Any, columns: int) -> LayerProducts | None:
        """Return products from layers, where they pay."""
        if not self._unchanged():  # the layers are those of the module as it is now
            return None
        return LayerProducts.of(self._gradients, batch, self.columns, outputs=columns)

    def _unchanged(self) -> bool:
        now = self.view.values()
        return all(torch.equal(value, now[name]) for name, value in self._params.items())

    def column_blocks(self, y: Tensor, t: Tensor) -> Iterator[Tensor]:
        """Yield the columns in blocks that need not be held together."""
        yield self.columns(y, t)

    def _sample_columns(
        self, blocks: Callable[[Tensor, Tensor], Iterable[Tensor]]
    ) -> Iterator[Iterator[Tensor | LayerGradients]]:
        """Yield for each batch the samples' J^T c, one set of gradients for every column c, to be taken in turn."""
        gradients = self._gradients
        if not self._unchanged():
            raise ValueError("the module's parameters changed since the operator was made; make a new one.")
        for batch in self.batches:
            with gradients.recording(batch) as (plain, outputs):
                y = self.objective.outputs(self.module, plain) if outputs is None else outputs
                found = blocks(y.detach(), self.objective.targets(plain))
                yield (self._pulled(plain, outputs, column) for block in found for column in block)

    def _pulled(self, batch: Any, outputs: Tensor | None, column: Tensor) -> Tensor | LayerGradients:
        others = self._gradients.others(batch, column)
        if outputs is None:
            return self.view.flatten(others)
        return self._gradients.recorder.backward(outputs, column, others)

    def per_sample_traces(self, draws: int = 0, generator: torch.Generator | None = None) -> Tensor:
        r"""Return :math:`\operatorname{tr} J_i^\top B_i J_i` of this rank's samples, without damping, ``(n,)``.

        Args:
            draws: 0 for the exact trace, by one backward pass for each output of a sample; or the number of random
                vectors :math:`g` with :math:`\mathbb E[g g^\top] = B_i` to estimate it from without bias, for many
                outputs.
            generator: of the random vectors.
        """

        def drawn(y: Tensor, t: Tensor) -> Iterator[Tensor]:
            return (self._draw(y, t, generator).unsqueeze(0) / math.sqrt(draws) for _ in range(draws))

        found = self._sample_columns(drawn if draws else self.column_blocks)
        none = torch.zeros((), dtype=self.dtype, device=self.device)
        traces = [sum(map(_squared_norms, gradients), none) for gradients in found]
        return torch.cat([none.new_zeros(0), *traces])

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
        for found in self._sample_columns(self.column_blocks):
            for gradients in found:
                blocks.append((gradients if isinstance(gradients, Tensor) else gradients.explicit()) / root)
                count += len(blocks[-1])
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

    >>> from lightning_ext.functional import InfluenceObjective
    >>> layer = torch.nn.Linear(2, 1, bias=False).eval()
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

    def between(self, y: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:  # noqa: D102
        return self.objective.loss.hessian_at(y, t)

    def columns(self, y: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return self.objective.loss.hessian_sqrt(y, t)

    def column_blocks(self, y: Tensor, t: Tensor) -> Iterator[Tensor]:  # noqa: D102
        at_once = max(1, _BLOCK_BYTES // max(1, y.numel() * y.element_size()))
        return self.objective.loss.hessian_columns(y, t, at_once)


class EmpiricalFisherOperator(_ThroughOutputs):
    r"""The empirical Fisher matrix :math:`F + \lambda I`, :math:`F = \frac1N \sum_i g_i g_i^\top`, at the true labels.

    It is not the Fisher matrix, and at a good fit not close to it (Kunstner et al. 2019, arXiv:1905.12558). See
    :class:`CurvatureOperator`.

    >>> from lightning_ext.functional import InfluenceObjective
    >>> layer = torch.nn.Linear(1, 1, bias=False).eval()
    >>> data = [(torch.ones(1, 1), layer.weight.detach() - 3.0)]
    >>> EmpiricalFisherOperator(layer, InfluenceObjective("half_squared_error"), data).dense()  # residual squared
    tensor([[9.]])
    """

    def between(self, y: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:  # noqa: D102
        gradient = self.objective.loss.gradient(y, t)

        def product(u: Tensor) -> Tensor:
            along = (u * gradient).flatten(2).sum(2) if y.ndim > 1 else u * gradient
            return along.reshape(*along.shape, *[1] * (y.ndim - 1)) * gradient

        return product

    def columns(self, y: Tensor, t: Tensor) -> Tensor:  # noqa: D102
        return self.objective.loss.gradient(y, t).unsqueeze(0)

    def columns_per_sample(self, y: Tensor) -> int:  # noqa: D102
        return 1

    def _draw(self, y: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.objective.loss.gradient(y, t)


class HessianOperator(CurvatureOperator):
    r"""The Hessian of the mean training loss, plus :math:`\lambda I`; indefinite where the network is not at a minimum.

    See :class:`CurvatureOperator`; ``backend`` does not matter here.

    >>> from lightning_ext.functional import InfluenceObjective
    >>> layer = torch.nn.Linear(1, 1, bias=False).eval()
    >>> data = [(torch.full((1, 1), 2.0), torch.zeros(1, 1))]
    >>> HessianOperator(layer, InfluenceObjective("half_squared_error"), data, damping=0.5).dense()  # x^2 + damping
    tensor([[4.5000]])
    """

    def _share(self, batch: Any, *, check: bool) -> Share:
        function, targets = self.objective.function(self.module, self.view, batch), self.objective.targets(batch)
        return LinearizedGradient(lambda p: self.objective.losses(function(p), targets), self._params)
