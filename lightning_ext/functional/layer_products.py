r"""Products with a Gauss-Newton matrix from the inputs and output gradients of linear layers and convolutions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ext.functional.layer_recorder import RecordedLayer
from lightning_ext.functional.per_sample import SampleGradients

__all__ = ["LayerFactors", "LayerProducts"]

_WORKING_BYTES = 3 * 2**20  # what a piece of the work should take, to stay in a processor's cache
_ACCELERATOR_BYTES = 2**28
_MOST_BYTES = 2**28  # of output gradients of one batch


@dataclass(frozen=True)
class LayerFactors:
    """A linear map's inputs and output gradients for one batch.

    Args:
        a: inputs ``(B, T, M)``, T positions that share the weight.
        g: output gradients ``(B, P T, S)`` for S columns.
        weight: the place of the weight ``(P, M)`` in the flat vector.
        bias: the place of the bias ``(P,)``, if it is a parameter.
    """

    a: Tensor
    g: Tensor
    weight: slice
    bias: slice | None


class LayerProducts:
    r"""The matrix :math:`\sum_b \sum_s (J_b^\top c_{sb}) (J_b^\top c_{sb})^\top` of a batch, for blocks of rows.

    In a layer with inputs a and output gradients g the row :math:`J_b^\top c_{sb}` is :math:`\sum_t g_{sbt}
    a_{bt}^\top`. With :math:`V_\ell` the layer's part of a vector, the inner products are :math:`u_{sb} = \sum_{\ell t}
    g_{sbt}^\top V_\ell a_{bt}`, and the product's part :math:`\sum_{bt} (\sum_s u_{sb} g_{sbt}) a_{bt}^\top`. For S
    columns and layers of width M that takes (M + S) / 2 M of the multiplications of a forward and a backward
    derivative, in products of large matrices.

    Args:
        layers: one entry per layer, see :meth:`of`.

    Attributes:
        nbytes: what it keeps.

    Note:
        A product costs (M + S) P T multiplications per sample and layer, twice. Only one batch is looked at.

    >>> from lightning_ext.functional.layer_products import LayerFactors
    >>> x = LayerFactors(torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 1), slice(0, 2), None)
    >>> LayerProducts([x]).product(torch.eye(2))  # x x^T
    tensor([[1., 2.],
            [2., 4.]])
    """

    def __init__(self, layers: Sequence[LayerFactors]) -> None:
        self._layers = layers
        self.nbytes = sum(x.numel() * x.element_size() for layer in layers for x in (layer.a, layer.g))

    @classmethod
    def of(
        cls, gradients: SampleGradients, batch: Any, columns: Callable[[Tensor, Tensor], Tensor], *, outputs: int = 1
    ) -> "LayerProducts | None":
        """Record a batch.

        Args:
            gradients: knows the module, its layers and whether these explain the gradients.
            batch: the batch.
            columns: from the batch's outputs and targets to the columns c, ``(S, *outputs.shape)``.
            outputs: S as far as it is known beforehand.

        Returns:
            The products, or ``None`` where they would not pay: layers of another kind, too many outputs.
        """
        with gradients.recording(batch) as (plain, y):
            recorder = gradients.recorder
            recorded = recorder.recorded
            if y is None or gradients.uncovered or not all(map(_is_outer, recorded)):
                return None
            inputs = [recorder.inputs(layer, len(y))[0] for layer in recorded]
            widths = [int(gradients.view.values()[str(layer.weight)].shape[0]) for layer in recorded]
            if not _pays(inputs, widths, outputs):
                return None
            pulled = recorder.output_gradients(y, columns(y.detach(), gradients.objective.targets(plain)))
        slices = gradients.view.slices()
        layers = []
        for layer, a, g in zip(recorded, inputs, pulled, strict=True):
            weight, bias = slices[str(layer.weight)], slices[layer.bias] if layer.bias else None
            layers.append(LayerFactors(a, g[:, 0].permute(1, 3, 2, 0).flatten(1, 2).contiguous(), weight, bias))
        return cls(layers)

    def product(self, rows: Tensor) -> Tensor:
        """Multiply rows ``(R, D)``."""
        with torch.inference_mode(False), torch.no_grad():
            total = torch.zeros_like(rows)
            at_once = self._rows_at_once(rows)
            for start in range(0, len(rows), at_once):
                part = slice(start, start + at_once)
                self._add_product(rows[part], total[part])
        return total

    def _rows_at_once(self, rows: Tensor) -> int:
        widest = max(layer.g.shape[1] for layer in self._layers)
        return max(16, min(128, _budget(rows) // (widest * rows.element_size())))

    def _add_product(self, rows: Tensor, total: Tensor) -> None:
        count, samples = len(rows), len(self._layers[0].a)
        maps = [_Maps(layer, rows) for layer in self._layers]
        widest = max(layer.g.shape[1] for layer in self._layers)
        step = max(1, _budget(rows) // (count * widest * rows.element_size()))
        for start in range(0, samples, step):
            part = slice(start, start + step)
            along = sum((m.along(part) for m in maps[1:]), maps[0].along(part))
            for m in maps:
                m.add(along, part)
        for m in maps:
            m.write(total)


class _Maps:
    """A block of R vectors' part of one layer, and the product's part that is added up."""

    def __init__(self, layer: LayerFactors, rows: Tensor) -> None:
        self._layer, self._count = layer, len(rows)
        features = layer.a.shape[2]
        self._weight = rows[:, layer.weight].reshape(-1, features)  # (R P, M)
        self._bias = None if layer.bias is None else rows[:, layer.bias].reshape(-1)
        self._weights = torch.zeros_like(self._weight)
        self._biases = None if self._bias is None else torch.zeros_like(self._bias)

    def along(self, part: slice) -> Tensor:
        """Return u, (samples, R, S)."""
        a, g = self._layer.a[part], self._layer.g[part]
        if a.shape[1] == 1:
            mapped = a[:, 0] @ self._weight.T
            mapped = mapped if self._bias is None else mapped.add_(self._bias)
        else:
            mapped = self._weight @ a.mT  # (samples, R P, T)
            mapped = mapped if self._bias is None else mapped.add_(self._bias.unsqueeze(-1))
        return mapped.reshape(len(a), self._count, -1) @ g

    def add(self, along: Tensor, part: slice) -> None:
        a, g = self._layer.a[part], self._layer.g[part]
        mixed = along @ g.mT  # (samples, R, P T)
        if a.shape[1] == 1:
            mixed = mixed.reshape(len(a), -1)
            self._weights.addmm_(mixed.T, a[:, 0])
            biases = mixed.sum(0)
        else:
            mixed = mixed.reshape(len(a), -1, a.shape[1])
            for of_sample, inputs in zip(mixed, a, strict=True):
                self._weights.addmm_(of_sample, inputs)
            biases = mixed.sum((0, 2))
        if self._biases is not None:
            self._biases += biases

    def write(self, total: Tensor) -> None:
        total[:, self._layer.weight] = self._weights.reshape(self._count, -1)
        if self._layer.bias is not None and self._biases is not None:
            total[:, self._layer.bias] = self._biases.reshape(self._count, -1)


def _budget(rows: Tensor) -> int:
    return _WORKING_BYTES if rows.device.type == "cpu" else _ACCELERATOR_BYTES


def _is_outer(layer: RecordedLayer) -> bool:
    return layer.kind == "outer" and layer.groups == 1 and layer.weight is not None


def _pays(inputs: Sequence[Tensor], widths: Sequence[int], columns: int) -> bool:
    """Compare multiplications with those of derivatives through the network, and bound the memory."""
    ours, theirs, numbers = 0, 0, 0
    for a, width in zip(inputs, widths, strict=True):
        places, features = a[..., 0].numel() * width, a.shape[2]
        ours += places * (features + columns)
        theirs += places * features * (1 if theirs == 0 else 2)  # the network's inputs have no tangents
        numbers += places * columns
    return 4 * ours <= 3 * theirs and numbers * inputs[0].element_size() <= _MOST_BYTES
