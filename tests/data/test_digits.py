"""The digits: what scikit-learn ships, split once and for all."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ext._lightning import LightningModule, Trainer
from lightning_ext.data import DigitsDataModule, digits
from lightning_ext.modules import BetaVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder
from lightning_ext.testing import assert_resumes

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def ready(**kwargs):
    data = DigitsDataModule(**kwargs)
    data.setup("fit")
    return data


def rows(images, labels):
    return sorted([*image, label] for image, label in zip(images.flatten(1).tolist(), labels.tolist(), strict=True))


def test_both_parts_together_are_the_images_of_scikit_learn():
    data, source = ready(binarize=False), sklearn_datasets.load_digits()
    train, held_out = data.train_set.tensors, data.held_out_set.tensors
    assert (len(train[0]), len(held_out[0])) == (1400, 397)
    images, labels = (torch.cat(part) for part in zip(train, held_out, strict=True))
    expected = torch.from_numpy(source.data).float() / 16, torch.from_numpy(source.target)
    assert rows(images, labels) == rows(*expected)
    assert (images.min(), images.max()) == (0, 1)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_the_split_is_always_the_same_and_mixes_all_digits():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = ready()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = ready()
    for part in ("train_set", "held_out_set"):
        images, labels = getattr(first, part).tensors
        assert torch.equal(images, getattr(second, part).tensors[0])
        assert torch.bincount(labels, minlength=10).min() > len(labels) / 20
    assert first.held_out_set.tensors[1][:8].tolist() == [0, 6, 0, 3, 4, 0, 6, 0], (
        "published numbers hang on this split"
    )


def test_pixels_are_thresholded_at_half_of_their_range():
    grey, binary = ready(binarize=False), ready()
    expected = (16 * grey.train_set.tensors[0] > 7.5).float()
    assert torch.equal(binary.train_set.tensors[0], expected)


@pytest.mark.parametrize(("shape", "size"), [("flat", (64,)), ("image", (1, 8, 8))])
def test_shapes(shape, size):
    data = ready(shape=shape, batch_size=10)
    assert data.input_shape == size
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (10, *size)
        assert labels.shape == (10,)
    flat = ready().train_set.tensors[0]
    assert torch.equal(data.train_set.tensors[0].flatten(1), flat)


def order(seed, epoch):
    loader = ready(batch_size=700, seed=seed).train_dataloader()
    loader.sampler.set_epoch(epoch)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    assert rows(images, labels) == rows(*ready().train_set.tensors)
    return images


def test_the_order_of_training_follows_from_seed_and_epoch_alone():
    first = order(seed=1, epoch=0)
    assert not torch.equal(first, ready().train_set.tensors[0])
    torch.manual_seed(99)
    assert torch.equal(order(seed=1, epoch=0), first)
    assert not torch.equal(order(seed=1, epoch=1), first)
    assert not torch.equal(order(seed=2, epoch=0), first)


def test_without_a_seed_the_order_is_that_of_the_program():
    torch.manual_seed(7)
    assert DigitsDataModule().seed == 7


def test_evaluation_is_not_shuffled():
    data = ready()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(torch.cat([images for images, _ in loader]), data.held_out_set.tensors[0])


@pytest.mark.parametrize(("checkpoint", "crash_at"), [("step", (1, 1)), ("epoch", (1, 0))])
def test_a_resumed_training_sees_the_rest_of_its_epoch(checkpoint, crash_at):
    def build():
        return BetaVAE(MLPEncoder([64], [5], 2), MLPDecoder(2, [5], [64]), input_shape=[64])

    assert_resumes(build, lambda: DigitsDataModule(batch_size=400), checkpoint=checkpoint, crash_at=crash_at)


def test_a_loader_of_the_users_own_collates_the_samples():
    data = ready()
    images, labels = next(iter(DataLoader(data.train_set, batch_size=5)))
    assert torch.equal(images, data.train_set.tensors[0][:5])
    assert torch.equal(labels, data.train_set.tensors[1][:5])


def test_a_second_setup_reads_nothing_again():
    data = ready()
    before = data.train_set
    data.setup("test")
    assert data.train_set is before


class Counts(LightningModule):
    def __init__(self):
        super().__init__()
        self.seen, self.weight = 0, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_sees_every_training_image():
    model = Counts()
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, devices=1,
                      enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=300))
    assert model.seen == 1400


def test_arguments_are_hyperparameters():
    assert dict(DigitsDataModule(batch_size=7, binarize=False).hparams) == {
        "batch_size": 7,
        "binarize": False,
        "shape": "flat",
        "num_workers": 0,
        "seed": None,
    }


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        DigitsDataModule(batch_size=0)
    with pytest.raises(ValueError, match="shape must be 'flat' or 'image'; got 'square'"):
        DigitsDataModule(shape="square")
    with pytest.raises(RuntimeError, match=r"call setup\(\) before asking for a loader"):
        DigitsDataModule().train_dataloader()
    monkeypatch.setattr(digits, "_SKLEARN", False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ext\[examples\]'"):
        ready()
