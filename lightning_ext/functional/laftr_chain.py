"""Finds the chain of linear layers and ReLUs that a network is, by the order of its calls."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["sequential_layers"]

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_KEEPING = {torch.flatten, torch.reshape, Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.contiguous, Tensor.clone}
_KEEPING |= {Tensor.to, Tensor.float, Tensor.double}
_DROPOUT = {F.dropout, F.alpha_dropout, torch.dropout, torch.alpha_dropout}


def sequential_layers(
    module: nn.Module | Callable[[Mapping[str, Tensor], Tensor], Tensor],
    params: Mapping[str, Tensor],
    x_example: Tensor,
) -> list[tuple[str, str | None]]:
    r"""Names of the weights and biases of a chain linear, ReLU, linear, ..., linear, in the order of the calls.

    Modules may be nested and used in any order, and functions called directly. Flattening, identities, and dropout in
    evaluation mode may come in between.

    Args:
        module: a module, in evaluation mode, or a function ``(params, inputs) -> outputs``.
        params: its parameters (and buffers) by name, such as ``dict(module.named_parameters())``.
        x_example: inputs ``(B, *input)``, a single one will do; their values play no part.

    Returns:
        One ``(weight, bias)`` for each linear layer; the bias is None if there is none.

    Raises:
        NotImplementedError: If the network is anything else, with the function and the module that make it so.

    >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> sequential_layers(net, dict(net.named_parameters()), torch.zeros(1, 3))
    [('0.weight', '0.bias'), ('2.weight', None)]

    Note:
        One forward pass without gradients.
    """
    chain = _Chain(params, x_example)
    with torch.no_grad(), chain.naming(module), chain:
        if isinstance(module, nn.Module):
            out = torch.func.functional_call(module, dict(params), (x_example,))
        else:
            out = module(params, x_example)
    if out is not chain.stream or not chain.after_linear:
        chain.refuse("the output is not that of a linear layer at the end of the chain")
    return chain.layers


class _Chain(TorchFunctionMode):
    """Follows one tensor through the calls, and refuses whatever leaves the chain."""

    def __init__(self, params: Mapping[str, Tensor], x: Tensor) -> None:
        super().__init__()
        self.stream, self.layers, self.after_linear = x, list[tuple[str, str | None]](), False
        self._names = {id(tensor): name for name, tensor in reversed(list(params.items()))}
        self._batch, self._running = len(x), list[str]()

    @contextlib.contextmanager
    def naming(self, module: object) -> Iterator[None]:
        """Know which module runs, for messages."""
        handles = []
        for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
            place = f" in {name or 'the network'} ({type(part).__name__})"
            handles.append(part.register_forward_pre_hook(lambda *_, place=place: self._running.append(place)))
            handles.append(part.register_forward_hook(lambda *_: self._left()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self) -> None:
        self._running.pop()

    def refuse(self, what: str) -> NoReturn:
        """Say what leaves the chain, and where."""
        raise NotImplementedError(
            f"the closed form needs a chain linear, ReLU, linear, ..., linear, but {what}"
            f"{self._running[-1] if self._running else ''}. Take sampled inputs with the activations linearised, "
            'mode="relu".'
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before, kwargs = self.stream, dict(kwargs or {})
        out = func(*args, **kwargs)
        given = args[0] if args else kwargs.get("input")
        if isinstance(out, Tensor) and out.is_floating_point():
            if given is not before:
                self.refuse(f"{func.__name__} takes another tensor than the last layer's output")
            self._follow(func, before, out, args, kwargs)
            self.stream = out
        elif out is None and given is before:
            self.refuse(f"{func.__name__} overwrites values")
        return out

    def _follow(
        self, func: Callable[..., Any], x: Tensor, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if func is F.linear:
            self._linear(x, args, kwargs)
        elif func in _RELU:
            if not self.after_linear:
                self.refuse("a ReLU follows no linear layer")
            self.after_linear = False
        elif func in _DROPOUT:
            if _argument(2, ("training", "train"), True, args, kwargs):
                self.refuse("dropout is in training mode")
        elif func not in _KEEPING or len(out) != self._batch:
            self.refuse(f"there is {func.__name__}")

    def _linear(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight, bias = (_argument(i, (key,), None, args, kwargs) for i, key in ((1, "weight"), (2, "bias")))
        if x.ndim != 2:
            self.refuse(f"a linear layer takes inputs of shape {tuple(x.shape)} instead of (B, d)")
        if self.after_linear:
            self.refuse("a linear layer follows another one without a ReLU")
        if id(weight) not in self._names or (bias is not None and id(bias) not in self._names):
            self.refuse("a linear layer's weight or bias is none of params")
        self.layers.append((self._names[id(weight)], None if bias is None else self._names[id(bias)]))
        self.after_linear = True


def _argument(
    position: int, names: Sequence[str], default: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)
