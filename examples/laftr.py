r"""
Learn a second task, keep the first, store no data
==================================================

Fine-tune a network and it forgets. ``FunctionSpaceRegularizer`` (after LAFTR: Dhawan et al., ICML 2023, arXiv
2302.03519) adds a penalty to the loss of whatever LightningModule it is attached to: an estimate of how far the
*outputs* on earlier data have moved, from moments of the inputs that were kept when those data were still there.
"""

# %%
# Five tasks, one after the other
# -------------------------------
# The same digits, the pixels in another order for each task. Nothing of the training knows about tasks.

import functools
import logging

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

from lightning_ext.callbacks import FunctionSpaceRegularizer
from lightning_ext.data import ContinualDataModule
from lightning_ext.metrics import ContinualMetrics, FunctionSpaceDistance
from lightning_ext.modules import Classifier
from lightning_ext.nn import MLP, function_space_estimator

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
torch.set_num_threads(1)

TASKS, EPOCHS = 3, 5


def learn(callbacks):
    """Train on one task after the other, and test on all of them each time."""
    pl.seed_everything(0, verbose=False)
    data = ContinualDataModule.permuted(num_tasks=TASKS, batch_size=32)
    model = Classifier(MLP([64, 64, 64, 10]), functools.partial(torch.optim.Adam, lr=1e-3))
    accuracy = ContinualMetrics(num_tasks=TASKS)
    for task in range(TASKS):
        data.set_task(task)
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(model, data)
        with torch.no_grad():
            for other in range(TASKS):
                for images, labels in data.dataloader_of(other):
                    accuracy.update(model(images), labels, seen=task, task=other)
    return model, data, accuracy


# %%
# With the callback and without
# -----------------------------
# When a fit ends, the callback goes through that fit's data once and keeps moments. From the second fit on it adds the
# penalty.

regularizer = FunctionSpaceRegularizer("laftr", weight=10.0)
_, _, plain = learn([])
model, data, kept = learn([regularizer])
for name, accuracy in (("fine-tuning", plain), ("with the callback", kept)):
    found = accuracy.compute()
    print(f"{name:18s} accuracy {found['cl/avg_acc']:.3f}, backward transfer {found['cl/bwt']:+.3f}")
print(f"{regularizer.stats_bytes:,} bytes kept for {len(regularizer.tasks)} tasks")

# %%
# The accuracy on every task, after every task: columns that stay light are tasks that are not forgotten.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for axis, (name, accuracy) in zip(axes, (("fine-tuning", plain), ("with the callback", kept)), strict=True):
    accuracy.plot(ax=axis)
    axis.set_title(name)

# %%
# How good is the estimate?
# -------------------------
# An estimator can be used by itself, on any module, and held against the truth as long as there are data.

data.set_task(0)
batches = list(data.dataloader_of(0))
reference = [model(images).detach() for images, _ in batches]
estimators = {
    name: function_space_estimator(name).fit(model, batches)
    for name in ("laftr", "laftr-moments", "coreset", "kfac", "ewc")
}
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.03 * torch.randn_like(parameter))

truth = FunctionSpaceDistance("kl")
for (images, _), old in zip(batches, reference, strict=True):
    truth.update(model(images), old)
print(f"true distance {truth.compute():.4f} nats")
for name, estimator in estimators.items():
    print(f"{name:14s} {estimator.distance(model):.4f} nats, {estimator.nbytes:,} bytes")
