"""Small modules, data and a recorder for the tests of the learning-rate callbacks."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ext._lightning import Callback, LightningModule, Trainer

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
         "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1}  # fmt: skip
EVERY_STEP = {"every_n_steps": 1, "warmup_steps": 0}
BESIDE = {"fsd_fraction": 1.0, "divergence": "squared_error"}


class Recorder(Callback):
    """Writes down what every batch did: rates, weights before and after, gradients as the optimizer used them."""

    def __init__(self):
        self.rates, self.before, self.after, self.grads, self.losses, self.logged = ([] for _ in range(6))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append([p.detach().clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append([float(g["lr"]) for o in trainer.optimizers for g in o.param_groups])
        self.after.append([p.detach().clone() for p in pl_module.parameters()])
        self.grads.append([None if p.grad is None else p.grad.clone() for p in pl_module.parameters()])
        self.losses.append(outputs["loss"].item() if outputs else None)
        self.logged.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("apo/")})


def fit(module, data, *callbacks, **kwargs):
    """Train; the trainer and a recorder that stands behind the callbacks."""
    recorder = Recorder()
    trainer = Trainer(callbacks=[*callbacks, recorder], **{**QUIET, **kwargs})
    trainer.fit(module, data)
    return trainer, recorder


def as_they_are(*batches):
    """A loader of ready-made batches."""
    return DataLoader(list(batches), batch_size=None)


def regression_batches(n, rows=12, width=4, seed=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (rows,))
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes) for _ in range(n)]


class Regression(LightningModule):
    """Half the mean squared error of a linear map in float64; a third part of the batch may weigh the loss."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), start=(0.5, -1.0, 2.0, 0.1)):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.optimizer = optimizer

    def forward(self, x):
        return (x @ self.weight)[:, None]

    def training_step(self, batch, batch_idx):
        return loss_of(self, batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def loss_of(module, batch):
    share = batch[2] if len(batch) > 2 else 1.0
    return share * 0.5 * (module(batch[0])[:, 0] - batch[1]).square().mean()


def slope(batch, other, after, moved, lam_f=1.0, lam_w=0.1):
    """The derivative of the proximal objective of :class:`Regression` by hand."""
    x, y = batch[:2]
    v = x.T @ (x @ after - y) / len(x) + lam_w * moved
    if other is not None:
        v = v + lam_f * other[0].T @ (other[0] @ moved) / len(other[0])
    return (v @ moved).item()


def rows(n=24, width=6, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return TensorDataset(torch.randn(n, width, generator=generator) + labels[:, None], labels)


def loader(n=24, batch_size=6, **kwargs):
    return DataLoader(rows(n, **kwargs), batch_size)


class Classifier(LightningModule):
    """Two layers and cross-entropy; the optimizer is given as a function of the parameters or the module."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), dropout=0.0, norm=False):
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.optimizer = optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Manual(Classifier):
    """The same under manual optimisation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def cross_entropy(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])
