"""What the mutual-information experiments share: quiet Trainers, a VAE of the digits, and one line of progress."""

import contextlib
import functools
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_ext.data import DigitsDataModule
from lightning_ext.modules import MultiRateVAE, SigmaVAE
from lightning_ext.nn import LatentModel, latent_model_from_vae

LATENTS, EPOCHS, BETA_EPOCHS = 10, 150, 150
LEARNING_RATE, BETA_RATE = 1e-3, 5e-3


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Say what runs, and how long it took."""
    start = time.perf_counter()
    yield
    print(f"  {what}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One thread, which such small networks are fastest with; no notes of Lightning on devices and workers."""
    threads, logger = torch.get_num_threads(), logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning")
            yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)


def trainer(**options: Any) -> pl.Trainer:
    """A Trainer that says nothing."""
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def tanh_networks() -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the digits, smooth in the latents."""
    encoder = nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2 * LATENTS)
    )  # fmt: skip
    decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64))
    return encoder, decoder


@functools.cache
def digits_vae(seed: int) -> LatentModel:
    """A VAE of grey digits that learned the variance of its pixels, as a generative model."""
    with quiet(), told(f"VAE of the digits, seed {seed}"):
        pl.seed_everything(seed, verbose=False)
        vae = SigmaVAE(*tanh_networks(), input_shape=[64], lr=LEARNING_RATE, seed=seed)
        trainer(max_epochs=EPOCHS, limit_val_batches=0).fit(vae, DigitsDataModule(binarize=False, seed=seed))
        return latent_model_from_vae(vae.eval())


@functools.cache
def held_out() -> Tensor:
    """Grey digits that no VAE here was trained on."""
    data = DigitsDataModule(binarize=False)
    data.setup()
    return torch.cat([x for x, _ in data.val_dataloader()])


@functools.cache
def multi_rate_vae(seed: int) -> MultiRateVAE:
    """One VAE for every beta, of grey digits with Gaussian pixels: beta is their variance."""
    with quiet(), told(f"multi-rate VAE of the digits, seed {seed}"):
        pl.seed_everything(seed, verbose=False)
        vae = MultiRateVAE(
            *tanh_networks(), input_shape=[64], beta_range=[0.005, 1.0], distortion="gaussian", lr=BETA_RATE, seed=seed
        )
        trainer(max_epochs=BETA_EPOCHS, limit_val_batches=0).fit(vae, DigitsDataModule(binarize=False, seed=seed))
        return vae.eval()
