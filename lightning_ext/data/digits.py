"""The 8 x 8 digits that scikit-learn ships: real data for examples, tests and demos, without a download."""

from typing import Any, Literal

import torch
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext.data.resumable import ResumableDataModule

__all__ = ["DigitsDataModule"]

_SKLEARN = RequirementCache("scikit-learn")
_NUM_TRAIN = 1400
_SPLIT_SEED = 0


class DigitsDataModule(ResumableDataModule):
    """1,400 training and 397 held-out images of handwritten digits, 8 x 8 pixels, with labels.

    Source of the data: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (its test part,
    bundled with scikit-learn). The split is a fixed random permutation. Validation, test and predict loaders all give
    the held-out images: choose nothing on validation that you then report on test.

    Args:
        batch_size: samples per batch and rank.
        binarize: threshold pixels at half of their range, to 0 or 1; otherwise they are grey values in [0, 1].
        shape: ``"flat"`` (64,) or ``"image"`` (1, 8, 8).
        num_workers: workers of the loaders.
        seed: seed of the training order, see :class:`ResumableDataModule`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        binarize: bool = True,
        shape: Literal["flat", "image"] = "flat",
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if shape not in ("flat", "image"):
            raise ValueError(f"shape must be 'flat' or 'image'; got {shape!r}.")
        self.save_hyperparameters()
        self.binarize, self.shape = binarize, shape
        self.train_set: TensorDataset | None = None
        self.held_out_set: TensorDataset | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, ``(64,)`` or ``(1, 8, 8)``."""
        return (64,) if self.shape == "flat" else (1, 8, 8)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images once."""
        if self.train_set is not None:
            return
        images, labels = _load()
        images = (images > 7.5).float() if self.binarize else images / 16.0
        images = images.reshape(-1, *self.input_shape)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        train, held_out = order[:_NUM_TRAIN], order[_NUM_TRAIN:]
        self.train_set = TensorDataset(images[train], labels[train])
        self.held_out_set = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training images with labels."""
        return self.loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out images with labels."""
        return self.loader(self.held_out_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same held-out images."""
        return self.loader(self.held_out_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same held-out images."""
        return self.loader(self.held_out_set)


def _load() -> tuple[Tensor, Tensor]:
    if not _SKLEARN:
        raise ModuleNotFoundError(
            "DigitsDataModule reads the digits bundled with scikit-learn: pip install 'lightning-ext[examples]'"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target).long()
