"""dSprites comes with its factors, stays bytes in memory, and a damaged or missing file is one sentence."""

import hashlib

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer

from lightning_ext.data import DSpritesDataModule, dsprites
from lightning_ext.metrics import MutualInformationGap
from lightning_ext.modules import BetaVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder

SIZES = (1, 3, 6, 40, 32, 32)


def arrays(count=24):
    rng = np.random.default_rng(0)
    classes = np.stack([rng.integers(0, size, count) for size in SIZES], axis=1)
    return {
        "imgs": rng.integers(0, 2, (count, 64, 64), dtype=np.uint8),
        "latents_classes": classes,
        "latents_values": classes.astype(np.float64),
        "metadata": np.array({"title": "pickled, as in the true file"}, dtype=object),
    }


def write(folder, **replaced):
    folder.mkdir(exist_ok=True)
    content = {name: value for name, value in {**arrays(), **replaced}.items() if value is not None}
    np.savez_compressed(folder / dsprites._FILE, **content)
    return folder


def ready(root, **options):
    data = DSpritesDataModule(str(root), **{"batch_size": 8, "num_eval": 10, **options})
    data.prepare_data()
    data.setup()
    return data


def test_images_come_with_their_factors(tmp_path):
    data = ready(write(tmp_path), shape="flat")
    assert len(data.train_set) == 24
    assert data.train_set.images.dtype == torch.uint8
    x, factors = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    assert x.shape == (24, 4096)
    assert x.dtype == torch.float32
    assert factors.shape == (24, 5)
    rows = {
        tuple(image.flatten()): tuple(c[1:])
        for image, c in zip(arrays()["imgs"], arrays()["latents_classes"], strict=True)
    }
    for image, row in zip(x.tolist(), factors.tolist(), strict=True):
        assert rows[tuple(image)] == tuple(row)


def test_evaluation_is_a_fixed_choice(tmp_path):
    write(tmp_path)
    first, again = ready(tmp_path), ready(tmp_path)
    assert [len(x) for x, _ in first.val_dataloader()] == [8, 2]
    for (x, factors), (y, same) in zip(first.test_dataloader(), again.predict_dataloader(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(factors, same)
    assert x.shape[1:] == first.input_shape == (1, 64, 64)
    assert len(ready(tmp_path, num_eval=100).eval_set) == 24


def test_it_trains_a_model_and_feeds_the_metric(tmp_path):
    data = ready(write(tmp_path), shape="flat")
    model = BetaVAE(MLPEncoder([4096], [4], 2), MLPDecoder(2, [4], [4096]), [4096])
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/loss"].isfinite()
    metric = MutualInformationGap(data.factor_sizes, latent_dim=2)
    for x, factors in data.test_dataloader():
        metric.update(model.encode(x)[0], factors)
    assert metric.compute()["gap"].shape == (5,)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"imgs": None}, "lacks the arrays imgs: it is not the dSprites file"),
        ({"imgs": np.zeros((24, 64, 63), np.uint8)}, r"images \(24, 64, 63\)"),
        ({"latents_classes": np.zeros((23, 6), np.int64)}, r"classes \(23, 6\); expected \(N, 64, 64\)"),
    ],
)
def test_another_file_is_refused(tmp_path, replaced, message):
    with pytest.raises(ValueError, match=message):
        ready(write(tmp_path, **replaced))


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path) / dsprites._FILE
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"npz is damaged .*delete it and fetch it again"):
        ready(tmp_path)
    spoiled = bytearray(content)
    spoiled[200:300] = bytes(100)
    path.write_bytes(bytes(spoiled))
    with pytest.raises(ValueError, match="npz is damaged"):
        ready(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"dSprites: dsprites_.*npz not found in .*\. Pass download=True, or put"
    ):
        ready(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        DSpritesDataModule(str(tmp_path / "nowhere")).setup()


def test_download(tmp_path, monkeypatch):
    source = write(tmp_path / "mirror") / dsprites._FILE
    monkeypatch.setattr(dsprites, "_URLS", ((tmp_path / "gone").as_uri(), source.as_uri()))
    with pytest.raises(RuntimeError, match=r"its md5 is .* instead of 7da33b31b13a06f4b04a70402ce90c2e"):
        ready(tmp_path / "root", download=True)
    assert not list((tmp_path / "root").iterdir())
    monkeypatch.setattr(dsprites, "_CHECKSUM", f"md5:{hashlib.md5(source.read_bytes()).hexdigest()}")
    assert len(ready(tmp_path / "root", download=True).train_set) == 24
    assert [path.name for path in (tmp_path / "root").iterdir()] == [dsprites._FILE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"num_eval": 0}, "num_eval must be at least 1; got 0"),
        ({"shape": "cube"}, "shape must be 'image' or 'flat'; got 'cube'"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ready(write(tmp_path), **options)
