"""Correlated Gaussian pairs, and a quiet Trainer for them."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Trainer


def correlated(num, rho=0.9, dim=1, seed=0, dtype=torch.float32):
    """Pairs with -dim / 2 log(1 - rho^2) nats."""
    x, noise = torch.randn(2, num, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, rho * x + (1 - rho**2) ** 0.5 * noise


def loader(*tensors, batch_size=128, wrap=None):
    data = TensorDataset(*tensors)
    return DataLoader(data if wrap is None else wrap(data), batch_size, shuffle=False)


def trainer(**options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, enable_progress_bar=False, **(defaults | options))
