"""Correlated Gaussian pairs, and a quiet Trainer for them."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Callback, Trainer
from lightning_ext.testing import ddp_trainer_kwargs


def correlated(num, rho=0.9, dim=1, seed=0, dtype=torch.float32):
    """Pairs with -dim / 2 log(1 - rho^2) nats."""
    x, noise = torch.randn(2, num, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, rho * x + (1 - rho**2) ** 0.5 * noise


def loader(*tensors, batch_size=128, wrap=None):
    data = TensorDataset(*tensors)
    return DataLoader(data if wrap is None else wrap(data), batch_size, shuffle=False)


def trainer(**options):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return Trainer(**(defaults | options))


class _Looks(Callback):
    def __init__(self, folder, look):
        self.folder, self.look = folder, look

    def on_train_end(self, trainer, pl_module):
        torch.save(self.look(pl_module), self.folder / f"{trainer.global_rank}.pt")


def on_two_ranks(module, pairs, folder, look):
    """What ``look(module)`` gives on each of two ranks after an epoch."""
    trainer(**ddp_trainer_kwargs(), callbacks=[_Looks(folder, look)]).fit(module, pairs)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
