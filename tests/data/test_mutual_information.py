"""Pairs have the moments and the information they promise, come fresh, and can be taken up again."""

import math

import pytest
import torch
from torch import nn

from lightning_ext._lightning import LightningModule, Trainer
from lightning_ext.data import (
    CorrelatedGaussianDataModule,
    FiniteJointDataModule,
    LinearGaussianDataModule,
    PairLoader,
    SimulatedPairsDataModule,
)
from lightning_ext.nn import GaussianDecoderModel, LinearGaussianModel
from lightning_ext.testing import run_ddp

JOINT = [[0.30, 0.05, 0.05], [0.05, 0.25, 0.10], [0.02, 0.08, 0.10]]
WEIGHT = [[1.0, 0.0], [0.5, 2.0], [0.0, 1.0]]
SMALL = {"num_train": 10, "num_val": 6, "batch_size": 4, "seed": 3}


def joined(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


@pytest.mark.parametrize("transform", [None, "asinh", "cube", "half_cube", "wiggle"])
def test_gaussians_have_their_correlation_and_transforms_can_be_undone(transform):
    data = CorrelatedGaussianDataModule(3, 0.6, transform, num_train=40_000, seed=0)
    assert data.mutual_information == pytest.approx(-1.5 * math.log(1 - 0.36))
    x, z = joined(data.train_dataloader())
    assert x.shape == z.shape == (40_000, 3)
    if transform is None:
        both = torch.corrcoef(torch.cat([x, z], 1).mT)
        torch.testing.assert_close(both[:3, 3:], 0.6 * torch.eye(3), rtol=0, atol=0.02)
        torch.testing.assert_close(both[:3, :3], torch.eye(3), rtol=0, atol=0.02)
        return
    plain = joined(CorrelatedGaussianDataModule(3, 0.6, None, num_train=40_000, seed=0).train_dataloader())
    for ours, theirs in zip((x, z), plain, strict=True):  # in the order of the plain pairs they rise
        assert (ours.gather(0, theirs.argsort(0)).diff(dim=0) >= 0).all()
        assert not torch.allclose(ours, theirs)


def test_linear_pairs_have_the_covariance_of_the_model():
    data = LinearGaussianDataModule(WEIGHT, 0.5, [1.0, 2.0, 3.0], num_train=60_000, seed=0)
    x, z = joined(data.train_dataloader())
    w = torch.tensor(WEIGHT)
    torch.testing.assert_close(torch.cov(x.mT), w @ w.T + 0.25 * torch.eye(3), rtol=0.03, atol=0.03)
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, 2.0, 3.0]), rtol=0, atol=0.03)
    torch.testing.assert_close((x - x.mean(0)).mT @ z / len(z), w, rtol=0, atol=0.03)
    assert data.mutual_information == pytest.approx(0.5 * torch.logdet(torch.eye(2) + w.T @ w / 0.25).item(), rel=1e-5)


def test_symbols_are_as_frequent_as_the_table_says():
    data = FiniteJointDataModule(JOINT, num_train=100_000, seed=0)
    x, z = joined(data.train_dataloader())
    torch.testing.assert_close(x.mT @ z / len(x), torch.tensor(JOINT), rtol=0, atol=0.005)
    assert data.mutual_information == pytest.approx(0.2391079865, abs=1e-9)
    numbers = joined(FiniteJointDataModule(JOINT, one_hot=False, **SMALL).val_dataloader())
    assert [part.shape for part in numbers] == [(6, 1)] * 2
    assert not numbers[0].is_floating_point()


def test_a_models_pairs():
    model = LinearGaussianModel(torch.tensor(WEIGHT), torch.zeros(3), 0.5)
    data = SimulatedPairsDataModule(model, **SMALL)
    assert data.mutual_information is None
    x, z = joined(data.train_dataloader())
    assert (x.shape, z.shape) == ((10, 3), (10, 2))
    decoder = GaussianDecoderModel(nn.Linear(2, 3), 0.0, 2)
    assert not joined(SimulatedPairsDataModule(decoder, **SMALL).val_dataloader())[0].requires_grad
    with pytest.raises(ValueError, match=r"model must have simulate\(num, generator\), as a LatentModel; got Linear"):
        SimulatedPairsDataModule(nn.Linear(1, 1))


def test_epochs_are_fresh_validation_is_not_and_random_states_are_left_alone():
    data = CorrelatedGaussianDataModule(2, **SMALL)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    loader = data.train_dataloader()
    assert [len(x) for x, _ in loader] == [4, 4, 2]
    first = joined(loader)
    assert torch.equal(joined(loader)[0], first[0])
    loader.sampler.set_epoch(1)
    assert not torch.isclose(joined(loader)[0], first[0]).any()
    check = data.val_dataloader()
    before = joined(check)
    check.set_epoch(5)
    assert torch.equal(joined(check)[0], before[0])
    assert not torch.isclose(before[0][:4], first[0][:4]).any()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(joined(data.test_dataloader())[1], before[1])
    assert torch.equal(joined(data.predict_dataloader())[1], before[1])
    assert len(first[0].flatten().unique()) == 20


def test_a_loader_goes_on_in_the_middle_of_an_epoch():
    loader = CorrelatedGaussianDataModule(2, **SMALL).train_dataloader()
    stream = iter(loader)
    next(stream)
    resumed = CorrelatedGaussianDataModule(2, **SMALL).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = list(stream)
    assert len(rest) == 2
    for ours, theirs in zip(resumed, rest, strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert len(list(resumed)) == 3
    with pytest.raises(ValueError, match="cannot resume inside an epoch of 3 batches with one of 2"):
        PairLoader(resumed.draw, 5, 4).load_state_dict(loader.state_dict())


class Watching(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = nn.Linear(2, 1), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0])
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, module, data, **options):
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False, max_epochs=2, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def test_a_trainer_gets_fresh_pairs_in_every_epoch(tmp_path):
    module = Watching()
    fit(tmp_path, module, CorrelatedGaussianDataModule(2, **SMALL))
    assert len(module.seen) == 6
    assert not torch.isclose(module.seen[0], module.seen[3]).any()


def _on_two_ranks(rank):
    return joined(CorrelatedGaussianDataModule(2, **SMALL).train_dataloader())[0]


def test_ranks_draw_apart():
    first, second = run_ddp(_on_two_ranks)
    assert first.shape == second.shape == (10, 2)
    assert not torch.isclose(first, second).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CorrelatedGaussianDataModule(rho=1.0), "rho between -1 and 1"),
        (lambda: CorrelatedGaussianDataModule(transform="spiral"), "transform must be None or one of 'asinh'"),
        (lambda: CorrelatedGaussianDataModule(num_train=0), "num_train and num_val must be at least 1; got 0 and 1000"),
        (lambda: CorrelatedGaussianDataModule(batch_size=0), "batch_size must be at least 1"),
        (lambda: LinearGaussianDataModule(WEIGHT, 0.0), "sigma positive"),
        (lambda: LinearGaussianDataModule(WEIGHT, 1.0, [0.0]), r"bias must be \(3,\)"),
        (lambda: FiniteJointDataModule([[0.5, 0.1]]), "sum to 1"),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
