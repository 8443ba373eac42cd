"""Models whose mutual information is known, to hold estimates against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "copy_infonce",
    "correlated_gaussian_information",
    "finite_joint_information",
    "linear_gaussian_annealing_bounds",
    "linear_gaussian_information",
    "quadratic_critic_values",
]


def _signal_to_noise(weight: Tensor, sigma: float) -> Tensor:
    if weight.ndim != 2 or not sigma > 0:
        raise ValueError(f"weight must be (D, d) and sigma positive; got {tuple(weight.shape)} and {sigma}.")
    found: Tensor = torch.linalg.svdvals(weight.double()).square() / sigma**2
    return found


def linear_gaussian_information(weight: Tensor, sigma: float) -> Tensor:
    r"""Information of :math:`x = W z + b + \sigma \epsilon` on :math:`z \sim \mathcal N(0, I)`.

    .. math:: I = \tfrac12 \sum_i \log(1 + a_i), \quad a_i \text{ the eigenvalues of } W^\top W / \sigma^2

    Args:
        weight: W, ``(D, d)``.
        sigma: positive.

    Returns:
        A scalar in nats, float64.

    Raises:
        ValueError: If an argument is none of these.

    >>> linear_gaussian_information(torch.tensor([[3.0]]), 1.0)  # log(10) / 2
    tensor(1.1513, dtype=torch.float64)
    """
    return 0.5 * torch.log1p(_signal_to_noise(weight, sigma)).sum()


def linear_gaussian_annealing_bounds(
    weight: Tensor, sigma: float, betas: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    r"""What annealed chains from the prior give in expectation if every transition is a fresh sample.

    .. math:: g(\beta) = \sum_i \tfrac12 \Bigl[ \frac{a_i}{1 + \beta a_i} + \frac{1 + a_i}{(1 + \beta a_i)^2} - 1 \Bigr]

    The upper bound is the left Riemann sum of g over the schedule, the lower bound the right one; the integral is I. On
    the linear schedule their gap is :math:`\sum_i a_i / T`.

    Args:
        weight: W, ``(D, d)``.
        sigma: positive.
        betas: the schedule, T + 1 points from 0 to 1.

    Returns:
        The upper and the lower bound, scalars in nats, float64.

    Raises:
        ValueError: If an argument is none of these.
    """
    a, points = _signal_to_noise(weight, sigma), torch.as_tensor(betas, dtype=torch.float64)
    if points.ndim != 1 or len(points) < 2 or points[0] != 0 or points[-1] != 1:
        raise ValueError(f"betas must be T + 1 points from 0 to 1; got {tuple(points.shape)}.")
    damped = 1 + points.unsqueeze(1) * a
    g = 0.5 * (a / damped + (1 + a) / damped.square() - 1).sum(1)
    widths = points.diff()
    return widths @ g[:-1], widths @ g[1:]


def correlated_gaussian_information(dim: int, rho: float) -> float:
    r"""Information of Gaussians that are correlated dimension by dimension, :math:`-\frac d2 \log(1 - \rho^2)`.

    Args:
        dim: d, at least 1.
        rho: between -1 and 1.

    Returns:
        Nats.

    Raises:
        ValueError: If an argument is out of range.

    >>> round(correlated_gaussian_information(20, 0.5), 6)
    2.876821
    """
    if dim < 1 or not -1 < rho < 1:
        raise ValueError(f"dim must be at least 1 and rho between -1 and 1; got {dim} and {rho}.")
    return -0.5 * dim * math.log1p(-(rho**2))


def finite_joint_information(joint: Tensor) -> Tensor:
    r"""Information of a table of probabilities, :math:`\sum p(x, z) \log \frac{p(x, z)}{p(x) p(z)}`.

    Args:
        joint: ``(X, Z)``, at least 0, summing to 1.

    Returns:
        A scalar in nats, float64.

    Raises:
        ValueError: If it is no table of probabilities.

    >>> finite_joint_information(torch.eye(2) / 2)  # log 2
    tensor(0.6931, dtype=torch.float64)
    """
    p = joint.double()
    if p.ndim != 2 or bool((p < 0).any()) or not math.isclose(float(p.sum()), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"joint must be a table of probabilities that sum to 1; got shape {tuple(p.shape)}, sum {float(p.sum()):g}."
        )
    independent = p.sum(1, keepdim=True) * p.sum(0)
    return torch.where(p > 0, p * (p / independent.clamp_min(torch.finfo(p.dtype).tiny)).log(), 0.0).sum()


def copy_infonce(symbols: int, num: int) -> float:
    r"""InfoNCE with its best critic, where z is one of M symbols with equal chances and x = z.

    .. math:: \log K - \mathbb E \log(1 + n), \quad n \sim \operatorname{Bin}(K - 1, 1 / M)

    The information is :math:`\log M`, the bound at most :math:`\log K`.

    Args:
        symbols: M, at least 1.
        num: K, at least 1.

    Returns:
        Nats.

    Raises:
        ValueError: If an argument is out of range.

    >>> round(copy_infonce(16, 64), 6)
    2.647556
    """
    if symbols < 1 or num < 1:
        raise ValueError(f"symbols and num must be at least 1; got {symbols} and {num}.")
    chance, others = 1 / symbols, num - 1
    likely = (math.comb(others, n) * chance**n * (1 - chance) ** (others - n) for n in range(num))
    return math.log(num) - math.fsum(p * math.log1p(n) for n, p in enumerate(likely))


def quadratic_critic_values(rho: float, a: float, b: float, c: float) -> dict[str, float]:
    r"""What the critic :math:`T = A x z - \tfrac12 B z^2 - \tfrac12 C x^2` says of two Gaussians of correlation rho.

    .. math:: \mathrm{IBAL} = A \rho - \tfrac12 B - \frac{A^2}{2 (1 + B)} + \tfrac12 \log(1 + B)

    with the prior as base; Donsker-Varadhan and NWJ likewise, minus infinity where :math:`\mathbb E e^T` is infinite.
    The best are :math:`1 + B = 1 / (1 - \rho^2)`, :math:`A = \rho / (1 - \rho^2)`, where IBAL is the information for
    every C.

    Args:
        rho: between -1 and 1.
        a: A.
        b: B, above -1.
        c: C.

    Returns:
        ``"ibal"``, ``"donsker_varadhan"`` and ``"nwj"``, in nats.

    Raises:
        ValueError: If an argument is out of range.

    >>> {name: round(value, 4) for name, value in quadratic_critic_values(0.9, 2.0, 1.0, 1.5).items()}
    {'ibal': 0.6466, 'donsker_varadhan': 0.55, 'nwj': 0.55}
    """
    if not -1 < rho < 1 or not b > -1:
        raise ValueError(f"rho must be between -1 and 1 and b above -1; got {rho} and {b}.")
    mean = a * rho - b / 2
    ibal = mean - a**2 / (2 * (1 + b)) + 0.5 * math.log1p(b)
    inner = 1 - a**2 / (1 + b) + c
    if inner <= 0:
        return {"ibal": ibal, "donsker_varadhan": -math.inf, "nwj": -math.inf}
    log_mean = -0.5 * math.log((1 + b) * inner)
    dv, nwj = mean - c / 2 - log_mean, mean - c / 2 + 1 - math.exp(log_mean)
    return {"ibal": ibal, "donsker_varadhan": dv, "nwj": nwj}
