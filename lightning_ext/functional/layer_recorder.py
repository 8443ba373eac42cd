"""Inputs and output gradients of a network's layers, by hooks, in the form of one list of tokens per sample."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_ext.functional.embedding_rows import EmbeddingRows
from lightning_ext.functional.layer_gradients import ExplicitRows, GradientBlock, LayerGradients, OuterProducts
from lightning_ext.functional.parameters import ParameterView

__all__ = ["LayerRecorder", "RecordedLayer"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNEL_NORMS = (
    nn.GroupNorm,
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_NORMS = (nn.LayerNorm, nn.RMSNorm, *_CHANNEL_NORMS)


@dataclass(frozen=True)
class RecordedLayer:
    """A layer whose chosen parameters have gradients that follow from its inputs and its outputs' gradients.

    Args:
        name: Name of the layer in the module, or ``""`` for the module itself.
        layer: The layer.
        kind: "outer" (linear maps and convolutions), "embedding" or "affine" (norm layers).
        weight: Full name of the weight in the parameter view, None where it is not chosen.
        bias: The same of the bias.
    """

    name: str
    layer: nn.Module
    kind: Literal["outer", "embedding", "affine"]
    weight: str | None
    bias: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the chosen parameters, the weight first."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def groups(self) -> int:
        """Independent parts of a grouped convolution, 1 otherwise."""
        return self.layer.groups if isinstance(self.layer, _CONVOLUTIONS) else 1


def _kind(layer: nn.Module) -> Literal["outer", "embedding", "affine"] | None:
    if isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        return "outer"
    if isinstance(layer, nn.Embedding) and layer.max_norm is None and not layer.scale_grad_by_freq:
        return "embedding"
    return "affine" if isinstance(layer, _NORMS) else None


def _find_layers(module: nn.Module, names: Sequence[str]) -> tuple[RecordedLayer, ...]:
    chosen = set(names)
    places = Counter(
        id(p) for layer in module.modules() for _, p in layer.named_parameters(recurse=False, remove_duplicate=False)
    )
    inside_attention = {
        child for layer in module.modules() if isinstance(layer, nn.MultiheadAttention) for child in layer.modules()
    }  # it reads the weights of its layers and never calls them
    found = []
    for prefix, layer in module.named_modules():
        kind = None if layer in inside_attention else _kind(layer)
        own = {
            local: f"{prefix}.{local}" if prefix else local
            for local, p in layer.named_parameters(recurse=False)
            if kind and local in ("weight", "bias") and places[id(p)] == 1
        }
        picked = {local: name for local, name in own.items() if name in chosen}
        if kind and picked:
            found.append(RecordedLayer(prefix, layer, kind, picked.get("weight"), picked.get("bias")))
    return tuple(found)


def _unfolded(layer: Any, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies its weight with: ``(G, N, positions, C / G * kernel)``."""
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sides = [(0, 0) for _ in spans]
    if layer.padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    elif layer.padding != "valid":
        sides = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)
    for axis, (span, stride, dilation) in enumerate(zip(spans, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, span + 1, stride)[..., ::dilation]
    x = x.reshape(len(x), layer.groups, -1, *x.shape[2:])  # (N, G, C / G, *positions, *kernel)
    n = len(spans)
    order = (1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    return x.permute(order).flatten(2 + n).flatten(2, 1 + n)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _by_sample(x: Tensor, batch: int, layer: str) -> Tensor:
    """``(G, N, T, F)`` with the N rows of each sample together, as ``(G, B, N / B * T, F)``."""
    if x.shape[1] % batch:
        raise ValueError(f"layer {layer!r} works on {x.shape[1]} rows, not a multiple of the {batch} samples.")
    return x.reshape(x.shape[0], batch, -1, x.shape[3])


def _channels_last(x: Tensor, groups: int = 1) -> Tensor:
    """``(N, C, *positions)`` as ``(G, N, T, C / G)``."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1).permute(1, 0, 3, 2)


@dataclass(frozen=True)
class _Call:
    inputs: Tensor
    edge: GradientEdge
    shape: torch.Size


class LayerRecorder:
    r"""Record a forward pass so that per-sample gradients follow from one backward pass to the layers' outputs.

    Covered are Linear (any leading dimensions), Conv1d to Conv3d (stride, padding, dilation, groups), Embedding, and
    the affine parameters of LayerNorm, RMSNorm, GroupNorm, InstanceNorm and BatchNorm in eval mode. A layer called
    several times adds its calls up. Hooks are on the layers only inside the ``with`` block.

    Args:
        module: The network, in eval mode.
        view: Its chosen parameters.

    Example:
        >>> from lightning_ext.functional import ParameterView
        >>> module = nn.Linear(2, 1).eval()
        >>> with LayerRecorder(module, ParameterView(module)) as recorder:
        ...     outputs = module(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> recorder.backward(outputs, torch.ones(2, 1)).explicit()
        tensor([[1., 2., 1.],
                [3., 4., 1.]])

    Note:
        A backward pass to the outputs of layers leaves out the products for the weights: less than a training step.
        What a hook cannot see (weights used outside their layer, samples that meet inside the network) it gets wrong;
        :class:`SampleGradients` checks for that.
    """

    def __init__(self, module: nn.Module, view: ParameterView) -> None:
        self.module, self.view = module, view
        self.layers = _find_layers(module, view.names)
        self._slices = view.slices()
        self._calls: dict[str, list[_Call]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._tokens_first: dict[str, bool] = {}

    def __enter__(self) -> "LayerRecorder":
        """Forget what was recorded and listen."""
        self.forget()
        for layer in self.layers:
            hook = self._hook(layer.name)
            self._handles.append(layer.layer.register_forward_hook(hook, with_kwargs=True, always_call=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forget(self) -> None:
        """Let go of the recorded inputs and of the graph behind the outputs."""
        self._calls.clear()

    def _hook(self, name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if output.requires_grad:
                inputs = args[0] if args else next(iter(kwargs.values()))
                # An in-place activation that follows leaves the edge where it is, but would rewrite that of a view.
                output = output.clone() if output._is_view() else output
                self._calls[name].append(_Call(inputs.detach(), get_gradient_edge(output), output.shape))
            return output

        return record

    @property
    def recorded(self) -> tuple[RecordedLayer, ...]:
        """The layers that the forward pass called."""
        return tuple(layer for layer in self.layers if layer.name in self._calls)

    @property
    def shapes(self) -> tuple[tuple[str, torch.Size], ...]:
        """Name and output shape of every recorded call."""
        return tuple((name, call.shape) for name, calls in self._calls.items() for call in calls)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Chosen parameters that no recorded layer explains."""
        covered = {name for layer in self.recorded for name in layer.parameters}
        return tuple(name for name in self.view.names if name not in covered)

    def inputs(self, layer: RecordedLayer, batch: int) -> Tensor:
        """What multiplies the parameters: ``(G, B, T, M)``; indices ``(1, B, T, 1)`` for an embedding.

        Args:
            layer: One of ``recorded``.
            batch: B, the number of samples.
        """
        tokens = [self._input_tokens(layer, call.inputs, batch) for call in self._calls[layer.name]]
        parts = [_by_sample(part, batch, layer.name) for part in tokens]
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _input_tokens(self, layer: RecordedLayer, x: Tensor, batch: int) -> Tensor:
        if layer.kind == "embedding":
            return self._features_last(layer, x.unsqueeze(-1), batch)
        if layer.kind == "affine":
            return self._output_tokens(layer, self._normalized(layer.layer, x), batch)
        if isinstance(layer.layer, _CONVOLUTIONS):
            return _unfolded(layer.layer, _at_least_float32(x))
        return self._features_last(layer, _at_least_float32(x), batch)

    def _features_last(self, layer: RecordedLayer, x: Tensor, batch: int, features: int = 1) -> Tensor:
        """``(*lead, *features)`` as ``(1, N, T, F)``, samples first also where the network has tokens first."""
        x = x.flatten(x.ndim - features)
        if x.ndim > 2 and batch in x.shape[:2]:
            if x.shape[0] != x.shape[1]:  # where the two are equal, what was seen before decides
                self._tokens_first[layer.name] = x.shape[1] == batch
            x = x.transpose(0, 1) if self._tokens_first.get(layer.name) else x
        return x.reshape(1, x.shape[0], -1, x.shape[-1])

    def _normalized(self, layer: nn.Module, x: Tensor) -> Tensor:
        identity = {
            name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p)
            for name, p in layer.named_parameters(recurse=False)
        }
        # nothing here requires a gradient, so the layer's hook passes this call over
        normalized: Tensor = torch.func.functional_call(layer, identity, (x,))
        return normalized

    def _output_tokens(self, layer: RecordedLayer, g: Tensor, batch: int) -> Tensor:
        g = _at_least_float32(g)
        if isinstance(layer.layer, (*_CONVOLUTIONS, *_CHANNEL_NORMS)):
            return _channels_last(g, layer.groups)
        shape = getattr(layer.layer, "normalized_shape", (1,))
        return self._features_last(layer, g, batch, len(shape))

    def output_gradients(self, outputs: Tensor, cotangents: Tensor, vectorize: bool | None = None) -> list[Tensor]:
        """Pull output cotangents back to the outputs of every recorded layer.

        Args:
            outputs: What the recorded forward pass returned, ``(B, ...)``.
            cotangents: ``(*outputs.shape)`` or ``(S, *outputs.shape)``.
            vectorize: One batched backward pass for the S cotangents, or S passes. Default None: batched except on a
                CPU, where passes one after the other are no slower and need less memory.

        Returns:
            For each of ``recorded`` a tensor ``(G, B, T, P)`` or ``(S, G, B, T, P)``.
        """
        edges = [call.edge for layer in self.recorded for call in self._calls[layer.name]]
        if not edges:
            return []

        def pull(cotangent: Tensor, batched: bool = False) -> tuple[Tensor | None, ...]:
            if not outputs.requires_grad:
                return (None,) * len(edges)
            return torch.autograd.grad(
                outputs, edges, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        if cotangents.shape == outputs.shape:
            return self._per_layer(pull(cotangents), outputs)
        if outputs.device.type != "cpu" if vectorize is None else vectorize:
            batched = pull(cotangents, batched=True)
            columns = [tuple(None if g is None else g[s] for g in batched) for s in range(len(cotangents))]
        else:
            columns = [pull(cotangent) for cotangent in cotangents]
        each = [self._per_layer(column, outputs) for column in columns]
        return [torch.stack(layer) for layer in zip(*each, strict=True)]

    def _per_layer(self, gradients: Sequence[Tensor | None], outputs: Tensor) -> list[Tensor]:
        flat, result = iter(gradients), []
        for layer in self.recorded:
            parts = []
            for call in self._calls[layer.name]:
                g = next(flat)
                g = outputs.new_zeros(call.shape) if g is None else g
                parts.append(_by_sample(self._output_tokens(layer, g, len(outputs)), len(outputs), layer.name))
            result.append(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
        return result

    def backward(
        self, outputs: Tensor, cotangents: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> LayerGradients:
        r"""Gradients of :math:`\sum_b c_b^\top y_b` with respect to the parameters, kept apart by sample.

        Args:
            outputs: What the recorded forward pass returned, ``(B, ...)``.
            cotangents: ``(*outputs.shape)``; the gradients of a loss with respect to the outputs, for instance.
            others: Gradients ``(B, *shape)`` of the parameters in ``uncovered``. Default none.

        Returns:
            The gradients of the B samples.

        Raises:
            ValueError: If a chosen parameter is neither covered nor among ``others``.
        """
        others = others or {}
        missing = [name for name in self.uncovered if name not in others]
        if missing:
            raise ValueError(f"no recorded layer explains {missing}; give their gradients as others, or choose fewer.")
        gradients = self.output_gradients(outputs, cotangents)
        blocks = [self.block(layer, g) for layer, g in zip(self.recorded, gradients, strict=True)]
        if self.uncovered:
            slices = tuple(self._slices[name] for name in self.uncovered)
            given = (_at_least_float32(others[name]) for name in self.uncovered)
            blocks.append(ExplicitRows(slices, tuple(rows.reshape(len(rows), -1) for rows in given)))
        return LayerGradients(blocks, self.view.numel)

    def block(self, layer: RecordedLayer, g: Tensor) -> GradientBlock:
        """The per-sample gradients of one layer from its output gradients ``(G, B, T, P)``."""
        slices = tuple(self._slices[name] for name in layer.parameters)
        weight, bias = layer.weight is not None, layer.bias is not None
        a = self.inputs(layer, g.shape[1])
        if layer.kind == "outer":
            return OuterProducts(slices, a, g, weight, bias)
        if layer.kind == "affine":
            rows = ((a * g).sum((0, 2)),) if weight else ()
            return ExplicitRows(slices, rows + ((g.sum((0, 2)),) if bias else ()))
        table: Any = layer.layer
        indices = a[0, ..., 0]
        if table.padding_idx is not None:
            g = g * (a != table.padding_idx)
        return EmbeddingRows(slices, indices, g[0], table.num_embeddings)
