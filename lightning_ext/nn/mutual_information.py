r"""Latent variable models as mutual information sees them: a prior, a likelihood, samples of both, maybe a proposal."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints

from lightning_ext.functional import AnnealingPath, DiagonalGaussian, seeded_draws
from lightning_ext.nn.mrvae_convert import posterior_parameters, reconstruction_parameters

__all__ = [
    "BernoulliDecoderModel",
    "DistributionModel",
    "GaussianDecoderModel",
    "LatentModel",
    "Proposal",
    "check_deterministic",
]


class Proposal:
    """A normalised density of latents for each data point, that can be drawn from.

    Args:
        density: log-density ``(..., B)`` of latents ``(..., B, d)``; with a method ``gradient`` it needs no autograd.
        draw: ``(num, generator) -> (num, B, d)``.
    """

    def __init__(self, density: Callable[[Tensor], Tensor], draw: Callable[[int, Generator | None], Tensor]) -> None:
        self.density, self.draw = density, draw

    @classmethod
    def gaussian(cls, mean: Tensor, scale: Tensor) -> "Proposal":
        """Diagonal Gaussians with means and standard deviations ``(B, d)``."""
        density = DiagonalGaussian(mean, scale)
        return cls(density, lambda num, generator: density.sample((num, *mean.shape), mean, generator))

    @classmethod
    def of(cls, distribution: Distribution) -> "Proposal":
        """A distribution whose batch and event shapes make up ``(B, d)``; minus infinity outside of its support."""
        plain = distribution.base_dist if isinstance(distribution, Independent) else distribution
        if type(plain) is Normal and plain.loc.ndim:
            return cls.gaussian(plain.loc.detach(), plain.scale.detach())

        def density(z: Tensor) -> Tensor:
            found = distribution.log_prob(z)
            return found if found.ndim < z.ndim else found.sum(-1)

        return cls(_within(distribution, density), lambda num, generator: _drawn(distribution, num, generator))


class LatentModel(nn.Module):
    r"""A generative model :math:`p(z)\, p(x \mid z)` with latents in :math:`\mathbb R^d`.

    To write another one, implement ``log_likelihood`` and ``sample_x``; the prior is standard normal unless ``prior``
    and ``sample_prior`` say otherwise. The densities must not change from call to call: see
    :func:`check_deterministic`.

    Args:
        latent_dim: d, at least 1.

    Attributes:
        discrete: whether latents are integers, which Hamiltonian Monte Carlo cannot move.
    """

    discrete: bool = False

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1; got {latent_dim}.")
        self.latent_dim = latent_dim

    @property
    def device(self) -> torch.device:
        """Where its samples live."""
        return self._like().device

    @property
    def dtype(self) -> torch.dtype:
        """What its samples are in."""
        return self._like().dtype

    @property
    def prior(self) -> Callable[[Tensor], Tensor]:
        r""":math:`\log p(z)`, ``(..., d)`` to ``(...)``, normalised; one with a ``gradient`` needs no autograd."""
        return DiagonalGaussian(0.0, 1.0)

    def sample_prior(self, num: int, generator: Generator | None = None) -> Tensor:
        """Latents ``(num, d)``."""
        like = self._like()
        return torch.randn(num, self.latent_dim, generator=generator, dtype=like.dtype, device=like.device)

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        r""":math:`\log p(x \mid z)`, ``(..., B)``, of data ``(B, *event)`` and latents ``(..., B, d)``; normalised."""

    @abstractmethod
    def sample_x(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Data ``(B, *event)`` for latents ``(B, d)``."""

    def proposal(self, x: Tensor) -> Proposal | None:
        """A density of latents near the posterior of each of ``(B, *event)``; None where the model has none."""
        return None

    # -- what follows from these --------------------------------------------------------------------------------------

    def simulate(self, num: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Pairs ``x (num, *event)``, ``z (num, d)`` of the joint: each z is an exact posterior sample of its x."""
        z = self.sample_prior(num, generator)
        x = self.sample_x(z, generator)
        if x.shape[:1] != (num,):
            raise ValueError(f"x must be one data point for each of {num} latents; got shape {tuple(x.shape)}.")
        return x, z

    def path(self, x: Tensor, proposal: Proposal | None = None) -> AnnealingPath:
        """From the prior, or from a proposal, to the posterior of each of ``(B, *event)``."""
        if proposal is None:
            return AnnealingPath(self.prior, lambda z: self.checked_likelihood(x, z))
        base = proposal.density
        return AnnealingPath(base, lambda z: self.prior(z) + self.checked_likelihood(x, z) - base(z))

    def checked_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """``log_likelihood``, whose shape nothing may broadcast away.

        Raises:
            ValueError: If it is another shape than ``(..., B)``, or z has another size than the model's latents.
        """
        if z.ndim < 2 or z.shape[-1] != self.latent_dim or z.shape[-2] != len(x):
            raise ValueError(
                f"z must have shape (..., {len(x)}, {self.latent_dim}), latents of each data point; got "
                f"{tuple(z.shape)}."
            )
        found = self.log_likelihood(x, z)
        if found.shape != z.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}.log_likelihood must give one number per data point and sample, "
                f"{tuple(z.shape[:-1])}; got {tuple(found.shape)}. Sum over the dimensions of x."
            )
        return found

    def _like(self) -> Tensor:
        """A floating tensor of the model, for its dtype and device."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0)


class _DecoderModel(LatentModel):
    """Networks that map latents to the parameters of the data's density, and data to those of the latents'."""

    def __init__(self, decoder: nn.Module, latent_dim: int, encoder: nn.Module | None) -> None:
        super().__init__(latent_dim)
        self.decoder, self.encoder = decoder, encoder

    def decode(self, z: Tensor) -> Tensor:
        """Parameters ``(..., *event)`` of the data's density for latents ``(..., d)``."""
        flat = z.reshape(-1, self.latent_dim)
        try:
            found = reconstruction_parameters(self.decoder(flat))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the decoder does not take latents {tuple(flat.shape)}: {error}. Is latent_dim={self.latent_dim} its "
                "number of inputs?"
            ) from error
        if len(found) != len(flat):
            raise ValueError(f"the decoder must give one output per latent, {len(flat)}; got {tuple(found.shape)}.")
        return found.reshape(*z.shape[:-1], *found.shape[1:])

    def _like(self) -> Tensor:
        """Of the decoder: the noise may have another dtype."""
        return next((p for p in self.decoder.parameters() if p.is_floating_point()), super()._like())

    def _beside(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Data ``(B, D)`` and decoder outputs ``(..., B, D)``."""
        outputs = self.decode(z)
        flat, event = x.flatten(1), outputs.shape[z.ndim - 1 :]
        if flat.shape[1] != event.numel():
            raise ValueError(
                f"the decoder's outputs are {tuple(event)} for each latent, but x is {tuple(x.shape[1:])}."
            )
        return flat, outputs.flatten(z.ndim - 1) if event else outputs.unsqueeze(-1)

    def proposal(self, x: Tensor) -> Proposal | None:
        """The encoder's Gaussian."""
        if self.encoder is None:
            return None
        with torch.no_grad():
            mean, log_var = posterior_parameters(self.encoder(x))
        return Proposal.gaussian(mean, (0.5 * log_var).exp())


class GaussianDecoderModel(_DecoderModel):
    r"""A decoder with Gaussian noise: :math:`p(x \mid z) = \mathcal N(f(z), \operatorname{diag}(e^{v}))`.

    VAEs with a Gaussian likelihood; and GANs and any generator, with a variance that you choose and that the
    information depends on.

    Args:
        decoder: latents ``(N, d)`` to means ``(N, *event)``, as a tensor or as pythae's outputs. Shared, not copied.
        log_var: v, a number, or a tensor or parameter that broadcasts against one event.
        latent_dim: d.
        encoder: data to ``(mean, log variance)`` of latents, for proposals. Default none.

    >>> model = GaussianDecoderModel(nn.Identity(), 0.0, latent_dim=1)
    >>> model.log_likelihood(torch.zeros(1, 1), torch.zeros(3, 1, 1))[0]  # -log(2 pi) / 2
    tensor([-0.9189])
    """

    def __init__(
        self, decoder: nn.Module, log_var: float | Tensor, latent_dim: int, encoder: nn.Module | None = None
    ) -> None:
        super().__init__(decoder, latent_dim, encoder)
        if not isinstance(log_var, Tensor | float | int) or not bool(torch.as_tensor(log_var).isfinite().all()):
            raise ValueError(
                f"log_var must be a finite number or tensor, the logarithm of a variance; got {log_var!r}."
            )
        if isinstance(log_var, nn.Parameter):
            self.log_var: Tensor = log_var
        else:
            number = torch.as_tensor(log_var, dtype=torch.get_default_dtype())
            self.register_buffer("log_var", number.detach())

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-density, summed over the event."""
        flat, mean = self._beside(x, z)
        log_var = self.log_var.to(mean)
        if log_var.numel() == 1:
            log_var = log_var.reshape(())
            squared = (flat - mean).square().sum(-1)
            return -0.5 * (squared * (-log_var).exp() + flat.shape[1] * (log_var + math.log(2 * math.pi)))
        log_var = self._for_each(x.shape[1:]).to(mean).flatten()
        squared = ((flat - mean).square() * (-log_var).exp()).sum(-1)
        return -0.5 * (squared + (log_var + math.log(2 * math.pi)).sum())

    def sample_x(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Decoder means with noise."""
        with torch.no_grad():
            mean = self.decode(z)
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
            return mean + (0.5 * self._for_each(mean.shape[1:]).to(mean)).exp() * noise

    def _for_each(self, event: torch.Size) -> Tensor:
        try:
            return self.log_var.reshape(()).expand(event) if self.log_var.numel() == 1 else self.log_var.expand(event)
        except RuntimeError as error:
            raise ValueError(
                f"log_var must broadcast against the decoder's outputs for one latent, {tuple(event)}; got "
                f"{tuple(self.log_var.shape)}."
            ) from error


class BernoulliDecoderModel(_DecoderModel):
    """A decoder of independent binary pixels.

    Args:
        decoder: latents ``(N, d)`` to logits ``(N, *event)``, or to probabilities; as a tensor or as pythae's outputs.
        latent_dim: d.
        logits: whether the outputs are logits.
        encoder: data to ``(mean, log variance)`` of latents, for proposals. Default none.
    """

    def __init__(
        self, decoder: nn.Module, latent_dim: int, logits: bool = True, encoder: nn.Module | None = None
    ) -> None:
        super().__init__(decoder, latent_dim, encoder)
        self.logits = logits

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-probability, summed over the pixels."""
        flat, outputs = self._beside(x, z)
        if self.logits:
            return (flat * outputs - nn.functional.softplus(outputs)).sum(-1)
        dark, light = torch.where(flat < 1, 1 - outputs, 1.0), torch.where(flat > 0, outputs, 1.0)
        return (flat * light.log() + (1 - flat) * dark.log()).sum(-1)  # of 0 log 0 the gradient would be NaN

    def sample_x(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Binary data."""
        with torch.no_grad():
            outputs = self.decode(z)
            return torch.bernoulli(outputs.sigmoid() if self.logits else outputs, generator=generator)


class DistributionModel(LatentModel):
    """A model made of ``torch.distributions``.

    Args:
        prior: of one latent, with an event of d dimensions or a batch of them.
        likelihood: latents ``(..., d)`` to the distribution of x, with batch and event shapes ``(..., *event)``.
        proposal: data ``(B, *event)`` to a distribution of latents with shapes ``(B, d)``. Default none.

    >>> from torch.distributions import Normal
    >>> model = DistributionModel(Normal(torch.zeros(2), 1.0), lambda z: Normal(z, 0.5))
    >>> x, z = model.simulate(5)
    >>> model.log_likelihood(x, z).shape
    torch.Size([5])
    """

    def __init__(
        self,
        prior: Distribution,
        likelihood: Callable[[Tensor], Distribution],
        proposal: Callable[[Tensor], Distribution] | None = None,
    ) -> None:
        super().__init__(torch.Size((*prior.batch_shape, *prior.event_shape)).numel())
        self._prior, self._likelihood, self._proposal = prior, likelihood, proposal
        self._example = _drawn(prior, None, torch.Generator())
        self.discrete = bool(getattr(_support(prior), "is_discrete", False))
        self._density = Proposal.of(prior).density

    @property
    def prior(self) -> Callable[[Tensor], Tensor]:
        """The distribution's log-density."""
        return self._density

    def sample_prior(self, num: int, generator: Generator | None = None) -> Tensor:
        """Latents ``(num, d)``."""
        return _drawn(self._prior, num, generator).reshape(num, self.latent_dim)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """The distribution's, summed over what is left of the event."""
        with _unvalidated():
            found: Tensor = self._likelihood(z).log_prob(x)
        return found.flatten(z.ndim - 1).sum(-1) if found.ndim >= z.ndim > 1 else found

    def sample_x(self, z: Tensor, generator: Generator | None = None) -> Tensor:
        """Data ``(B, *event)``."""
        return _drawn(self._likelihood(z), None, generator)

    def proposal(self, x: Tensor) -> Proposal | None:
        """The distribution that was given for these data."""
        return None if self._proposal is None else Proposal.of(self._proposal(x))

    def _like(self) -> Tensor:
        """Where and what the prior's samples are."""
        return self._example


def check_deterministic(model: nn.Module) -> None:
    """Refuse networks whose densities change from call to call, or with their batch.

    Raises:
        ValueError: If a dropout, batch normalisation or other layer that draws is in training mode, or a batch
            normalisation keeps no running statistics; the message names it.
    """
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.RReLU)
    sometimes = (nn.MultiheadAttention, nn.RNNBase)
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"{name or 'the model'} ({type(part).__name__}) keeps no running statistics: the density of a point "
                "depends on its batch, and no bound holds. Use track_running_stats=True, or another normalisation."
            )
        drawing = isinstance(part, sometimes) and part.dropout > 0
        if part.training and (drawing or isinstance(part, kinds)):
            raise ValueError(
                f"{name or 'the model'} ({type(part).__name__}) is in training mode: the density is another one at "
                "each call, and no bound holds. Call model.eval() first."
            )


def _support(distribution: Distribution) -> constraints.Constraint | None:
    try:
        return distribution.support
    except NotImplementedError:  # distributions of one's own need not say
        return None


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Chains go where distributions would raise, and are rejected there."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _within(distribution: Distribution, density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A density outside of whose support there is nothing: chains that leave it are rejected."""
    support = _support(distribution)
    if support is None:
        return density
    inner = _drawn(distribution, None, torch.Generator())

    def bounded(z: Tensor) -> Tensor:
        inside: Tensor = support.check(z)  # type: ignore[no-untyped-call]
        inside = inside if inside.ndim < z.ndim else inside.all(-1)
        found = density(torch.where(inside.unsqueeze(-1), z, inner.to(z)))
        return torch.where(inside, found + 0 * z.sum(-1), -torch.inf)  # some, such as a uniform one, have no gradient

    return bounded


def _drawn(distribution: Distribution, num: int | None, generator: Generator | None) -> Tensor:
    """Samples of a distribution, which knows no generators."""
    shape = torch.Size() if num is None else torch.Size((num,))
    if generator is None:
        return distribution.sample(shape)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with seeded_draws(seed, generator.device):
        return distribution.sample(shape)
