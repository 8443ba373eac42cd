"""The logarithm of a mean of exponentials: at once, or of more numbers than fit in memory."""

import math

import torch
from torch import Tensor

__all__ = ["StreamingLogMeanExp", "log_mean_exp", "widest_float"]


def widest_float(device: torch.device) -> torch.dtype:
    """The widest float that a device can add up in."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_mean_exp(x: Tensor, dim: int = 0) -> Tensor:
    r"""Logarithm of the mean of exponentials along a dimension.

    .. math:: \log \frac1K \sum_{k=1}^{K} e^{x_k}

    Args:
        x: any shape, K at least 1 along ``dim``; minus infinity counts as 0, and where all of them are the result is
            minus infinity.
        dim: the dimension that goes.

    Returns:
        The shape of ``x`` without ``dim``, in its dtype.

    Raises:
        ValueError: If there is nothing to average.

    >>> log_mean_exp(torch.tensor([0.0, -torch.inf]))  # log 1/2
    tensor(-0.6931)
    """
    count = x.shape[dim]
    if count == 0:
        raise ValueError(f"x must hold at least one number along dim={dim}; got shape {tuple(x.shape)}.")
    return torch.logsumexp(x, dim) - math.log(count)


class StreamingLogMeanExp:
    r""":func:`log_mean_exp` of numbers that come in pieces, in memory that does not grow with them.

    Args:
        shape: of one number, such as ``(B,)`` for the weights of B data points.
        device: where the running sum lives.

    Attributes:
        count: how many have been added.

    >>> running = StreamingLogMeanExp(())
    >>> running.add(torch.tensor([0.0, 0.0])).add(torch.tensor([-torch.inf, -torch.inf])).value()
    tensor(-0.6931, dtype=torch.float64)

    Note:
        The running sum is in float64. Over ranks, ``merge`` what each has.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.log_sum = torch.full(shape, -torch.inf, dtype=widest_float(device), device=device)
        self.count = 0

    def add(self, chunk: Tensor) -> "StreamingLogMeanExp":
        """Take in ``(k, *shape)`` more numbers, k at least 0.

        Raises:
            ValueError: If their shape does not end in that of one number.
        """
        if chunk.shape[1:] != self.log_sum.shape or not chunk.ndim:
            raise ValueError(f"chunk must have shape (k, *{tuple(self.log_sum.shape)}); got {tuple(chunk.shape)}.")
        if len(chunk):
            self.log_sum = torch.logaddexp(self.log_sum, torch.logsumexp(chunk.detach().to(self.log_sum), 0))
            self.count += len(chunk)
        return self

    def merge(self, other: "StreamingLogMeanExp") -> "StreamingLogMeanExp":
        """Take in what another one has added."""
        self.log_sum = torch.logaddexp(self.log_sum, other.log_sum.to(self.log_sum))
        self.count += other.count
        return self

    def value(self) -> Tensor:
        """The result so far, in float64.

        Raises:
            ValueError: If nothing was added.
        """
        if not self.count:
            raise ValueError("nothing was added yet.")
        return self.log_sum - math.log(self.count)
