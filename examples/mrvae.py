r"""
MR-VAE: every beta from one training run
========================================

A beta-VAE must be trained again for every :math:`\beta`. A multi-rate VAE (Bae et al., ICLR 2023, arXiv 2212.03905) is
trained once and then asked for any :math:`\beta` of a range. This script trains one on the digits that scikit-learn
ships, draws its rate-distortion curve, and then turns an *ordinary* VAE that is already trained into a multi-rate one.
"""

# %%
# Train
# -----
# Any encoder and decoder will do; they are gated in place. ``RateDistortionCallback`` measures the curve.

import logging

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch

from lightning_ext.callbacks import RateDistortionCallback
from lightning_ext.data import DigitsDataModule
from lightning_ext.metrics import RateDistortionCurve
from lightning_ext.modules import BetaVAE, MultiRateVAE
from lightning_ext.nn import MLPDecoder, MLPEncoder

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def networks():
    return MLPEncoder([64], [128, 128], latent_dim=8), MLPDecoder(8, [128, 128], [64])


def fit(model, epochs, *callbacks):
    trainer = pl.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=DigitsDataModule())


pl.seed_everything(0, verbose=False)
torch.set_num_threads(1)
model = MultiRateVAE(*networks(), input_shape=[64], beta_range=(0.01, 10.0), lr=5e-3, convert={"gate_heads": False})
curve = RateDistortionCallback(num_betas=20, save_csv=False)
fit(model, 120, curve)

# %%
# The curve
# ---------
# Twenty betas of one network, on held-out digits.

metric = RateDistortionCurve(curve.curve["beta"].tolist())
figure, _ = metric.plot(curve.curve)

# %%
# Use it
# ------
# Reconstruct at any beta, sample, ask for the beta that spends a given number of nats, or fold the gates away and
# deploy an ordinary network.

data = DigitsDataModule()
data.setup()
images = data.held_out_set.tensors[0][:10]
betas = (0.02, 0.3, 1.0, 3.0)
figure, axes = plt.subplots(len(betas) + 1, 1, figsize=(7, 3.6), layout="constrained")
with torch.no_grad():
    rows = [("data", images)] + [(rf"$\beta={beta:g}$", model.at_beta(beta)(images)) for beta in betas]
for axis, (label, row) in zip(axes, rows, strict=True):
    axis.imshow(row.reshape(10, 8, 8).permute(1, 0, 2).reshape(8, 80), cmap="gray_r", vmin=0, vmax=1, aspect="auto")
    axis.set_ylabel(label, rotation=0, ha="right", va="center")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)

beta = model.beta_for_rate(5.0, curve.curve)
plain = model.fold(beta)
print(f"beta = {beta:.2f} spends 5 nats; folded encoder: {type(plain['encoder']).__name__}")

# %%
# A trained VAE becomes multi-rate
# --------------------------------
# Gates start at exactly 1, so a converted network is the network it was; a short fine-tune spreads it over the range.

vae = BetaVAE(*networks(), input_shape=[64], beta=1.0, lr=5e-3)
fit(vae, 120)
before = RateDistortionCallback(num_betas=20, save_csv=False)
after = RateDistortionCallback(num_betas=20, save_csv=False)
tuned = MultiRateVAE(vae.encoder, vae.decoder, input_shape=[64], lr=5e-3, convert={"gate_heads": False})
measure = pl.Trainer(callbacks=[before], logger=False, enable_progress_bar=False, enable_model_summary=False)
measure.validate(tuned, datamodule=DigitsDataModule(), verbose=False)
fit(tuned, 30, after)

figure, axis = metric.plot(after.curve)
point = before.curve["rate"][0], before.curve["distortion"][0]
axis.scatter(*point, marker="*", s=160, color="tab:red", zorder=5, label="the VAE it was, at every beta")
axis.set_title("30 epochs of fine-tuning")
axis.legend(frameon=False)
plt.show()
