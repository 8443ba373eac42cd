"""MNIST is read from its own files, whole or not at all, and a download is checked before it gets its name."""

import gzip
import hashlib
import struct

import pytest
import torch
from pytorch_lightning import Trainer

from lightning_ext.data import MNISTDataModule, mnist
from lightning_ext.modules import BetaVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(values):
    """The bytes of an idx file."""
    header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    return header + bytes(values.flatten().tolist())


def images_of(count):
    return torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(count))


def write(folder, packed=False, train=20, test=8):
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        for name, values in zip(NAMES[part], (images_of(count), torch.arange(count) % 10), strict=True):
            content = idx(values)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def ready(root, **options):
    data = MNISTDataModule(str(root), **{"num_val": 4, "batch_size": 8, **options})
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_files_are_read_plain_or_packed(tmp_path, packed, below):
    write(tmp_path / below, packed)
    data = ready(tmp_path, binarize=None)
    assert [len(s) for s in (data.train_set, data.val_set, data.test_set)] == [16, 4, 8]
    x, y = next(iter(data.test_dataloader()))
    assert torch.equal(x, images_of(8).unsqueeze(1) / 255.0)
    assert y.tolist() == list(range(8))
    x, y = next(iter(data.val_dataloader()))
    assert torch.equal(x, images_of(20)[16:].unsqueeze(1) / 255.0)
    assert y.tolist() == [6, 7, 8, 9]


def test_training_images_are_shuffled_and_complete(tmp_path):
    data = ready(write(tmp_path), binarize=None, shape="flat")
    batches = [x for x, _ in data.train_dataloader()]
    assert [len(x) for x in batches] == [8, 8]
    seen = torch.cat(batches)
    expected = images_of(20)[:16].flatten(1) / 255.0
    assert not torch.equal(seen, expected)
    assert {tuple(row) for row in seen.tolist()} == {tuple(row) for row in expected.tolist()}


def test_binarisation(tmp_path):
    write(tmp_path, test=200)
    grey = images_of(200).unsqueeze(1) / 255.0
    threshold, _ = next(iter(ready(tmp_path, batch_size=200).test_dataloader()))
    assert torch.equal(threshold, (grey > 0.5).float())
    stochastic, _ = next(iter(ready(tmp_path, binarize="stochastic", batch_size=200).test_dataloader()))
    again, _ = next(iter(ready(tmp_path, binarize="stochastic", batch_size=200).test_dataloader()))
    assert torch.equal(stochastic, again)
    assert set(stochastic.unique().tolist()) == {0.0, 1.0}
    for low, high in ((0.1, 0.2), (0.45, 0.55), (0.8, 0.9)):
        inside = (grey > low) & (grey < high)
        assert stochastic[inside].mean() == pytest.approx(float(grey[inside].mean()), abs=0.02)
    assert (stochastic[grey == 0] == 0).all()
    assert (stochastic[grey == 1] == 1).all()


def test_a_model_trains_on_it(tmp_path):
    model = BetaVAE(MLPEncoder([784], [8], 2), MLPDecoder(2, [8], [784]), [784])
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(model, datamodule=MNISTDataModule(str(write(tmp_path)), shape="flat", num_val=4))
    assert trainer.callback_metrics["val/loss"].isfinite()
    (logged,) = trainer.test(model, datamodule=ready(tmp_path, shape="flat", num_val=0), verbose=False)
    assert 300 < logged["test/distortion"] < 800  # 784 pixels at about log 2 each


def test_without_validation_images_there_is_no_validation_loader(tmp_path):
    data = ready(write(tmp_path), num_val=0)
    assert len(data.train_set) == 20
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda b: b[:-5],
            r"t10k-images-idx3-ubyte is truncated or too long: .*\(8, 28, 28\).* 6272 bytes; 6267 follow",
        ),
        (lambda b: b + b"x", "truncated or too long"),
        (lambda b: b[:9], "truncated: 9 bytes do not even hold its header"),
        (lambda b: bytes([0, 0, 8, 1]) + b[4:], "not an idx file of bytes with 3 dimensions"),
        (lambda b: b"<html>" + b, r"not an idx file of bytes with 3 dimensions: it begins b'<htm'"),
        (lambda b: idx(torch.zeros(8, 27, 28, dtype=torch.long)), r"\(8, 27, 28\) and 8 labels; expected equally many"),
        (lambda b: idx(torch.zeros(7, 28, 28, dtype=torch.long)), r"\(7, 28, 28\) and 8 labels; expected equally many"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil, message):
    path = write(tmp_path) / NAMES["t10k"][0]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ready(tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    path = write(tmp_path, packed=True) / f"{NAMES['train'][0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged .* fetch it again"):
        ready(tmp_path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        ready(tmp_path)


def test_missing_files_are_named_with_where_they_were_sought(tmp_path):
    write(tmp_path)
    (tmp_path / NAMES["train"][1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"MNIST: train-labels-idx1-ubyte \(plain or \.gz\) not found in .*raw\. "
    ):
        ready(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder\)\. Pass download=True, or put the files there"):
        MNISTDataModule(str(tmp_path / "nowhere")).prepare_data()
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        MNISTDataModule(str(tmp_path / "nowhere")).setup()
    with pytest.raises(RuntimeError, match=r"call setup\(\) before"):
        MNISTDataModule(str(tmp_path)).train_dataloader()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Two mirrors, the first of them gone; the checksums are those of the second one's files."""
    folder = write(tmp_path / "mirror", packed=True)
    monkeypatch.setattr(mnist, "_MIRRORS", ((tmp_path / "gone").as_uri() + "/", folder.as_uri() + "/"))
    sums = {path.stem: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in folder.iterdir()}
    monkeypatch.setattr(mnist, "_CHECKSUMS", {name: sums[name] for name in mnist._CHECKSUMS})
    return folder


def test_missing_files_are_downloaded_once(tmp_path, mirror, monkeypatch):
    root = tmp_path / "root"
    assert len(ready(root, download=True).test_set) == 8
    assert sorted(path.name for path in root.iterdir()) == sorted(f"{name}.gz" for name in mnist._CHECKSUMS)
    monkeypatch.setattr(mnist, "fetch", lambda *args: pytest.fail("fetched a file that was there"))
    ready(root, download=True)


def test_a_wrong_checksum_leaves_nothing_behind(tmp_path, mirror):
    (mirror / "t10k-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(
        RuntimeError, match=r"t10k-images-idx3-ubyte\.gz is not the expected file: its sha256 is .* deleted"
    ):
        ready(tmp_path / "root", download=True)
    assert not [path for path in (tmp_path / "root").iterdir() if path.name.startswith("t10k-images")]


def test_offline_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "_MIRRORS", ("http://127.0.0.1:9/",))  # the discard port: nobody listens
    with pytest.raises(
        FileNotFoundError,
        match=r"train-images-idx3-ubyte\.gz could not be downloaded \(http.* Without a connection, put",
    ):
        ready(tmp_path / "root", download=True)
    assert not list((tmp_path / "root").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"binarize": "yes"}, "binarize must be 'threshold', 'stochastic' or None; got 'yes'"),
        ({"shape": "square"}, "shape must be 'image' or 'flat'; got 'square'"),
        ({"num_val": -1}, "num_val must be at least 0; got -1"),
        ({"num_val": 20}, "num_val=20 leaves nothing of the 20 training images"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        ready(tmp_path, **options)


def test_the_true_checksums_and_mirrors_are_those_of_four_files():
    assert set(mnist._CHECKSUMS) == {name for pair in NAMES.values() for name in pair}
    assert all(len(value) == len("sha256:") + 64 for value in mnist._CHECKSUMS.values())
    assert all(url.startswith("https://") and url.endswith("/") for url in mnist._MIRRORS)
