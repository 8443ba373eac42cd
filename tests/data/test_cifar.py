"""CIFAR's binary version, from tiny files in the true format."""

import numpy as np
import pytest

from lightning_ext.data import CIFAR10, CIFAR100, CIFARImages, CIFARLayout, read_cifar


def write(folder, layout: CIFARLayout, count):
    """Pixel (channel, row, column) of image i is i + 10 channel + row + 2 column; the coarse label is always 7."""
    home = folder / layout.folder
    home.mkdir()
    channel, row, column = np.indices((3, 32, 32))
    for name in (*layout.train, layout.test):
        records = [
            bytes([7] * (layout.label_bytes - 1) + [i % layout.classes])
            + (i + 10 * channel + row + 2 * column).astype(np.uint8).tobytes()
            for i in range(count)
        ]
        (home / name).write_bytes(b"".join(records))


@pytest.mark.parametrize(("layout", "count"), [(CIFAR10, 12), (CIFAR100, 60)], ids=["10", "100"])
def test_images_and_labels_are_where_they_belong(tmp_path, layout, count):
    write(tmp_path, layout, count)
    found = read_cifar(tmp_path, layout)
    assert isinstance(found, CIFARImages)
    images, labels = found.train
    assert images.shape == (count * len(layout.train), 3, 32, 32)
    assert labels.tolist() == [i % layout.classes for i in range(count)] * len(layout.train)  # not the coarse ones
    assert int(found.test[0][11, 2, 30, 1]) == 11 + 10 * 2 + 30 + 2 * 1
    assert found.test[1].shape == (count,)


def test_cifar_10_is_the_default(tmp_path):
    write(tmp_path, CIFAR10, 1)
    assert len(read_cifar(str(tmp_path)).train[0]) == 5


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("data_batch_4.bin", None, FileNotFoundError, r"data_batch_4.bin not found in .*cifar-10-binary.tar.gz"),
        ("test_batch.bin", b"12", ValueError, r"test_batch.bin is damaged: 2 bytes are not .* 3073 bytes"),
        ("test_batch.bin", b"", ValueError, r"test_batch.bin is damaged: 0 bytes"),
        ("data_batch_1.bin", bytes([10]) + bytes(3072), ValueError, r"holds the label 10: it is not CIFAR-10"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(tmp_path, name, content, error, message):
    write(tmp_path, CIFAR10, 2)
    path = tmp_path / "cifar-10-batches-bin" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(error, match=message):
        read_cifar(tmp_path)
