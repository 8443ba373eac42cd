"""The shell shared by all VAEs here: encoding, decoding, noise, objectives, optimizer and logging."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext._lightning import pl
from lightning_ext.functional.counter_rng import seeded_generator
from lightning_ext.functional.mrvae import (
    at_least_float32,
    bernoulli_distortion,
    gaussian_distortion,
    gaussian_kl,
    squared_error_distortion,
    total_correlation_terms,
)
from lightning_ext.modules.mrvae_noise import AddressedNoise
from lightning_ext.nn import dry_run, posterior_parameters, reconstruction_parameters

__all__ = ["BaseVAE", "RateDistortion"]

Distortion = Literal["bernoulli_logits", "bernoulli", "gaussian", "sse"]
Objective = Literal["vae", "tcvae", "hierarchical"]


@dataclasses.dataclass
class RateDistortion:
    r"""Per-sample terms of :math:`L_\beta = A + \beta B`.

    Args:
        rate: :math:`R_i`, ``(B,)`` nats.
        distortion: :math:`D_i`, ``(B,)`` nats (for ``"sse"``: squared error).
        mu: posterior means ``(B, k)`` where there are any; used for active units.
        weighted: :math:`B_i` where it is not the rate (total correlation in a beta-TCVAE).
        fixed: :math:`A_i` where it is not the distortion.
    """

    rate: Tensor
    distortion: Tensor
    mu: Tensor | None = None
    weighted: Tensor | None = None
    fixed: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rate.dim() != 1:
            raise ValueError(
                f"rate must hold one number per sample, shape (B,); got {tuple(self.rate.shape)}. Sum over everything "
                "but the batch, and leave the average over the batch to the module."
            )
        terms = {"rate": self.rate, "distortion": self.distortion, "weighted": self.weighted, "fixed": self.fixed}
        for name, term in terms.items():
            if term is not None and (term.dim() != 1 or len(term) != len(self.rate)):
                raise ValueError(
                    f"{name} must hold one number per sample, shape ({len(self.rate)},); got {tuple(term.shape)}. Sum "
                    "over everything but the batch."
                )

    def loss(self, beta: float | Tensor) -> Tensor:
        """Per-sample loss ``(B,)``: the fixed part plus beta times the weighted part."""
        fixed = self.distortion if self.fixed is None else self.fixed
        weighted = self.rate if self.weighted is None else self.weighted
        return fixed + beta * weighted


def log_terms(module: AddressedNoise, stage: str, terms: RateDistortion, loss: Tensor) -> None:
    """Log loss, mean rate and mean distortion of a batch; in training only where Lightning passes them on."""
    if stage == "train" and not module._logs_now:
        return
    values = {"loss": loss, "rate": terms.rate.mean(), "distortion": terms.distortion.mean()}
    module.log_dict(
        {f"{stage}/{name}": value.detach() for name, value in values.items()},
        batch_size=len(terms.rate),
        sync_dist=stage != "train",
    )


class BaseVAE(AddressedNoise):
    r"""A VAE from any encoder and decoder; subclasses say how rate and distortion make a loss.

    Args:
        encoder: returns ``(mu, logvar)``, one tensor ``(B, 2 k)`` or a pythae output. With
            ``objective="hierarchical"``: returns features, whatever the decoder wants.
        decoder: takes ``z`` ``(B, k)`` and returns reconstruction parameters or a pythae output. With
            ``objective="hierarchical"``: ``decoder(features, noise) -> (reconstruction, [kl_1, ...])`` and
            ``decoder.sample(num, noise)``, see :class:`lightning_ext.nn.LadderDecoder`.
        input_shape: shape of one sample, without the batch: the networks are run once on zeros of this shape to find
            the number of latents and to check that the reconstruction fits.
        distortion: ``"bernoulli_logits"`` (decoder returns logits), ``"bernoulli"`` (probabilities), ``"gaussian"``
            (half the squared error, unit variance), ``"sse"`` (squared error), or a callable
            ``(reconstruction, x) -> (B,)`` that **sums** over pixels.
        objective: ``"vae"``, ``"tcvae"`` (beta weights the total correlation only) or ``"hierarchical"``.
        dataset_size: size of the training set; needed by ``"tcvae"``.
        lr: learning rate of Adam, positive.
        warmup_fraction: part of the training over which the learning rate rises linearly, per step, before it falls to
            zero along a cosine; in [0, 1).
        seed: seed of the noise (and of the betas of a multi-rate VAE). ``None`` takes the seed of the program
            (``seed_everything``). The noise is addressed by (seed, epoch, batch, rank): ranks draw different noise, a
            resumed run draws what the uninterrupted one would, and the global generator is not touched.

    Raises:
        ValueError: an argument is out of range, the encoder's output does not split, or shapes do not fit.

    Logged: ``{stage}/loss``, ``{stage}/rate``, ``{stage}/distortion`` for train, val and test, in nats. Training values
    are those of single batches, at every ``log_every_n_steps``-th step and at the end of an epoch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        distortion: Distortion | Callable[[Tensor, Tensor], Tensor] = "bernoulli_logits",
        objective: Objective = "vae",
        dataset_size: int | None = None,
        lr: float = 1e-3,
        warmup_fraction: float = 0.05,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(distortion, objective, dataset_size, lr, warmup_fraction)
        ignored = ["encoder", "decoder"] + ([] if isinstance(distortion, str) else ["distortion"])
        self.save_hyperparameters(ignore=ignored)
        self.encoder, self.decoder = encoder, decoder
        self.input_shape = tuple(input_shape)
        self.distortion = distortion
        self.objective: Objective = objective
        self.dataset_size = dataset_size
        self.lr, self.warmup_fraction = lr, warmup_fraction
        self._seed, self._seed_was_given = seed, seed is not None
        self.latent_dim: int | None = None

    # -- what a subclass may override -------------------------------------------------------------------------------

    def get_input(self, batch: Any) -> Tensor:
        """The data tensor of a batch: the batch itself or its first element; override for other batches.

        Raises:
            TypeError: the batch is neither a tensor nor a tuple or list that begins with one.
        """
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(
                f"a batch of type {type(batch).__name__} has no obvious data tensor: override get_input(batch) in a "
                f"subclass of {type(self).__name__}."
            )
        return x

    def loss(self, terms: RateDistortion) -> Tensor:
        """Scalar training loss from the per-sample terms."""
        raise NotImplementedError(f"{type(self).__name__} must implement loss(terms).")

    def configure_optimizers(self) -> Any:
        """Adam with a linear warm-up and a cosine decay per step; override for anything else.

        The schedule learns its length in ``on_train_start``: a subclass that overrides that hook calls ``super``.
        """
        # The fused kernel unscales gradients by itself, which Lightning refuses to combine with clipping in fp16.
        fused = self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(self.warmup_fraction))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Tell the schedule how long the training is.

        Not in ``configure_optimizers``: asking for the number of steps there sets the loaders up before a checkpoint is
        restored, and a loader with a state would then begin its epoch anew.
        """
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                for schedule in scheduler.lr_lambdas:
                    if isinstance(schedule, WarmupCosine):
                        schedule.begin(scheduler, float(self.trainer.estimated_stepping_batches))

    # -- the model --------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and log variances, each ``(B, k)`` in float32 or wider."""
        mu, logvar = posterior_parameters(self.encoder(x))
        return at_least_float32(mu), at_least_float32(logvar)

    def draw(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """One sample of each posterior, ``(B, k)``, differentiable in its parameters."""
        return mu + torch.exp(0.5 * logvar) * self.noise(mu)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction parameters ``(B, *input_shape)``: logits, probabilities or means."""
        return reconstruction_parameters(self.decoder(z.to(self.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct in data space from the posterior mean, ``(B, *input_shape)``."""
        if self.objective == "hierarchical":
            return self._to_data(self._hierarchical(x)[0])
        return self._to_data(self.decode(self.encode(x)[0]))

    def sample(self, num: int) -> Tensor:
        """Decode ``num`` draws from the prior, in data space, ``(num, *input_shape)``."""
        if self.objective == "hierarchical":
            sampler: Any = self.decoder
            return self._to_data(sampler.sample(num, self.noise))
        return self._to_data(self.decode(self.noise(torch.empty(num, self._latents(), device=self.device))))

    def rate_distortion(self, batch: Any) -> RateDistortion:
        """Rate and distortion of each sample of a batch, with one posterior sample each.

        Args:
            batch: what the dataloader gives; see :meth:`get_input`.

        Returns:
            The terms in nats. One forward pass.

        Raises:
            ValueError: Bernoulli targets outside [0, 1], or a distortion that is not one number per sample.
        """
        x = self.get_input(batch)
        self._check_target(x)
        if self.objective == "hierarchical":
            reconstruction, groups = self._hierarchical(x)
            rate = torch.stack([at_least_float32(kl) for kl in groups]).sum(0)
            return RateDistortion(rate, self._distortion(reconstruction, x))
        mu, logvar = self.encode(x)
        z = self.draw(mu, logvar)
        terms = RateDistortion(gaussian_kl(mu, logvar).sum(1), self._distortion(self.decode(z), x), mu)
        if self.objective == "tcvae":
            assert self.dataset_size is not None  # the constructor demands it
            information, terms.weighted, dimension_wise = total_correlation_terms(z, mu, logvar, self.dataset_size)
            terms.fixed = terms.distortion + information + dimension_wise
        return terms

    # -- Lightning hooks --------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return self._step("train", batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of one batch; its noise is the same in every epoch."""
        self._step("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of one batch."""
        self._step("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reconstructions in data space."""
        return self(self.get_input(batch))  # type: ignore[no-any-return]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        self.set_address(stage, batch_idx)
        terms = self.rate_distortion(batch)
        loss = self.loss(terms)
        log_terms(self, stage, terms, loss)
        return loss

    def _latents(self) -> int:
        if self.latent_dim is None:
            raise RuntimeError("a hierarchical VAE has no single latent vector.")
        return self.latent_dim

    def _hierarchical(self, x: Tensor, noise: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        reconstruction, groups = self.decoder(self.encoder(x), noise or self.noise)
        return reconstruction_parameters(reconstruction), groups

    def _distortion(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        if callable(self.distortion):
            values = self.distortion(reconstruction, x)
            if values.shape != (len(x),):
                raise ValueError(
                    f"distortion must return one number per sample, shape ({len(x)},); got {tuple(values.shape)}."
                )
            return values
        if self.distortion == "gaussian":
            return gaussian_distortion(reconstruction, x)
        if self.distortion == "sse":
            return squared_error_distortion(reconstruction, x)
        return bernoulli_distortion(reconstruction, x, logits=self.distortion == "bernoulli_logits")

    def _to_data(self, reconstruction: Tensor) -> Tensor:
        return torch.sigmoid(reconstruction) if self.distortion == "bernoulli_logits" else reconstruction

    def _check_target(self, x: Tensor) -> None:
        if self.distortion not in ("bernoulli_logits", "bernoulli") or (x.is_cuda and self._address[2]):
            return  # on a GPU the first batch of every epoch must do: looking at each would stall it
        low, high = (float(v) for v in torch.aminmax(x))
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"distortion={self.distortion!r} needs data in [0, 1]; this batch spans [{low:g}, {high:g}]. Rescale "
                "the data, or use distortion='gaussian'."
            )

    @torch.no_grad()
    def check_networks(self) -> None:
        """Run both networks once on zeros, find the number of latents and check shapes; call it last in ``__init__``.

        Raises:
            ValueError: the encoder's output does not split or the reconstruction does not have ``input_shape``.
        """
        x = next(self.parameters()).new_zeros(2, *self.input_shape)
        with dry_run(self):
            if self.objective == "hierarchical":
                reconstruction = self._hierarchical(x, torch.zeros_like)[0]
            else:
                mu, _ = self.encode(x)
                if mu.dim() != 2:
                    raise ValueError(f"the latent code must have shape (B, k); got {tuple(mu.shape)}: flatten it.")
                reconstruction, self.latent_dim = self.decode(mu), mu.shape[1]
        if reconstruction.shape != x.shape and isinstance(self.distortion, str):
            raise ValueError(
                f"the decoder returned shape {tuple(reconstruction.shape[1:])} for input_shape={self.input_shape}; the "
                "two must be equal."
            )
        if reconstruction.shape == x.shape:
            self._check_mean_reduction()
        self._check_logits()

    def _check_logits(self) -> None:
        if self.distortion != "bernoulli_logits" or self.latent_dim is None:
            return
        like = next(self.parameters())
        far = 100.0 * torch.randn(16, self.latent_dim, generator=seeded_generator(0))
        low, high = torch.aminmax(self.decode(far.to(like)))
        if 0.0 <= float(low) < float(high) <= 1.0:
            pl.utilities.rank_zero_warn(
                "the decoder's outputs stay in [0, 1], so they look like probabilities: take off its sigmoid, or use "
                "distortion='bernoulli'."
            )

    def _check_mean_reduction(self) -> None:
        if not callable(self.distortion) or math.prod(self.input_shape) < 16:
            return
        ones = torch.ones(1, *self.input_shape)
        # An error of 1/2 in every pixel costs a sum at least 1/8 per pixel, and a mean less than one in all.
        if 0.0 < float(self.distortion(0.5 * ones, ones).sum()) <= 1.001:
            pl.utilities.rank_zero_warn(
                "distortion seems to average over pixels: the rate is then overweighted by their number and the "
                "posterior collapses. Sum over pixels."
            )


class WarmupCosine:
    """Factor on the learning rate: a line up, then a cosine to zero; without a known end, a constant."""

    def __init__(self, warmup_fraction: float) -> None:
        self.warmup_fraction = warmup_fraction
        self.total: float | None = None

    def begin(self, scheduler: torch.optim.lr_scheduler.LambdaLR, total: float) -> None:
        """Learn the number of steps of this run, which may go on for longer than the one that was resumed."""
        self.total = total
        rates = [base * self(scheduler.last_epoch) for base in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def __call__(self, step: int) -> float:
        if self.total is None or not math.isfinite(self.total):
            return 1.0
        warmup = self.warmup_fraction * self.total
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, self.total - warmup))))


def _check_arguments(
    distortion: object, objective: str, dataset_size: int | None, lr: float, warmup_fraction: float
) -> None:
    known = ("bernoulli_logits", "bernoulli", "gaussian", "sse")
    if not callable(distortion) and distortion not in known:
        raise ValueError(f"distortion must be one of {', '.join(known)} or a callable; got {distortion!r}.")
    if objective not in ("vae", "tcvae", "hierarchical"):
        raise ValueError(f"objective must be 'vae', 'tcvae' or 'hierarchical'; got {objective!r}.")
    if objective == "tcvae" and (dataset_size is None or dataset_size < 1):
        raise ValueError(f"objective='tcvae' needs dataset_size, the size of the training set; got {dataset_size}.")
    if not lr > 0.0:
        raise ValueError(f"lr must be positive; got {lr}.")
    if not 0.0 <= warmup_fraction < 1.0:
        raise ValueError(f"warmup_fraction must be in [0, 1); got {warmup_fraction}.")
