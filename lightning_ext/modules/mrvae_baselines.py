"""Single-rate VAEs that a multi-rate VAE is compared with; each gives one point of the rate-distortion plane."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext.functional.mrvae import free_bits_rate, gaussian_kl, sigma_vae_distortion
from lightning_ext.modules.mrvae_base import BaseVAE, Distortion, Objective, RateDistortion, log_terms

__all__ = ["GECOVAE", "BetaVAE", "FreeBitsVAE", "SigmaVAE"]


class BetaVAE(BaseVAE):
    r"""VAE with a fixed weight on the rate, :math:`D + \beta R`.

    Source: Higgins et al., *beta-VAE*, ICLR 2017. Attach :class:`lightning_ext.callbacks.KLSchedule` to anneal
    ``beta``, monotonically (Bowman et al. 2016) or cyclically (Fu et al. 2019).

    Args:
        encoder: see :class:`BaseVAE`.
        decoder: see :class:`BaseVAE`.
        input_shape: shape of one sample.
        beta: weight of the rate, at least 0. A plain attribute, which may be changed during training.
        distortion: see :class:`BaseVAE`.
        objective: ``"tcvae"`` makes it a beta-TCVAE.
        dataset_size: needed by ``"tcvae"``.
        lr: learning rate of Adam.
        warmup_fraction: part of the training over which the learning rate rises.
        seed: seed of the noise.

    Raises:
        ValueError: an argument is out of range or shapes do not fit.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        beta: float = 1.0,
        distortion: Distortion | Callable[[Tensor, Tensor], Tensor] = "bernoulli_logits",
        objective: Objective = "vae",
        dataset_size: int | None = None,
        lr: float = 1e-3,
        warmup_fraction: float = 0.05,
        seed: int | None = None,
    ) -> None:
        if not beta >= 0.0:
            raise ValueError(f"beta must be at least 0; got {beta}.")
        super().__init__(encoder, decoder, input_shape, distortion, objective, dataset_size, lr, warmup_fraction, seed)
        self.beta = beta
        self.check_networks()

    def loss(self, terms: RateDistortion) -> Tensor:
        """Mean of the per-sample losses at ``self.beta``."""
        return terms.loss(self.beta).mean()


class FreeBitsVAE(BaseVAE):
    r"""VAE whose latents cost nothing below ``free_bits`` nats each: :math:`D + \sum_j \max(\lambda, E_i KL_{ij})`.

    Source: Kingma et al., arXiv 1606.04934 (from memory).

    Args:
        encoder: see :class:`BaseVAE`.
        decoder: see :class:`BaseVAE`.
        input_shape: shape of one sample.
        free_bits: :math:`\lambda \ge 0`, nats per latent. The floor applies to the mean over the batch of each rank.
        distortion: see :class:`BaseVAE`.
        lr: learning rate of Adam.
        warmup_fraction: part of the training over which the learning rate rises.
        seed: seed of the noise.

    Raises:
        ValueError: an argument is out of range or shapes do not fit.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        free_bits: float = 0.1,
        distortion: Distortion | Callable[[Tensor, Tensor], Tensor] = "bernoulli_logits",
        lr: float = 1e-3,
        warmup_fraction: float = 0.05,
        seed: int | None = None,
    ) -> None:
        if not free_bits >= 0.0:
            raise ValueError(f"free_bits must be at least 0; got {free_bits}.")
        super().__init__(encoder, decoder, input_shape, distortion, "vae", None, lr, warmup_fraction, seed)
        self.free_bits = free_bits
        self.check_networks()

    def rate_distortion(self, batch: Any) -> RateDistortion:
        """Terms of the batch; the weighted part is the floored rate, equal for all samples of the batch."""
        x = self.get_input(batch)
        self._check_target(x)
        mu, logvar = self.encode(x)
        kl = gaussian_kl(mu, logvar)
        z = self.draw(mu, logvar)
        floored = free_bits_rate(kl, self.free_bits).expand(len(x))
        return RateDistortion(kl.sum(1), self._distortion(self.decode(z), x), mu, weighted=floored)

    def loss(self, terms: RateDistortion) -> Tensor:
        """Distortion plus the floored rate."""
        return terms.loss(1.0).mean()


class SigmaVAE(BaseVAE):
    r"""VAE with a Gaussian decoder whose variance is the optimal one for each batch; no weight to tune.

    Source: Rybkin, Daniilidis, Levine, arXiv 2006.13202 (from memory). Logged besides the usual: nothing; the last
    batch's variance is :attr:`variance`.

    Args:
        encoder: see :class:`BaseVAE`.
        decoder: returns the means of the pixels.
        input_shape: shape of one sample.
        lr: learning rate of Adam.
        warmup_fraction: part of the training over which the learning rate rises.
        seed: seed of the noise.

    Raises:
        ValueError: an argument is out of range or shapes do not fit.
    """

    variance: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        lr: float = 1e-3,
        warmup_fraction: float = 0.05,
        seed: int | None = None,
    ) -> None:
        super().__init__(encoder, decoder, input_shape, "gaussian", "vae", None, lr, warmup_fraction, seed)
        self.register_buffer("variance", torch.tensor(1.0))
        self.check_networks()

    def rate_distortion(self, batch: Any) -> RateDistortion:
        """Terms of the batch at its optimal variance; in training the variance is kept for later use."""
        x = self.get_input(batch)
        mu, logvar = self.encode(x)
        z = self.draw(mu, logvar)
        distortion, variance = sigma_vae_distortion(self.decode(z), x)
        if self.training:
            self.variance.copy_(variance.detach())
        return RateDistortion(gaussian_kl(mu, logvar).sum(1), distortion, mu)

    def loss(self, terms: RateDistortion) -> Tensor:
        """Negative ELBO."""
        return terms.loss(1.0).mean()


class GECOVAE(BaseVAE):
    r"""Smallest rate under a constraint on the distortion, :math:`\min R` subject to :math:`D \le \kappa`.

    The loss is :math:`R + \lambda (D - \kappa)`; after every training batch the multiplier moves as
    :math:`\lambda \leftarrow \lambda\, e^{\nu c}` with :math:`c` the moving average of :math:`(D - \kappa)/\kappa`,
    averaged over all ranks. Source: Rezende, Viola, *Taming VAEs*, arXiv 1810.00597 (from memory).

    Args:
        encoder: see :class:`BaseVAE`.
        decoder: see :class:`BaseVAE`.
        input_shape: shape of one sample.
        target_distortion: :math:`\kappa > 0`, nats per sample.
        multiplier_lr: :math:`\nu > 0`.
        smoothing: weight of the past in the moving average, in [0, 1).
        distortion: see :class:`BaseVAE`.
        lr: learning rate of Adam.
        warmup_fraction: part of the training over which the learning rate rises.
        seed: seed of the noise.

    Raises:
        ValueError: an argument is out of range or shapes do not fit.
    """

    multiplier: Tensor
    constraint: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        target_distortion: float = 20.0,
        multiplier_lr: float = 0.01,
        smoothing: float = 0.99,
        distortion: Distortion | Callable[[Tensor, Tensor], Tensor] = "bernoulli_logits",
        lr: float = 1e-3,
        warmup_fraction: float = 0.05,
        seed: int | None = None,
    ) -> None:
        if not target_distortion > 0.0:
            raise ValueError(f"target_distortion must be positive; got {target_distortion}.")
        if not (multiplier_lr > 0.0 and 0.0 <= smoothing < 1.0):
            raise ValueError(
                f"multiplier_lr must be positive and smoothing in [0, 1); got {multiplier_lr} and {smoothing}."
            )
        super().__init__(encoder, decoder, input_shape, distortion, "vae", None, lr, warmup_fraction, seed)
        self.target_distortion = target_distortion
        self.multiplier_lr, self.smoothing = multiplier_lr, smoothing
        self.register_buffer("multiplier", torch.tensor(1.0))
        self.register_buffer("constraint", torch.tensor(0.0))
        self.check_networks()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch; then the multiplier moves."""
        self.set_address("train", batch_idx)
        terms = self.rate_distortion(batch)
        loss = self.loss(terms)
        log_terms(self, "train", terms, loss)
        self._move_multiplier(terms.distortion.detach().mean())
        if self._logs_now:
            self.log("train/multiplier", self.multiplier)
        return loss

    def loss(self, terms: RateDistortion) -> Tensor:
        r""":math:`R + \lambda(D - \kappa)`, averaged over the batch."""
        # The multiplier is changed in place below, so the graph must hold a copy.
        return (terms.rate + self.multiplier.clone() * (terms.distortion - self.target_distortion)).mean()

    @torch.no_grad()
    def _move_multiplier(self, distortion: Tensor) -> None:
        if self._world_size > 1:
            distortion = self.trainer.strategy.reduce(distortion, reduce_op="mean")
        violation = distortion / self.target_distortion - 1.0
        self.constraint.lerp_(violation, 1.0 - self.smoothing)
        self.multiplier.mul_(torch.exp(self.multiplier_lr * self.constraint)).clamp_(1e-8, 1e8)
