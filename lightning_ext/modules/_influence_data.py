"""A data set in its own order, shared out over ranks, as batches with the positions of their samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_ext.modules._influence_input import check_loader


def plain(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a batch; floats take the parameters' precision, and tensors made under inference mode can be used again."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return tensor.clone() if tensor.is_inference() else tensor

    return apply_to_collection(batch, Tensor, moved)


def batches_of(loader: Any) -> Iterator[Any]:
    """The batches of a loader or of a list; tensors are looked up, not stacked sample by sample."""
    if getattr(type(loader), "__iter__", None) is DataLoader.__iter__ and _looked_up(loader.dataset, loader.collate_fn):
        return _batches(loader.dataset, loader.collate_fn, loader.batch_sampler)
    return iter(loader)


def _batches(dataset: Any, collate: Any, parts: Iterable[Any], workers: int = 0) -> Iterator[Any]:
    """One batch for the positions in each part."""
    each = (torch.as_tensor(part, device="cpu") for part in parts)
    if _looked_up(dataset, collate):
        return (list(dataset[part]) for part in each)
    lists = [part.tolist() for part in each]
    generator = torch.Generator().manual_seed(0)  # a loader without one draws from the global generator
    return iter(DataLoader(dataset, batch_sampler=lists, collate_fn=collate, generator=generator, num_workers=workers))


def _looked_up(dataset: Any, collate: Any) -> bool:
    return getattr(type(dataset), "__getitem__", None) is TensorDataset.__getitem__ and collate is default_collate


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors side by side; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class Shard:
    """This rank's samples of a loader's data set: positions rank, rank + world, ..., in batches of the loader's size.

    Args:
        loader: a DataLoader over a data set with a length; its sampler is not asked.
        move: brings a batch to where it is used.
        rank: this process.
        world: number of processes.
        check: looks at batches and the positions of their samples until all were seen once.
    """

    def __init__(
        self, loader: Any, move: Callable[[Any], Any], rank: int = 0, world: int = 1,
        check: Callable[[Any, Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        check_loader(loader, world)
        self.dataset, self._check = loader.dataset, check
        self.num_samples = len(self.dataset)
        self._collate, self._move, self._workers = loader.collate_fn, move, loader.num_workers
        found = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)  # else the mean of what it makes
        self.batch_size = int(found or max(1, self.num_samples // max(1, len(loader.batch_sampler))))
        self._positions = torch.arange(self.num_samples, device="cpu")[rank::world]

    def __len__(self) -> int:
        return -(-len(self._positions) // self.batch_size)

    def indexed(self) -> Iterator[tuple[Tensor, Any]]:
        """Positions and batches."""
        parts = [part for part in torch.split(self._positions, self.batch_size) if len(part)]
        batches = _batches(self.dataset, self._collate, parts, self._workers)
        for part, batch in zip(parts, batches, strict=True):
            yield part, self._checked(batch, part)
        self._check = None

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.indexed())

    def get(self, indices: Sequence[int]) -> Any:
        """The batch of the samples at ``indices``, whichever rank's they are."""
        outside = [i for i in indices if not 0 <= i < self.num_samples]
        if outside or not indices:
            raise ValueError(
                f"Samples must lie in 0 to {self.num_samples - 1}, at least one; got {list(indices)[:20]}."
            )
        positions = torch.tensor(indices, device="cpu")
        return self._checked(next(_batches(self.dataset, self._collate, [positions])), positions)

    def _checked(self, batch: Any, positions: Tensor) -> Any:
        batch = self._move(batch)
        self.check(batch, positions)
        return batch

    def check(self, batch: Any, positions: Tensor) -> None:
        """Look at a batch of these samples, unless all samples were seen already."""
        if self._check is not None:
            self._check(batch, positions)
