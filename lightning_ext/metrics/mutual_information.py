"""Bounds on mutual information from densities, streamed over batches and ranks."""

import math
from typing import Any, Literal

from torch import Tensor

from lightning_ext.functional import (
    barber_agakov_lower,
    barber_agakov_upper,
    giwae_lower,
    giwae_upper,
    iwae_bound,
    structured_infonce,
    structured_infonce_upper,
)
from lightning_ext.metrics._per_datum import SidedMean, require_finite, with_first_row

__all__ = ["BarberAgakovBound", "GIWAEBound", "IWAEBound", "StructuredInfoNCE"]

Side = Literal["lower", "upper", "both"]


class BarberAgakovBound(SidedMean):
    r"""Barber-Agakov bounds from a normalised density q(z|x).

    .. math::
        \mathbb E\left[\log \frac{q(z|x)}{p(z)}\right] \le I \le
        \mathbb E\left[\log p(x|z) - \log \frac{p(x, \tilde z)}{q(\tilde z|x)}\right], \quad \tilde z \sim q(\cdot|x)

    ``update(log_q, log_prior, log_likelihood, log_weight)`` takes ``(B,)`` each, for pairs of p(x, z): the lower side
    needs the first two, the upper side the last two, by keyword, and what a side does not need is not looked at.

    - ``log_q``, ``log_prior``: :math:`\log q(z_b|x_b)` and :math:`\log p(z_b)`;
    - ``log_likelihood``: :math:`\log p(x_b|z_b)`, finite;
    - ``log_weight``: :math:`\log p(x_b, \tilde z_b) - \log q(\tilde z_b|x_b)`.

    ``compute()`` returns a dict of scalars: ``lower`` or ``upper``, its ``stderr``, and ``count``, the number of pairs;
    with ``side="both"``, ``lower``, ``upper`` and ``gap`` in nats, each with ``..._stderr``, that of the gap from
    differences pair by pair.

    Args:
        side: ``"lower"``, ``"upper"`` or ``"both"``.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on shapes that would broadcast, empty batches, NaN and missing arguments.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Barber and Agakov 2003; Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        States are means and squared deviations in float64 (float32 on MPS) that merge over ranks: one rank and many
        give one value. Standard errors take pairs to be independent. An infinite bound is infinite.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import BarberAgakovBound
        >>> bound = BarberAgakovBound()
        >>> bound.update(log_q=torch.tensor([-1.0, -2.0]), log_prior=torch.tensor([-3.0, -3.0]))
        >>> {name: round(value.item(), 4) for name, value in bound.compute().items()}
        {'lower': 1.5, 'stderr': 0.5, 'count': 2}
    """

    def __init__(self, side: Side = "lower", key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(side, key_prefix, **kwargs)

    def update(
        self,
        log_q: Tensor | None = None,
        log_prior: Tensor | None = None,
        log_likelihood: Tensor | None = None,
        log_weight: Tensor | None = None,
    ) -> None:
        """Add pairs; see the class for the arguments."""
        sides = {}
        if self.has("lower"):
            log_q, log_prior = self.widened(log_q=log_q, log_prior=log_prior)
            sides["lower"] = barber_agakov_lower(log_q, log_prior)
            require_finite("log_prior", log_prior)
        if self.has("upper"):
            log_likelihood, log_weight = self.widened(log_likelihood=log_likelihood, log_weight=log_weight)
            sides["upper"] = barber_agakov_upper(log_likelihood, log_weight)
            require_finite("log_likelihood", log_likelihood)
        self.add_sides(**sides)


class IWAEBound(SidedMean):
    r"""Importance-weighted bounds from K samples of a proposal q(z|x).

    .. math:: \mathbb E\left[\log p(x|z) - \log \frac1K \sum_{k=1}^K w_k\right], \quad
        w_k = \frac{p(x, z_k)}{q(z_k|x)}

    An upper bound with all samples from q; a lower bound with the pair's own z, which is a posterior sample, among
    them. The lower side is at most :math:`\log K` above :class:`BarberAgakovBound`'s.

    ``update(log_likelihood, log_weights, posterior_log_weight=None)`` takes

    - ``log_likelihood``: :math:`\log p(x_b|z_b)`, ``(B,)``, finite;
    - ``log_weights``: :math:`\log w_k`, ``(K, B)``; for the upper side all of samples of q;
    - ``posterior_log_weight``: :math:`\log w` at the pair's own z, ``(B,)``. On the lower side it takes the place of
      row 0; without it, row 0 is that weight. ``side="both"`` needs it.

    ``compute()`` returns what :class:`BarberAgakovBound` does.

    Args:
        side: ``"lower"``, ``"upper"`` or ``"both"``.
        num_samples: K that every batch must have. Default: any, which may differ.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on malformed shapes, empty batches, NaN, and a posterior weight that is not finite.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Burda et al. 2016 (arXiv 1509.00519); Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        Distributed behaviour as :class:`BarberAgakovBound`. For K beyond memory, stream
        :class:`~lightning_ext.functional.StreamingLogMeanExp` and pass its value as one row.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import IWAEBound
        >>> bound = IWAEBound(side="both")
        >>> weights = torch.tensor([[-3.0, -2.0], [-3.0, -2.0]])
        >>> bound.update(torch.tensor([-1.0, -1.0]), weights, posterior_log_weight=torch.tensor([-3.0, -2.0]))
        >>> {name: round(value.item(), 4) for name, value in bound.compute().items() if "stderr" not in name}
        {'lower': 1.5, 'upper': 1.5, 'gap': 0.0, 'count': 2}
    """

    def __init__(
        self, side: Side = "lower", num_samples: int | None = None, key_prefix: str = "", **kwargs: Any
    ) -> None:
        super().__init__(side, key_prefix, **kwargs)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, or None for any; got {num_samples}.")
        self.num_samples = num_samples

    def update(self, log_likelihood: Tensor, log_weights: Tensor, posterior_log_weight: Tensor | None = None) -> None:
        """Add pairs; see the class for the arguments."""
        log_likelihood, log_weights = self.widened(log_likelihood=log_likelihood, log_weights=log_weights)
        sides = {"upper": iwae_bound(log_likelihood, log_weights)}
        if self.num_samples not in (None, len(log_weights)):
            raise ValueError(f"log_weights must be of num_samples={self.num_samples} samples; got {len(log_weights)}.")
        require_finite("log_likelihood", log_likelihood)
        if self.has("lower"):
            name = "log_weights[0], the posterior sample's,"
            if posterior_log_weight is not None or self.side == "both":
                name = "posterior_log_weight"
                (first,) = self.widened(posterior_log_weight=posterior_log_weight)
                log_weights = with_first_row(log_weights, first, ("log_weights", name))
            require_finite(name, log_weights[0])
            sides["lower"] = iwae_bound(log_likelihood, log_weights)
        self.add_sides(**sides)


class StructuredInfoNCE(SidedMean):
    r"""Bounds from a likelihood and samples of the prior, whose density need not be known.

    .. math:: \mathbb E \log \frac{p(x|z)}{\frac1K \sum_{k=1}^K p(x|z_k)}

    A lower bound, of at most :math:`\log K`, with the pair's own z as :math:`z_1`; an upper bound with all from p(z).

    ``update(scores, log_likelihood=None)`` takes

    - ``scores``: :math:`\log p(x_b|z_k)`, ``(K, B)``; for the upper side all of samples of p(z);
    - ``log_likelihood``: :math:`\log p(x_b|z_b)` at the pair's own z, ``(B,)``, finite. On the lower side it takes the
      place of row 0; without it, row 0 is that. The upper side needs it.

    ``compute()`` returns what :class:`BarberAgakovBound` does.

    Args:
        side: ``"lower"``, ``"upper"`` or ``"both"``.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on malformed shapes, empty batches, NaN, and pairs of no density.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        Distributed behaviour as :class:`BarberAgakovBound`.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import StructuredInfoNCE
        >>> bound = StructuredInfoNCE()
        >>> bound.update(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))  # at the cap, log 2
        >>> round(bound.compute()["lower"].item(), 4)
        0.6931
    """

    def __init__(self, side: Side = "lower", key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(side, key_prefix, **kwargs)

    def update(self, scores: Tensor, log_likelihood: Tensor | None = None) -> None:
        """Add pairs; see the class for the arguments."""
        (scores,) = self.widened(scores=scores)
        if scores.ndim != 2:
            raise ValueError(f"scores must be (K, B), a row per sample; got {tuple(scores.shape)}.")
        name = "scores[0], the likelihood of the pair,"
        if log_likelihood is None and self.side == "lower":
            log_likelihood = scores[0]
        else:
            name = "log_likelihood"
            (log_likelihood,) = self.widened(log_likelihood=log_likelihood)
        rows = with_first_row(scores, log_likelihood, ("scores", "log_likelihood"))
        require_finite(name, log_likelihood)
        self.add_sides(lower=structured_infonce(rows), upper=structured_infonce_upper(log_likelihood, scores))


class GIWAEBound(SidedMean):
    r"""What a critic T(x, z) adds to :class:`BarberAgakovBound` with K samples of q(z|x).

    .. math:: I \ge \mathbb E\left[\log \frac{q(z_1|x)}{p(z_1)} + T(x, z_1)
        - \log \frac1K \sum_{k=1}^K e^{T(x, z_k)}\right]

    The lower side needs no likelihood: q, p(z) and the critic do. For the upper side see
    :func:`~lightning_ext.functional.giwae_upper`.

    ``update(log_q, log_prior, critic, log_likelihood, log_weights, posterior_critic)``: the lower side needs the first
    three, the upper side ``critic``, ``log_likelihood`` and ``log_weights``, both all; what a side does not need is not
    looked at.

    - ``log_q``, ``log_prior``: at the pair's own z, ``(B,)``;
    - ``critic``: :math:`T(x_b, z_k)`, ``(K, B)``; for the upper side all of samples of q;
    - ``log_likelihood``: :math:`\log p(x_b|z_b)`, ``(B,)``, finite;
    - ``log_weights``: :math:`\log p(x_b, z_k) - \log q(z_k|x_b)` of the critic's samples, ``(K, B)``;
    - ``posterior_critic``: :math:`T(x_b, z_b)`, ``(B,)``. On the lower side it takes the place of row 0; without it,
      row 0 is that.

    ``compute()`` returns what :class:`BarberAgakovBound` does.

    Args:
        side: ``"lower"``, ``"upper"`` or ``"both"``.
        key_prefix: Stands before each key.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, on malformed shapes, empty batches, NaN, missing arguments, and a critic that is
            not finite at the pair's own z.
        RuntimeError: From ``compute`` when no rank was ever updated.

    Source: Brekelmans et al. 2022 (arXiv 2303.06992).

    Note:
        Distributed behaviour as :class:`BarberAgakovBound`.

    Example:
        >>> import torch
        >>> from lightning_ext.metrics import GIWAEBound
        >>> bound = GIWAEBound()
        >>> bound.update(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -3.0]), critic=torch.zeros(4, 2))
        >>> bound.compute()["lower"].item()  # Barber-Agakov, as the critic says nothing
        1.5
    """

    def __init__(self, side: Side = "lower", key_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(side, key_prefix, **kwargs)

    def update(
        self,
        log_q: Tensor | None = None,
        log_prior: Tensor | None = None,
        critic: Tensor | None = None,
        log_likelihood: Tensor | None = None,
        log_weights: Tensor | None = None,
        posterior_critic: Tensor | None = None,
    ) -> None:
        """Add pairs; see the class for the arguments."""
        (scores,) = self.widened(critic=critic)
        sides = {}
        if self.has("lower"):
            sides["lower"] = self._lower(log_q, log_prior, scores, posterior_critic)
        if self.has("upper"):
            log_likelihood, log_weights = self.widened(log_likelihood=log_likelihood, log_weights=log_weights)
            sides["upper"] = giwae_upper(log_likelihood, log_weights, scores)
            require_finite("log_likelihood", log_likelihood)
            if bool((scores == -math.inf).all(0).any()):
                raise ValueError("critic is minus infinity at all samples of some pair, so that none can be chosen.")
        self.add_sides(**sides)

    def _lower(
        self, log_q: Tensor | None, log_prior: Tensor | None, scores: Tensor, posterior_critic: Tensor | None
    ) -> Tensor:
        log_q, log_prior = self.widened(log_q=log_q, log_prior=log_prior)
        name = "critic[0], at the pair's own z,"
        if posterior_critic is not None or self.side == "both":
            name = "posterior_critic"
            (first,) = self.widened(posterior_critic=posterior_critic)
            scores = with_first_row(scores, first, ("critic", name))
        values: Tensor = giwae_lower(log_q, log_prior, scores)
        require_finite(name, scores[0])
        require_finite("log_prior", log_prior)
        return values
