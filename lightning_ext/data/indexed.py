"""A dataset that says which samples a batch holds, for whatever treats samples apart from each other."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["IndexedBatch", "IndexedDataset"]


class IndexedBatch(NamedTuple):
    """A batch, or a sample, and where it stands in its dataset.

    Args:
        indices: ``(B,)`` positions in the dataset, or one position.
        batch: what the dataset gives there.
    """

    indices: Tensor | int
    batch: Any


class IndexedDataset(Dataset[IndexedBatch]):
    """Each sample of a dataset together with its position; a loader's batches become :class:`IndexedBatch`.

    Args:
        dataset: a map-style dataset; one with ``__getitems__`` keeps its own way of indexing whole batches.

    Works with PyTorch's default collation, and with a loader that passes whole batches through.

    >>> dataset = IndexedDataset([10.0, 20.0, 30.0])
    >>> next(iter(torch.utils.data.DataLoader(dataset, sampler=[2, 0], batch_size=2)))
    IndexedBatch(indices=tensor([2, 0]), batch=tensor([30., 10.], dtype=torch.float64))
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset needs positions and a length; got {type(dataset).__name__}, which has not both.")
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> IndexedBatch:
        """One sample and its position."""
        return IndexedBatch(int(index), self.dataset[index])

    def __getitems__(self, indices: list[int]) -> Any:
        """The samples of a batch: a list to collate, or one batch if the dataset makes whole batches itself."""
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        found = self.dataset.__getitems__(indices)
        if isinstance(found, list):
            return [IndexedBatch(int(index), sample) for index, sample in zip(indices, found, strict=True)]
        return IndexedBatch(torch.as_tensor(indices), found)
