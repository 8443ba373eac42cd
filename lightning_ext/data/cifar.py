"""CIFAR-10 and CIFAR-100 from their binary versions, without torchvision and without unpickling anything."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CIFAR10", "CIFAR100", "CIFARImages", "CIFARLayout", "read_cifar"]

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CIFARLayout:
    """Where the binary version keeps what: a record is some label bytes, of which the last one counts, and an image.

    Args:
        classes: number of classes.
        folder: what the archive unpacks to.
        archive: name of the published archive.
        label_bytes: in front of each image.
        train: names of the training files.
        test: name of the test file.
    """

    classes: int
    folder: str
    archive: str
    label_bytes: int
    train: tuple[str, ...]
    test: str


CIFAR10 = CIFARLayout(
    10, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", 1, tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test_batch.bin",
)  # fmt: skip
CIFAR100 = CIFARLayout(100, "cifar-100-binary", "cifar-100-binary.tar.gz", 2, ("train.bin",), "test.bin")


@dataclass(frozen=True)
class CIFARImages:
    """Images ``(N, 3, 32, 32)`` as bytes with labels ``(N,)``.

    Args:
        train: of the training files.
        test: of the test file.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read_cifar(folder: Path | str, layout: CIFARLayout = CIFAR10) -> CIFARImages:
    """Read CIFAR from its binary version.

    Args:
        folder: where the archive was unpacked.
        layout: ``CIFAR10`` or ``CIFAR100``, which gives the fine labels.

    Returns:
        50,000 training and 10,000 test images, 180 MB.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not made of whole records, or has a label that does not exist.

    Source: Krizhevsky, *Learning multiple layers of features from tiny images*, 2009.
    """
    home = Path(folder) / layout.folder
    missing = [name for name in (*layout.train, layout.test) if not (home / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"CIFAR-{layout.classes}: {', '.join(missing)} not found in {home}. Unpack the binary version, "
            f"{layout.archive}, into {folder} (the Python version is a pickle and is not read)."
        )
    images, labels = zip(*(_records(home / name, layout) for name in layout.train), strict=True)
    return CIFARImages((torch.cat(images), torch.cat(labels)), _records(home / layout.test, layout))


def _records(path: Path, layout: CIFARLayout) -> tuple[Tensor, Tensor]:
    size = layout.label_bytes + _PIXELS
    content = path.read_bytes()
    if not content or len(content) % size:
        raise ValueError(f"{path} is damaged: {len(content)} bytes are not a number of records of {size} bytes.")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
    labels = records[:, layout.label_bytes - 1].long()
    if int(labels.max()) >= layout.classes:
        raise ValueError(f"{path} holds the label {int(labels.max())}: it is not CIFAR-{layout.classes}.")
    return records[:, layout.label_bytes :].reshape(-1, 3, 32, 32), labels
