"""A data set in its own order, shared out over ranks, as batches with the positions of their samples."""

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_ext._lightning import MisconfigurationException


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
    """

    def __init__(self, loader: Any, move: Callable[[Any], Any], rank: int = 0, world: int = 1) -> None:
        self.dataset = getattr(loader, "dataset", None)
        if self.dataset is None or isinstance(self.dataset, IterableDataset) or not isinstance(self.dataset, Sized):
            raise MisconfigurationException(
                "Influence needs a DataLoader over a data set with a length, whose samples can be named by their "
                f"positions; got {type(loader).__name__} over {type(self.dataset).__name__}."
            )
        self.num_samples = len(self.dataset)
        if self.num_samples == 0:
            raise ValueError("The loader's data set is empty.")
        _refuse_choosing(getattr(loader.batch_sampler, "sampler", loader.sampler), self.num_samples)
        if loader.batch_sampler is None:
            raise MisconfigurationException(
                "With batch_size=None the data set gives whole batches, in which no sample has a position. Pass a "
                "DataLoader that makes the batches."
            )
        self._collate, self._move, self._workers = loader.collate_fn, move, loader.num_workers
        found = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)  # else the mean of what it makes
        self.batch_size = int(found or max(1, self.num_samples // max(1, len(loader.batch_sampler))))
        self._indices = list(range(rank, self.num_samples, world))

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def _loader(self, indices: list[int], **kwargs: Any) -> DataLoader[Any]:
        chosen = Subset(self.dataset, indices)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)  # a loader without one draws from the global generator
        return DataLoader(chosen, collate_fn=self._collate, generator=generator, **kwargs)

    def indexed(self) -> Iterator[tuple[Tensor, Any]]:
        """Positions and batches."""
        batches = self._loader(self._indices, batch_size=self.batch_size, num_workers=self._workers)
        for i, batch in enumerate(batches):
            part = self._indices[i * self.batch_size : (i + 1) * self.batch_size]
            yield torch.tensor(part), self._move(batch)

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.indexed())

    def get(self, indices: Sequence[int]) -> Any:
        """The batch of the samples at ``indices``, whichever rank's they are."""
        outside = [i for i in indices if not 0 <= i < self.num_samples]
        if outside or not indices:
            raise ValueError(
                f"Samples must lie in 0 to {self.num_samples - 1}, at least one; got {list(indices)[:20]}."
            )
        return self._move(next(iter(self._loader(list(indices), batch_size=len(indices)))))


def _refuse_choosing(sampler: Any, num_samples: int) -> None:
    """Samplers that leave samples out, or repeat them, would have another data set scored than was trained on."""
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # what Lightning wraps for ranks
    drawn = isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != num_samples)
    if drawn or isinstance(sampler, SubsetRandomSampler | WeightedRandomSampler):
        raise MisconfigurationException(
            f"Influence is that of a whole data set, and the loader's {type(sampler).__name__} takes {len(sampler)} of "
            f"its {num_samples} samples. Pass a loader over torch.utils.data.Subset(dataset, positions)."
        )
