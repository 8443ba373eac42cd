r"""Linear VAEs in closed form: the oracles that a multi-rate VAE is measured against.

The model is :math:`p(x|z) = N(Dz, s^2 I)`, :math:`q(z|x) = N(Ex, C)` with :math:`C` diagonal, on centred data with
covariance :math:`S`, and the loss :math:`L_\beta = D + \beta R` in nats, summed over dimensions and averaged over
the data. Everything depends on :math:`\beta` and :math:`s^2` through the water level :math:`w = \beta s^2` only.
With ``decoder_variance=0.5`` the distortion is the plain sum of squared errors.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LinearOptimum",
    "best_response",
    "linear_vae_optimum",
    "linear_vae_terms",
    "reverse_waterfilling",
]


class LinearOptimum(NamedTuple):
    """A linear VAE that is optimal for its beta; leading dimensions, if any, are those of beta."""

    decoder: Tensor
    """:math:`D`, ``(..., d, k)``."""
    encoder: Tensor
    """:math:`E`, ``(..., k, d)``."""
    variance: Tensor
    """The diagonal of :math:`C`, ``(..., k)``."""
    rate: Tensor
    """Nats, ``(...)``."""
    distortion: Tensor
    """Nats, ``(...)``."""


def reverse_waterfilling(
    eigenvalues: Tensor,
    beta: float | Tensor,
    num_latents: int | None = None,
    decoder_variance: float = 1.0,
    include_constant: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Rate and distortion of the best linear VAE at each beta: Shannon's reverse water-filling.

    .. math::
        R^*(\beta) = \frac12 \sum_{i \in A} \log\frac{\lambda_i}{w}, \qquad
        D^*(\beta) = \frac{1}{2 s^2} \Big[ |A|\, w + \sum_{i \notin A} \lambda_i \Big], \qquad w = \beta s^2,

    where :math:`\lambda_1 \ge \dots \ge \lambda_d` and :math:`A = \{i \le k : \lambda_i > w\}` are the latents in use.
    Hence :math:`dD^*/dR^* = -\beta` and latent :math:`i` collapses at :math:`w \ge \lambda_i`.

    Args:
        eigenvalues: Spectrum of the data covariance, shape ``(d,)``, non-negative, any order.
        beta: KL weight, positive; a number or a tensor of any shape.
        num_latents: Number of latents k, at least 0. Default: d.
        decoder_variance: :math:`s^2`, positive.
        include_constant: Add :math:`\frac d2 \log 2\pi s^2` to the distortion, as the full negative log-likelihood has.

    Returns:
        ``(rate, distortion)`` in nats, each of the shape of ``beta``; differentiable in both inputs.

    Raises:
        ValueError: If the spectrum is not a non-negative vector, or beta or the variance is not positive.

    Source: Bae et al. 2023 (arXiv 2212.03905), appendix A.1, building on Lucas et al. 2019 (arXiv 1911.02469); the sums
    are derived from Eq. 21-23.

    Note:
        O(d) per beta. No randomness, nothing to reduce across ranks.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import reverse_waterfilling
        >>> rate, distortion = reverse_waterfilling(torch.tensor([4.0, 1.0, 0.5]), beta=1.0)
        >>> round(rate.item(), 4), distortion.item()  # log(4)/2 and (1 + 1 + 0.5)/2
        (0.6931, 1.25)
    """
    if eigenvalues.ndim != 1 or eigenvalues.numel() == 0 or not bool((eigenvalues >= 0).all()):
        raise ValueError(
            f"eigenvalues must be a non-empty vector of non-negative numbers, got shape {tuple(eigenvalues.shape)}"
            + (f" with minimum {eigenvalues.min().item():g}." if eigenvalues.numel() else ".")
        )
    k = check_num_latents(num_latents, eigenvalues.numel())
    level = _water_level(beta, decoder_variance, eigenvalues).unsqueeze(-1)
    spectrum = eigenvalues.sort(descending=True).values
    used, rest = spectrum[:k], spectrum[k:].sum()
    rate = (torch.maximum(used, level).log() - level.log()).sum(-1) / 2
    distortion = (torch.minimum(used, level).sum(-1) + rest) / (2 * decoder_variance)
    if include_constant:
        distortion = distortion + _log_normaliser(eigenvalues.numel(), decoder_variance, distortion)
    return rate, distortion


def linear_vae_optimum(
    covariance: Tensor, num_latents: int, beta: float | Tensor, decoder_variance: float = 1.0
) -> LinearOptimum:
    r"""The linear VAE that minimises :math:`D + \beta R` over decoder, encoder and variance jointly.

    .. math::
        D^* = U_k \max(\Lambda_k - wI, 0)^{1/2}, \quad
        E^*_i = \frac{\sqrt{\max(\lambda_i - w, 0)}}{\max(\lambda_i, w)} u_i^\top, \quad
        C^*_i = \min(1, w / \lambda_i), \qquad w = \beta s^2,

    with :math:`(\lambda_i, u_i)` the eigenpairs of the covariance in descending order; the optimum is unique up to a
    permutation and signs of the latents. Latents beyond the data's dimension stay collapsed.

    Args:
        covariance: :math:`S`, shape ``(d, d)``, symmetric and positive semi-definite.
        num_latents: Number of latents k, at least 0.
        beta: KL weight, positive; a number or a tensor, whose shape leads every output.
        decoder_variance: :math:`s^2`, positive.

    Returns:
        The parameters, and rate and distortion in nats without :math:`\frac d2 \log 2\pi s^2`. Gradients reach the
        covariance where its leading eigenvalues are distinct.

    Raises:
        ValueError: If the covariance is not square and symmetric, or another argument is out of its range.

    Source: Bae et al. 2023 (arXiv 2212.03905), Eq. 21-23; Lucas et al. 2019 (arXiv 1911.02469).

    Note:
        One eigendecomposition, O(d^3), shared by all betas.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import linear_vae_optimum
        >>> best = linear_vae_optimum(torch.diag(torch.tensor([4.0, 1.0, 0.5])), num_latents=2, beta=0.25)
        >>> best.variance  # beta / eigenvalue
        tensor([0.0625, 0.2500])
    """
    eigenvalues, vectors = descending_eigh(covariance)
    d, k = eigenvalues.numel(), check_num_latents(num_latents)
    level = _water_level(beta, decoder_variance, eigenvalues).unsqueeze(-1)
    spectrum = torch.nn.functional.pad(eigenvalues[:k], (0, max(0, k - d)))
    directions = torch.nn.functional.pad(vectors[:, :k], (0, max(0, k - d)))
    scale = _safe_sqrt(spectrum - level)
    decoder = directions * scale.unsqueeze(-2)
    encoder = (scale / torch.maximum(spectrum, level)).unsqueeze(-1) * directions.T
    variance = level / torch.maximum(spectrum, level)
    rate, distortion = reverse_waterfilling(eigenvalues, beta, min(k, d), decoder_variance)
    return LinearOptimum(decoder, encoder, variance, rate, distortion)


def best_response(
    decoder: Tensor, beta: float | Tensor, decoder_variance: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    r"""The encoder and variance that are optimal for a given decoder.

    .. math::
        E^* = (D^\top D + wI)^{-1} D^\top, \qquad C^* = w\,(\mathrm{diag}(D^\top D) + wI)^{-1}, \qquad w = \beta s^2.

    :math:`C^*` uses the diagonal of :math:`D^\top D` also where that matrix is not diagonal. Neither depends on the
    data's covariance.

    Args:
        decoder: :math:`D`, shape ``(..., d, k)``.
        beta: KL weight, positive; its shape broadcasts against the leading dimensions of ``decoder``.
        decoder_variance: :math:`s^2`, positive.

    Returns:
        ``(encoder, variance)`` of shapes ``(..., k, d)`` and ``(..., k)``; differentiable.

    Raises:
        ValueError: If the decoder is not a matrix, or beta or the variance is not positive.

    Source: Bae et al. 2023 (arXiv 2212.03905), Eq. 21-22.

    Note:
        One k x k solve per beta.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import best_response
        >>> best_response(torch.eye(2), beta=1.0)
        (tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]]), tensor([0.5000, 0.5000]))
    """
    if decoder.ndim < 2:
        raise ValueError(f"decoder must have shape (..., d, k), got {tuple(decoder.shape)}.")
    level = _water_level(beta, decoder_variance, decoder)
    gram = decoder.mT @ decoder
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    encoder = torch.linalg.solve(gram + level[..., None, None] * identity, decoder.mT)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return encoder, level.unsqueeze(-1) / (squares + level.unsqueeze(-1))


def linear_vae_terms(
    encoder: Tensor,
    decoder: Tensor,
    variance: Tensor,
    covariance: Tensor,
    decoder_variance: float | Tensor = 1.0,
    include_constant: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Expected rate and distortion of any linear VAE, without sampling.

    .. math::
        R = \tfrac12 \big[ \mathrm{tr}(E S E^\top) + \sum_j (C_j - 1 - \log C_j) \big], \qquad
        D = \tfrac{1}{2 s^2} \big[ \mathrm{tr}\big((I - DE) S (I - DE)^\top\big) + \sum_j C_j \|d_j\|^2 \big].

    Args:
        encoder: :math:`E`, shape ``(..., k, d)``.
        decoder: :math:`D` with columns :math:`d_j`, shape ``(..., d, k)``.
        variance: The diagonal of :math:`C`, shape ``(..., k)``, positive.
        covariance: :math:`S`, shape ``(d, d)``.
        decoder_variance: :math:`s^2`, positive.
        include_constant: Add :math:`\frac d2 \log 2\pi s^2` to the distortion.

    Returns:
        ``(rate, distortion)`` in nats over the leading dimensions; differentiable in every tensor.

    Raises:
        ValueError: If the shapes do not fit together.

    Source: Bae et al. 2023 (arXiv 2212.03905), appendix A.1 (the expectations are derived here).

    Note:
        Two d x d products per model in the batch.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import linear_vae_terms
        >>> zero = torch.zeros(1, 2)
        >>> linear_vae_terms(zero, zero.T, torch.ones(1), torch.eye(2))  # a collapsed latent
        (tensor(0.), tensor(1.))
    """
    d, k = decoder.shape[-2:]
    if encoder.shape[-2:] != (k, d) or variance.shape[-1:] != (k,) or covariance.shape[-2:] != (d, d):
        raise ValueError(
            "encoder (..., k, d), decoder (..., d, k), variance (..., k) and covariance (d, d) do not fit: got "
            f"{tuple(encoder.shape)}, {tuple(decoder.shape)}, {tuple(variance.shape)}, {tuple(covariance.shape)}."
        )
    rate = ((encoder @ covariance) * encoder).sum((-2, -1)) + (variance - 1 - variance.log()).sum(-1)
    residual = torch.eye(d, dtype=decoder.dtype, device=decoder.device) - decoder @ encoder
    error = ((residual @ covariance) * residual).sum((-2, -1)) + (variance * decoder.square().sum(-2)).sum(-1)
    distortion = error / (2 * decoder_variance)
    if include_constant:
        distortion = distortion + _log_normaliser(d, decoder_variance, distortion)
    return rate / 2, distortion


def _water_level(beta: float | Tensor, decoder_variance: float | Tensor, like: Tensor) -> Tensor:
    weight = torch.as_tensor(beta, dtype=like.dtype, device=like.device)
    spread = torch.as_tensor(decoder_variance, dtype=like.dtype, device=like.device)
    for name, value in (("beta", weight), ("decoder_variance", spread)):
        if not bool((value > 0).all() & value.isfinite().all()):
            raise ValueError(f"{name} must be positive and finite, got {value.tolist()}.")
    return weight * spread


def check_num_latents(num_latents: int | None, limit: int | None = None) -> int:
    """Return a valid number of latents, ``limit`` where none is given."""
    if num_latents is None and limit is not None:
        return limit
    if num_latents is None or num_latents < 0 or (limit is not None and num_latents > limit):
        wanted = "at least 0" if limit is None else f"from 0 to the data's dimension {limit}"
        raise ValueError(f"num_latents must be {wanted}, got {num_latents}.")
    return num_latents


def descending_eigh(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors in columns, of a checked covariance matrix."""
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or covariance.numel() == 0:
        raise ValueError(f"covariance must be a square matrix, got shape {tuple(covariance.shape)}.")
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.detach().abs().max())):
        raise ValueError("covariance must be symmetric; pass X.T @ X / len(X) of centred data.")
    values, vectors = torch.linalg.eigh(covariance)
    slack = len(covariance) * torch.finfo(values.dtype).eps * float(values.detach().abs().max())
    if float(values.detach()[0]) < -max(slack, 1e-12):
        raise ValueError(f"covariance must be positive semi-definite, its smallest eigenvalue is {values[0].item():g}.")
    return values.clamp(min=0).flip(0), vectors.flip(1)


def _safe_sqrt(value: Tensor) -> Tensor:
    """``sqrt(max(value, 0))`` whose gradient is 0, not NaN, where the value is not positive."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


def _log_normaliser(dimension: int, decoder_variance: float | Tensor, like: Tensor) -> Tensor:
    spread = torch.as_tensor(decoder_variance, dtype=like.dtype, device=like.device)
    return dimension / 2 * torch.log(2 * math.pi * spread)
