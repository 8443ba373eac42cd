"""Gates for linear VAEs by formula: those of the paper's Theorem 1, and those that are jointly exact."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ext.functional.mrvae_linear import check_num_latents, descending_eigh, linear_vae_optimum

__all__ = ["GatedLinear", "LinearGates", "joint_exact_gates", "theorem1_gates"]

_SQRT3 = math.sqrt(3.0)


class GatedLinear(NamedTuple):
    """One linear layer with one gate per output: ``activation(gate_weight * t + gate_bias) * (weight @ input)``."""

    weight: Tensor
    """``(out, in)``; for the variance a vector ``(k,)``."""
    gate_weight: Tensor
    """``(out,)``: the factor of the standardised input t."""
    gate_bias: Tensor
    """``(out,)``."""
    activation: str
    """``"sigmoid"``, ``"sqrt"`` for :math:`\\sqrt{\\max(0, 1 - e^x)}`, ``"relu_log"`` for :math:`e^{-\\max(0, x)}`, or
    ``"none"`` for a layer without a gate."""


class LinearGates(NamedTuple):
    """The layers of a gated linear VAE, each tuple in the order of application."""

    encoder: tuple[GatedLinear, ...]
    variance: tuple[GatedLinear, ...]
    """Vectors whose product is the diagonal of C."""
    decoder: tuple[GatedLinear, ...]


def theorem1_gates(
    covariance: Tensor,
    num_latents: int,
    low: float = 0.01,
    high: float = 10.0,
    decoder: Tensor | None = None,
    decoder_variance: float = 1.0,
) -> LinearGates:
    r"""Gates of a two-layer linear VAE that follow the responses of the paper's Theorem 1.

    For a fixed decoder :math:`D = A \Sigma B^\top` and the water level :math:`w = \beta s^2`, the encoder's gates are
    :math:`\Sigma_i^2 / (\Sigma_i^2 + w)` and the variance's :math:`w / ((D^\top D)_{jj} + w)`, both sigmoids: exactly
    :func:`best_response` at every beta. The decoder's gates are :math:`\sqrt{\max(0, 1 - w / \lambda_i)}`: exactly the
    decoder of :func:`linear_vae_optimum`.
    The encoder answers the *fixed* decoder, so the three together are **not** the joint optimum (with an eigenvalue
    of 1.5, a fixed decoder optimal at 0.01 and the moving decoder, the excess loss reaches 0.33 nats);
    :func:`joint_exact_gates` are. All are written in the standardised input
    :math:`t = \sqrt3 (\log\beta - m) / h`, with :math:`m, h` the middle and half the length of
    :math:`[\log` ``low``, :math:`\log` ``high`` :math:`]`.

    Args:
        covariance: :math:`S`, shape ``(d, d)``.
        num_latents: Number of latents k, from 0 to d.
        low: Lower end of the beta range, positive.
        high: Upper end of the beta range, at least ``low``.
        decoder: The fixed decoder that the encoder answers, shape ``(d, k)``. Default: the optimum at ``low``.
        decoder_variance: :math:`s^2`, positive.

    Returns:
        Two encoder layers, two factors of the variance (each base of the second doubled, under a gate of one half) and
        two decoder layers, of which the last has no gate.

    Raises:
        ValueError: If the range, the covariance or the decoder's shape is wrong.

    Source: Bae et al. 2023 (arXiv 2212.03905), Theorem 1 and Eq. 6-7.

    Note:
        One eigendecomposition and one singular value decomposition.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import theorem1_gates
        >>> gates = theorem1_gates(torch.diag(torch.tensor([4.0, 1.0])), num_latents=2)
        >>> [layer.activation for layer in gates.decoder]
        ['sqrt', 'none']
    """
    eigenvalues, vectors = descending_eigh(covariance)
    k = check_num_latents(num_latents, eigenvalues.numel())
    if decoder is None:
        decoder = linear_vae_optimum(covariance, k, low, decoder_variance).decoder
    if decoder.shape != (eigenvalues.numel(), k):
        raise ValueError(f"decoder must have shape {(eigenvalues.numel(), k)}, got {tuple(decoder.shape)}.")
    span = (low, high, decoder_variance)
    zero, one = torch.zeros_like(eigenvalues[:k]), torch.ones_like(eigenvalues[:k])

    left, singular, right = torch.linalg.svd(decoder, full_matrices=False)
    noise = max(decoder.shape) * torch.finfo(singular.dtype).eps * singular[:1]
    singular = torch.where(singular > noise, singular, 0.0)
    inverse = torch.where(singular > 0, torch.exp(-_log_or_zero(singular)), 0.0)
    shrink = _standardise(-_indicator(singular), 2 * _log_or_zero(singular), *span)
    encoder = (GatedLinear(left.T, *shrink, "sigmoid"), GatedLinear(2 * right.T * inverse, zero, zero, "sigmoid"))

    squares = decoder.square().sum(0)
    widen = _standardise(_indicator(squares), -_log_or_zero(squares), *span)
    base = 2 - _indicator(squares)  # under a gate of one half, an unused column keeps variance 1
    variance = (GatedLinear(base, *widen, "sigmoid"), GatedLinear(2 * one, zero, zero, "sigmoid"))
    return LinearGates(encoder, variance, _decoder_gates(eigenvalues[:k], vectors[:, :k], low, high, decoder_variance))


def joint_exact_gates(
    covariance: Tensor, num_latents: int, low: float = 0.01, high: float = 10.0, decoder_variance: float = 1.0
) -> LinearGates:
    r"""Gates that make one linear VAE jointly optimal at every beta.

    .. math::
        E_i(\beta) = \lambda_i^{-1/2} \sqrt{\max(0, 1 - w/\lambda_i)}\, u_i^\top, \quad
        \log C_i(\beta) = -\max(0, \log\lambda_i - \log w), \quad
        D_i(\beta) = \lambda_i^{1/2} \sqrt{\max(0, 1 - w/\lambda_i)}\, u_i .

    The encoder has the decoder's square-root gate and the log-variance a ramp, which the paper's sigmoids can only
    approach.

    Args:
        covariance: :math:`S`, shape ``(d, d)``.
        num_latents: Number of latents k, from 0 to d.
        low: Lower end of the beta range, positive.
        high: Upper end of the beta range, at least ``low``.
        decoder_variance: :math:`s^2`, positive.

    Returns:
        One encoder layer, one variance factor (activation ``"relu_log"``) and two decoder layers, in the standardised
        input t (see :func:`theorem1_gates`).

    Raises:
        ValueError: If the range or the covariance is wrong.

    Source: derived from Bae et al. 2023 (arXiv 2212.03905), Eq. 21-23; not in the paper.

    Note:
        One eigendecomposition.

    Example:
        >>> import torch
        >>> from lightning_ext.functional import joint_exact_gates
        >>> gates = joint_exact_gates(torch.diag(torch.tensor([4.0, 1.0])), num_latents=1)
        >>> gates.encoder[0].weight  # 1 / sqrt(4)
        tensor([[0.5000, 0.0000]])
    """
    eigenvalues, vectors = descending_eigh(covariance)
    k = check_num_latents(num_latents, eigenvalues.numel())
    spectrum, directions = eigenvalues[:k], vectors[:, :k]
    log_spectrum = _log_or_zero(spectrum)
    inverse_root = _indicator(spectrum) * torch.exp(-log_spectrum / 2)
    decoder = _decoder_gates(spectrum, directions, low, high, decoder_variance)
    ramp = _standardise(-_indicator(spectrum), log_spectrum, low, high, decoder_variance)
    return LinearGates(
        encoder=(GatedLinear(inverse_root.unsqueeze(-1) * directions.T, *decoder[0][1:3], "sqrt"),),
        variance=(GatedLinear(torch.ones_like(spectrum), *ramp, "relu_log"),),
        decoder=decoder,
    )


def _decoder_gates(
    spectrum: Tensor, directions: Tensor, low: float, high: float, decoder_variance: float
) -> tuple[GatedLinear, GatedLinear]:
    gate = _standardise(_indicator(spectrum), -_log_or_zero(spectrum), low, high, decoder_variance)
    zero = directions.new_zeros(len(directions))
    identity = torch.eye(spectrum.numel(), dtype=spectrum.dtype, device=spectrum.device)
    return GatedLinear(identity, *gate, "sqrt"), GatedLinear(directions * spectrum.sqrt(), zero, zero, "none")


def _standardise(
    weight: Tensor, bias: Tensor, low: float, high: float, decoder_variance: float
) -> tuple[Tensor, Tensor]:
    """Rewrite ``weight * log(beta s2) + bias`` as a function of t."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"low and high must satisfy 0 < low <= high < inf, got low={low}, high={high}.")
    if not 0 < decoder_variance < math.inf:
        raise ValueError(f"decoder_variance must be positive and finite, got {decoder_variance}.")
    middle, half = (math.log(low) + math.log(high)) / 2, (math.log(high) - math.log(low)) / 2
    return weight * (half / _SQRT3), bias + weight * (middle + math.log(decoder_variance))


def _indicator(value: Tensor) -> Tensor:
    return (value > 0).to(value.dtype)


def _log_or_zero(value: Tensor) -> Tensor:
    """``log(value)`` where positive, 0 elsewhere."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).log(), 0.0)
