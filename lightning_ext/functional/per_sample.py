"""The gradient of every sample of a batch: from the layers' inputs and output gradients, checked, or by ``vmap``."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext.functional.batches import batch_size, differentiable, select, select_traced
from lightning_ext.functional.counter_rng import seeded_generator
from lightning_ext.functional.influence_objective import InfluenceObjective, evaluating
from lightning_ext.functional.layer_gradients import ExplicitRows, LayerGradients, pieces
from lightning_ext.functional.layer_recorder import LayerRecorder
from lightning_ext.functional.parameters import ParameterView

__all__ = ["SampleGradients", "per_sample_gradients"]

Parameters = Mapping[str, Tensor]

# fmt: off
_ONE_BY_ONE = {
    nn.Sequential, nn.Linear, nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh,
    nn.Sigmoid, nn.Softplus,
}
# fmt: on


def per_sample_gradients(
    function: Callable[[Parameters, Any], Tensor],
    parameters: Parameters,
    batch: Any,
    *,
    chunk_size: int | None = None,
    vectorize: bool | None = None,
) -> dict[str, Tensor]:
    r"""Gradients :math:`\nabla_\theta f(\theta, z_b)` of every sample, by ``vmap(grad)``.

    Args:
        function: Maps parameters and a batch of one sample to a tensor with one element; made of torch functions.
        parameters: Tensors by name, the point :math:`\theta`.
        batch: Tensors with the samples first, in nested tuples, lists and dicts.
        chunk_size: Samples at a time, at least 1. Default None, all at once; every chunk keeps its activations.
        vectorize: False goes through the samples one by one. Default None: only where ``vmap`` cannot trace the
            function (values that decide about the path, operators without a batching rule).

    Returns:
        For each parameter the gradients ``(B, *shape)``.

    Example:
        >>> batch = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> per_sample_gradients(lambda p, x: (x @ p["w"]).square().sum(), {"w": torch.tensor([1.0, 0.0])}, batch)
        {'w': tensor([[ 2.,  4.],
                [18., 24.]])}

    Note:
        About two forward passes per sample and ``B D`` numbers, whatever the layers are.
    """
    gradient = torch.func.grad(lambda p, sample: function(p, sample).sum())
    parameters = dict(parameters)
    device = next(iter(parameters.values())).device
    indices = torch.arange(batch_size(batch), device=device)

    def of(index: Tensor) -> dict[str, Tensor]:
        sample = select_traced(batch, index.reshape(1))
        result: dict[str, Tensor] = gradient(parameters, sample)
        return result

    with torch.no_grad():  # of what is around; grad differentiates all the same
        if vectorize is not False:
            try:
                return torch.func.vmap(of, randomness="different", chunk_size=chunk_size)(indices)
            except RuntimeError:
                if vectorize:
                    raise
        each = [of(index) for index in indices]
    return {name: torch.stack([gradients[name] for gradients in each]) for name in parameters}


class SampleGradients:
    r"""Per-sample gradients of an objective: ``SampleGradients(module, objective)(batch)``.

    Layers that :class:`LayerRecorder` knows are recorded. Parameters of others, and those that several layers share,
    get explicit gradients by :func:`per_sample_gradients`. Whether the layers tell the truth is checked against
    autograd, on one sample run alone with a random output cotangent, whenever the layers' shapes are new (the number of
    samples aside, unless it is one), except in a plain chain of linear layers and functions of each element. Where they
    do not (a weight is used outside its layer, samples meet inside the network, a layer works on something that is not
    ordered by samples), all gradients are explicit from then on, and ``fallback`` says why.

    Args:
        module: The network; it is put into eval mode for each call and back.
        objective: Loss, outputs and measurement.
        view: The chosen parameters. Default None, all that require gradients.
        quantity: "loss" or "measurement", what is differentiated. Default "loss".
        layerwise: False makes all gradients explicit. Default True.
        memory_bytes: What explicit gradients may take at a time in :meth:`parts`, at least 1. Default 256 MiB.

    Attributes:
        uncovered: Names of the parameters whose gradients are explicit; all of them after a fallback.
        fallback: Why the layers are not used at all, or None.

    Raises:
        ValueError: From a call, if the gradient of a sample is not finite; the message gives its place in the batch.

    Note:
        A call costs a forward pass and the part of a backward pass that reaches the layers' outputs. It works under
        ``inference_mode``, and takes no part in autocasting. Nothing is reduced over ranks: each has its own batch.

    Source: Goodfellow 2015 (arXiv 1510.01799) for norms; Rochette et al. 2019 (arXiv 1912.06015) for convolutions.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: InfluenceObjective,
        view: ParameterView | None = None,
        *,
        quantity: Literal["loss", "measurement"] = "loss",
        layerwise: bool = True,
        memory_bytes: int = 2**28,
    ) -> None:
        if quantity not in ("loss", "measurement"):
            raise ValueError(f'quantity must be "loss" or "measurement", got {quantity!r}.')
        if memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1, got {memory_bytes}.")
        self.module, self.objective, self.quantity, self.memory_bytes = module, objective, quantity, memory_bytes
        self.view = ParameterView(module) if view is None else view
        self.recorder = LayerRecorder(module, self.view)
        covered = {name for layer in self.recorder.layers for name in layer.parameters}
        self.uncovered = tuple(name for name in self.view.names if name not in covered)
        self.fallback: str | None = None
        self._checked: set[Any] = set()
        if not layerwise:
            self._fall_back("layerwise=False was asked for")

    def _fall_back(self, reason: str) -> None:
        self.fallback, self.uncovered = reason, self.view.names

    def __call__(self, batch: Any) -> LayerGradients:
        """The gradients of all samples of a batch, as factors."""
        with self.recording(batch) as (batch, outputs):
            gradients = self._explicit(batch) if outputs is None else self._recorded(batch, outputs)
        _refuse_non_finite(gradients)
        return gradients

    @contextlib.contextmanager
    def recording(self, batch: Any) -> Iterator[tuple[Any, Tensor | None]]:
        """Run the batch with ``recorder`` listening, in eval mode, with autograd on and autocasting off.

        Yields:
            The batch as autograd can use it, and the outputs; None for these where the layers do not explain the
            gradients, see ``fallback``. What was recorded is forgotten at the end.
        """
        device = self.view.device.type
        plain = torch.autocast(device, enabled=False), _eager(self.view)
        with evaluating(self.module), differentiable(batch) as batch, plain[0], plain[1]:
            try:
                yield batch, None if self.fallback else self._outputs(batch)
            finally:
                self.recorder.forget()

    def _outputs(self, batch: Any) -> Tensor | None:
        with self.recorder:
            outputs = self.objective.outputs(self.module, batch)
        if len(outputs) != batch_size(batch):
            raise ValueError(
                f"a batch of {batch_size(batch)} samples must give as many outputs; got {tuple(outputs.shape)}."
            )
        try:
            self._check(batch, outputs)
        except _UnexplainedError as reason:
            self._fall_back(str(reason))
            return None
        self.uncovered = self.recorder.uncovered
        return outputs

    def parts(self, batch: Any) -> Iterator[LayerGradients]:
        """The same in pieces, of so many samples that explicit gradients stay within ``memory_bytes``."""
        for piece, _ in self.split(batch):
            yield self(piece)

    def split(self, batch: Any) -> Iterator[tuple[Any, slice]]:
        """Cut a batch so that each piece's explicit gradients stay within ``memory_bytes``.

        Yields:
            The samples of a piece, and where they stand in the batch.
        """
        slices = self.view.slices()
        width = sum(slices[name].stop - slices[name].start for name in self.uncovered)
        total = batch_size(batch)
        for part in pieces(total, 4 * width, self.memory_bytes) if width else [slice(0, total)]:
            piece = part.start, part.stop
            yield batch if piece == (0, total) else select(batch, torch.arange(*piece)), part

    def project(self, batch: Any, rows: Tensor) -> Tensor:
        """Inner products ``(Q, B)`` of ``rows`` ``(Q, D)`` with every sample's gradient."""
        return torch.cat([part.project(rows) for part in self.parts(batch)], dim=1)

    def norms(self, batch: Any) -> Tensor:
        """Lengths ``(B,)`` of the gradients."""
        return torch.cat([part.norms() for part in self.parts(batch)])

    def explicit(self, batch: Any) -> Tensor:
        """The gradients ``(B, D)`` written out, in the order of the parameter view."""
        return torch.cat([part.explicit() for part in self.parts(batch)])

    def _values(self, outputs: Tensor, targets: Any) -> Tensor:
        if self.quantity == "loss":
            return self.objective.losses(outputs, targets)
        return self.objective.measure(outputs, targets)

    def _cotangent(self, outputs: Tensor, targets: Any) -> Tensor:
        if self.quantity == "loss":
            return self.objective.loss.gradient(outputs, targets).to(outputs.dtype)
        value = self._values(outputs.requires_grad_(), targets).sum()
        cotangent: Tensor = torch.autograd.grad(value, outputs)[0]
        return cotangent

    def _recorded(self, batch: Any, outputs: Tensor) -> LayerGradients:
        cotangent = self._cotangent(outputs.detach(), self.objective.targets(batch))
        return self.recorder.backward(outputs, cotangent, self.others(batch, cotangent))

    def others(self, batch: Any, cotangent: Tensor) -> dict[str, Tensor]:
        """Gradients ``(B, *shape)`` of the ``uncovered`` parameters for an output cotangent ``(B, ...)``."""
        values = self.view.values()

        def pulled(parameters: Parameters, sample: Any) -> Tensor:
            inputs, c = sample
            outputs = self.objective.function(self.module, self.view, inputs)(values | dict(parameters))
            return torch.sum(outputs * c)

        if not self.uncovered:
            return {}
        return per_sample_gradients(pulled, {name: values[name] for name in self.uncovered}, (batch, cotangent))

    def _explicit(self, batch: Any) -> LayerGradients:
        def value(parameters: Parameters, sample: Any) -> Tensor:
            outputs = self.objective.function(self.module, self.view, sample)(parameters)
            return self._values(outputs, self.objective.targets(sample))

        gradients = per_sample_gradients(value, self.view.values(), batch)
        rows = self.view.flatten(gradients)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return LayerGradients([ExplicitRows((slice(0, self.view.numel),), (rows,))], self.view.numel)

    def _check(self, batch: Any, outputs: Tensor) -> None:
        """Raise where a sample alone has another gradient than the layers say."""
        recorder, last = self.recorder, len(outputs) - 1

        def named(size: int) -> int | str:
            return "samples" if size == len(outputs) else size

        shapes = (last > 0, *((name, *map(named, shape)) for name, shape in recorder.shapes))
        if shapes in self._checked or not recorder.recorded or not outputs.requires_grad:
            return
        rows_only = all(len(shape) == 2 and shape[0] == len(outputs) for _, shape in recorder.shapes)
        if rows_only and not callable(self.objective.forward) and _evident(self.module):
            return
        cotangent = torch.randn(outputs.shape, generator=seeded_generator(0)).to(outputs)
        try:
            gradients = recorder.output_gradients(outputs, cotangent)
            blocks = [recorder.block(layer, g) for layer, g in zip(recorder.recorded, gradients, strict=True)]
        except ValueError as error:
            raise _UnexplainedError(str(error)) from error
        ours = [rows[0] for block in blocks for rows in block[last : last + 1].explicit()]
        names = [name for layer in recorder.recorded for name in layer.parameters]
        parameters = [self.module.get_parameter(name) for name in names]
        alone = self.objective.outputs(self.module, select(batch, [last]))
        _require_apart(outputs[last : last + 1].detach(), alone.detach())
        truth = torch.autograd.grad(alone, parameters, cotangent[last].reshape(alone.shape), materialize_grads=True)
        _compare(names, ours, [g.flatten() for g in truth])
        self._checked.add(shapes)


def _evident(module: nn.Module) -> bool:
    """Whether all it does is linear layers and functions of each element, one after the other."""
    return all(
        type(part) in _ONE_BY_ONE
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        and not (part._backward_hooks or part._backward_pre_hooks)
        for part in module.modules()
    )


class _UnexplainedError(Exception):
    """The layers do not explain the gradients; the message says where."""


def _require_apart(among_others: Tensor, alone: Tensor) -> None:
    tolerance = torch.finfo(alone.dtype).eps ** 0.4
    if among_others.shape == alone.shape and (among_others - alone).norm() > tolerance * (1e-3 + alone.norm()):
        raise ValueError(
            "a sample's outputs are others when it is alone than in its batch: BatchNorm without running statistics, "
            "say, lets samples meet, or the network draws random numbers. A single sample then has no gradient."
        )


def _compare(names: list[str], ours: list[Tensor], truth: list[Tensor]) -> None:
    tolerance = torch.finfo(truth[0].dtype).eps ** 0.4  # rounding of another order of the sums stays below
    errors, sizes = (torch.stack(torch._foreach_norm(each)) for each in (torch._foreach_sub(ours, truth), truth))
    wrong = (errors > tolerance * (sizes + 0.01 * sizes.max())).nonzero()
    if len(wrong):
        raise _UnexplainedError(
            f"the layer of {names[int(wrong[0])]!r} does not explain the gradient of a sample run alone"
        )


def _eager(view: ParameterView) -> contextlib.AbstractContextManager[Any]:
    """Compiled networks run without their compiled code, in which hooks are not called."""
    compiled = any("_orig_mod." in name for name in view.names)
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _refuse_non_finite(gradients: LayerGradients) -> None:
    if all(block.is_finite() for block in gradients.blocks):
        return
    bad = gradients.norms().isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the gradients of samples {bad[:10]} of the batch are not finite: look at their inputs.")
