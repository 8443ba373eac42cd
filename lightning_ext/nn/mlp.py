"""A fully connected network."""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

__all__ = ["MLP"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Module):
    """Linear layers with an activation between them, after flattening the input.

    Args:
        sizes: widths from the input to the output, at least two.
        activation: ``"relu"``, ``"tanh"`` or ``"gelu"``; none after the last layer.
        batch_norm: normalise before each activation.
        dropout: rate of dropout after each activation, in [0, 1).

    Raises:
        ValueError: For fewer than two sizes or an unknown activation.

    >>> import torch
    >>> MLP([64, 32, 10])(torch.zeros(5, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Literal["relu", "tanh", "gelu"] = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least the input's and the output's width; got {list(sizes)}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}.")
        layers: list[nn.Module] = [nn.Flatten()]
        *inner, last = itertools.pairwise(sizes)
        for width, next_width in inner:
            layers.append(nn.Linear(width, next_width))
            layers += [nn.BatchNorm1d(next_width)] if batch_norm else []
            layers.append(ACTIVATIONS[activation]())
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers, nn.Linear(*last))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...)`` to ``(B, sizes[-1])``."""
        output: Tensor = self.layers(x)
        return output
