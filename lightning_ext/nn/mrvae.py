r"""What a network needs to depend on :math:`\log\beta`: its distribution and the context that gates read it from.

Source: Bae et al., *Multi-Rate VAE*, ICLR 2023, arXiv 2212.03905, sections 3 and 4.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ext.functional.counter_rng import seeded_generator
from lightning_ext.functional.mrvae import (
    beta_grid,
    standardize_beta,
    stratified_uniform,
    unstandardize_beta,
)

__all__ = ["LogUniformBeta", "RateContext"]


class LogUniformBeta(nn.Module):
    r"""The distribution :math:`\log\beta \sim U(\log a, \log b)` that training draws from.

    Args:
        low: smallest beta :math:`a > 0`.
        high: largest beta :math:`b \ge a`; a range of one point is allowed and always gives that point.

    Raises:
        ValueError: the range is not ``0 < low <= high``, both finite.

    The range is part of the state dict: gates trained on one range mean something else on another, so loading a
    checkpoint with a different range is an error that names both.

    >>> round(float(LogUniformBeta(0.01, 10.0).mean), 4)
    1.4462
    """

    range: Tensor

    def __init__(self, low: float = 0.01, high: float = 10.0) -> None:
        super().__init__()
        beta_grid(1, low, high)  # checks the range
        self.low, self.high = float(low), float(high)
        self.register_buffer("range", torch.tensor([self.low, self.high]))

    @property
    def mean(self) -> float:
        r""":math:`E\beta = (b - a)/\log(b/a)`."""
        if self.low == self.high:
            return self.low
        return (self.high - self.low) / math.log(self.high / self.low)

    def sample(
        self, num: int, seed: int, *counters: int, stratified: bool = True, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """Draw ``num`` betas at a counter address, see :func:`lightning_ext.functional.stratified_uniform`.

        Args:
            num: number of draws on this rank.
            seed: the same on all ranks.
            *counters: address of the draw (epoch, batch index).
            stratified: spread the draws of all ranks evenly over the range; otherwise they are independent.
            rank: this rank.
            world_size: number of ranks.

        Returns:
            ``(num,)`` float32 on the CPU, inside the range. No communication.
        """
        if stratified:
            u = stratified_uniform(num, seed, *counters, rank=rank, world_size=world_size)
        else:
            u = torch.rand(num, generator=seeded_generator(seed, *counters, rank), dtype=torch.float64)
        return self.unstandardize(math.sqrt(3.0) * (2.0 * u - 1.0)).clamp(self.low, self.high).float()

    def standardize(self, beta: Tensor) -> Tensor:
        """Beta to the gates' input ``t``; any shape."""
        return standardize_beta(beta, self.low, self.high)

    def unstandardize(self, t: Tensor) -> Tensor:
        """The gates' input ``t`` to beta; any shape."""
        return unstandardize_beta(t, self.low, self.high)

    def grid(self, num: int) -> list[float]:
        """``num`` betas, evenly spaced on a log scale, ends included."""
        return [float(beta) for beta in beta_grid(num, self.low, self.high)]

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"low={self.low:g}, high={self.high:g}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any,
        error_msgs: list[str],
    ) -> None:  # fmt: skip
        saved = state_dict.get(f"{prefix}range")
        if saved is not None:
            # A model that was cast to half precision has rounded its range too.
            tolerance = 4 * max(torch.finfo(saved.dtype).eps, torch.finfo(torch.float32).eps)
            ours = torch.tensor([self.low, self.high], dtype=torch.float64)
            if not torch.allclose(saved.double().cpu(), ours, rtol=tolerance, atol=0.0):
                error_msgs.append(
                    f"the checkpoint was trained on beta in [{float(saved[0]):g}, {float(saved[1]):g}] but this model "
                    f"has [{self.low:g}, {self.high:g}]: build it with the checkpoint's range."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs)


class RateContext:
    r"""The :math:`\beta` that all gates of one model read during a forward pass.

    A plain object, shared by the gates and never registered as a submodule, so that it adds no keys to the state dict.

    Args:
        prior: the range of beta and its standardisation.

    Example:
        >>> context = RateContext(LogUniformBeta(0.01, 10.0))
        >>> with context.at(1.0):
        ...     context.t.shape
        torch.Size([1, 1])
    """

    def __init__(self, prior: LogUniformBeta) -> None:
        # A module held by a plain object stays out of the owner's module tree.
        self.prior = prior
        self._t: Tensor | None = None
        self._num_samples = 1

    @property
    def t(self) -> Tensor:
        """Standardised log beta, ``(1, 1)`` or ``(B, 1)`` float32.

        Raises:
            RuntimeError: no beta is set; a gate never samples one silently.
        """
        if self._t is None:
            raise RuntimeError(
                "no beta is set: call the network inside `with context.at(beta):` (for a MultiRateVAE: "
                "`with model.at(beta):` or `model.at_beta(beta)(x)`)."
            )
        return self._t

    @property
    def is_set(self) -> bool:
        """Whether a beta is set, that is, whether we are inside :meth:`at`."""
        return self._t is not None

    @contextlib.contextmanager
    def at(self, beta: float | Tensor, num_samples: int = 1, extrapolate: bool = False) -> Iterator["RateContext"]:
        """Set beta for the forward passes inside the ``with`` block; blocks can be nested.

        Args:
            beta: a number, or ``(B,)`` with one beta per sample.
            num_samples: the decoder may also see ``B * num_samples`` rows, the samples of one input next to each other
                (``repeat_interleave``).
            extrapolate: allow a beta outside the trained range.

        Raises:
            ValueError: beta is not positive and finite, lies outside the range, or is not a number or ``(B,)``.
        """
        beta = torch.as_tensor(beta)
        if beta.dim() > 1 or beta.numel() == 0:
            raise ValueError(f"beta must be a number or have shape (B,); got shape {tuple(beta.shape)}.")
        self._check(beta, extrapolate)
        with self.at_standardized(self.prior.standardize(beta.double()).float().reshape(-1, 1), num_samples):
            yield self

    @contextlib.contextmanager
    def at_standardized(self, t: Tensor, num_samples: int = 1) -> Iterator["RateContext"]:
        """Set the gates' input itself, ``(B, 1)``, unchecked: the training loop's path, which must not synchronise."""
        before = self._t, self._num_samples
        self._t, self._num_samples = t, num_samples
        try:
            yield self
        finally:
            self._t, self._num_samples = before

    def rows(self, values: Tensor, batch: int) -> Tensor:
        """Fit per-beta rows to a layer that sees ``batch`` rows.

        Args:
            values: ``(1, C)`` or ``(B, C)``.
            batch: rows of the layer's output.

        Returns:
            ``(1, C)`` or ``(batch, C)``.

        Raises:
            ValueError: ``batch`` is neither ``B`` nor ``B * num_samples``.
        """
        given = values.shape[0]
        if given in (1, batch):
            return values
        if batch == given * self._num_samples:
            return values.repeat_interleave(self._num_samples, dim=0)
        raise ValueError(
            f"beta has shape ({given},) but the layer sees a batch of {batch}: give one number, one beta per sample, "
            "or num_samples when each sample is decoded several times."
        )

    def _check(self, beta: Tensor, extrapolate: bool) -> None:
        low, high = self.prior.low, self.prior.high
        smallest, largest = (float(v) for v in torch.aminmax(beta.detach().double()))
        if not (smallest > 0.0 and math.isfinite(largest)):
            raise ValueError(f"beta must be positive and finite; got {smallest:g}.")
        if not extrapolate and (smallest < low * (1 - 1e-6) or largest > high * (1 + 1e-6)):
            outside = smallest if smallest < low * (1 - 1e-6) else largest
            raise ValueError(
                f"beta={outside:g} is outside the trained range [{low:g}, {high:g}]: train on a wider beta_range, or "
                "pass extrapolate=True to accept what the gates make of it."
            )
