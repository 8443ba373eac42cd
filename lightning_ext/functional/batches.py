"""Batches of any nesting: how many samples they hold, some of these, several joined; and autograd through them.

A batch is a tensor, or tuples, lists and mappings of tensors with the samples in the first dimension. A list that holds
no tensor and has one entry per sample (file names, say) belongs to the samples too; anything else that is not a tensor,
and a tensor without dimensions, is the whole batch's and is kept as it is.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["batch_size", "concatenate", "differentiable", "map_tensors", "select", "select_traced"]

T = TypeVar("T")


def _rebuild_mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if not isinstance(batch, MutableMapping):
        return values
    new = copy.copy(batch)  # keeps default factories and the classes of tokenizers
    for key, value in values.items():
        new[key] = value
    return new


def _rebuild_sequence(batch: Sequence[Any], values: list[Any]) -> Any:
    if hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*values)
    return tuple(values) if isinstance(batch, tuple) else values


def _map(function: Callable[[Any, str], Any], batch: Any, path: str = "batch") -> Any:
    """Apply ``function(leaf, path)`` to tensors, to lists that hold no tensor, and to everything else."""
    if isinstance(batch, Mapping):
        return _rebuild_mapping(batch, {k: _map(function, v, f"{path}[{k!r}]") for k, v in batch.items()})
    if isinstance(batch, tuple | list) and _holds_tensors(batch):
        return _rebuild_sequence(batch, [_map(function, v, f"{path}[{i}]") for i, v in enumerate(batch)])
    return function(batch, path)


def _holds_tensors(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return any(map(_holds_tensors, batch.values()))
    if isinstance(batch, tuple | list):
        return any(map(_holds_tensors, batch))
    return isinstance(batch, Tensor)


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return the batch with ``function`` applied to each of its tensors, everything else as it is.

    >>> map_tensors(lambda x: x + 1, {"x": torch.zeros(2), "name": "a"})
    {'x': tensor([1., 1.]), 'name': 'a'}
    """
    return _map(lambda leaf, _: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def batch_size(batch: Any) -> int:
    """Return the number of samples.

    Raises:
        ValueError: If no tensor has dimensions, or their first dimensions differ.

    >>> batch_size((torch.zeros(4, 3), {"label": torch.zeros(4)}))
    4
    """
    sizes: dict[str, int] = {}

    def note(leaf: Any, path: str) -> None:
        if isinstance(leaf, Tensor) and leaf.ndim:
            sizes[path] = len(leaf)

    _map(note, batch)
    if not sizes:
        raise ValueError(
            f"the batch holds no tensor with a first dimension over samples; got {type(batch).__name__}. Batches are "
            "tensors, or tuples, lists and mappings of them."
        )
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(f"the batch's tensors must have the samples in the first dimension; they have {found}.")
    return next(iter(sizes.values()))


def _per_sample(leaf: Any, size: int) -> bool:
    return isinstance(leaf, tuple | list) and len(leaf) == size


def select(batch: T, index: Tensor | Sequence[int]) -> T:
    """Return the batch of the chosen samples.

    Args:
        batch: a batch of B samples.
        index: their numbers in the batch, in any order, or a boolean mask ``(B,)``.

    Raises:
        IndexError: If a number is not below B.
        ValueError: As :func:`batch_size` does.

    >>> select({"x": torch.tensor([5, 6, 7]), "name": ["a", "b", "c"]}, [2, 0])
    {'x': tensor([7, 5]), 'name': ['c', 'a']}
    """
    size = batch_size(batch)
    rows = torch.as_tensor(index)
    rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows.long().reshape(-1)
    if rows.numel() and not (-size <= int(rows.min()) and int(rows.max()) < size):
        raise IndexError(f"index must be below the batch's {size} samples; got {rows.tolist()}.")

    def choose(leaf: Any, _: str) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[rows.to(leaf.device)] if leaf.ndim else leaf
        if _per_sample(leaf, size):
            return type(leaf)(leaf[i] for i in rows.tolist())
        return leaf

    result: T = _map(choose, batch)
    return result


class _UnreadableList(Sequence[Any]):
    """Stands for a list with an entry per sample where nobody can say which samples are looked at."""

    def _refuse(self, *args: Any) -> Any:
        raise ValueError(
            "the module reads a list with one entry per sample, and its gradients are taken for all samples at once. "
            "Put what it needs into a tensor."
        )

    __getitem__ = __len__ = __iter__ = __contains__ = _refuse


def select_traced(batch: T, index: Tensor) -> T:
    """Return the samples at ``index``, ``(b,)``, within ``torch.func.vmap``, where numbers cannot be read.

    Lists with an entry per sample refuse to be read in the result.

    Raises:
        ValueError: As :func:`batch_size` does; and where such a list is read.

    >>> torch.func.vmap(lambda i: select_traced(torch.tensor([5, 6]), i.reshape(1)))(torch.tensor([1, 0]))
    tensor([[6],
            [5]])
    """
    size = batch_size(batch)

    def choose(leaf: Any, _: str) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index] if leaf.ndim else leaf
        return _UnreadableList() if _per_sample(leaf, size) else leaf

    result: T = _map(choose, batch)
    return result


def concatenate(batches: Sequence[T]) -> T:
    """Join batches of one structure to a single one.

    Raises:
        ValueError: If there is none, they are built differently, their tensors have other shapes beyond the first
            dimension, or something that is not per sample differs among them.

    >>> concatenate([(torch.tensor([1]), "a"), (torch.tensor([2, 3]), "a")])
    (tensor([1, 2, 3]), 'a')
    """
    if not batches:
        raise ValueError("batches must not be empty.")
    sizes = [batch_size(batch) for batch in batches]
    leaves: list[dict[str, Any]] = []
    for batch in batches:
        leaves.append({})
        _map(lambda leaf, path: leaves[-1].__setitem__(path, leaf), batch)
    if any(entry.keys() != leaves[0].keys() for entry in leaves):
        raise ValueError(f"batches must be built alike; they have the entries {[list(entry) for entry in leaves]}.")

    def join(leaf: Any, path: str) -> Any:
        parts = [entry[path] for entry in leaves]
        if isinstance(leaf, Tensor) and leaf.ndim:
            return _cat(parts, path)
        if all(_per_sample(part, size) for part, size in zip(parts, sizes, strict=True)):
            return type(leaf)(item for part in parts for item in part)
        if any(not _equal(part, leaf) for part in parts):
            raise ValueError(f"{path} is not per sample and differs among the batches: {parts}.")
        return leaf

    result: T = _map(join, batches[0])
    return result


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _cat(parts: list[Tensor], path: str) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"{path} must have one shape beyond the samples; got {shapes}. Pad the batches alike.")
    return torch.cat(parts)


@contextmanager
def differentiable(batch: T) -> Iterator[T]:
    """Let autograd work in here, also where inference mode or ``no_grad`` holds outside.

    Args:
        batch: tensors made under inference mode cannot be saved for a backward pass; these are cloned.

    Yields:
        The batch to use inside.

    >>> with torch.inference_mode():
    ...     x = torch.ones(2)
    ...     with differentiable(x) as x:
    ...         w = torch.ones(2, requires_grad=True)
    ...         torch.autograd.grad((w * x).sum(), w)
    (tensor([1., 1.]),)
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield map_tensors(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, batch)
