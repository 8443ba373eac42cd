r"""Random projections of gradients that keep inner products, determined by a seed alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ext.functional.counter_rng import seeded_generator

__all__ = ["Projection"]

_DENSE_BLOCK = 2**22  # entries of the projection matrix that exist at a time; changing it changes the projections
_SPARSE_BLOCK = 2**20  # coordinates hashed at a time; likewise


@dataclass(frozen=True)
class Projection:
    r"""A linear map :math:`P: \mathbb{R}^D \to \mathbb{R}^k` with :math:`\mathbb E[P^\top P] = I`.

    Inner products survive on average, with a variance that falls with k:

    .. math::
        \mathbb E\,\langle Px, Py\rangle = \langle x, y\rangle, \qquad \operatorname{Var} \langle Px, Py\rangle =
        \frac1k \Big(\|x\|^2 \|y\|^2 + \langle x, y\rangle^2 - c \textstyle\sum_d x_d^2 y_d^2\Big)

    with c = 0 for ``gaussian`` (entries :math:`\mathcal N(0, 1/k)`) and c = 2 for ``rademacher`` (entries
    :math:`\pm 1/\sqrt k`) and ``countsketch`` (one entry :math:`\pm 1` per coordinate, in a random one of the k rows).

    Args:
        size: D, at least 1.
        dim: k, at least 1.
        kind: "rademacher", "gaussian" or "countsketch". Default "rademacher".
        seed: Any integer; another one is another projection. Default 0.

    Raises:
        ValueError: For other sizes or kinds, and for rows of another width.

    Source: Johnson and Lindenstrauss 1984; Achlioptas 2003 for signs; Charikar et al. 2002 for CountSketch; Park et al.
    2023 (arXiv 2303.14186) for gradients.

    Example:
        >>> project = Projection(size=10_000, dim=64, kind="countsketch")
        >>> project(torch.ones(2, 10_000)).shape
        torch.Size([2, 64])

    Note:
        The matrix is made in blocks, which depend on seed and position alone, and never kept: R rows cost R D k
        multiplications and about 2 ns for each of the D k random signs (5 ns for normal numbers); ``countsketch`` R D
        additions. Streams of different device types differ, so sketches made on a CPU and on a GPU cannot be compared.
    """

    size: int
    dim: int
    kind: Literal["rademacher", "gaussian", "countsketch"] = "rademacher"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.size < 1 or self.dim < 1:
            raise ValueError(f"size and dim must be at least 1, got {self.size} and {self.dim}.")
        if self.kind not in ("rademacher", "gaussian", "countsketch"):
            raise ValueError(f'kind must be "rademacher", "gaussian" or "countsketch", got {self.kind!r}.')

    def __call__(self, rows: Tensor) -> Tensor:
        """Project rows.

        Args:
            rows: ``(R, D)``; 16-bit rows are projected in float32.

        Returns:
            ``(R, k)``.
        """
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(f"rows must have shape (R, {self.size}), got {tuple(rows.shape)}.")
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        out = rows.new_zeros(len(rows), self.dim)
        add = self._hash if self.kind == "countsketch" else self._multiply
        with torch.autocast(rows.device.type, enabled=False):
            for part, generator in self._blocks(rows.device):
                add(rows[:, part], generator, out)
        return out

    def transpose(self, rows: Tensor) -> Tensor:
        r"""Multiply sketches by :math:`P^\top`, the way back.

        Args:
            rows: ``(R, k)``.

        Returns:
            ``(R, D)``.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows must have shape (R, {self.dim}), got {tuple(rows.shape)}.")
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        out = rows.new_empty(len(rows), self.size)
        with torch.autocast(rows.device.type, enabled=False):
            for part, generator in self._blocks(rows.device):
                width = part.stop - part.start
                if self.kind == "countsketch":
                    signs, bucket = self._places(width, generator, rows)
                    torch.mul(rows[:, bucket], signs, out=out[:, part])
                else:
                    out[:, part] = rows @ self._matrix(width, generator, rows).mT * self.dim**-0.5
        return out

    def _blocks(self, device: torch.device) -> Iterator[tuple[slice, torch.Generator]]:
        width = _SPARSE_BLOCK if self.kind == "countsketch" else max(1, _DENSE_BLOCK // self.dim)
        for block, start in enumerate(range(0, self.size, width)):
            part = slice(start, min(start + width, self.size))
            yield part, seeded_generator(self.seed, self.dim, block, device=device)

    def _matrix(self, width: int, generator: torch.Generator, like: Tensor) -> Tensor:
        draw: Callable[..., Tensor] = _signs if self.kind == "rademacher" else _normal
        return draw(width * self.dim, generator, like).view(-1, self.dim)

    def _places(self, width: int, generator: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor]:
        signs = _signs(width, generator, like)
        return signs, torch.randint(self.dim, (width,), generator=generator, device=like.device)

    def _multiply(self, rows: Tensor, generator: torch.Generator, out: Tensor) -> None:
        out.addmm_(rows, self._matrix(rows.shape[1], generator, rows), alpha=self.dim**-0.5)

    def _hash(self, rows: Tensor, generator: torch.Generator, out: Tensor) -> None:
        signs, bucket = self._places(rows.shape[1], generator, rows)
        for row, sketch in zip(rows, out, strict=True):  # one after the other: faster than a scatter of matrices
            sketch.scatter_add_(0, bucket, row * signs)


def _normal(count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(count, generator=generator, device=like.device).to(like.dtype)


def _signs(count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Plus and minus ones, 64 to a random integer."""
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-count // 64),), generator=generator, device=like.device)
    byte = torch.arange(256, device=like.device).unsqueeze(1) >> torch.arange(8, device=like.device)
    table = (1 - 2 * (byte & 1)).to(like.dtype)
    return table.index_select(0, bits.view(torch.uint8).int()).flatten()[:count]
