r"""A function linearised once, multiplied many times: :math:`J v` and :math:`J^\top u` in its parameters."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["LinearizedBatch", "LinearizedGradient", "PullBack"]

_TRACED_AFTER = 16  # products with a convolution by which tracing has paid for itself
_ACCELERATOR_BYTES = 2**30  # what intermediate results of rows that go through an accelerator together may take
_HIDDEN = 4  # times the parameters' size, a guess at what is saved where it cannot be counted
_CPU_BYTES, _CPU_ROWS = 2**23, 64  # on a CPU they must stay in its cache, or rows are faster one by one


def _without_inference(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


_CUT = (
    "an operator cuts the graph of its backward pass (once_differentiable, detach), so that second derivatives are not "
    "those of the function. Write it with torch functions, or give it a jvp and use backend='linearize'."
)

Function = Callable[[Mapping[str, Tensor]], Tensor]


def _run(function: Function, params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the parameters as leaves of a new graph, and the function's value with that graph."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {name: _without_inference(value).detach().requires_grad_() for name, value in params.items()}
        return leaves, function(leaves)


def _saved_bytes(function: Function, params: Mapping[str, Tensor]) -> int:
    """Return what one forward pass saves for the backward pass beside the parameters, by running one."""
    own = {value.untyped_storage().data_ptr() for value in params.values()}
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    try:
        with torch.inference_mode(False), torch.enable_grad(), hooks:
            function(params)
    except RuntimeError as error:  # a function with transforms of its own does not show what it saves
        if "saved tensor hooks" not in str(error):
            raise
        return _HIDDEN * sum(value.nbytes for value in params.values())
    return sum(size for place, size in sizes.items() if place not in own)


def _rows_at_once(device: torch.device, nbytes: int) -> int:
    if device.type != "cpu":
        return max(1, _ACCELERATOR_BYTES // max(1, nbytes))
    together = min(_CPU_ROWS, _CPU_BYTES // max(1, nbytes))
    return together if together >= 4 else 1


class PullBack:
    r"""Rows of cotangents through one autograd graph, as often as asked for.

    Args:
        outputs: tensors with a graph; those without one contribute nothing.
        inputs: what to differentiate with respect to; their joined sizes are the result's columns.
        at_once: rows that go through the graph together, at least 1; one by one after all where an operator in it
            cannot be batched. Default 1.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> PullBack([x.square()], [x])([torch.eye(2)])
    tensor([[2., 0.],
            [0., 4.]])
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], at_once: int = 1) -> None:
        self._live = [i for i, output in enumerate(outputs) if output.requires_grad]
        self._outputs = [outputs[i] for i in self._live]
        self._inputs, self._at_once = list(inputs), at_once

    def __call__(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Pull back cotangents ``(R, *shape)``, one tensor per output, to rows ``(R, columns)``."""
        count = len(cotangents[0])
        with torch.inference_mode(False), torch.enable_grad():
            columns, step = sum(x.numel() for x in self._inputs), self._at_once
            kept = [_without_inference(cotangents[i]) for i in self._live]
            if not kept:
                return self._inputs[0].new_zeros(count, columns)
            rows = self._inputs[0].new_empty(count, columns)
            for start in range(0, count, step):
                part = slice(start, start + step)
                torch.cat(self._gradients([c[part] for c in kept]), 1, out=rows[part])
        return rows

    def _gradients(self, cotangents: list[Tensor]) -> list[Tensor]:
        count = len(cotangents[0])
        if count > 1 and self._at_once > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about operators that are batched by a loop
                    return self._together(cotangents)
            except RuntimeError:
                self._at_once = 1
        each = [self._together([c[i : i + 1] for c in cotangents]) for i in range(count)]
        return each[0] if count == 1 else [torch.cat(parts) for parts in zip(*each, strict=True)]

    def _together(self, cotangents: list[Tensor]) -> list[Tensor]:
        count = len(cotangents[0])
        gradients = torch.autograd.grad(
            self._outputs,
            self._inputs,
            [c[0] for c in cotangents] if count == 1 else cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=count > 1,
        )
        return [
            x.new_zeros(count, x.numel()) if g is None else g.reshape(count, -1)
            for g, x in zip(gradients, self._inputs, strict=True)
        ]


class LinearizedBatch:
    r"""Outputs :math:`f(\theta)` with products of their Jacobian :math:`J = \partial f / \partial \theta`.

    The forward pass runs once; :math:`J^\top u` is a backward pass. For :math:`J v` there are two ways.
    ``"double_backward"`` differentiates :math:`u \mapsto J^\top u`, which is linear, once more: ready at once, and as
    fast as a backward pass but for convolutions. ``"linearize"`` traces the forward derivative
    (``torch.func.linearize``): 30 to 600 ms for each batch, then half the time with convolutions.

    Args:
        function: parameters by name to outputs ``(B, ...)``.
        params: the point :math:`\theta`; D numbers in all, in the order of the mapping.
        backend: ``"auto"`` starts with double backward and traces a function with convolutions once 16 rows were asked
            for, unless tracing fails (forward derivatives of recurrent layers are missing, for instance); and it
            traces a function without a second derivative.
        rows_at_once: rows that are worked on together, at least 1. Default ``None``: as many as 1 GiB of intermediate
            results allows on an accelerator; on a CPU what its cache holds, one of large batches.
        check: compare :math:`u^\top J v` both ways for one random pair before the first product: operators that cut the
            graph of their backward pass give zeros for second derivatives, and no error.

    Attributes:
        outputs: :math:`f(\theta)`, detached.

    Raises:
        ValueError: For an unknown backend.
        RuntimeError: From a product, if the function cannot be differentiated in the way asked for.

    Source: Pearlmutter 1994 (Fast exact multiplication by the Hessian); Schraudolph 2002 for the products with J.

    >>> weights = {"w": torch.tensor([1.0, 2.0])}
    >>> batch = LinearizedBatch(lambda p: p["w"].prod().reshape(1), weights)
    >>> batch.jvp(torch.tensor([[1.0, 0.0]])), batch.vjp(torch.tensor([[3.0]]))
    (tensor([[2.]]), tensor([[6., 3.]]))

    Note:
        Works under ``no_grad`` and inference mode. It keeps the forward pass's intermediate results, those of the
        double backward pass from the first ``jvp`` on.
    """

    def __init__(
        self,
        function: Function,
        params: Mapping[str, Tensor],
        backend: Literal["auto", "linearize", "double_backward"] = "auto",
        rows_at_once: int | None = None,
        check: bool = True,
    ) -> None:
        if backend not in ("auto", "linearize", "double_backward"):
            raise ValueError(f"backend must be 'auto', 'linearize' or 'double_backward'; got {backend!r}.")
        self._function, self._asked, self._backend = function, backend, backend
        self._check_first = check
        self._params, self._graph = _run(function, params)
        self.outputs = self._graph.detach()
        self._shapes = [value.shape for value in self._params.values()]
        self._sizes = [value.numel() for value in self._params.values()]
        self._saved: int | None = None
        self._pull: PullBack | None = None
        self._push: PullBack | None = None
        self._linear: Callable[[dict[str, Tensor]], Tensor] | None = None
        self._at_once, self._rows_seen = rows_at_once, 0

    @property
    def nbytes(self) -> int:
        """About what the linearisation keeps in memory beside the parameters, in bytes.

        Costs a forward pass when first asked for; counts the double backward pass as twice the forward one.
        """
        if self._saved is None:
            self._saved = 3 * _saved_bytes(self._function, self._params)
        return self._saved

    @property
    def rows_at_once(self) -> int:
        """Rows that are worked on together."""
        if self._at_once is None:
            self._at_once = _rows_at_once(self.outputs.device, self.nbytes)
        return self._at_once

    def vjp(self, cotangents: Tensor) -> Tensor:
        r"""Return :math:`J^\top u` as rows ``(R, D)`` for cotangents ``(R, *outputs.shape)``."""
        self._check(cotangents, "cotangents", tuple(self.outputs.shape))
        if self._pull is None:
            self._pull = PullBack([self._graph], list(self._params.values()), self.rows_at_once)
        return self._pull([cotangents])

    def jvp(self, rows: Tensor) -> Tensor:
        r"""Return :math:`J v`, ``(R, *outputs.shape)``, for rows ``(R, D)``."""
        self._check(rows, "rows", (sum(self._sizes),))
        self._rows_seen += len(rows)
        self._choose()
        if self._linear is None:
            try:
                return self._twice_backward(rows)
            except RuntimeError:  # an operator without a second derivative; it may have a forward one
                self._push = None
                if self._asked != "auto":
                    raise
                self._linear = self._trace()
        return self._through_trace(self._linear, rows)

    def _check(self, given: Tensor, name: str, shape: tuple[int, ...]) -> None:
        if given.shape[1:] != shape or given.ndim == 0:
            raise ValueError(f"{name} must have the shape (R, {', '.join(map(str, shape))}); got {tuple(given.shape)}.")

    def _twice_backward(self, rows: Tensor) -> Tensor:
        if self._push is None and self._graph.requires_grad:
            with torch.inference_mode(False), torch.enable_grad():
                dummy = torch.zeros_like(self.outputs, requires_grad=True)
                inputs = list(self._params.values())
                pulled = torch.autograd.grad(self._graph, inputs, dummy, create_graph=True, materialize_grads=True)
            self._push = PullBack(pulled, [dummy], self.rows_at_once)
            if self._check_first:
                self._check_adjoint()
        if self._push is None:  # no parameter takes part
            return rows.new_zeros(len(rows), *self.outputs.shape)
        return self._push(self._tangents(rows)).reshape(len(rows), *self.outputs.shape)

    def _check_adjoint(self) -> None:
        u, v = (_probe(count, self.outputs) for count in (self.outputs.numel(), sum(self._sizes)))
        along = self._twice_backward(v).reshape(1, -1)
        there, back = (u * along).sum(), (self.vjp(u.reshape(1, *self.outputs.shape)) * v).sum()
        tolerance = torch.finfo(u.dtype).eps ** 0.5 * (u.norm() * along.norm() + back.abs())
        if not bool((there - back).abs() <= tolerance) and bool(back.isfinite()):
            raise RuntimeError(_CUT)

    def _tangents(self, rows: Tensor) -> list[Tensor]:
        parts = torch.split(rows, self._sizes, 1)
        return [part.reshape(len(rows), *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _choose(self) -> None:
        """Trace the function where that was asked for, or will pay."""
        if self._linear is not None or self._backend == "double_backward":
            return
        if self._backend == "linearize":
            self._linear = self._trace()
        elif self._rows_seen >= _TRACED_AFTER:
            if _has_node([self._graph], "Convolution"):
                with contextlib.suppress(RuntimeError, TypeError, ValueError):  # what a tracer cannot do
                    self._linear, self._push = self._trace(), None
            self._backend = "double_backward"  # the choice is made

    def _trace(self) -> Callable[[dict[str, Tensor]], Tensor]:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the tracer's own constants
            params = {name: value.detach() for name, value in self._params.items()}
            linear: Callable[[dict[str, Tensor]], Tensor] = torch.func.linearize(self._function, params)[1]
        return linear

    def _through_trace(self, linear: Callable[[dict[str, Tensor]], Tensor], rows: Tensor) -> Tensor:
        with torch.no_grad():
            tangents = dict(zip(self._params, self._tangents(rows), strict=True))
            if self.rows_at_once > 1 and len(rows) > 1:
                with contextlib.suppress(RuntimeError), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    together: Tensor = torch.func.vmap(linear, chunk_size=self.rows_at_once)(tangents)
                    return together
                self._at_once = 1
            products = [linear({name: value[i] for name, value in tangents.items()}) for i in range(len(rows))]
            return torch.stack(products) if products else rows.new_zeros(0, *self.outputs.shape)


class LinearizedGradient:
    r"""The gradient of a sum, linearised: products with :math:`\nabla_\theta^2 \sum_b f_b(\theta)`.

    Args:
        function: parameters by name to values ``(B,)``, the losses of a batch.
        params: the point :math:`\theta`; D numbers in all.
        rows_at_once: as for :class:`LinearizedBatch`.

    Attributes:
        outputs: the values ``(B,)``, detached.

    Raises:
        RuntimeError: If an operator says that it has no second derivative.

    Source: Pearlmutter 1994 (Fast exact multiplication by the Hessian), as one more backward pass.

    >>> batch = LinearizedGradient(lambda p: p["w"].pow(3), {"w": torch.tensor([1.0, 2.0])})
    >>> batch.product(torch.ones(1, 2))  # 6 w
    tensor([[ 6., 12.]])
    """

    def __init__(self, function: Function, params: Mapping[str, Tensor], rows_at_once: int | None = None) -> None:
        leaves, values = _run(function, params)
        inputs = list(leaves.values())
        self._function, self._params, self.outputs = function, leaves, values.detach()
        gradients = [torch.zeros_like(x) for x in inputs]
        if values.requires_grad:
            with torch.inference_mode(False), torch.enable_grad():
                ones = torch.ones_like(values, requires_grad=True)  # operators that cut the graph show then
                gradients = list(torch.autograd.grad(values, inputs, ones, create_graph=True, materialize_grads=True))
        if _has_node(gradients, "Error"):
            raise RuntimeError(_CUT)
        self._sizes = [x.numel() for x in inputs]
        self._pull = PullBack(gradients, inputs, rows_at_once or _rows_at_once(values.device, self.nbytes))

    @property
    def nbytes(self) -> int:
        """About what is kept in memory beside the parameters, in bytes; costs a forward pass."""
        return 3 * _saved_bytes(self._function, self._params)

    def product(self, rows: Tensor) -> Tensor:
        """Return the Hessian's products with rows ``(R, D)``."""
        parts = zip(torch.split(rows, self._sizes, 1), self._params.values(), strict=True)
        return self._pull([part.reshape(len(rows), *x.shape) for part, x in parts])


def _probe(count: int, like: Tensor) -> Tensor:
    """Return a row of numbers of both signs, the same in every run."""
    return (torch.arange(1, count + 1, device=like.device, dtype=torch.float32).square() % 97).cos().to(like)[None]


def _has_node(outputs: Sequence[Tensor], word: str) -> bool:
    """Look through an autograd graph for an operator whose name contains the word."""
    seen, waiting = set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if word in node.name():
            return True
        waiting.extend(before for before, _ in node.next_functions)
    return False
