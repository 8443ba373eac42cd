"""How LAFTR adds up batches, keeps symmetric sums, and joins the gates of several tasks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ext.functional import ActivationSite, gates


class Gathered:
    """Small batches, taken together: few rows cost as many calls as many.

    Args:
        take: what is done with inputs and their groups.
        most_bytes: from where on they are taken.
        most_rows: likewise.

    Attributes:
        row_bytes: what a row takes there, beside the input.
    """

    def __init__(
        self, take: Callable[[Tensor, Tensor | None], None], most_bytes: int = 2**22, most_rows: int = 4096
    ) -> None:
        self._take, self._most_bytes, self._most_rows = take, most_bytes, most_rows
        self.row_bytes = 0
        self._rows: list[Tensor] = []
        self._groups: list[Tensor] = []
        self._number, self._bytes = 0, 0

    def add(self, x: Tensor, groups: Tensor | None) -> None:
        """Now or later."""
        if self._rows and (x.shape[1:], x.dtype) != (self._rows[0].shape[1:], self._rows[0].dtype):
            self.flush()
        self._rows.append(x.clone())  # a loader may write into what it gave
        if groups is not None:
            self._groups.append(groups.clone())
        self._number += len(x)
        self._bytes += x.nbytes + len(x) * self.row_bytes
        if self._number >= self._most_rows or self._bytes >= self._most_bytes:
            self.flush()

    def flush(self) -> None:
        """Take what waits."""
        rows, groups = self._rows, self._groups
        self._rows, self._groups, self._number, self._bytes = [], [], 0, 0
        if rows:
            self._take(torch.cat(rows), torch.cat(groups) if groups else None)


def joined(each: Sequence[Sequence[ActivationSite | None]]) -> list[ActivationSite | None]:
    """The gates of several draws, one after the other."""
    found: list[ActivationSite | None] = []
    for sites in zip(*each, strict=True):
        gated = [site for site in sites if site is not None]
        if not gated:
            found.append(None)
            continue
        [site] = gates(gated[:1], [torch.cat([site.gate for site in gated if site.gate is not None])])
        found.append(site)
    return found


def packed(second: Tensor, covariance: str) -> Tensor:
    """Of a symmetric matrix the lower half."""
    if covariance != "full":
        return second
    rows, columns = torch.tril_indices(*second.shape[1:], device=second.device)
    return second[:, rows, columns]


def unpacked(second: Tensor, covariance: str) -> Tensor:
    """The matrix that :func:`packed` made smaller."""
    if covariance != "full":
        return second
    size = int((2 * second.shape[1]) ** 0.5)  # d of d (d + 1) / 2
    rows, columns = torch.tril_indices(size, size, device=second.device)
    full = second.new_zeros(len(second), size, size)
    full[:, rows, columns] = second
    full[:, columns, rows] = second
    return full
