r"""
APO: a learning rate that finds itself
======================================

A learning rate is usually tuned by training several times. ``APOLearningRate`` (after Bae et al., NeurIPS 2022, arXiv
2203.00089) adapts it during the one training there is: after a step it asks whether a longer or shorter one would have
lowered the loss more without changing the network's outputs too far. This script attaches it to a classifier whose
learning rate starts anywhere, looks at what it does, and then lets it learn one rate per layer.
"""

# %%
# Five starts over five orders of magnitude
# -----------------------------------------
# The module and its optimizer stay as they are; the callback is the only new line.

import functools
import logging

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

from lightning_ext.callbacks import APOLearningRate
from lightning_ext.data import DigitsDataModule
from lightning_ext.modules import Classifier
from lightning_ext.nn import MLP

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
torch.set_num_threads(1)


class Record(pl.Callback):
    """Remembers loss and learning rate of every step."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: D102
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def train(lr, *callbacks, epochs=20):
    pl.seed_everything(0, verbose=False)
    model = Classifier(MLP([64, 64, 64, 10]), functools.partial(torch.optim.SGD, lr=lr, momentum=0.9))
    record = Record()
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=[record, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=100, binarize=False))
    return record, model


starts = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
runs = {lr: (train(lr)[0], train(lr, APOLearningRate())[0]) for lr in starts}

# %%
# The rates meet, and so do the losses. Without the callback only one start in five is any good.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for colour, (lr, (fixed, adapted)) in zip(plt.cm.viridis(torch.linspace(0, 0.85, 5)), runs.items(), strict=True):
    left.semilogy(adapted.rates, color=colour, label=f"{lr:g}")
    right.semilogy(adapted.losses, color=colour, lw=1)
    right.semilogy(fixed.losses, color=colour, ls=":", lw=1)
left.set(xlabel="step", ylabel="learning rate", title="APO, from five starts")
left.legend(title="start", frameon=False, ncols=2)
right.set(xlabel="step", ylabel="training loss in nats", title="with APO (lines), fixed (dots)")

# %%
# One learning rate per layer
# ---------------------------
# ``granularity="layer"`` gives each layer a factor of its own. ``lam_f="auto"`` chooses how cautious to be.

callback = APOLearningRate(lam_f="auto", granularity="layer")
record, model = train(1e-3, callback)
state = callback.state_dict()["optimizers"]["0"]
layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
for name, factor in zip(layers, state["multiplier"].tolist(), strict=True):
    print(f"{name}: learning rate {1e-3 * factor:.3g}")
print(f"loss {record.losses[-1]:.4f} nats, lambda_F {state['lam_f']:.3g}, {state['meta_count']} meta-steps")
plt.show()
