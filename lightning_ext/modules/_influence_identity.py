"""What scores were computed from, in a few letters: a stored table is continued by the same question only."""

import functools
import hashlib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


def digest(*parts: Any) -> str:
    """A short name of the exact values of all tensors in the parts."""
    found = hashlib.sha256()

    def add(tensor: Tensor) -> None:
        found.update(_octets(tensor.reshape(1, -1))[0])

    apply_to_collection(parts, Tensor, add)
    return found.hexdigest()[:16]


def sum_of_digests(positions: Tensor, batch: Any) -> int:
    """One number for samples and their positions, which batches and ranks may share out as they like.

    It adds a 32-bit name of each sample: two thousand million samples fit an int64.
    """
    names = [hashlib.blake2b(str(position).encode(), digest_size=4) for position in positions.tolist()]

    def add(tensor: Tensor) -> None:
        if tensor.ndim and len(tensor) == len(names):
            for name, octets in zip(names, _octets(tensor.reshape(len(tensor), -1)), strict=True):
                name.update(octets)

    apply_to_collection(batch, Tensor, add)
    return sum(int.from_bytes(name.digest(), "big") for name in names)


def _octets(rows: Tensor) -> Any:
    return rows.detach().cpu().contiguous().view(torch.uint8).numpy()


def described(value: Any, seen: set[int] | None = None) -> str:
    """What a value is, by contents: a function by its code and what it reads, not by its name or address."""
    seen = set() if seen is None else seen
    if isinstance(value, types.FunctionType | nn.Module) or hasattr(value, "__dict__"):
        if id(value) in seen:
            return "seen"
        seen.add(id(value))
    label, parts = _contents(value)
    inner = ", ".join(described(part, seen) for part in parts)
    return f"{label}({inner})" if inner else label


@functools.singledispatch
def _contents(value: Any) -> tuple[str, Iterable[Any]]:
    if isinstance(value, type | types.ModuleType):
        return f"{type(value).__name__} {value.__name__}", ()
    if hasattr(value, "__dict__"):
        return type(value).__qualname__, vars(value).items()
    return re.sub(" at 0x[0-9a-f]+", "", repr(value)), ()


@_contents.register(list)
@_contents.register(tuple)
def _(value: Any) -> tuple[str, Iterable[Any]]:
    return type(value).__name__, value


@_contents.register(set)
@_contents.register(frozenset)
def _(value: Any) -> tuple[str, Iterable[Any]]:
    return type(value).__name__, sorted(map(repr, value))  # hash order is that of a process


@_contents.register
def _(value: Mapping) -> tuple[str, Iterable[Any]]:  # type: ignore[type-arg]
    return type(value).__name__, value.items()


@_contents.register
def _(value: Tensor) -> tuple[str, Iterable[Any]]:
    return f"tensor {digest(value)}", ()


@_contents.register
def _(value: nn.Module) -> tuple[str, Iterable[Any]]:
    return f"{value!r} {digest(list(value.parameters()), list(value.buffers()))}", ()


@_contents.register
def _(value: types.CodeType) -> tuple[str, Iterable[Any]]:
    return f"code {value.co_code.hex()} {value.co_names}", value.co_consts


@_contents.register
def _(value: types.FunctionType) -> tuple[str, Iterable[Any]]:
    held = [cell.cell_contents for cell in value.__closure__ or ()]
    read = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
    return "function", [value.__code__, *held, value.__defaults__, value.__kwdefaults__, *read]


@_contents.register
def _(value: types.MethodType) -> tuple[str, Iterable[Any]]:
    return "method", [value.__func__, value.__self__]


@_contents.register
def _(value: functools.partial) -> tuple[str, Iterable[Any]]:  # type: ignore[type-arg]
    return "partial", [value.func, value.args, value.keywords]
