"""MNIST from its own files, without torchvision."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ext.data._arrays import ImageArrays
from lightning_ext.data._download import download as fetch
from lightning_ext.data.resumable import ResumableDataModule

__all__ = ["MNISTDataModule"]

_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
_CHECKSUMS = {
    "train-images-idx3-ubyte": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_BINARIZE_SEED = 0

Binarize = Literal["threshold", "stochastic"] | None


class MNISTDataModule(ResumableDataModule):
    """60,000 training and 10,000 test images of handwritten digits, 28 x 28 pixels, with labels.

    Source of the data: LeCun, Cortes, Burges, *The MNIST database of handwritten digits*, 1998.

    Args:
        root: folder with the four idx files, plain or as ``.gz``; ``root/MNIST/raw``, where torchvision puts them, is
            searched too.
        batch_size: samples per batch and rank.
        binarize: ``"threshold"`` (1 above half of the range), ``"stochastic"`` (1 with the probability of the grey
            value, drawn once with a fixed seed, so the images stay the same in all epochs and runs), or ``None`` (grey
            values in [0, 1]).
        shape: ``"image"`` (1, 28, 28) or ``"flat"`` (784,).
        num_val: training images held out for validation, the last ones; with 0 there is no validation loader.
        download: fetch files that are missing (11 MB), checked against their SHA-256.
        num_workers: workers of the loaders.
        seed: seed of the training order, see :class:`ResumableDataModule`.

    Raises:
        ValueError: an argument is out of range, or a file is not what its name says.
        FileNotFoundError: from ``prepare_data`` and ``setup``, when a file is missing and cannot be fetched.
        RuntimeError: a downloaded file has the wrong checksum.

    Note:
        Images stay bytes in memory (55 MB) and become float32 one batch at a time.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        binarize: Binarize = "threshold",
        shape: Literal["image", "flat"] = "image",
        num_val: int = 5000,
        download: bool = False,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if binarize not in ("threshold", "stochastic", None):
            raise ValueError(f"binarize must be 'threshold', 'stochastic' or None; got {binarize!r}.")
        if shape not in ("image", "flat"):
            raise ValueError(f"shape must be 'image' or 'flat'; got {shape!r}.")
        if num_val < 0:
            raise ValueError(f"num_val must be at least 0; got {num_val}.")
        self.save_hyperparameters()
        self.root, self.download = Path(root), download
        self.num_val = num_val
        self.binarize, self.shape = binarize, shape
        self.train_set: ImageArrays | None = None
        self.val_set: ImageArrays | None = None
        self.test_set: ImageArrays | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, ``(1, 28, 28)`` or ``(784,)``."""
        return (1, 28, 28) if self.shape == "image" else (784,)

    def prepare_data(self) -> None:
        """Find the four files, and fetch the missing ones where that is wanted."""
        missing = [name for name in _CHECKSUMS if self._find(name) is None]
        if missing and not self.download:
            raise FileNotFoundError(self._complaint(missing))
        for name in missing:
            urls = [f"{mirror}{name}.gz" for mirror in _MIRRORS]
            fetch(urls, self.root / f"{name}.gz", _CHECKSUMS[name])

    def setup(self, stage: str | None = None) -> None:
        """Read the files once."""
        if self.train_set is not None:
            return
        train, test = self._read("train"), self._read("t10k")
        cut = len(train) - self.num_val
        if cut < 1:
            raise ValueError(f"num_val={self.num_val} leaves nothing of the {len(train)} training images.")
        self.train_set = ImageArrays(train.images[:cut], train.targets[:cut], train.scale)
        self.val_set = ImageArrays(train.images[cut:], train.targets[cut:], train.scale)
        self.test_set = test

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training images with labels."""
        return self.loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The images held out of the training part."""
        return self.loader(self.val_set) if self.num_val else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images."""
        return self.loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images."""
        return self.test_dataloader()

    def _find(self, name: str) -> Path | None:
        places = (self.root, self.root / "MNIST" / "raw")
        paths = (folder / f"{name}{ending}" for folder in places for ending in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    def _complaint(self, missing: list[str]) -> str:
        looked = f"{self.root} and {self.root / 'MNIST' / 'raw'}"
        nothing = "" if self.root.is_dir() else " (no such folder)"
        return (
            f"MNIST: {', '.join(missing)} (plain or .gz) not found in {looked}{nothing}. Pass download=True, or put "
            "the files there."
        )

    def _read(self, part: str) -> ImageArrays:
        paths = {}
        for kind, dimensions in (("images", 3), ("labels", 1)):
            name = f"{part}-{kind}-idx{dimensions}-ubyte"
            path = self._find(name)
            if path is None:
                raise FileNotFoundError(self._complaint([name]))
            paths[kind] = _read_idx(path, dimensions)
        images, labels = paths["images"], paths["labels"].long()
        if len(images) != len(labels) or images.shape[1:] != (28, 28):
            raise ValueError(
                f"MNIST: the {part} files hold images of shape {tuple(images.shape)} and {len(labels)} labels; "
                "expected equally many, 28 x 28."
            )
        return ImageArrays(self._binary(images, part).reshape(-1, *self.input_shape), labels, self._scale)

    @property
    def _scale(self) -> float:
        return 255.0 if self.binarize is None else 1.0

    def _binary(self, images: Tensor, part: str) -> Tensor:
        if self.binarize is None:
            return images
        if self.binarize == "threshold":
            return (images > 127).to(torch.uint8)
        generator = torch.Generator().manual_seed(_BINARIZE_SEED + (part != "train"))
        # a byte b becomes 1 with probability b / 255
        noise = torch.randint(0, 255, images.shape, generator=generator, dtype=torch.uint8)
        return (noise < images).to(torch.uint8)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an idx file of unsigned bytes: two zeros, type 8, number of dimensions, big-endian sizes, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and fetch it again.") from error
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise ValueError(f"{path} is not an idx file of bytes with {dimensions} dimensions: it begins {content[:4]!r}.")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path} is truncated: {len(content)} bytes do not even hold its header.")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:]
    if values.numel() != torch.Size(shape).numel():
        raise ValueError(
            f"{path} is truncated or too long: its header says {tuple(shape)}, which is {torch.Size(shape).numel()} "
            f"bytes; {values.numel()} follow."
        )
    return values.reshape(shape)
