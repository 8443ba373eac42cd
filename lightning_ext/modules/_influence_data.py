"""A data set in its own order, shared out over ranks, as batches with the positions of their samples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lightning_ext.modules._influence_input import check_loader


def plain(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move a batch; floats take the parameters' precision, and tensors made under inference mode can be used again."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return tensor.clone() if tensor.is_inference() else tensor

    return apply_to_collection(batch, Tensor, moved)


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
        check: Callable[[Any, Sequence[int]], None] | None = None,
    ) -> None:  # fmt: skip
        check_loader(loader, world)
        self.dataset, self._check = loader.dataset, check
        self.num_samples = len(self.dataset)
        self._collate, self._move, self._workers = loader.collate_fn, move, loader.num_workers
        found = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)  # else the mean of what it makes
        self.batch_size = int(found or max(1, self.num_samples // max(1, len(loader.batch_sampler))))
        self._indices = list(range(rank, self.num_samples, world))
        own = getattr(type(self.dataset), "__getitem__", None) is TensorDataset.__getitem__
        self._at_once = own and self._collate is default_collate  # tensors: one look-up, and no stacking of samples

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def _loader(self, indices: list[int], **kwargs: Any) -> DataLoader[Any]:
        chosen = Subset(self.dataset, indices)
        generator = torch.Generator().manual_seed(0)  # a loader without one draws from the global generator
        return DataLoader(chosen, collate_fn=self._collate, generator=generator, **kwargs)

    def indexed(self) -> Iterator[tuple[Tensor, Any]]:
        """Positions and batches."""
        parts = [self._indices[i : i + self.batch_size] for i in range(0, len(self._indices), self.batch_size)]
        batches: Any = self._loader(self._indices, batch_size=self.batch_size, num_workers=self._workers)
        for part, batch in zip(parts, map(self._rows, parts) if self._at_once else batches, strict=True):
            yield torch.tensor(part), self._checked(batch, part)
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
        if self._at_once:
            return self._checked(self._rows(list(indices)), indices)
        return self._checked(next(iter(self._loader(list(indices), batch_size=len(indices)))), indices)

    def _rows(self, indices: list[int]) -> list[Tensor]:
        return list(self.dataset[indices])

    def _checked(self, batch: Any, positions: Sequence[int]) -> Any:
        batch = self._move(batch)
        self.check(batch, positions)
        return batch

    def check(self, batch: Any, positions: Sequence[int]) -> None:
        """Look at a batch of these samples, unless all samples were seen already."""
        if self._check is not None:
            self._check(batch, positions)
