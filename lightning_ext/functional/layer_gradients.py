r"""Per-sample gradients kept as factors: inner products and projections without a row of parameters per sample.

The gradient of sample :math:`b` with respect to a linear map :math:`s_t = W a_t` is :math:`\sum_t g_t a_t^\top`. Its
inputs :math:`a` and output gradients :math:`g` are :math:`T (M + P)` numbers, the gradient itself :math:`M P`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["ExplicitRows", "GradientBlock", "LayerGradients", "OuterProducts"]

_CACHE_BYTES = 2**23  # of gradients written out before a matrix product reads them again
_MAPPED_BYTES = 2**21  # of tokens mapped by rows before a sum reads them again
_BLOCK_BYTES = 2**26  # of gradients, or of products between tokens, held at once
_NARROW = 32  # features below which mapped tokens make poor matrix products


def pieces(total: int, bytes_each: int, budget: int | None = None) -> Iterator[slice]:
    """Cut a range into slices of things that take ``budget`` bytes together (64 MiB by default), at least one each.

    >>> list(pieces(5, bytes_each=4, budget=8))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, (_BLOCK_BYTES if budget is None else budget) // max(1, bytes_each))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class GradientBlock(ABC):
    """Gradients of B samples with respect to the parameters of one layer; by default they are written out."""

    slices: tuple[slice, ...]
    """Where each parameter lies in the flat parameter vector."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: slice) -> "GradientBlock":
        """The chosen samples."""

    @abstractmethod
    def explicit(self) -> tuple[Tensor, ...]:
        """The gradients written out, ``(B, d)`` for each slice."""

    @abstractmethod
    def sample(self) -> Tensor:
        """Any tensor of the gradients' dtype and device."""

    def is_finite(self) -> bool:
        """Whether all of what the gradients are made of is; a large sum may overflow, look closer then."""
        return bool(self.sample().sum().isfinite())

    def chunks(self, budget: int | None = None) -> Iterator[slice]:
        """Ranges of samples whose gradients, written out, take ``budget`` bytes; by default they fit a core's cache."""
        width = sum(part.stop - part.start for part in self.slices)
        return pieces(len(self), width * self.sample().element_size(), _CACHE_BYTES if budget is None else budget)

    def project(self, parts: Sequence[Tensor]) -> Tensor:
        """Inner products ``(Q, B)`` with ``parts``, ``(Q, d)`` for each slice."""
        out = parts[0].new_zeros(len(self), len(parts[0]))
        for chunk in self.chunks():
            for part, rows in zip(parts, self[chunk].explicit(), strict=True):
                out[chunk].addmm_(rows, part.mT)
        return out.mT

    def combine(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Sums over the samples with weights ``(R, B)``, ``(R, d)`` for each slice."""
        sums = tuple(weights.new_zeros(len(weights), part.stop - part.start) for part in self.slices)
        for chunk in self.chunks():
            for total, rows in zip(sums, self[chunk].explicit(), strict=True):
                total.addmm_(weights[:, chunk], rows)
        return sums

    def dot(self, other: "GradientBlock") -> Tensor:
        """Inner products ``(B, B')`` with the gradients of other samples with respect to the same parameters."""
        out = self.sample().new_empty(len(self), len(other))
        for chunk in self.chunks(_BLOCK_BYTES):
            out[chunk] = other.project(self[chunk].explicit())
        return out

    def squared_norms(self) -> Tensor:
        """Squared lengths ``(B,)``."""
        out = self.sample().new_zeros(len(self))
        for chunk in self.chunks():
            for rows in self[chunk].explicit():
                out[chunk] += rows.square().sum(1)
        return out

    def square_sums(self) -> tuple[Tensor, ...]:
        """Sums over the samples of the squared gradients, ``(d,)`` for each slice."""
        sums = tuple(self.sample().new_zeros(part.stop - part.start) for part in self.slices)
        for chunk in self.chunks():
            for total, rows in zip(sums, self[chunk].explicit(), strict=True):
                total += rows.square().sum(0)
        return sums


@dataclass(frozen=True)
class ExplicitRows(GradientBlock):
    """Gradients written out: those of norm layers, and of parameters that no layer explains.

    Args:
        slices: Where each parameter lies in the flat parameter vector.
        rows: For each slice the gradients ``(B, d)``.
    """

    slices: tuple[slice, ...]
    rows: tuple[Tensor, ...]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows[0])

    def __getitem__(self, index: slice) -> "ExplicitRows":
        """The chosen samples."""
        return ExplicitRows(self.slices, tuple(rows[index] for rows in self.rows))

    def explicit(self) -> tuple[Tensor, ...]:
        """The gradients, ``(B, d)`` for each slice."""
        return self.rows

    def sample(self) -> Tensor:
        """Any tensor of the gradients' dtype and device."""
        return self.rows[0]

    def is_finite(self) -> bool:
        """Whether all rows are."""
        return all(bool(rows.sum().isfinite()) for rows in self.rows)


@dataclass(frozen=True)
class OuterProducts(GradientBlock):
    r"""Gradients :math:`\sum_t g_t a_t^\top` of a weight and :math:`\sum_t g_t` of a bias.

    Args:
        slices: Where weight and bias lie in the flat parameter vector, as far as they are chosen, the weight first.
        a: Inputs ``(G, B, T, M)``: groups, samples, tokens (positions of a convolution), features.
        g: Gradients of the outputs ``(G, B, T, P)``.
        weight: The weight is chosen. Default True.
        bias: The bias is chosen. Default True.
    """

    slices: tuple[slice, ...]
    a: Tensor
    g: Tensor
    weight: bool = True
    bias: bool = True

    def __len__(self) -> int:
        """Number of samples."""
        return self.g.shape[1]

    def __getitem__(self, index: slice) -> "OuterProducts":
        """The chosen samples."""
        return OuterProducts(self.slices, self.a[:, index], self.g[:, index], self.weight, self.bias)

    def sample(self) -> Tensor:
        """Any tensor of the gradients' dtype and device."""
        return self.g

    def matrices(self, out: Tensor | None = None) -> Tensor:
        """The gradients of the weight, ``(B, G, P, M)``, in the memory of ``out`` where it is given."""
        g, a = self.g.transpose(0, 1).mT, self.a.transpose(0, 1)
        return torch.mul(g, a, out=out) if g.shape[-1] == 1 else torch.matmul(g, a, out=out)

    def bias_rows(self) -> Tensor:
        """The gradients of the bias, ``(B, G * P)``."""
        return self.g.sum(2).transpose(0, 1).flatten(1)

    def is_finite(self) -> bool:
        """Whether inputs and output gradients are."""
        return super().is_finite() and (not self.weight or bool(self.a.sum().isfinite()))

    def explicit(self) -> tuple[Tensor, ...]:
        """The gradients, ``(B, d)`` for each slice."""
        weight = (self.matrices().flatten(1),) if self.weight else ()
        return weight + ((self.bias_rows(),) if self.bias else ())

    def project(self, parts: Sequence[Tensor]) -> Tensor:
        """Inner products ``(Q, B)`` with ``parts``, ``(Q, d)`` for each slice."""
        out = parts[0].new_zeros(len(parts[0]), len(self))
        if self.weight:
            (self._project_tokens if self._maps_tokens() else self._project_matrices)(parts[0], out)
        return out.addmm_(parts[-1], self.bias_rows().mT) if self.bias else out

    def _maps_tokens(self) -> bool:
        """Mapping every token costs T times the products of mapping every gradient, but no gradient is written."""
        (groups, _, tokens, outputs), inputs = self.g.shape, self.a.shape[3]
        cached = _CACHE_BYTES // (groups * outputs * inputs * self.g.element_size())
        return min(outputs, inputs) >= _NARROW and tokens <= 1 + 20 / max(1, cached)  # 20: measured on a CPU

    def _project_tokens(self, part: Tensor, out: Tensor) -> None:
        groups, size, tokens, outputs = self.g.shape
        matrices = part.reshape(len(part), groups, outputs, -1)
        forwards = outputs <= self.a.shape[3]
        width = size * tokens * min(outputs, self.a.shape[3]) * self.g.element_size()
        for group in range(groups):
            a, g = self.a[group].flatten(0, 1), self.g[group].flatten(0, 1)
            for chunk in pieces(len(part), width, _MAPPED_BYTES):
                matrix = matrices[chunk, group]
                mapped = (a @ matrix.mT).mul_(g) if forwards else (g @ matrix).mul_(a)
                out[chunk] += mapped.sum(2).reshape(-1, size, tokens).sum(2)

    def _project_matrices(self, part: Tensor, out: Tensor) -> None:
        chunks = list(self.chunks())
        scratch = self.g.new_empty(chunks[0].stop, self.g.shape[0], self.g.shape[3], self.a.shape[3])
        for chunk in chunks:
            rows = self[chunk].matrices(scratch[: chunk.stop - chunk.start]).flatten(1)
            out[:, chunk] = (rows @ part.mT).mT

    def combine(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Sums over the samples with weights ``(R, B)``, ``(R, d)`` for each slice."""
        a = self.a.flatten(1, 2)
        each = [(self.g * row.view(1, -1, 1, 1)).flatten(1, 2) for row in weights]
        weight = (torch.stack([(g.mT @ a).flatten() for g in each]),) if self.weight else ()
        return weight + ((torch.stack([g.sum(1).flatten() for g in each]),) if self.bias else ())

    def dot(self, other: GradientBlock) -> Tensor:
        """Inner products ``(B, B')``, over pairs of tokens where that is cheaper than over parameters."""
        if not isinstance(other, OuterProducts):
            raise TypeError(f"other must hold outer products of the same layer, got {type(other).__name__}.")
        pairs, (outputs, inputs) = self.g.shape[2] * other.g.shape[2], (self.g.shape[3], self.a.shape[3])
        held = max(1, _BLOCK_BYTES // (outputs * inputs * self.g.element_size()))
        explicit = outputs * inputs * (1 + other.g.shape[2] / held)  # others are written out once per ``held`` samples
        if self.weight and pairs * (outputs + inputs) > explicit:
            return super().dot(other)
        chunks = list(pieces(len(self), 2 * len(other) * pairs * self.g.shape[0] * self.g.element_size()))
        if len(chunks) == pairs == self.g.shape[0] == 1:  # nothing to sum over
            return self._pairs("gbtf,gcuf->gbctu", self, other).reshape(len(self), len(other))
        out = self.g.new_empty(len(self), len(other))
        for chunk in chunks:
            torch.sum(self._pairs("gbtf,gcuf->gbctu", self[chunk], other), (0, 3, 4), out=out[chunk])
        return out

    def squared_norms(self) -> Tensor:
        """Squared lengths ``(B,)``."""
        groups, _, tokens, inputs = self.a.shape
        if self.weight and tokens**2 * (self.g.shape[-1] + inputs) > self.g.shape[-1] * inputs:
            return super().squared_norms()
        out = self.g.new_empty(len(self))
        for chunk in pieces(len(self), 2 * tokens**2 * groups * self.g.element_size()):
            out[chunk] = self._pairs("gbtf,gbuf->gbtu", self[chunk], self[chunk]).sum((0, 2, 3))
        return out

    def square_sums(self) -> tuple[Tensor, ...]:
        """Sums over the samples of the squared gradients, ``(d,)`` for each slice."""
        if self.g.shape[2] > 1:
            return super().square_sums()
        a, g = self.a.squeeze(2).square(), self.g.squeeze(2).square()
        weight = ((g.mT @ a).flatten(),) if self.weight else ()
        return weight + ((g.sum(1).flatten(),) if self.bias else ())

    def _pairs(self, equation: str, left: "OuterProducts", right: "OuterProducts") -> Tensor:
        gradients = torch.einsum(equation, left.g, right.g)
        if not self.weight:
            return gradients
        inputs = torch.einsum(equation, left.a, right.a)
        return gradients.mul_(inputs.add_(1) if self.bias else inputs)


Method = TypeVar("Method", bound=Callable[..., Tensor])


def _full_precision(method: Method) -> Method:
    """Keep the matrix products out of the autocasting that a training loop may have on."""

    @wraps(method)
    def plain(self: "LayerGradients", *args: Any) -> Tensor:
        with torch.autocast(self.blocks[0].sample().device.type, enabled=False):
            return method(self, *args)

    return cast(Method, plain)


class LayerGradients:
    r"""Gradients :math:`g_b \in \mathbb{R}^D` of ``B`` samples, one block per layer.

    Args:
        blocks: One :class:`GradientBlock` per layer, of the same samples; together they cover the flat vector once.
        size: D, the number of chosen parameters.

    Raises:
        ValueError: If the blocks do not cover the vector, or disagree about the number of samples.

    >>> from lightning_ext.functional import OuterProducts
    >>> a, g = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0]]]])
    >>> gradients = LayerGradients([OuterProducts((slice(0, 2), slice(2, 3)), a, g)], 3)
    >>> gradients.explicit(), gradients.norms() ** 2, gradients.project(torch.ones(1, 3))
    (tensor([[3., 6., 3.]]), tensor([54.]), tensor([[12.]]))

    Note:
        ``project`` costs :math:`Q B M P` multiplications per layer: it maps the inputs by each row's matrix or, of
        layers with few features or many tokens, writes the gradients of a few samples at a time into cache. It never
        needs ``(B, D)`` numbers. ``dot`` costs :math:`B B' T T' (M + P)`, or :math:`B B' M P` where that is less.
    """

    def __init__(self, blocks: Sequence[GradientBlock], size: int) -> None:
        covered = sum(part.stop - part.start for block in blocks for part in block.slices)
        if covered != size:
            raise ValueError(f"blocks cover {covered} of {size} parameters.")
        if len({len(block) for block in blocks}) != 1:
            raise ValueError(f"blocks hold {[len(block) for block in blocks]} samples; they must agree.")
        self.blocks, self.size = tuple(blocks), size

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.blocks[0])

    def __getitem__(self, index: slice) -> "LayerGradients":
        """The chosen samples."""
        return LayerGradients([block[index] for block in self.blocks], self.size)

    @_full_precision
    def explicit(self) -> Tensor:
        """The gradients ``(B, D)``, in nats per unit of each parameter for a loss in nats."""
        out = self.blocks[0].sample().new_empty(len(self), self.size)
        for block in self.blocks:
            for part, rows in zip(block.slices, block.explicit(), strict=True):
                out[:, part] = rows
        return out

    @_full_precision
    def project(self, rows: Tensor) -> Tensor:
        """Inner products ``(Q, B)`` of ``rows`` ``(Q, D)`` with every sample's gradient."""
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(f"rows must have shape (Q, {self.size}), got {tuple(rows.shape)}.")
        rows = rows.to(self.blocks[0].sample().dtype)
        out = rows.new_zeros(len(rows), len(self))
        for block in self.blocks:
            out += block.project([rows[:, part] for part in block.slices])
        return out

    @_full_precision
    def combine(self, weights: Tensor) -> Tensor:
        """Weighted sums of the gradients, ``(R, D)``, for weights ``(R, B)``: a group's gradient, for instance."""
        if weights.ndim != 2 or weights.shape[1] != len(self):
            raise ValueError(f"weights must have shape (R, {len(self)}), got {tuple(weights.shape)}.")
        weights = weights.to(self.blocks[0].sample().dtype)
        out = weights.new_empty(len(weights), self.size)
        for block in self.blocks:
            for part, total in zip(block.slices, block.combine(weights), strict=True):
                out[:, part] = total
        return out

    @_full_precision
    def dot(self, other: "LayerGradients") -> Tensor:
        """Inner products ``(B, B')`` of these gradients with those of another batch."""
        layout = [[block.slices for block in gradients.blocks] for gradients in (self, other)]
        if layout[0] != layout[1]:
            raise ValueError("other must hold gradients of the same parameters, recorded in the same way.")
        first, *others = (mine.dot(theirs) for mine, theirs in zip(self.blocks, other.blocks, strict=True))
        for products in others:
            first += products
        return first

    @_full_precision
    def norms(self) -> Tensor:
        """Lengths ``(B,)`` of the gradients."""
        return torch.stack([block.squared_norms() for block in self.blocks]).sum(0).clamp(min=0).sqrt()
