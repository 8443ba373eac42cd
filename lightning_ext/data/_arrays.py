"""Images kept as bytes and turned into numbers one batch at a time: a data set of gigabytes needs no more than that."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["ImageArrays"]


class ImageArrays(Dataset[Any]):
    """Pairs of image and target.

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

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch in one indexing operation; the loader asks for this where it exists."""
        return self[indices]
