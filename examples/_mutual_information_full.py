"""Experiment F (``--full --data DIR``): VAEs and GANs of MNIST in the official configuration, for a GPU.

``DIR`` holds MNIST's four files as they are published, plain or as ``.gz``, there or in ``MNIST/raw``. Networks,
numbers of chains and samples, leapfrog steps and schedules are those of the official release
(huangsicong/ais_mi_estimation). Different here: the variance of a VAE's pixels is the best one of the last batch, no
learned scalar; the GANs, which are downloads there, are trained; one schedule serves both sides; steps are tuned
on other pairs and frozen.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ext._resources import UserError, load_script
from lightning_ext.data import MNISTDataModule
from lightning_ext.modules import SigmaVAE, measure_mutual_information
from lightning_ext.nn import GaussianDecoderModel, LatentModel, latent_model_from_vae
from lightning_ext.reproduce import Claim, Outcome

training: Any = load_script(Path(__file__).with_name("_mutual_information_training.py"))

WIDTH, PAIRS, BATCH = 1024, 128, 128
VAE_EPOCHS, GAN_EPOCHS = 300, 100
SAMPLES, CHUNK = (1, 1000, 1_000_000), 48
GAN_VARIANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Chains:
    """How many, how long, and along which schedule."""

    num_chains: int
    num_steps: int
    num_leapfrog: int
    delta: float


SHORT = {2: (2000, 20), 10: (2000, 20), 100: (1000, 30)}  # chains and leapfrog steps of 500 temperatures
SHORT_DELTA = {"VAE": {2: 7.0, 10: 6.0, 100: 3.0}, "GAN": {2: 5.0, 10: 3.0, 100: 3.0}}
LONG_DELTA = {"VAE": {2: 9.0, 10: 10.0, 100: 4.0}, "GAN": {2: 5.0, 10: 4.0, 100: 8.0}}
LONG_STEPS, LONG_CHAINS, LONG_LEAPFROG = 30_000, 48, 20
SHORT_STEPS = 500


def chains(kind: str, latents: int) -> dict[str, Chains]:
    """The release's two lengths."""
    number, leapfrog = SHORT[latents]
    return {
        "short": Chains(number, SHORT_STEPS, leapfrog, SHORT_DELTA[kind][latents]),
        "long": Chains(LONG_CHAINS, LONG_STEPS, LONG_LEAPFROG, LONG_DELTA[kind][latents]),
    }


def layers(sizes: Sequence[int], *last: nn.Module) -> nn.Sequential:
    """Linear layers with tanh between them."""
    found: list[nn.Module] = []
    for width, following in itertools.pairwise(sizes[:-1]):
        found += [nn.Linear(width, following), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *found, nn.Linear(*sizes[-2:]), *last)


def generator(latents: int) -> nn.Sequential:
    """Latents to pixels in (0, 1), flat."""
    return layers([latents, WIDTH, WIDTH, WIDTH, 784], nn.Sigmoid())


class GAN(pl.LightningModule):
    """Cross-entropy and two optimizers."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latents, self.generator = latents, generator(latents)
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(784, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, 1),
        )  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of each."""
        x, (for_generator, for_discriminator) = batch[0], self.optimizers()
        made = self.generator(torch.randn(len(x), self.latents, device=self.device))
        real, fake = self.discriminator(x), self.discriminator(made.detach())
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        for_generator.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(made)).mean())
        for_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for each."""
        return [
            torch.optim.Adam(part.parameters(), 2e-4, betas=(0.5, 0.999))
            for part in (self.generator, self.discriminator)
        ]


def _data(folder: Path, seed: int) -> MNISTDataModule:
    return MNISTDataModule(str(folder), BATCH, binarize=None, shape="flat", seed=seed)


@functools.cache
def generative(kind: str, latents: int, seed: int, folder: Path) -> LatentModel:
    """A trained model."""
    pl.seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"accelerator": "auto", "devices": 1, "logger": False, "enable_model_summary": False}
    with training.told(f"F, {kind} with {latents} latents, seed {seed}"), tempfile.TemporaryDirectory() as scratch:
        if kind == "GAN":
            gan = GAN(latents)
            pl.Trainer(
                max_epochs=GAN_EPOCHS, limit_val_batches=0, enable_checkpointing=False, **options
            ).fit(gan, _data(folder, seed))  # fmt: skip
            return GaussianDecoderModel(gan.generator, torch.tensor(GAN_VARIANCE).log(), latents)
        encoder = layers([784, WIDTH, WIDTH, WIDTH, 2 * latents])
        vae = SigmaVAE(encoder, generator(latents), input_shape=[784], lr=1e-4, warmup_fraction=0.0, seed=seed)
        vae.configure_optimizers = lambda: torch.optim.Adam(vae.parameters(), 1e-4)  # at a constant rate
        best = pl.callbacks.ModelCheckpoint(scratch, monitor="val/loss")
        trainer = pl.Trainer(max_epochs=VAE_EPOCHS, callbacks=[best], **options)
        trainer.fit(vae, _data(folder, seed))
        vae.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
        return latent_model_from_vae(vae.eval())


def measured(kind: str, latents: int, seed: int, folder: Path) -> dict[str, Tensor]:
    """Both bounds at every size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, found = generative(kind, latents, seed, folder).to(device).eval(), {}
    for samples in SAMPLES:
        values = measure_mutual_information(
            model, bounds=["iwae"], num_points=PAIRS, num_samples=samples, seed=seed
        ).values
        found |= {f"IWAE, K = {samples:,}{side}": values[f"iwae{side}"] for side in ("/lower", "/upper")}
    for name, plan in chains(kind, latents).items():
        with training.told(f"F, {kind} with {latents} latents, {name} chains, seed {seed}"):
            values = measure_mutual_information(
                model, bounds=["ais"], num_points=PAIRS, chunk_size=CHUNK, seed=seed, **dataclasses.asdict(plan)
            ).values
        found |= {f"AIS, {name}{side}": values[f"ais{side}"] for side in ("/lower", "/upper")}
    return found


def claims(seeds: Sequence[int], data_dir: Path | None) -> Iterator[Claim]:
    """One row for each model."""
    if data_dir is None:
        raise UserError("--full needs --data DIR, the folder of MNIST's four files.")
    for kind in ("VAE", "GAN"):
        for latents in (2, 10, 100):
            yield Claim(
                f"F MNIST {kind} with {latents} latents: gap of the long chains against IWAE with K = {SAMPLES[-1]:,}",
                "annealed bounds are tight where importance weighting is not; no figure at hand",
                "at most half, on every seed", functools.partial(_compared, kind, latents, seeds, data_dir),
            )  # fmt: skip


def _compared(kind: str, latents: int, seeds: Sequence[int], folder: Path) -> Outcome:
    runs = [measured(kind, latents, seed, folder) for seed in seeds]
    names = [name.removesuffix("/lower") for name in runs[0] if name.endswith("/lower")]

    def mean(key: str) -> float:
        return float(torch.stack([run[key] for run in runs]).mean())

    told = ", ".join(f"[{mean(f'{name}/lower'):.2f}, {mean(f'{name}/upper'):.2f}] {name}" for name in names)
    most = f"IWAE, K = {SAMPLES[-1]:,}"
    gaps = [[run[f"{name}/upper"] - run[f"{name}/lower"] for name in ("AIS, long", most)] for run in runs]
    return Outcome(told, all(bool(ours <= 0.5 * theirs) for ours, theirs in gaps), seeds=seeds)
