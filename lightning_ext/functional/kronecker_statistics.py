r"""Sums over samples that K-FAC and EK-FAC are made of: factors, eigenvalue corrections, and exact diagonals."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional.influence_objective import InfluenceObjective
from lightning_ext.functional.layer_recorder import RecordedLayer
from lightning_ext.functional.parameters import ParameterView
from lightning_ext.functional.per_sample import SampleGradients

__all__ = ["KroneckerLayer", "KroneckerStatistics"]

Fisher = Literal["type2", "mc", "empirical"]
_BLOCK_BYTES = 2**26  # of rotated per-sample gradients held at once
_COLUMN_BYTES = 2**26  # of several columns of the Hessians' roots and their output gradients, held at once


@dataclass(frozen=True)
class KroneckerLayer:
    """A layer's weight and bias as matrices ``(G, P, M)``, the bias being the last of the M columns.

    Args:
        name: Name of the layer in the module.
        weight: Where the weight lies in the flat parameter vector, None where it is not chosen.
        bias: The same of the bias.
        groups: G, independent parts of a grouped convolution.
        outputs: P, outputs of a group.
        inputs: M, inputs of a group, the constant 1 of the bias included.
    """

    name: str
    weight: slice | None
    bias: slice | None
    groups: int
    outputs: int
    inputs: int

    def gather(self, rows: Tensor) -> Tensor:
        """Return this layer's part of rows ``(R, D)`` as ``(R, G, P, M)``."""
        shape = (len(rows), self.groups, self.outputs, -1)
        parts = [rows[:, part].reshape(shape) for part in (self.weight, self.bias) if part is not None]
        return torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]

    def scatter(self, matrices: Tensor, out: Tensor) -> None:
        """Write matrices ``(R, G, P, M)`` to this layer's part of ``out`` ``(R, D)``."""
        if self.bias is not None:
            out[:, self.bias] = matrices[..., -1].flatten(1)
        if self.weight is not None:
            out[:, self.weight] = matrices[..., : self.inputs - (self.bias is not None)].flatten(1)

    def augment(self, a: Tensor) -> Tensor:
        """Append the constant 1 of a bias to inputs ``(G, B, T, M)``."""
        if self.bias is None:
            return a
        one = a.new_ones(1).expand(*a.shape[:3], 1)
        return one if self.weight is None else torch.cat([a, one], dim=3)


def _kronecker_layers(layers: Iterable[RecordedLayer], view: ParameterView, max_width: int) -> list[KroneckerLayer]:
    slices, found = view.slices(), []
    for layer in layers:
        if layer.kind != "outer":
            continue
        weight: Any = layer.layer.weight
        outputs, bias = weight.shape[0] // layer.groups, layer.bias is not None
        inputs = (weight[0].numel() if layer.weight is not None else 0) + bias
        if max(inputs, outputs) <= max_width:
            at, bias_at = (None if name is None else slices[name] for name in (layer.weight, layer.bias))
            found.append(KroneckerLayer(layer.name, at, bias_at, layer.groups, outputs, inputs))
    return found


class KroneckerStatistics:
    r"""What a batch adds to the factors of K-FAC and to the eigenvalues of EK-FAC; sums over samples, never means.

    With :math:`c_{ik}` the columns of a root of the output Hessian, :math:`H_i = \sum_k c_{ik} c_{ik}^\top`, and
    :math:`g_{ikt} = (\partial y_i / \partial s_t)^\top c_{ik}` at token t (position of a convolution) of a layer,

    .. math::
        A = \sum_i \frac1T \sum_t \bar a_{it} \bar a_{it}^\top, \qquad S = \sum_{i,k,t} g_{ikt} g_{ikt}^\top, \qquad
        \Lambda = \sum_{i,k} \Big(Q_S^\top \sum_t g_{ikt} \bar a_{it}^\top Q_A\Big)^{\circ 2}.

    Args:
        module: The network.
        objective: Loss and outputs.
        view: The chosen parameters. Default None, all that require gradients.
        fisher: "type2": all columns of the root, which is exact; "mc": one column, the gradient for a label that is
            drawn from the model; "empirical": the gradient of the loss itself, another matrix. Default "type2".
        max_width: Layers with more inputs or outputs per group get no factors. Default 8192.

    Attributes:
        layers: The layers with factors: Linear and convolutions.
        diagonal: Names of the other parameters, which have their exact diagonal: of embeddings, norm layers, attention
            (``nn.MultiheadAttention`` does not call the layers it holds) and whatever belongs to no known layer.
        dtype: That of the parameters, at least float32.

    Raises:
        ValueError: On a batch, if a layer does not explain the gradients of its parameters; the message names it.

    Note:
        One forward pass, and per column a backward pass that leaves out the weights' gradients. Per-sample products of
        layers with tokens are made in pieces of 64 MiB. Inputs of a convolution are unfolded for all samples of a
        batch: choose its size by that. Parameters that no recorded layer explains cost one ``vmap(grad)`` per column.

    Source: as :class:`KroneckerCurvature`.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        view: ParameterView | None = None,
        *,
        fisher: Fisher = "type2",
        max_width: int = 8192,
    ) -> None:
        if fisher not in ("type2", "mc", "empirical"):
            raise ValueError(f'fisher must be "type2", "mc" or "empirical", got {fisher!r}.')
        self.gradients = SampleGradients(module, objective, view)
        self.view, self.recorder = self.gradients.view, self.gradients.recorder
        self.objective, self.fisher = objective, fisher
        self.dtype = torch.promote_types(self.view.dtype, torch.float32)
        self.layers = tuple(_kronecker_layers(self.recorder.layers, self.view, max_width))
        self._factored = {layer.name: layer for layer in self.layers}
        kept = {name for layer in self.recorder.layers if layer.name in self._factored for name in layer.parameters}
        self.diagonal = tuple(name for name in self.view.names if name not in kept)

    def warn_of_diagonal(self) -> None:
        """Name the parameters that get no factors, if there are any."""
        if self.diagonal:
            share = sum(place.stop - place.start for place in self.places) / self.view.numel
            warnings.warn(
                f"{len(self.diagonal)} of {len(self.view.names)} parameters ({share:.0%} of the numbers) have no "
                f"Kronecker factors, only the diagonal of their curvature: {', '.join(self.diagonal[:20])}.",
                stacklevel=3,
            )

    @property
    def places(self) -> tuple[slice, ...]:
        """Where the parameters of ``diagonal`` lie in the flat vector."""
        slices = self.view.slices()
        return tuple(slices[name] for name in self.diagonal)

    @torch.inference_mode(False)  # they are added to with autograd on
    def factor_zeros(self) -> dict[str, Tensor]:
        """Zeros of the shapes of :meth:`factors`, in the widest float of the device."""
        sums = {"count": self._zeros(), "diagonal": self._zeros(sum(p.stop - p.start for p in self.places))}
        for layer in self.layers:
            sums[f"{layer.name}.A"] = self._zeros(layer.groups, layer.inputs, layer.inputs)
            sums[f"{layer.name}.S"] = self._zeros(layer.groups, layer.outputs, layer.outputs)
        return sums

    @torch.inference_mode(False)
    def correction_zeros(self) -> dict[str, Tensor]:
        """Zeros of the shapes of :meth:`corrections`, in the widest float of the device."""
        shapes = {layer.name: (layer.groups, layer.outputs, layer.inputs) for layer in self.layers}
        return {"count": self._zeros()} | {name: self._zeros(*shape) for name, shape in shapes.items()}

    def _zeros(self, *shape: int) -> Tensor:
        wide = torch.float32 if self.view.device.type == "mps" else torch.float64
        return torch.zeros(shape, dtype=wide, device=self.view.device)

    def factors(
        self, batch: Any, generator: torch.Generator | None = None, sums: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Sums over a batch.

        Args:
            batch: The samples.
            generator: Draws the labels of ``fisher="mc"``. Default None, the global one.
            sums: What to add to, in place. Default None, zeros.

        Returns:
            ``"count"``; ``"<layer>.A"`` ``(G, M, M)`` and ``"<layer>.S"`` ``(G, P, P)``; ``"diagonal"``, the exact
            diagonal at ``places``, one after the other.
        """
        sums = self.factor_zeros() if sums is None else sums
        with self.gradients.recording(batch) as (batch, outputs):
            outputs = self._explained_outputs(outputs)
            sums["count"] += len(outputs)
            widths = [part.stop - part.start for part in self.places]
            diagonal = dict(zip(self.diagonal, torch.split(sums["diagonal"], widths), strict=True))
            for layer, kron in self._recorded_factored():
                a = kron.augment(self.recorder.inputs(layer, len(outputs))).flatten(1, 2)
                sums[f"{layer.name}.A"] += (a.mT @ a) * (len(outputs) / a.shape[1])
            for columns in self._columns(batch, outputs, generator):
                gradients = self.recorder.output_gradients(outputs, columns)
                for layer, g in zip(self.recorder.recorded, gradients, strict=True):
                    if layer.name in self._factored:
                        flat = g.transpose(0, 1).flatten(1, 3)
                        sums[f"{layer.name}.S"] += flat.mT @ flat
                    else:
                        self._add_diagonal(layer, g, diagonal)
                self._add_others(batch, columns, diagonal)
        return sums

    def corrections(
        self,
        batch: Any,
        bases: Mapping[str, tuple[Tensor, Tensor]],
        generator: torch.Generator | None = None,
        sums: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        r"""Sums over a batch of squared gradients in the eigenbases.

        Args:
            batch: The samples.
            bases: For each layer :math:`(Q_A, Q_S)`, ``(G, M, M)`` and ``(G, P, P)``.
            generator: As in :meth:`factors`.
            sums: As in :meth:`factors`.

        Returns:
            ``"count"`` and ``"<layer>"`` ``(G, P, M)``.
        """
        sums = self.correction_zeros() if sums is None else sums
        with self.gradients.recording(batch) as (batch, outputs):
            outputs = self._explained_outputs(outputs)
            sums["count"] += len(outputs)
            inputs = {
                layer.name: _rotated(kron.augment(self.recorder.inputs(layer, len(outputs))), bases[layer.name][0])
                for layer, kron in self._recorded_factored()
            }
            for columns in self._columns(batch, outputs, generator):
                gradients = self.recorder.output_gradients(outputs, columns)
                for layer, g in zip(self.recorder.recorded, gradients, strict=True):
                    if layer.name in self._factored:
                        rotated = _rotated(g.transpose(0, 1), bases[layer.name][1])
                        sums[layer.name] += _squared_products(rotated, inputs[layer.name])
        return sums

    def _recorded_factored(self) -> Iterator[tuple[RecordedLayer, KroneckerLayer]]:
        for layer in self.recorder.recorded:
            if layer.name in self._factored:
                yield layer, self._factored[layer.name]

    def _explained_outputs(self, outputs: Tensor | None) -> Tensor:
        if outputs is None:
            raise ValueError(
                f"Kronecker factors need layers that explain their gradients: {self.gradients.fallback}. Leave it out "
                "of the parameters (include=), or use a solver that needs no layers."
            )
        return outputs

    def _columns(self, batch: Any, outputs: Tensor, generator: torch.Generator | None) -> Iterator[Tensor]:
        y, t, loss = outputs.detach(), self.objective.targets(batch), self.objective.loss
        if self.fisher == "type2":
            each = (y.numel() + sum(shape.numel() for _, shape in self.recorder.shapes)) * y.element_size()
            blocks = loss.hessian_columns(y, t, max(1, _COLUMN_BYTES // max(1, each)))
            yield from (columns.to(y.dtype) for columns in blocks)
        elif self.fisher == "mc":
            yield loss.sample_gradient(y, t, generator).unsqueeze(0).to(y.dtype)
        else:
            yield loss.gradient(y, t).unsqueeze(0).to(y.dtype)

    def _add_diagonal(self, layer: RecordedLayer, g: Tensor, diagonal: Mapping[str, Tensor]) -> None:
        for column in g:
            squares = self.recorder.block(layer, column).square_sums()
            for name, values in zip(layer.parameters, squares, strict=True):
                diagonal[name].add_(values)

    def _add_others(self, batch: Any, columns: Tensor, diagonal: Mapping[str, Tensor]) -> None:
        if not self.gradients.uncovered:
            return
        for piece, part in self.gradients.split(batch):
            for column in columns:
                for name, gradients in self.gradients.others(piece, column[part]).items():
                    self._add_squares(name, gradients.square().sum(0).flatten(), diagonal)

    def _add_squares(self, name: str, squares: Tensor, diagonal: Mapping[str, Tensor]) -> None:
        if name in diagonal:
            diagonal[name].add_(squares)
        elif bool(squares.any()):
            raise ValueError(f"{name!r} is used, but its layer is not called: leave it out (include=).")


def _rotated(x: Tensor, basis: Tensor) -> Tensor:
    """Multiply ``(G, ..., F)`` by ``(G, F, F)``, each group in one product."""
    return (x.flatten(1, -2) @ basis).view(x.shape)


def _squared_products(g: Tensor, a: Tensor) -> Tensor:
    """Sum over columns and samples of the squares of ``g`` ``(G, S, B, T, P)`` times ``a`` ``(G, B, T, M)``."""
    if g.shape[3] == 1:
        return g.square().sum((1, 3)).mT @ a.square().squeeze(2)
    total = g.new_zeros(g.shape[0], g.shape[4], a.shape[3])
    size = max(1, _BLOCK_BYTES // (total.numel() * g.element_size()))
    for column in range(g.shape[1]):
        for start in range(0, a.shape[1], size):
            part = slice(start, start + size)
            total += (g[:, column, part].mT @ a[:, part]).square_().sum(1)
    return total
