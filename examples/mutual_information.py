r"""
How many nats do the latents carry?
===================================

A decoder makes images of latents. How much do the images tell about them? Estimates from samples alone stop at the
logarithm of their number. Annealed importance sampling (Brekelmans et al., ICLR 2022, arXiv 2303.06992) bounds the
information of a generative model from **both** sides, and the gap says how far to trust it.
"""

# %%
# Attach the callback
# -------------------
# Any LightningModule with a decoder will do; this one was not written for it. ``adapter`` says what its likelihood is.

import functools
import logging
import math

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_ext.callbacks import MutualInformationCallback
from lightning_ext.data import CorrelatedGaussianDataModule, DigitsDataModule
from lightning_ext.modules import CriticModule, MINEAISModule, measure_implicit_bound, measure_mutual_information
from lightning_ext.nn import GaussianDecoderModel, QuadraticCritic

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
torch.set_num_threads(1)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class VAE(pl.LightningModule):
    """Gaussian pixels with one variance that is learned."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 20))
        self.decoder = nn.Sequential(nn.Linear(10, 128), nn.Tanh(), nn.Linear(128, 64))
        self.log_var = nn.Parameter(torch.tensor(-3.0))

    def training_step(self, batch, batch_idx):
        """The negative evidence bound."""
        x, _ = batch
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        squares = (self.decoder(z) - x).square().sum(1)
        distortion = 0.5 * (squares * (-self.log_var).exp() + 64 * self.log_var)
        rate = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        return (distortion + rate).mean()

    def validation_step(self, batch, batch_idx):
        """Nothing: the callback measures when the epoch ends."""

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


measure = MutualInformationCallback(
    adapter=lambda module: GaussianDecoderModel(module.decoder, module.log_var, latent_dim=10),
    num_points=32, num_samples=1000, num_chains=8, num_steps=50,
)  # fmt: skip
pl.seed_everything(0, verbose=False)
vae = VAE()
trainer = pl.Trainer(max_epochs=30, check_val_every_n_epoch=30, callbacks=[measure], **QUIET)
trainer.fit(vae, DigitsDataModule(binarize=False))
for bound in ("iwae", "ais"):
    lower, upper = (measure.result[f"mutual_information/{bound}/{side}"] for side in ("lower", "upper"))
    print(f"{bound:5s} {lower:5.1f} to {upper:5.1f} nats")

# %%
# Importance weighting of a thousand samples cannot certify more than log 1000 = 6.9 nats. More temperatures make the
# annealed bounds tighter; ``measure_mutual_information`` is the callback without a Trainer.

model = GaussianDecoderModel(vae.decoder, vae.log_var, latent_dim=10).eval()
longer = measure_mutual_information(model, bounds=["ais"], num_points=32, num_chains=8, num_steps=200)
print(f"200   {longer.values['ais/lower']:5.1f} to {longer.values['ais/upper']:5.1f} nats")
figure, axes = plt.subplots(figsize=(6.4, 2.2), layout="constrained")
measure.measurement.plot(ax=axes)

# %%
# Only samples, and a known p(z)
# ------------------------------
# Where there is no likelihood, a critic can be trained on pairs. Five dimensions of correlation 0.95 share 5.8 nats.

data = CorrelatedGaussianDataModule(dim=5, rho=0.95, num_train=64_000)
pl.seed_everything(0, verbose=False)
contrastive = CriticModule(QuadraticCritic(5, 5), "infonce", optimizer=functools.partial(torch.optim.Adam, lr=0.03))
energy = MINEAISModule(QuadraticCritic(5, 5), optimizer=functools.partial(torch.optim.Adam, lr=0.1), num_steps=100)
for module in (contrastive, energy):
    short = pl.Trainer(max_epochs=1, limit_val_batches=0, gradient_clip_val=10.0, **QUIET)
    short.fit(module, data)
    [found] = short.test(module, data, verbose=False)
    print({name.removeprefix("mutual_information/"): round(value, 2) for name, value in found.items()})
print(f"truth {data.mutual_information:.2f}, log of a batch {math.log(128):.2f} nats")

# %%
# The same critic that InfoNCE has trained certifies more, once its posterior is annealed.

x, z = data.draw(256, torch.Generator().manual_seed(0))
certified = measure_implicit_bound(contrastive.critic, x, z, num_steps=50)
print(f"InfoNCE's critic, certified: {certified.values['lower']:.2f} nats")
