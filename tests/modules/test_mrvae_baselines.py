"""Baselines: each loss against its formula, and the state that some of them keep."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ext._lightning import Callback, LightningDataModule, Trainer
from lightning_ext.functional.mrvae import gaussian_kl
from lightning_ext.modules import GECOVAE, BetaVAE, FreeBitsVAE, SigmaVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder
from lightning_ext.testing import StatefulLoader, assert_resumes, ddp_trainer_kwargs

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
         "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


def build(kind, **kwargs):
    return kind(MLPEncoder([6], [5], 2), MLPDecoder(2, [5], [6]), input_shape=[6], seed=3, **kwargs)


def pixels(n=8):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(1))


def parts(model, x):
    """KL of each latent and squared error of each sample, with the noise of the current address."""
    model.set_address("train", 0)
    mu, logvar = model.encoder(x)
    reconstruction = model.decoder(mu + (logvar / 2).exp() * model.noise(mu))
    model.set_address("train", 0)
    return gaussian_kl(mu, logvar), (reconstruction - x).square().sum(1)


def loss(model, x):
    return model.loss(model.rate_distortion(x))


def test_beta_vae():
    model, x = build(BetaVAE, beta=0.3, distortion="gaussian").double(), pixels().double()
    kl, error = parts(model, x)
    torch.testing.assert_close(loss(model, x), (error / 2).mean() + 0.3 * kl.sum(1).mean(), rtol=1e-12, atol=0)
    model.beta = 0.0
    parts(model, x)
    torch.testing.assert_close(loss(model, x), (error / 2).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("free_bits", [0.0, 0.2, 3.0])
def test_free_bits(free_bits):
    model, x = build(FreeBitsVAE, free_bits=free_bits, distortion="gaussian").double(), pixels().double()
    with torch.no_grad():
        model.encoder.mu.bias += torch.tensor([2.0, 0.0])  # one latent above the floor of 0.2, one below
    kl, error = parts(model, x)
    mean = kl.mean(0)
    if free_bits == 0.2:
        assert mean[0] > 0.2 > mean[1]
    expected = (error / 2).mean() + torch.maximum(mean, torch.full_like(mean, free_bits)).sum()
    terms = model.rate_distortion(x)
    torch.testing.assert_close(model.loss(terms), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.rate, kl.sum(1))  # what is reported has no floor


def test_a_latent_below_the_floor_is_not_pushed_down():
    model, x = build(FreeBitsVAE, free_bits=3.0, distortion=lambda y, x: 0 * y.sum(1)), pixels()
    loss(model, x).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_sigma_vae_uses_the_mean_squared_error_of_the_batch():
    model, x = build(SigmaVAE).double(), pixels().double()
    kl, error = parts(model, x)
    variance = error.mean() / 6
    expected = 3 * torch.log(2 * math.pi * variance) + 3 + kl.sum(1).mean()
    torch.testing.assert_close(loss(model, x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.variance, variance.detach(), rtol=1e-12, atol=0)
    before = model.variance.clone()
    model.eval().rate_distortion(1 - x)
    assert torch.equal(model.variance, before), "an evaluation leaves the variance alone"
    assert "variance" in model.state_dict()


def test_geco_weighs_the_constraint():
    model, x = build(GECOVAE, target_distortion=2.5, distortion="gaussian").double(), pixels().double()
    model.multiplier.fill_(1.7)
    kl, error = parts(model, x)
    expected = (kl.sum(1) + 1.7 * (error / 2 - 2.5)).mean()
    torch.testing.assert_close(loss(model, x), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("target", "direction"), [(0.01, 1), (100.0, -1)])
def test_geco_multiplier_moves_towards_the_constraint(target, direction):
    model = build(GECOVAE, target_distortion=target, distortion="gaussian", multiplier_lr=0.1, smoothing=0.5)
    Trainer(max_epochs=2, **QUIET).fit(model, DataLoader(TensorDataset(pixels()), 4))
    assert direction * math.log(model.multiplier.item()) > 0
    assert direction * model.constraint.item() > 0


def test_geco_multiplier_follows_its_moving_average():
    model = build(GECOVAE, target_distortion=2.0, multiplier_lr=0.3, smoothing=0.8)
    seen, multipliers, inner = [], [], model.rate_distortion

    def recorded(batch):
        terms = inner(batch)
        if model.training:
            seen.append(terms.distortion.mean().item())
        return terms

    model.rate_distortion = recorded
    model.on_train_batch_end = lambda *_: multipliers.append(model.multiplier.item())
    data = DataLoader(TensorDataset(pixels()), 4)
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(model, data, data)
    average, expected = 0.0, [1.0]
    for distortion in seen:
        average = 0.8 * average + 0.2 * (distortion / 2.0 - 1)
        expected.append(expected[-1] * math.exp(0.3 * average))
    assert len(multipliers) == 6
    assert multipliers == pytest.approx(expected[1:], rel=1e-5), "only training batches move it"
    assert trainer.callback_metrics["train/multiplier"].item() == pytest.approx(expected[-1], rel=1e-5)


def test_geco_multiplier_stays_finite():
    model = build(GECOVAE, target_distortion=1e-6, multiplier_lr=100.0, smoothing=0.0, distortion="gaussian")
    Trainer(max_epochs=2, **QUIET).fit(model, DataLoader(TensorDataset(pixels()), 4))
    assert model.multiplier.item() == pytest.approx(1e8)


KINDS = {
    "beta": (BetaVAE, {}),
    "free bits": (FreeBitsVAE, {}),
    "sigma": (SigmaVAE, {}),
    "geco": (GECOVAE, {"target_distortion": 2.0, "multiplier_lr": 0.3, "smoothing": 0.8}),
}


@pytest.mark.parametrize("kind", ["sigma", "geco"])
@pytest.mark.parametrize(("checkpoint", "crash_at"), [("step", (1, 1)), ("epoch", (1, 0))])
def test_state_of_a_baseline_survives_a_crash(kind, checkpoint, crash_at):
    cls, kwargs = KINDS[kind]
    data = TensorDataset(pixels(12))
    assert_resumes(
        lambda: build(cls, **kwargs), lambda: StatefulLoader(data, 4), checkpoint=checkpoint, crash_at=crash_at
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    cls, kwargs = KINDS[kind]
    model = build(cls, lr=0.02, **kwargs)
    x = pixels(32)
    parts(model, x)
    before = loss(model, x).item()
    multiplier = model.multiplier.item() if kind == "geco" else None
    Trainer(max_epochs=15, **QUIET).fit(model, DataLoader(TensorDataset(x), 8))
    if multiplier is not None:
        model.multiplier.fill_(multiplier)
    parts(model, x)
    assert loss(model, x).item() < before - 0.05


class Interleaved(LightningDataModule):
    """Unshuffled: rank r of n takes rows r, r + n, ..., so the ranks' batches make up the batch of one process."""

    def __init__(self, rows, batch_size):
        super().__init__()
        self.rows, self.batch_size = TensorDataset(rows), batch_size

    def train_dataloader(self):
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        sampler = DistributedSampler(self.rows, ranks, rank, shuffle=False)
        return DataLoader(self.rows, self.batch_size // ranks, sampler=sampler)


@pytest.mark.ddp
def test_two_ranks_move_one_multiplier_as_one_process_does():
    class Compare(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            ours = torch.stack([pl_module.multiplier, pl_module.constraint])
            assert torch.equal(*trainer.strategy.all_gather(ours)), "the ranks' multipliers differ"

    def trained(**kwargs):
        torch.manual_seed(0)
        model = build(GECOVAE, target_distortion=2.0, multiplier_lr=0.3, smoothing=0.8)
        model.noise = torch.zeros_like
        trainer = Trainer(
            **{"max_epochs": 3, "enable_checkpointing": False, "use_distributed_sampler": False, **kwargs}
        )
        trainer.fit(model, Interleaved(pixels() * torch.linspace(0, 1, 8)[:, None], batch_size=4))
        return model

    both, alone = trained(callbacks=[Compare()], **ddp_trainer_kwargs()), trained(**QUIET)
    assert both.multiplier.item() == pytest.approx(alone.multiplier.item(), rel=1e-5)
    assert abs(alone.multiplier.item() - 1) > 0.05


def test_bad_arguments_are_named():
    for kind, kwargs, message in (
        (BetaVAE, {"beta": -0.1}, "beta must be at least 0; got -0.1"),
        (BetaVAE, {"beta": math.nan}, "beta must be at least 0; got nan"),
        (FreeBitsVAE, {"free_bits": -1.0}, "free_bits must be at least 0; got -1.0"),
        (GECOVAE, {"target_distortion": 0.0}, "target_distortion must be positive; got 0.0"),
        (GECOVAE, {"multiplier_lr": 0.0}, r"multiplier_lr must be positive and smoothing in \[0, 1\); got 0.0"),
        (GECOVAE, {"smoothing": 1.0}, r"smoothing in \[0, 1\); got 0.01 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(kind, **kwargs)
