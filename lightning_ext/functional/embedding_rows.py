"""Per-sample gradients of embedding tables, kept as one row per token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ext.functional.layer_gradients import GradientBlock, pieces

__all__ = ["EmbeddingRows"]


@dataclass(frozen=True)
class EmbeddingRows(GradientBlock):
    """Gradients of an embedding table: the row of each token's index receives the gradient of its output.

    Args:
        slices: Where the table lies in the flat parameter vector.
        indices: ``(B, T)``, from 0 to ``num_embeddings - 1``.
        g: Gradients of the outputs ``(B, T, E)``.
        num_embeddings: Rows of the table.
    """

    slices: tuple[slice, ...]
    indices: Tensor
    g: Tensor
    num_embeddings: int

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.g)

    def __getitem__(self, index: slice) -> "EmbeddingRows":
        """The chosen samples."""
        return EmbeddingRows(self.slices, self.indices[index], self.g[index], self.num_embeddings)

    def sample(self) -> Tensor:
        """Any tensor of the gradients' dtype and device."""
        return self.g

    def explicit(self) -> tuple[Tensor, ...]:
        """The gradients, ``(B, d)`` for the one slice."""
        table = self.g.new_zeros(len(self), self.num_embeddings, self.g.shape[-1])
        index = self.indices.unsqueeze(-1).expand_as(self.g)
        return (table.scatter_add_(1, index, self.g).flatten(1),)

    def project(self, parts: Sequence[Tensor]) -> Tensor:
        """Inner products ``(Q, B)`` with the one part ``(Q, d)``."""
        tables = parts[0].reshape(len(parts[0]), self.num_embeddings, -1)
        out = self.g.new_empty(len(tables), len(self))
        for chunk in pieces(len(self), len(tables) * self.g[0].numel() * self.g.element_size()):
            out[:, chunk] = torch.einsum("qbte,bte->qb", tables[:, self.indices[chunk]], self.g[chunk])
        return out

    def combine(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Sums over the samples with weights ``(R, B)``."""
        out = weights.new_zeros(len(weights), self.num_embeddings, self.g.shape[-1])
        for row, weight in zip(out, weights, strict=True):
            row.index_add_(0, self.indices.flatten(), (weight[:, None, None] * self.g).flatten(0, 1))
        return (out.flatten(1),)

    def dot(self, other: GradientBlock) -> Tensor:
        """Inner products ``(B, B')`` over pairs of tokens with the same index."""
        if not isinstance(other, EmbeddingRows):
            raise TypeError(f"other must hold rows of the same table, got {type(other).__name__}.")
        out = self.g.new_empty(len(self), len(other))
        for chunk in pieces(len(self), 2 * len(other) * self.g.shape[1] * other.g.shape[1] * self.g.element_size()):
            same = self.indices[chunk][:, None, :, None] == other.indices[None, :, None, :]
            out[chunk] = (torch.einsum("bte,cue->bctu", self.g[chunk], other.g) * same).sum((2, 3))
        return out

    def squared_norms(self) -> Tensor:
        """Squared lengths ``(B,)``."""
        out = self.g.new_empty(len(self))
        for chunk in pieces(len(self), 2 * self.g.shape[1] ** 2 * self.g.element_size()):
            same = self.indices[chunk][:, :, None] == self.indices[chunk][:, None, :]
            out[chunk] = (self.g[chunk] @ self.g[chunk].mT * same).sum((1, 2))
        return out

    def square_sums(self) -> tuple[Tensor, ...]:
        """Sums over the samples of the squared gradients, ``(d,)`` for the one slice."""
        samples = torch.arange(len(self), device=self.g.device).unsqueeze(1)
        cells, where = torch.unique(samples * self.num_embeddings + self.indices, return_inverse=True)
        rows = self.g.new_zeros(len(cells), self.g.shape[-1]).index_add_(0, where.flatten(), self.g.flatten(0, 1))
        table = self.g.new_zeros(self.num_embeddings, self.g.shape[-1])
        return (table.index_add_(0, cells % self.num_embeddings, rows.square()).flatten(),)
