r"""Multi-Rate VAE: one network, trained once, for every :math:`\beta` of a range.

Source: Bae, Zhang, Ruan, Wang, Hasegawa, Ba, Grosse, *Multi-Rate VAE: Train Once, Get the Full Rate-Distortion Curve*,
ICLR 2023, arXiv 2212.03905.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_ext._lightning import pl, submodule
from lightning_ext.functional.mrvae_curve import beta_for_rate
from lightning_ext.modules.mrvae_base import BaseVAE, Distortion, Objective, RateDistortion, log_terms
from lightning_ext.modules.mrvae_noise import AddressedNoise
from lightning_ext.nn import LogUniformBeta, RateContext, convert_to_multirate, fold

__all__ = ["AtBeta", "MultiRateMixin", "MultiRateVAE"]

BetaSampling = Literal["stratified", "sample", "batch"]
Conditioning = Literal["gate", "film", "concat", "none"]

_BETA_STREAM = 0x6265_7461  # keeps the betas' stream apart from the noise at the same address


class MultiRateMixin(AddressedNoise):
    r"""Makes a LightningModule of yours multi-rate: betas are drawn, set in the gates and weight the rate for you.

    Put it before your class, call :meth:`make_multirate` at the end of ``__init__`` and implement
    ``rate_distortion(batch)``, which returns a :class:`RateDistortion` at the betas set in the gates; ``training_step``
    and ``validation_step`` come from here. Draw noise with ``self.noise``, and a resumed run equals an uninterrupted
    one. The terms need not be those of a VAE: any pair :math:`(B_i, A_i)` with a loss :math:`A_i + \beta B_i` works.

    Example:
        >>> from lightning_ext.nn import MLPDecoder, MLPEncoder
        >>> class MyVAE(MultiRateMixin):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = MLPEncoder([4], [8], 2), MLPDecoder(2, [8], [4])
        ...         self.make_multirate(self.encoder, self.decoder, input_shape=[4])
        ...
        ...     def rate_distortion(self, batch):
        ...         mu, logvar = self.encoder(batch)
        ...         error = self.decoder(mu + self.noise(mu) * (logvar / 2).exp()) - batch
        ...         return RateDistortion(0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1), (error**2).sum(1) / 2, mu)
        >>> model = MyVAE()
        >>> with model.at(0.5):
        ...     model.rate_distortion(torch.zeros(3, 4)).rate.shape
        torch.Size([3])
    """

    beta_sampling: BetaSampling = "stratified"
    fixed_beta: float | None = None
    """Train at this beta instead of drawing one; a :class:`lightning_ext.callbacks.KLSchedule` may set it."""

    if TYPE_CHECKING:  # at run time it must come from your class, which the mixin stands in front of

        def rate_distortion(self, batch: Any) -> RateDistortion:
            """Per-sample terms of a batch at the betas set in the gates."""

    def make_multirate(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        beta_range: Sequence[float] = (0.01, 10.0),
        beta_sampling: BetaSampling = "stratified",
        **convert: Any,
    ) -> list[str]:
        """Gate both networks in place and remember the range of beta.

        Args:
            encoder: see :func:`lightning_ext.nn.convert_to_multirate`.
            decoder: the same.
            input_shape: shape of one sample; the networks are run once on zeros of this shape.
            beta_range: smallest and largest beta.
            beta_sampling: ``"stratified"`` (one beta per sample, spread evenly over the batch of all ranks),
                ``"sample"`` (one independent beta per sample) or ``"batch"`` (one beta per batch; clearly worse).
            **convert: further arguments of :func:`lightning_ext.nn.convert_to_multirate`.

        Returns:
            Names of the gated layers.

        Raises:
            TypeError: the module does not implement ``rate_distortion(batch)``.
            ValueError: the range, the sampling or the networks do not fit.
        """
        if not callable(getattr(self, "rate_distortion", None)):
            raise TypeError(
                f"{type(self).__name__} must implement rate_distortion(batch) and return RateDistortion(rate, "
                "distortion), one number per sample each."
            )
        self._set_prior(beta_range, beta_sampling)
        example = torch.zeros(2, *input_shape)
        one_beta = beta_sampling == "batch"
        return convert_to_multirate(
            encoder, decoder, self.rate_context, example, one_beta_per_batch=one_beta, **convert
        )

    def at(self, beta: float | Tensor, num_samples: int = 1, extrapolate: bool = False) -> Any:
        """Context in which the gates are set to beta, see :meth:`lightning_ext.nn.RateContext.at`."""
        beta = torch.as_tensor(beta, device=self.device)
        return self.rate_context.at(beta, num_samples, extrapolate)

    def sample_betas(self, num: int, stage: str, batch_idx: int) -> Tensor:
        """Betas of one batch on this rank, ``(num,)``; the same address gives the same betas.

        Args:
            num: samples in the batch of this rank.
            stage: ``"train"``, or anything else for an evaluation, whose betas are the same in every epoch.
            batch_idx: index of the batch.
        """
        if self.fixed_beta is not None and stage == "train":
            if not self.beta_prior.low <= self.fixed_beta <= self.beta_prior.high:
                raise ValueError(
                    f"fixed_beta={self.fixed_beta:g} is outside the range [{self.beta_prior.low:g}, "
                    f"{self.beta_prior.high:g}]."
                )
            return torch.full((num,), float(self.fixed_beta), device=self.device)
        training = stage == "train"
        counters = (_BETA_STREAM, self.current_epoch if training else -1, batch_idx)
        rank, world = self._rank, self._world_size
        # A beta-TCVAE is evaluated as it is trained: its batch estimate wants posteriors at one beta.
        if self.beta_sampling == "batch" and (training or getattr(self, "objective", None) == "tcvae"):
            return self.beta_prior.sample(1, self.seed, *counters).expand(num).to(self.device)
        stratified = self.beta_sampling != "sample" or not training
        betas = self.beta_prior.sample(num, self.seed, *counters, stratified=stratified, rank=rank, world_size=world)
        return betas.to(self.device, non_blocking=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        r"""Mean of :math:`D_i + \beta_i R_i` over the batch, with fresh betas (2212.03905, Algorithm 1)."""
        return self._multirate_step("train", batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss averaged over the whole range of beta, the same betas in every epoch."""
        self._multirate_step("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss averaged over the whole range of beta."""
        self._multirate_step("test", batch, batch_idx)

    def beta_for_rate(self, target: float, curve: Mapping[str, Tensor]) -> float:
        """The beta at which the model spends ``target`` nats, read off a measured curve.

        Args:
            target: rate in nats, inside the curve.
            curve: what :class:`lightning_ext.metrics.RateDistortionCurve` computes;
                :attr:`lightning_ext.callbacks.RateDistortionCallback.curve` has the latest one.

        Raises:
            ValueError: the target is outside the curve.
        """
        return float(beta_for_rate(curve["beta"], curve["rate"], target))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _set_prior(self, beta_range: Sequence[float], beta_sampling: BetaSampling) -> None:
        if len(beta_range) != 2:
            raise ValueError(f"beta_range must be two numbers, smallest and largest beta; got {list(beta_range)}.")
        if beta_sampling not in ("stratified", "sample", "batch"):
            raise ValueError(f"beta_sampling must be 'stratified', 'sample' or 'batch'; got {beta_sampling!r}.")
        self.beta_prior = LogUniformBeta(*beta_range)
        self.rate_context = RateContext(self.beta_prior)
        self.beta_sampling = beta_sampling

    @contextlib.contextmanager
    def _at_unchecked(self, betas: Tensor) -> Iterator[None]:
        with self.rate_context.at_standardized(self.beta_prior.standardize(betas).unsqueeze(1)):
            yield

    def get_batch_size(self, batch: Any) -> int:
        """Samples in a batch; override it where Lightning's guess (first dimension of the first tensor) is wrong."""
        return int(submodule("utilities.data").extract_batch_size(batch))

    def _multirate_step(self, stage: str, batch: Any, batch_idx: int) -> Tensor:
        if not hasattr(self, "beta_prior"):
            raise RuntimeError(f"{type(self).__name__} is not multi-rate yet: call make_multirate(...) in __init__.")
        self.set_address(stage, batch_idx)
        betas = self.sample_betas(self.get_batch_size(batch), stage, batch_idx)
        with self._at_unchecked(betas):
            terms = self.rate_distortion(batch)
        if not isinstance(terms, RateDistortion):
            raise TypeError(
                f"rate_distortion(batch) must return a RateDistortion(rate, distortion); got {type(terms).__name__}."
            )
        losses = terms.loss(betas)
        loss = losses.mean()
        log_terms(self, stage, terms, loss)
        if stage == "train" and self._is_logging_step:
            self._log_by_beta(losses.detach(), betas)
        return loss

    def _log_by_beta(self, losses: Tensor, betas: Tensor) -> None:
        third = torch.bucketize(self.beta_prior.standardize(betas), betas.new_tensor([-0.57735, 0.57735]))
        for index, name in enumerate(("low", "mid", "high")):
            inside = losses[third == index]
            if len(inside):
                self.log(f"train/loss_{name}_beta", inside.mean())


@dataclasses.dataclass
class AtBeta:
    """A multi-rate VAE held at one beta: call it, encode, decode, sample."""

    model: "MultiRateVAE"
    beta: float
    extrapolate: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct in data space from the posterior mean."""
        with self._set():
            return BaseVAE.forward(self.model, x)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and log variances."""
        with self._set():
            return self.model.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction parameters."""
        with self._set():
            return self.model.decode(z)

    def sample(self, num: int) -> Tensor:
        """Decode ``num`` draws from the prior, in data space."""
        with self._set():
            return self.model.sample(num)

    def _set(self) -> Any:
        return self.model.at(self.beta, extrapolate=self.extrapolate)


class MultiRateVAE(MultiRateMixin, BaseVAE):
    r"""VAE that is conditioned on :math:`\log\beta` and trained at all betas of a range at once.

    .. math:: \min_\psi\; E_{\log\beta \sim U(\log a, \log b)}\, E_x
              \left[ D_i(\psi, \beta) + \beta R_i(\psi, \beta) \right]

    After one training run any beta in the range can be chosen at inference.

    Args:
        encoder: any network that returns ``(mu, logvar)``, one tensor ``(B, 2 k)`` or a pythae output; gated in place.
        decoder: any network from ``z`` to reconstruction parameters; gated in place.
        input_shape: shape of one sample.
        beta_range: smallest and largest beta, positive.
        conditioning: ``"gate"`` (the paper), ``"film"`` (scale and shift by small networks), ``"concat"`` (t(beta)
            as an extra input channel and an extra latent: build the networks one wider) or ``"none"`` (one network
            for all betas, a lower bound).
        distortion: see :class:`BaseVAE`.
        beta_sampling: ``"stratified"``, ``"sample"`` or ``"batch"``, see :meth:`MultiRateMixin.make_multirate`.
        objective: ``"vae"``, ``"tcvae"`` or ``"hierarchical"``. With ``"tcvae"`` take ``beta_sampling="batch"``: the
            density of the batch mixes posteriors at different betas otherwise.
        dataset_size: size of the training set; needed by ``"tcvae"``.
        lr: learning rate of Adam; the best one is at or above the best one of the ungated network.
        warmup_fraction: part of the training over which the learning rate rises.
        seed: seed of noise and betas; see :class:`BaseVAE`.
        convert: further arguments of :func:`lightning_ext.nn.convert_to_multirate` (layout, activations, init, heads).

    Raises:
        ValueError: an argument is out of range, no layer matched, or shapes do not fit.

    Logged: ``{stage}/loss``, ``{stage}/rate``, ``{stage}/distortion`` (averages over the range of beta) and
    ``train/loss_{low,mid,high}_beta``. Cost: two numbers and one multiplication per channel of a gated layer.
    Distributed: betas are stratified over the global batch, noise differs between ranks.

    >>> from lightning_ext.nn import MLPDecoder, MLPEncoder
    >>> model = MultiRateVAE(MLPEncoder([4], [8], 2), MLPDecoder(2, [8], [4]), input_shape=[4])
    >>> model.at_beta(0.5)(torch.zeros(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        beta_range: Sequence[float] = (0.01, 10.0),
        conditioning: Conditioning = "gate",
        distortion: Distortion | Callable[[Tensor, Tensor], Tensor] = "bernoulli_logits",
        beta_sampling: BetaSampling = "stratified",
        objective: Objective = "vae",
        dataset_size: int | None = None,
        lr: float = 1e-3,
        warmup_fraction: float = 0.05,
        seed: int | None = None,
        convert: dict[str, Any] | None = None,
    ) -> None:
        if conditioning not in ("gate", "film", "concat", "none"):
            raise ValueError(f"conditioning must be 'gate', 'film', 'concat' or 'none'; got {conditioning!r}.")
        if conditioning == "concat" and objective == "hierarchical":
            raise ValueError("conditioning='concat' has no single latent to append beta to in a hierarchical VAE.")
        if convert and conditioning not in ("gate", "film"):
            raise ValueError(
                f"convert={convert} has no effect with conditioning={conditioning!r}: nothing is converted."
            )
        super().__init__(encoder, decoder, input_shape, distortion, objective, dataset_size, lr, warmup_fraction, seed)
        self.conditioning: Conditioning = conditioning
        self._set_prior(beta_range, beta_sampling)
        if conditioning in ("gate", "film"):
            options = {"conditioning": conditioning, "hierarchical": objective == "hierarchical", **(convert or {})}
            self.make_multirate(encoder, decoder, input_shape, beta_range, beta_sampling, **options)
        with self.at(self.beta_prior.high):
            self.check_networks()
        if objective == "tcvae" and beta_sampling != "batch":
            pl.utilities.rank_zero_warn(
                "objective='tcvae' estimates the aggregate posterior from the batch, whose samples sit at different "
                "betas: beta_sampling='batch' keeps them at one."
            )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and log variances at the current beta."""
        return super().encode(self._concat(x))

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction parameters at the current beta."""
        return super().decode(self._concat(z))

    def forward(self, x: Tensor, beta: float | Tensor) -> Tensor:  # type: ignore[override]
        """Reconstruct in data space from the posterior mean.

        Args:
            x: ``(B, *input_shape)``.
            beta: a number or ``(B,)``; there is no default, a beta is never drawn silently.
        """
        with self.at(beta):
            return super().forward(x)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Reconstructions at :attr:`predict_beta`."""
        return self(self.get_input(batch), self.predict_beta)  # type: ignore[no-any-return]

    @property
    def predict_beta(self) -> float:
        """The beta of ``trainer.predict``: 1, the ordinary VAE, or the nearest end of the range."""
        return min(max(1.0, self.beta_prior.low), self.beta_prior.high)

    def at_beta(self, beta: float, extrapolate: bool = False) -> AtBeta:
        """The model at one beta, to call, encode, decode and sample; no retraining, no copy.

        Raises:
            ValueError: when used, if beta is outside the range and ``extrapolate`` is false.
        """
        return AtBeta(self, beta, extrapolate)

    def fold(self, beta: float) -> nn.ModuleDict:
        """The ordinary networks at one beta, ``{"encoder", "decoder"}``, for deployment: no gates, no extra cost.

        Raises:
            ValueError: beta is outside the range, or the conditioning cannot be folded.
        """
        if self.conditioning not in ("gate", "film"):
            raise ValueError(
                f"conditioning={self.conditioning!r} cannot be folded into weights; use at_beta({beta:g}) instead."
            )
        return nn.ModuleDict({"encoder": fold(self.encoder, beta), "decoder": fold(self.decoder, beta)})

    def _concat(self, x: Tensor) -> Tensor:
        if self.conditioning != "concat":
            return x
        t = self.rate_context.rows(self.rate_context.t, len(x)).to(x.dtype)
        return torch.cat((x, t.view(-1, *[1] * (x.dim() - 1)).expand(len(x), 1, *x.shape[2:])), dim=1)

    def get_batch_size(self, batch: Any) -> int:
        """Samples in a batch."""
        return len(self.get_input(batch))
