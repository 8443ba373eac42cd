"""Data in tensors, and how a loader indexes it once per batch instead of once per sample."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

__all__ = ["ImageArrays", "PermutedImages", "Rows", "WholeBatches", "takes_lists"]


class Rows(Dataset[Any]):
    """A dataset that takes a list of positions where others take one, and gives their batch."""


class WholeBatches(Dataset[Any]):
    """What a loader reads in place of a dataset that takes lists: each batch comes from one indexing operation.

    The dataset itself has no ``__getitems__``, so that any ``DataLoader`` of the user's collates its samples.

    Args:
        rows: the dataset.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the dataset."""
        tensors: tuple[Tensor, ...] = self.rows.tensors
        return tensors

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """A batch; the loader asks for this where it exists, and the collate function must let it pass."""
        return self.rows[indices]


def takes_lists(dataset: Any) -> bool:
    """Whether indexing with a list gives a batch: :class:`Rows`, and a ``TensorDataset`` with its own indexing."""
    return isinstance(dataset, Rows) or getattr(type(dataset), "__getitem__", None) is TensorDataset.__getitem__


class ImageArrays(Rows):
    """Images kept as bytes and turned into numbers one batch at a time: gigabytes of data need no more than that.

    Args:
        images: ``(N, ...)`` in uint8.
        targets: ``(N, ...)``.
        scale: What a byte is divided by.
    """

    def __init__(self, images: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        self.images, self.targets, self.scale = images, targets, scale

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / self.scale, self.targets[index]


class PermutedImages(Rows):
    """Images whose pixels change places as they are read: many permutations of the same data share its memory.

    Args:
        images: ``(N, ...)``.
        targets: ``(N, ...)``.
        order: a permutation of one image's pixels, flattened: pixel ``order[j]`` goes to place j.
    """

    def __init__(self, images: Tensor, targets: Tensor, order: Tensor) -> None:
        self.images, self.targets, self.order = images, targets, order

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All permuted images and the targets, as those of a ``TensorDataset``; the images are copied."""
        return self[slice(None)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        found = self.images[index]
        leading = found.shape[: found.ndim - self.images.ndim + 1]
        return found.reshape(*leading, -1)[..., self.order].reshape(found.shape), self.targets[index]
