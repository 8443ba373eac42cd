r"""Mathematics of the multi-rate VAE: rates, distortions, gates and the sampling of :math:`\beta`.

Source: Bae, Zhang, Ruan, Wang, Hasegawa, Ba, Grosse, *Multi-Rate VAE: Train Once, Get the Full Rate-Distortion Curve*,
ICLR 2023, arXiv 2212.03905. Everywhere

.. math:: L_\beta = D + \beta R, \quad D = E_x E_{q(z|x)}[-\log p(x|z)], \quad R = E_x KL(q(z|x) \,\|\, N(0, I))

in nats: **summed** over pixels and latents, averaged over the batch. A distortion averaged over pixels changes the
meaning of :math:`\beta` by the number of pixels and collapses the posterior.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ext.functional.counter_rng import seeded_generator

__all__ = [
    "at_least_float32",
    "bernoulli_distortion",
    "beta_grid",
    "free_bits_rate",
    "gate_activation",
    "gaussian_distortion",
    "gaussian_kl",
    "kl_weight",
    "sigma_vae_distortion",
    "squared_error_distortion",
    "standardize_beta",
    "stratified_uniform",
    "total_correlation_terms",
    "unstandardize_beta",
]

GateActivation = Literal["sigmoid", "sqrt", "two_sigmoid"]
TCEstimator = Literal["mws", "mss"]

_SQRT3 = math.sqrt(3.0)


def _log_range(low: float, high: float) -> tuple[float, float]:
    if not (math.isfinite(low) and math.isfinite(high) and 0.0 < low <= high):
        raise ValueError(
            f"the range of beta must satisfy 0 < low <= high, both finite; got low={low}, high={high}. "
            "beta is sampled on a log scale, so 0 cannot be an end point: take a small number such as 0.01."
        )
    log_low, log_high = math.log(low), math.log(high)
    return (log_low + log_high) / 2, (log_high - log_low) / 2


def standardize_beta(beta: Tensor, low: float, high: float) -> Tensor:
    r"""Map :math:`\beta` to the zero-mean, unit-variance input of the gates (2212.03905, section 4.1).

    .. math:: t = \sqrt 3\,(\log\beta - m)/h, \quad m = (\log a + \log b)/2, \quad h = (\log b - \log a)/2

    so that :math:`t \in [-\sqrt 3, \sqrt 3]` has mean 0 and variance 1 when :math:`\log\beta \sim U(\log a, \log b)`.

    Args:
        beta: any shape, positive.
        low: :math:`a > 0`.
        high: :math:`b \ge a`. For :math:`a = b` the result is 0 everywhere.

    Returns:
        ``t``, the shape of ``beta``.

    Raises:
        ValueError: the range is not ``0 < low <= high``.

    >>> round(float(standardize_beta(torch.tensor(1.0), 0.01, 10.0)), 6)
    0.57735
    """
    centre, half_width = _log_range(low, high)
    if half_width == 0.0:
        return torch.zeros_like(beta)
    return _SQRT3 * (beta.log() - centre) / half_width


def unstandardize_beta(t: Tensor, low: float, high: float) -> Tensor:
    r"""Inverse of :func:`standardize_beta`.

    Args:
        t: standardised input, any shape.
        low: :math:`a > 0`.
        high: :math:`b \ge a`.

    Returns:
        :math:`\beta = \exp(m + h t / \sqrt 3)`, the shape of ``t``.

    Raises:
        ValueError: the range is not ``0 < low <= high``.
    """
    centre, half_width = _log_range(low, high)
    return torch.exp(centre + half_width * t / _SQRT3)


def beta_grid(num: int, low: float, high: float) -> Tensor:
    """``num`` values of beta, evenly spaced on a log scale, both ends included and exact.

    Args:
        num: at least 1; one value is the geometric mean of the range.
        low: smallest beta, positive.
        high: largest beta.

    Returns:
        ``(num,)`` in float64.

    Raises:
        ValueError: ``num < 1`` or the range is not ``0 < low <= high``.

    >>> beta_grid(3, 0.1, 10.0).tolist()
    [0.1, 1.0, 10.0]
    """
    centre, half_width = _log_range(low, high)
    if num < 1:
        raise ValueError(f"num must be at least 1; got {num}.")
    if num == 1:
        return torch.tensor([math.exp(centre)], dtype=torch.float64)
    grid = torch.linspace(centre - half_width, centre + half_width, num, dtype=torch.float64).exp()
    grid[0], grid[-1] = low, high
    return grid


def stratified_uniform(num: int, seed: int, *counters: int, rank: int = 0, world_size: int = 1) -> Tensor:
    r"""Uniform numbers that fill the unit interval evenly over the **global** batch of all ranks.

    The global batch of ``world_size * num`` samples is cut into as many strata; a permutation drawn from
    ``(seed, *counters)`` gives each sample one stratum, :math:`u_i = (\pi(i) + U_i)/n`. Sample ``i`` of rank ``r`` is
    global sample ``i * world_size + r``, the order of ``DistributedSampler``, so two processes with batches of ``B``
    draw what one process with a batch of ``2B`` draws.

    Args:
        num: samples on this rank, equal on all ranks.
        seed: the same on all ranks.
        *counters: address of the draw (epoch, batch index), the same on all ranks.
        rank: this rank.
        world_size: number of ranks.

    Returns:
        ``(num,)`` float64 in ``[0, 1)``: each is uniform, together they are stratified. No communication; cost grows
        with the global batch.
    """
    generator = seeded_generator(seed, *counters)
    total = num * world_size
    strata = torch.randperm(total, generator=generator)
    jitter = torch.rand(total, generator=generator, dtype=torch.float64)
    return ((strata + jitter) / total)[rank::world_size]


def gate_activation(x: Tensor, activation: GateActivation, gain: float = 1.0) -> Tensor:
    r"""Squash the affine function of :math:`t` into a gate (2212.03905, Eq. 7).

    - ``sigmoid``: :math:`1/(1+e^{-x})`, the paper's encoder;
    - ``sqrt``: :math:`\sqrt{\max(0, 1-e^x)}`, the paper's decoder, the exact response of a linear decoder;
    - ``two_sigmoid``: :math:`2/(1+e^{-x})`, which is 1 at 0.

    The square root is written so that the value, the gradient and ``torch.func.jvp`` are finite for every finite ``x``
    (the naive forms give NaN at ``x >= 0`` and lose :math:`1-e^x` for tiny ``x`` in float32). Its gradient is 0 where
    the gate is closed.

    Args:
        x: any shape.
        activation: one of the three names.
        gain: positive factor on the gate.

    Returns:
        ``gain`` times the gate, the shape of ``x``.

    >>> x = torch.tensor(-1.0, requires_grad=True)
    >>> gate = gate_activation(x, "sqrt")
    >>> gate.backward()
    >>> round(gate.item(), 6), round(x.grad.item(), 6)
    (0.79506, -0.231353)
    """
    if activation == "sigmoid":
        return torch.sigmoid(x) if gain == 1.0 else gain * torch.sigmoid(x)
    if activation == "two_sigmoid":
        return (2.0 * gain) * torch.sigmoid(x)
    if activation == "sqrt":
        # A closed gate is computed at x = -1 and multiplied by 0. torch.where would say the same at twice the cost, and
        # a square root of exact zeros is twenty times slower than one of positive numbers.
        is_open = x.detach().neg().sign().clamp_min(0.0)
        inside = torch.addcmul(is_open - 1.0, x, is_open)
        return is_open * torch.sqrt(torch.expm1(inside) * -(gain * gain))
    raise ValueError(f"activation must be 'sigmoid', 'sqrt' or 'two_sigmoid'; got {activation!r}.")


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    r""":math:`KL(N(\mu, e^{\ell}) \,\|\, N(0, 1)) = (\mu^2 + e^{\ell} - 1 - \ell)/2` per dimension.

    Args:
        mu: posterior means, any shape.
        logvar: logarithms of the variances, the same shape.

    Returns:
        Nats, the shape of ``mu``; sum over the last dimension for the rate of a sample.

    >>> gaussian_kl(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor([2.])
    """
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)


def _sum_per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def bernoulli_distortion(reconstruction: Tensor, target: Tensor, logits: bool = True) -> Tensor:
    r"""Binary cross-entropy :math:`-\sum_p x_p\log y_p + (1-x_p)\log(1-y_p)` of each sample.

    Args:
        reconstruction: logits, or probabilities in [0, 1] with ``logits=False``; ``(B, *)``.
        target: in [0, 1], ``(B, *)``.
        logits: whether ``reconstruction`` holds logits (numerically safer) or probabilities.

    Returns:
        ``(B,)`` nats, summed over all but the first dimension, in float32 or wider.

    >>> bernoulli_distortion(torch.zeros(1, 4), torch.ones(1, 4)) / math.log(2)
    tensor([4.])
    """
    reconstruction, target = at_least_float32(reconstruction), at_least_float32(target)
    if logits:
        return _sum_per_sample(F.binary_cross_entropy_with_logits(reconstruction, target, reduction="none"))
    # binary_cross_entropy refuses to run under autocast, whatever its inputs' dtype.
    with torch.autocast(reconstruction.device.type, enabled=False):
        return _sum_per_sample(F.binary_cross_entropy(reconstruction, target, reduction="none"))


def gaussian_distortion(
    reconstruction: Tensor, target: Tensor, variance: float = 1.0, constant: bool = False
) -> Tensor:
    r"""Gaussian negative log-likelihood :math:`\|x - y\|^2/(2 s^2)` of each sample.

    Args:
        reconstruction: decoder means, ``(B, *)``.
        target: data, ``(B, *)``.
        variance: the decoder's variance :math:`s^2 > 0`. Variance :math:`s^2` at :math:`\beta` trains the same network
            as variance 1 at :math:`\beta s^2`.
        constant: add :math:`\frac d2 \log(2\pi s^2)`, which makes the sum a density in nats.

    Returns:
        ``(B,)`` nats (without the constant: nats up to a constant).

    >>> gaussian_distortion(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([1.])
    """
    error = _sum_per_sample((at_least_float32(reconstruction) - at_least_float32(target)).square()) / (2.0 * variance)
    if constant:
        error = error + 0.5 * target[0].numel() * math.log(2.0 * math.pi * variance)
    return error


def squared_error_distortion(reconstruction: Tensor, target: Tensor) -> Tensor:
    r"""Plain squared error :math:`\|x - y\|^2`, the convention of the official image experiments.

    It is twice :func:`gaussian_distortion`: :math:`\beta` here trains what :math:`\beta/2` trains there.

    Args:
        reconstruction: ``(B, *)``.
        target: ``(B, *)``.

    Returns:
        ``(B,)``, summed over all but the first dimension.
    """
    return _sum_per_sample((at_least_float32(reconstruction) - at_least_float32(target)).square())


def sigma_vae_distortion(reconstruction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    r"""Gaussian negative log-likelihood at the variance that is optimal for the batch (sigma-VAE).

    .. math:: s^2 = \frac{1}{Bd}\sum_i \|x_i - y_i\|^2, \quad D_i = \frac d2 \log(2\pi s^2) + \|x_i - y_i\|^2/(2 s^2)

    Source: Rybkin, Daniilidis, Levine, *Simple and Effective VAE Training with Calibrated Decoders*, ICML 2021,
    arXiv 2006.13202 (from memory). It gives one point of the rate-distortion plane, chosen by the data.

    Args:
        reconstruction: decoder means, ``(B, *)``.
        target: data, ``(B, *)``.

    Returns:
        ``(B,)`` distortion in nats and the scalar :math:`s^2`, both differentiable.
    """
    squared = squared_error_distortion(reconstruction, target)
    dimension = target[0].numel()
    variance = (squared.mean() / dimension).clamp_min(torch.finfo(squared.dtype).tiny)
    return 0.5 * dimension * torch.log(2.0 * math.pi * variance) + squared / (2.0 * variance), variance


def free_bits_rate(kl: Tensor, free_bits: float) -> Tensor:
    r"""Rate with a floor per latent, :math:`\sum_j \max(\lambda, E_i KL_{ij})`, so that latents are not switched off.

    Source: Kingma et al., *Improved Variational Inference with Inverse Autoregressive Flow*, NeurIPS 2016,
    arXiv 1606.04934 (from memory).

    Args:
        kl: ``(B, d)`` nats per sample and latent.
        free_bits: :math:`\lambda \ge 0`, nats per latent that cost nothing.

    Returns:
        Scalar, nats. The expectation is over the local batch: under DDP every rank uses its own.

    >>> free_bits_rate(torch.tensor([[0.1, 2.0], [0.1, 4.0]]), 0.5)
    tensor(3.5000)
    """
    return kl.mean(0).clamp_min(free_bits).sum()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; anything wider as it is. Rates, distortions and gates are computed after it.

    Args:
        x: any floating-point tensor.

    Returns:
        The same values, in float32 or wider.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2.0 * math.pi) + logvar + (z - mu).square() * torch.exp(-logvar))


def _importance_log_weights(batch: int, dataset_size: int, estimator: TCEstimator, like: Tensor) -> Tensor:
    if estimator == "mws":
        return like.new_full((batch, batch), -math.log(batch * dataset_size))
    if estimator != "mss":
        raise ValueError(f"estimator must be 'mws' or 'mss'; got {estimator!r}.")
    if batch < 2:
        raise ValueError("the 'mss' estimator needs a batch of at least two samples; got one.")
    others = batch - 1
    weights = like.new_full((batch, batch), 1.0 / others)
    rows = torch.arange(batch, device=like.device)
    weights[rows, rows] = 1.0 / dataset_size
    weights[rows, (rows + 1) % batch] = max(dataset_size - others, 0) / (dataset_size * others)
    return weights.log()


def total_correlation_terms(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, estimator: TCEstimator = "mws"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Split the KL of each sample into index-code information, total correlation and dimension-wise KL.

    .. math:: \log\frac{q(z|x)}{p(z)} = \log\frac{q(z|x)}{q(z)} + \log\frac{q(z)}{\prod_j q(z_j)}
              + \sum_j \log\frac{q(z_j)}{p(z_j)}

    with :math:`q(z)` estimated from the other samples of the batch: ``mws`` weights all of them by
    :math:`1/(MN)` (biased), ``mss`` by stratified weights that sum to one.

    Source: Chen, Li, Grosse, Duvenaud, *Isolating Sources of Disentanglement in VAEs*, NeurIPS 2018, arXiv 1802.04942,
    Eq. 3 and appendix C.

    Args:
        z: samples of the posteriors, ``(M, d)``.
        mu: posterior means, ``(M, d)``.
        logvar: log variances, ``(M, d)``.
        dataset_size: :math:`N`, the size of the training set, at least 1.
        estimator: ``"mws"`` or ``"mss"``.

    Returns:
        Three tensors ``(M,)`` in nats; their sum is the Monte-Carlo KL whatever the estimator. Cost and memory
        :math:`M^2 d`. Under DDP every rank uses its local batch.

    Raises:
        ValueError: ``dataset_size < 1``, an unknown estimator, or ``mss`` with one sample.
    """
    if dataset_size < 1:
        raise ValueError(f"dataset_size must be at least 1; got {dataset_size}.")
    log_weights = _importance_log_weights(len(z), dataset_size, estimator, z)
    pairwise = _log_normal(z[:, None], mu[None], logvar[None])
    log_joint = torch.logsumexp(log_weights + pairwise.sum(-1), dim=1)
    log_product = torch.logsumexp(log_weights[..., None] + pairwise, dim=1).sum(-1)
    log_posterior = _log_normal(z, mu, logvar).sum(-1)
    log_prior = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(-1)
    return log_posterior - log_joint, log_joint - log_product, log_product - log_prior


def kl_weight(
    progress: float,
    schedule: Literal["constant", "monotonic", "cyclical"],
    warmup_fraction: float = 0.3,
    num_cycles: int = 4,
    ramp_fraction: float = 0.5,
) -> float:
    r"""Weight of the KL term, as a fraction of its final value, at a point of the training.

    - ``constant``: 1;
    - ``monotonic``: a line from 0 to 1 over the first ``warmup_fraction`` of the training (Bowman et al. 2016);
    - ``cyclical``: ``num_cycles`` such lines, each over the first ``ramp_fraction`` of its cycle (Fu et al. 2019).

    Args:
        progress: in [0, 1): epoch over number of epochs, or step over number of steps.
        schedule: one of the three names.
        warmup_fraction: in (0, 1].
        num_cycles: at least 1.
        ramp_fraction: in (0, 1].

    Returns:
        The weight, in [0, 1].

    >>> [round(kl_weight(epoch / 20, "cyclical"), 1) for epoch in range(6)]
    [0.0, 0.4, 0.8, 1.0, 1.0, 0.0]
    """
    if schedule == "constant":
        return 1.0
    if schedule == "monotonic":
        return min(1.0, progress / warmup_fraction)
    if schedule == "cyclical":
        # Rounding keeps a cycle that starts at an exact epoch (5 of 20) from falling into the cycle before it.
        return min(1.0, round(progress * num_cycles, 9) % 1.0 / ramp_fraction)
    raise ValueError(f"schedule must be 'constant', 'monotonic' or 'cyclical'; got {schedule!r}.")
