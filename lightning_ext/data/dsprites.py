"""dSprites: every combination of five factors of variation once, for measuring disentanglement."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ext.data._arrays import ImageArrays
from lightning_ext.data._download import download as fetch
from lightning_ext.data.resumable import ResumableDataModule

__all__ = ["DSpritesDataModule"]

_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_URLS = (
    f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{_FILE}",
    f"https://github.com/deepmind/dsprites-dataset/raw/master/{_FILE}",
)
_CHECKSUM = "md5:7da33b31b13a06f4b04a70402ce90c2e"
_EVAL_SEED = 0


class DSpritesDataModule(ResumableDataModule):
    """737,280 binary images of one white shape, 64 x 64 pixels, with the factors that made each of them.

    A batch is ``(images, factors)``: float32 zeros and ones, and int64 ``(B, 5)`` with the classes of
    :attr:`factor_names`, each from 0 up to its size in :attr:`factor_sizes`. All images are trained on; validation,
    test and predict loaders give ``num_eval`` of them, a fixed random choice: dSprites measures what the latents mean,
    not generalisation.

    Source of the data: Matthey, Higgins, Hassabis, Lerchner, *dSprites: Disentanglement testing Sprites dataset*, 2017.

    Args:
        root: folder with ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``.
        batch_size: samples per batch and rank.
        shape: ``"image"`` (1, 64, 64) or ``"flat"`` (4096,).
        num_eval: images of the evaluation loaders, at least 1; all, if there are fewer.
        download: fetch the file if it is missing (27 MB), checked against its MD5.
        num_workers: workers of the loaders.
        seed: seed of the training order, see :class:`ResumableDataModule`.

    Raises:
        ValueError: an argument is out of range, or the file is damaged or holds something else.
        FileNotFoundError: from ``prepare_data`` and ``setup``, when the file is missing and cannot be fetched.
        RuntimeError: the downloaded file has the wrong checksum.

    Note:
        Images stay bytes in memory (3 GB) and become float32 one batch at a time. Needs NumPy.
    """

    factor_names = ("shape", "scale", "orientation", "x", "y")
    factor_sizes = (3, 6, 40, 32, 32)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 2048,
        shape: Literal["image", "flat"] = "image",
        num_eval: int = 10_000,
        download: bool = False,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if num_eval < 1:
            raise ValueError(f"num_eval must be at least 1; got {num_eval}.")
        if shape not in ("image", "flat"):
            raise ValueError(f"shape must be 'image' or 'flat'; got {shape!r}.")
        self.save_hyperparameters()
        self.root, self.download = Path(root), download
        self.num_eval = num_eval
        self.shape = shape
        self.train_set: ImageArrays | None = None
        self.eval_set: ImageArrays | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, ``(1, 64, 64)`` or ``(4096,)``."""
        return (1, 64, 64) if self.shape == "image" else (4096,)

    def prepare_data(self) -> None:
        """Find the file, and fetch it where that is wanted."""
        path = self.root / _FILE
        if path.is_file():
            return
        if not self.download:
            nothing = "" if self.root.is_dir() else " (no such folder)"
            raise FileNotFoundError(
                f"dSprites: {_FILE} not found in {self.root}{nothing}. Pass download=True, or put the file there."
            )
        fetch(_URLS, path, _CHECKSUM)

    def setup(self, stage: str | None = None) -> None:
        """Read the file once."""
        if self.train_set is not None:
            return
        path = self.root / _FILE
        if not path.is_file():
            self.prepare_data()
        images, factors = _read(path)
        self.train_set = ImageArrays(images.reshape(-1, *self.input_shape), factors)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_EVAL_SEED))[: self.num_eval]
        self.eval_set = ImageArrays(self.train_set.images[order], factors[order])

    def train_dataloader(self) -> DataLoader[Any]:
        """All images, shuffled, with their factors."""
        return self.loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The evaluation images with their factors."""
        return self.loader(self.eval_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same evaluation images."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same evaluation images."""
        return self.val_dataloader()


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``(N, 64, 64)`` and classes of the five factors; the pickled notes in the file are never opened."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            absent = {"imgs", "latents_classes"} - set(file.files)
            if absent:
                raise ValueError(f"{path} lacks the arrays {', '.join(sorted(absent))}: it is not the dSprites file.")
            images, classes = torch.from_numpy(file["imgs"]), torch.from_numpy(file["latents_classes"])
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again.") from error
    if images.shape[1:] != (64, 64) or classes.shape != (len(images), 6):
        raise ValueError(
            f"{path} holds images {tuple(images.shape)} and classes {tuple(classes.shape)}; expected (N, 64, 64) and "
            "(N, 6)."
        )
    return images.to(torch.uint8), classes[:, 1:].long()  # the first factor, the colour, never varies
