"""Tiny builds of the library's components: networks of a few units, six pixels, three betas."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_ext import nn, optim
from lightning_ext._lightning import LightningModule
from lightning_ext.functional.mrvae import gaussian_kl
from lightning_ext.modules import BetaVAE, Classifier, MultiRateMixin, MultiRateVAE, RateDistortion
from tests.conformance import toys

PIXELS = 6


def pixels() -> TensorDataset:
    """Twelve images of six pixels in [0, 1], with labels."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(12, PIXELS, generator=generator), torch.arange(12) % 3)


def networks(extra: int = 0) -> tuple[nn.MLPEncoder, nn.MLPDecoder]:
    return nn.MLPEncoder([PIXELS + extra], [5], 2), nn.MLPDecoder(2 + extra, [5], [PIXELS])


def single(kind: type, **kwargs: Any) -> LightningModule:
    return kind(*networks(), input_shape=[PIXELS], lr=0.01, **kwargs)


def beta_vae() -> BetaVAE:
    return single(BetaVAE, beta=0.5)


FEW_PAIRS = {"num_train": 12, "num_val": 6, "batch_size": 4, "seed": 1}


class Pairs:
    """A model with pairs to simulate."""

    def simulate(self, num: int, generator: Any) -> tuple[Any, Any]:
        x = torch.randn(num, 6, generator=generator)
        return x, x[:, :2]


class ReadsX(toys.Net):
    """Regression on the data of a pair."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch[0]).square().mean()
        self.log("train/loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(batch[0]).square().mean(), batch_size=len(batch[0]), sync_dist=True)

    test_step = validation_step


SHORT_CHAINS = {"num_points": 4, "num_samples": 5, "num_chains": 2, "num_steps": 3, "num_leapfrog": 2}


def decoder_model(kind: Any, *chosen: Any) -> Any:
    """A density of six numbers given two latents."""
    return kind(nn.MLPDecoder(2, [5], [6]), *chosen, latent_dim=2)


def multi_rate(**kwargs: Any) -> MultiRateVAE:
    return MultiRateVAE(*networks(), input_shape=[PIXELS], lr=0.01, **kwargs)


def multi_rate_concat() -> MultiRateVAE:
    return MultiRateVAE(*networks(extra=1), input_shape=[PIXELS], lr=0.01, conditioning="concat")


def multi_rate_ladder() -> MultiRateVAE:
    ladder = nn.LadderEncoder([PIXELS], 5), nn.LadderDecoder(5, [2, 3], [PIXELS])
    return MultiRateVAE(*ladder, input_shape=[PIXELS], lr=0.01, objective="hierarchical")


def digits_vae() -> BetaVAE:
    return BetaVAE(nn.MLPEncoder([64], [5], 2), nn.MLPDecoder(2, [5], [64]), input_shape=[64], lr=0.01)


class OwnMultiRate(MultiRateMixin):
    """A user's own VAE with the mixin: squared error, own optimiser, own prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = networks()
        self.make_multirate(self.encoder, self.decoder, input_shape=[PIXELS])

    def rate_distortion(self, batch: Any) -> RateDistortion:
        x = batch[0]
        mu, logvar = self.encoder(x)
        error = self.decoder(mu + self.noise(mu) * torch.exp(logvar / 2)) - x
        return RateDistortion(gaussian_kl(mu, logvar).sum(1), error.square().sum(1) / 2, mu)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.at(1.0):
            return self.decoder(self.encoder(batch[0])[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def without_noise(module: LightningModule) -> None:
    """Decode the posterior mean, at one beta: what is left is the same however the samples are spread over ranks."""
    module.noise = torch.zeros_like  # type: ignore[assignment]
    module.sample_betas = lambda num, stage, batch_idx: torch.full((num,), 0.5)  # type: ignore[assignment]


def curve_batches() -> list[tuple[Tensor, ...]]:
    """Three uneven batches in which every beta occurs, one of them at a single beta."""
    generator = torch.Generator().manual_seed(2)
    sizes_and_index = [(6, torch.tensor([0, 1, 2, 0, 1, 2])), (3, torch.tensor([2, 1, 0])), (4, torch.tensor([1] * 4))]
    return [
        (
            index,
            torch.rand(n, generator=generator) + 3 - index,
            torch.rand(n, generator=generator) + index,
            torch.randn(n, 2, generator=generator),
        )
        for n, index in sizes_and_index
    ]


def curve_reference(batches: Any) -> dict[str, Tensor]:
    """Means per beta from the concatenated data, by masks."""
    index, rate, distortion, _ = (torch.cat(column) for column in zip(*batches, strict=True))

    def mean(values: Tensor) -> Tensor:
        return torch.stack([values[index == k].double().mean() for k in range(3)])

    return {
        "rate": mean(rate),
        "distortion": mean(distortion),
        "elbo": -mean(rate) - mean(distortion),
        "count": torch.bincount(index, minlength=3),
    }


def factor_batches() -> list[tuple[Tensor, Tensor]]:
    """Latents that follow two independent factors, in uneven batches."""
    generator = torch.Generator().manual_seed(3)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        factors = torch.stack([torch.arange(n) % 2, torch.arange(n) // 2 % 3], dim=1)
        return factors.float() + 0.1 * torch.randn(n, 2, generator=generator), factors

    return [batch(n) for n in (12, 7, 18)]


def _context() -> nn.RateContext:
    return nn.RateContext(nn.LogUniformBeta(0.1, 2.0))


def _posterior_gate() -> nn.PosteriorGate:
    context = _context()
    return nn.PosteriorGate(nn.RateGate(2, context, -1), nn.LogVarianceGate(2, context))


def _gated_film() -> nn.GatedFiLM:
    context = _context()
    return nn.GatedFiLM(nn.RateGate(4, context, -1), nn.RateFiLM(4, context, -1, hidden=3, init="paper"))


CONDITIONERS: dict[str, Callable[[], nn.RateConditioner]] = {
    "RateGate": lambda: nn.RateGate(4, _context(), -1, init="paper"),
    "RateFiLM": lambda: nn.RateFiLM(4, _context(), -1, hidden=3, init="paper"),
    "LogVarianceGate": lambda: nn.LogVarianceGate(4, _context(), init="paper"),
    "PosteriorGate": _posterior_gate,
    "GatedFiLM": _gated_film,
}


def at_two_betas(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A gate speaks at the beta of its context only."""
    with module.context.at(0.2):
        low = module(*inputs)
    with module.context.at(1.5):
        return low, module(*inputs)


class Unscheduled(toys.Plain):
    """A classifier without BatchNorm and without a scheduler: two processes make the steps of one."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Preconditioned(toys.Plain):
    """The same with the structured preconditioner."""

    def configure_optimizers(self) -> Any:
        return optim.APOPreconditioner(self.parameters(), lr=0.1, every_n_steps=2)


def cross_entropy(module: Any, batch: Any) -> Tensor:
    """The loss of a look-ahead under manual optimisation."""
    return F.cross_entropy(module(batch[0]), batch[1])


def small_classifier() -> Classifier:
    return Classifier(nn.MLP([PIXELS, 5, 3]))
