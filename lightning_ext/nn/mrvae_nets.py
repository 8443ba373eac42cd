"""Encoders and decoders of the MR-VAE experiments; any other network of yours works as well.

Source of the architectures: Bae et al., arXiv 2212.03905, appendix C, after the benchmark networks of pythae. Every
``out_activation`` is left to the distortion: decoders return logits or means.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_ext.functional.mrvae import gaussian_kl

__all__ = ["LadderDecoder", "LadderEncoder", "MLPDecoder", "MLPEncoder", "ResNetDecoder", "ResNetEncoder"]

Noise = Callable[[Tensor], Tensor]


def _mlp(sizes: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(sizes):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return layers


class MLPEncoder(nn.Module):
    """Fully connected encoder that returns ``(mu, logvar)``.

    Args:
        input_shape: shape of one sample, flattened by the encoder.
        hidden: widths of the hidden layers, each followed by a ReLU.
        latent_dim: number of latents ``k``.

    >>> mu, logvar = MLPEncoder([8, 8], [16], 2)(torch.zeros(5, 8, 8))
    >>> mu.shape
    torch.Size([5, 2])
    """

    def __init__(self, input_shape: Sequence[int], hidden: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *hidden]
        self.body = nn.Sequential(nn.Flatten(), *_mlp(sizes))
        self.mu = nn.Linear(sizes[-1], latent_dim)
        self.logvar = nn.Linear(sizes[-1], latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, *input_shape)`` to two tensors ``(B, k)``."""
        features = self.body(x)
        return self.mu(features), self.logvar(features)


class MLPDecoder(nn.Module):
    """Fully connected decoder.

    Args:
        latent_dim: number of latents ``k``.
        hidden: widths of the hidden layers, each followed by a ReLU.
        output_shape: shape of one reconstruction.
    """

    def __init__(self, latent_dim: int, hidden: Sequence[int], output_shape: Sequence[int]) -> None:
        super().__init__()
        sizes = [latent_dim, *hidden]
        self.net = nn.Sequential(
            *_mlp(sizes), nn.Linear(sizes[-1], math.prod(output_shape)), nn.Unflatten(1, tuple(output_shape))
        )

    def forward(self, z: Tensor) -> Tensor:
        """``(B, k)`` to ``(B, *output_shape)``."""
        reconstruction: Tensor = self.net(z)
        return reconstruction


class _ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class ResNetEncoder(nn.Module):
    """Residual encoder for 28 x 28 grey images (MNIST, Omniglot); 1,881,217 parameters together with its decoder.

    Args:
        latent_dim: number of latents ``k``.
        width: channels of the residual blocks; the first convolution has half as many.
    """

    def __init__(self, latent_dim: int = 32, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width // 2, 4, 2, 1),
            nn.Conv2d(width // 2, width, 4, 2, 1),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.ReLU(),
            _ResBlock(width),
            _ResBlock(width),
            nn.Flatten(),
        )
        self.mu = nn.Linear(16 * width, latent_dim)
        self.logvar = nn.Linear(16 * width, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 1, 28, 28)`` to two tensors ``(B, k)``."""
        features = self.body(x)
        return self.mu(features), self.logvar(features)


class ResNetDecoder(nn.Module):
    """Residual decoder that mirrors :class:`ResNetEncoder`.

    Args:
        latent_dim: number of latents ``k``.
        width: channels of the residual blocks.
    """

    def __init__(self, latent_dim: int = 32, width: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(latent_dim, 16 * width),
            nn.Unflatten(1, (width, 4, 4)),
            nn.ConvTranspose2d(width, width, 3, 2, 1),
            _ResBlock(width),
            _ResBlock(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, 1, 3, 2, 1, output_padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """``(B, k)`` to logits ``(B, 1, 28, 28)``."""
        reconstruction: Tensor = self.net(z)
        return reconstruction


class LadderEncoder(nn.Module):
    """Deterministic bottom-up pass of a two-level hierarchical VAE: features for :class:`LadderDecoder`.

    Args:
        input_shape: shape of one sample, flattened.
        hidden: width of both levels.
    """

    def __init__(self, input_shape: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), hidden), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, *input_shape)`` to the features of the two levels, each ``(B, hidden)``."""
        bottom = self.bottom(x)
        return bottom, self.top(bottom)


class LadderDecoder(nn.Module):
    r"""Top-down pass of a two-level hierarchical VAE, :math:`z_2 \sim N(0, I)`, :math:`z_1 \sim N(m(z_2), I)`.

    The reference for ``objective="hierarchical"``: it samples by itself, with the noise it is handed, and returns
    the KL of every group. The posterior of the lower group is the prior's mean plus a correction, as in the NVAE.

    Args:
        hidden: width of the features and of the decoder.
        latent_dims: sizes of the upper and the lower group.
        output_shape: shape of one reconstruction.
    """

    def __init__(self, hidden: int, latent_dims: Sequence[int], output_shape: Sequence[int]) -> None:
        super().__init__()
        upper, lower = latent_dims
        self.upper, self.lower = upper, lower
        self.upper_posterior = nn.Linear(hidden, 2 * upper)
        self.lower_prior = nn.Sequential(nn.Linear(upper, hidden), nn.ReLU(), nn.Linear(hidden, lower))
        self.lower_posterior = nn.Linear(hidden + upper, 2 * lower)
        self.net = nn.Sequential(
            nn.Linear(upper + lower, hidden),
            nn.ReLU(),
            nn.Linear(hidden, math.prod(output_shape)),
            nn.Unflatten(1, tuple(output_shape)),
        )

    def forward(self, features: tuple[Tensor, Tensor], noise: Noise = torch.randn_like) -> tuple[Tensor, list[Tensor]]:
        """Sample both groups and decode.

        Args:
            features: what :class:`LadderEncoder` returned.
            noise: draws standard normal numbers shaped like its argument.

        Returns:
            The reconstruction and the KL of each group, each ``(B,)`` nats.
        """
        bottom, top = features
        mu, logvar = self.upper_posterior(top).chunk(2, dim=1)
        z_upper = mu + torch.exp(0.5 * logvar) * noise(mu)
        correction, lower_logvar = self.lower_posterior(torch.cat((bottom, z_upper), dim=1)).chunk(2, dim=1)
        z_lower = self.lower_prior(z_upper) + correction + torch.exp(0.5 * lower_logvar) * noise(correction)
        # Both groups share the unit prior variance, so the lower KL depends on the correction alone.
        kl = [gaussian_kl(mu, logvar).sum(1), gaussian_kl(correction, lower_logvar).sum(1)]
        return self.net(torch.cat((z_upper, z_lower), dim=1)), kl

    def sample(self, num: int, noise: Noise = torch.randn_like) -> Tensor:
        """Reconstruction parameters of ``num`` samples from the prior, ``(num, *output_shape)``."""
        like = next(self.parameters())
        z_upper = noise(like.new_empty(num, self.upper))
        z_lower = self.lower_prior(z_upper) + noise(like.new_empty(num, self.lower))
        reconstruction: Tensor = self.net(torch.cat((z_upper, z_lower), dim=1))
        return reconstruction
