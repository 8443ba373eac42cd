"""A network run with the activation pattern of another one: every nonlinearity replaced by its expansion there."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType, TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_ext.functional.activation_handlers import Build, activation_handlers
from lightning_ext.functional.activation_sites import ActivationSite

__all__ = ["RecordActivations", "ReplayActivations"]

_HANDLERS = activation_handlers()
_CONVOLUTIONS = frozenset(f"conv{kind}{dim}d" for kind in ("", "_transpose") for dim in (1, 2, 3))
# fmt: off
_PRODUCTS = _CONVOLUTIONS | {
    "addbmm", "addcmul", "addmm", "addmv", "baddbmm", "bmm", "div", "einsum", "imul", "itruediv", "linear",
    "matmul", "mm", "mul", "multiply", "mv", "outer", "rmatmul", "rmul", "tensordot", "true_divide", "truediv",
}
_LINEAR = _PRODUCTS | {
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "add", "alpha_dropout", "as_strided",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "batch_norm", "broadcast_tensors", "broadcast_to", "cat", "chunk",
    "clone", "concat", "concatenate", "contiguous", "copy", "cumsum", "detach", "diagonal", "double", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "embedding", "expand", "expand_as", "feature_alpha_dropout", "fill",
    "flatten", "flip", "float", "fold", "full_like", "gather", "get", "getitem", "half", "iadd", "index_select",
    "interpolate", "isub", "masked_fill", "masked_select", "mean", "moveaxis", "movedim", "narrow", "neg",
    "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "pad", "permute", "pixel_shuffle",
    "pixel_unshuffle", "radd", "rand_like", "randn_like", "repeat", "repeat_interleave", "requires_grad", "reshape",
    "reshape_as", "roll", "rsub", "scatter", "scatter_add", "select", "set", "setitem", "split", "squeeze", "stack",
    "sub", "subtract", "sum", "swapaxes", "swapdims", "t", "tensor_split", "tile", "to", "transpose", "tril",
    "triu", "type", "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "upsample", "view", "view_as", "where",
    "zero", "zeros_like",
}
_COMPARISONS = frozenset({"eq", "ge", "gt", "le", "lt", "ne"})
_QUOTIENTS = frozenset({"div", "itruediv", "true_divide", "truediv"})
_CONSTANTS = frozenset({f"{kind}_like" for kind in ("empty", "full", "ones", "rand", "randn", "zeros")})
_CONSTANTS |= {f"new_{kind}" for kind in ("empty", "full", "ones", "zeros")}
# fmt: on
_LIVE = "_depends_on_activations"  # set on tensors of a recorded pass, to tell products of two of them from layers


def _opened(function: Any) -> FunctionType:
    """A torch function written in Python, that shows its calls to the mode instead of itself."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


_OPENED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}


class _ActivationMode(TorchFunctionMode):
    """Sends every call of a known nonlinearity to ``_activate``."""

    _watching = False  # whether the other calls go to ``_passed``

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in own}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and _floating((*args, *kwargs.values())) and not self._owns(args, kwargs):
            out = handler(self._activate, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in _OPENED:
            with self._inside():
                return _OPENED[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if self._watching:
            self._passed(func, args, kwargs, out)
        return out

    def _owns(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        return bool(self._own) and id(args[0] if args else kwargs.get("input")) in self._own

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)  # type: ignore[no-untyped-call]

    def _activate(self, name: str, build: Build, s: Tensor) -> Tensor:
        raise NotImplementedError

    def _passed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Look at a call that is none of a known nonlinearity."""


class RecordActivations(_ActivationMode):
    r"""Run a reference network and keep the expansion of each of its nonlinearities.

    Known are ReLU and its relatives, GELU, SiLU, tanh, sigmoid, softplus and other functions of each element; softmax,
    attention, layer, group, instance and RMS normalisation; max-pooling. They may be called as modules, functions or
    methods, in place, and any number of times. Everything else runs as it is.

    Args:
        given: Sites in the order of the calls that take the place of the reference's own, from `gates`; None leaves a
            call to the reference. Default: all of them.
        watch: Whether to look at all other calls too; without, ``others`` stays empty, every site's ``channel`` is -1
            and the pass is faster.
        own: Tensors such as the network's parameters: a nonlinearity of one of them is no activation, and runs as it
            is.
        inputs: The network's inputs, for products and quotients of what depends on them to be among ``others`` before
            the first activation too.

    Attributes:
        sites: The expansions, in the order of the calls.
        others: Names of torch functions seen that are not known to be linear in the activations, among them products
            of two activations and comparisons; when replayed, each network runs its own.

    Raises:
        RuntimeError: On leaving, if there was no nonlinearity, as in compiled and scripted modules; or if a given site
            does not fit its call, or there are not as many as calls.

    Source: Dhawan, Huang, Bae & Grosse 2023 (arXiv:2302.03519) for ReLU; the other nonlinearities likewise.

    >>> import torch
    >>> with RecordActivations() as tape:
    ...     reference = torch.tensor([[-1.0, 2.0]]).relu()
    >>> with ReplayActivations(tape.sites):
    ...     torch.tensor([[5.0, 7.0]]).relu()
    tensor([[0., 7.]])

    Note:
        The sites keep the derivatives of each activation; run the reference under ``torch.no_grad()``.
    """

    def __init__(
        self,
        given: Sequence[ActivationSite | None] = (),
        *,
        watch: bool = True,
        own: Iterable[Tensor] = (),
        inputs: Tensor | None = None,
    ) -> None:
        super().__init__(own)
        self._watching, self._inputs = watch, inputs
        self.sites: list[ActivationSite] = []
        self.others: set[str] = set()
        self._given = list(given)
        self._channel = -1

    def __enter__(self) -> "RecordActivations":
        """Begin to record."""
        if self._inputs is not None:
            setattr(self._inputs, _LIVE, True)
        TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop recording."""
        TorchFunctionMode.__exit__(self, kind, error, trace)  # type: ignore[no-untyped-call]
        if self._inputs is not None:
            delattr(self._inputs, _LIVE)
        if kind is None and not self.sites:
            raise RuntimeError(
                "no activation function was called: the network is linear, compiled or scripted, or its activations "
                f"are none of those known (seen: {', '.join(sorted(self.others)) or 'nothing else'})."
            )
        if kind is None and self._given:
            _require_all(len(self.sites), len(self._given))

    def _activate(self, name: str, build: Build, s: Tensor) -> Tensor:
        given = _next(self._given, len(self.sites), name, s) if self._given else None
        if given is None:
            site = build(name, s)
            site.channel = self._channel
        else:
            site = given
        self.sites.append(site)
        out, site.output = site.output, None
        if out is None:
            out = site(s) if site.value is None else site.value.clone()
        if self._watching:
            setattr(out, _LIVE, True)
        return out

    def _passed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        name = getattr(func, "__name__", str(func)).strip("_")  # methods, operators and functions alike
        if name in _CONVOLUTIONS:
            self._channel = 1
        elif name in ("linear", "matmul"):
            self._channel = -1
        live = sum(hasattr(x, _LIVE) for x in _tensors((*args, *kwargs.values())))
        results = list(_tensors((out,)))
        changed = args[:1] if name == "setitem" else ()
        for x in (*results, *changed) if live and name not in _CONSTANTS else ():
            setattr(x, _LIVE, True)
        if self._departs(name, live, kwargs, args, results):
            self.others.add(name)

    def _departs(
        self, name: str, live: int, kwargs: Mapping[str, Any], args: tuple[Any, ...], results: list[Tensor]
    ) -> bool:
        if name in _PRODUCTS:
            return live > 1 or (name in _QUOTIENTS and live > sum(hasattr(x, _LIVE) for x in _tensors(args[:1])))
        if name in _COMPARISONS:
            return _floating(args)
        unknown = name not in _LINEAR or bool(kwargs.get("training"))
        return unknown and _floating((*args, *kwargs.values())) and _floating(results)


def _floating(values: Iterable[Any]) -> bool:
    return any(x.is_floating_point() for x in _tensors(values))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and among the items of their lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class ReplayActivations(_ActivationMode):
    """Run a network with the nonlinearities of a reference pass in place of its own.

    Args:
        sites: From `RecordActivations`, or from `gates` if none of them is None.
        own: As for `RecordActivations`, of this network.

    Raises:
        ValueError: If a site is None.
        RuntimeError: If the network calls other nonlinearities, more or fewer than the reference, or with other
            shapes: its control flow depends on data or parameters, or the batch is another one.

    Note:
        Differentiable in everything but the sites, which are constants. One multiplication for each ReLU. What
        activation checkpointing computes again in the backward pass is out of reach: turn it off, or see
        `recomputation_refused`.
    """

    def __init__(self, sites: Sequence[ActivationSite | None], own: Iterable[Tensor] = ()) -> None:
        super().__init__(own)
        if any(site is None for site in sites):
            raise ValueError(
                "some sites have no gate: run the reference in RecordActivations(given=sites) and replay its sites."
            )
        self._sites, self._seen = list(sites), 0

    def __enter__(self) -> "ReplayActivations":
        """Begin with the first site."""
        self._seen = 0
        TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop replaying."""
        TorchFunctionMode.__exit__(self, kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None:
            _require_all(self._seen, len(self._sites))

    def _activate(self, name: str, build: Build, s: Tensor) -> Tensor:
        site: ActivationSite = _next(self._sites, self._seen, name, s)
        self._seen += 1
        return site(s)


def _next(sites: Sequence[Any], index: int, name: str, s: Tensor) -> Any:
    if index >= len(sites):
        _require_all(index + 1, len(sites))
    site = sites[index]
    if site is not None and (site.name != name or not site.accepts(s)):
        raise RuntimeError(
            f"call {index} of an activation function is {name} with shape {tuple(s.shape)}, but the reference called "
            f"{site.name} with shape {site.shape}. Both networks must run the same functions on the same batch."
        )
    return site


def _require_all(seen: int, expected: int) -> None:
    if seen != expected:
        raise RuntimeError(
            f"the network called {'at least ' if seen > expected else ''}{seen} activation functions and the "
            f"reference {expected}. Both must run the same functions: control flow must not depend on the parameters."
        )
