"""How LAFTR adds up batches, keeps symmetric sums, and joins the gates of several tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ext.functional import ActivationSite, InputStatistics, gates


class Gathered:
    """Small batches, added together: sums of few rows cost as many calls as sums of many."""

    def __init__(self, most_bytes: int = 2**22) -> None:
        self.most_bytes, self._bytes = most_bytes, 0
        self._rows: list[Tensor] = []
        self._groups: list[Tensor] = []
        self._sites: list[Sequence[ActivationSite]] = []

    def add(
        self, statistics: InputStatistics, x: Tensor, groups: Tensor | None, sites: Sequence[ActivationSite]
    ) -> None:
        """Now or later, as ``statistics.add`` does."""
        if self._rows and (x.shape[1:], x.dtype) != (self._rows[0].shape[1:], self._rows[0].dtype):
            self.flush(statistics)
        self._rows.append(x.clone())  # a loader may write into what it gave
        self._sites.append([site for site in sites if site.gate is not None])
        if groups is not None:
            self._groups.append(groups.clone())
        self._bytes += x.nbytes + sum(site.gate.nbytes for site in sites if site.gate is not None)
        if self._bytes >= self.most_bytes:
            self.flush(statistics)

    def flush(self, statistics: InputStatistics) -> None:
        """Add what waits."""
        if self._rows:
            sites = [site for site in joined(self._sites) if site is not None]
            statistics.add(torch.cat(self._rows), torch.cat(self._groups) if self._groups else None, sites)
        self._rows, self._groups, self._sites, self._bytes = [], [], [], 0


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
