"""One row of numbers per sample, on disk: scores and gradients that do not fit into memory, or must outlive a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["RowStore"]

_DESCRIPTION, _ROWS, _DONE, _REPORT = "store.json", "rows.bin", "done.bin", "report.json"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16)}


class RowStore:
    """A memory-mapped ``(num_samples, dim)`` table whose rows are written in any order, by any process.

    A row counts as there only after all of it was written, so a run that was cut off finds out from
    :meth:`missing` what is left to do. Reading maps the file: memory holds what is in use, whatever the table's size.

    Args:
        folder: where the table lives; made when it is not there.
        num_samples: number of rows N. Not needed for a table that exists.
        dim: length of a row. Not needed for a table that exists.
        dtype: ``"float32"``, ``"float64"`` or ``"bfloat16"`` on disk.
        fingerprint: plain values that say what the rows were computed from. A table with another fingerprint is
            refused, so that rows of two models never mix.

    Raises:
        ValueError: A size or fingerprint that differs from the table's own.
        FileNotFoundError: No table in ``folder`` and no sizes to make one.

    Note:
        Several processes may write different rows at once if one of them made the table before; on several machines
        the folder must be shared. What a killed process wrote is kept, what it was writing counts as missing.

    >>> import tempfile
    >>> store = RowStore(tempfile.mkdtemp(), num_samples=3, dim=2)
    >>> store.write(torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> store.missing().tolist(), store.scores(torch.tensor([[1.0, 1.0]]))[:, store.done].tolist()
    ([1], [[7.0, 3.0]])
    """

    def __init__(
        self,
        folder: Path | str,
        num_samples: int | None = None,
        dim: int | None = None,
        dtype: str = "float32",
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / _DESCRIPTION
        if not path.is_file():
            if num_samples is None or dim is None:
                raise FileNotFoundError(f"There is no table in {self.folder}; to make one, give num_samples and dim.")
            self._create(num_samples, dim, dtype, dict(fingerprint or {}))
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"num_samples": num_samples, "dim": dim}
        differing = {name: (value, found[name]) for name, value in wanted.items() if value not in (None, found[name])}
        if fingerprint is not None:
            plain = json.loads(json.dumps(dict(fingerprint)))
            differing |= {
                name: (plain.get(name), found["fingerprint"].get(name))
                for name in {*plain, *found["fingerprint"]}
                if plain.get(name) != found["fingerprint"].get(name)
            }
        if differing:
            told = "; ".join(
                f"{name}: now {now!r}, there {there!r}" for name, (now, there) in sorted(differing.items())
            )
            raise ValueError(f"The table in {self.folder} holds something else ({told}). Choose another folder.")
        self.num_samples: int = found["num_samples"]
        self.dim: int = found["dim"]
        self.fingerprint: dict[str, Any] = found["fingerprint"]
        self.rows = self._mapped(_ROWS, self.num_samples * self.dim, _DTYPES[found["dtype"]]).view(-1, self.dim)
        self._done = self._mapped(_DONE, self.num_samples, torch.uint8)

    def _create(self, num_samples: int, dim: int, dtype: str, fingerprint: dict[str, Any]) -> None:
        if num_samples < 1 or dim < 1:
            raise ValueError(f"num_samples and dim must be at least 1; got {num_samples} and {dim}.")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, _DTYPES))}; got {dtype!r}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, size in ((_ROWS, num_samples * dim * _DTYPES[dtype].itemsize), (_DONE, num_samples)):
            with (self.folder / name).open("wb") as file:
                file.truncate(size)
        description = {"num_samples": num_samples, "dim": dim, "dtype": dtype, "fingerprint": fingerprint}
        (self.folder / _REPORT).unlink(missing_ok=True)
        self._write_json(_DESCRIPTION, description)  # last: a table without its description was never finished

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self.folder / name)

    def _mapped(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(self.folder / name), shared=True, size=size, dtype=dtype)

    @property
    def done(self) -> Tensor:
        """``(N,)`` bool: which rows are there."""
        return self._done.bool()

    def missing(self) -> Tensor:
        """Indices of the rows that are not there yet, ascending."""
        return (self._done == 0).nonzero().flatten()

    @property
    def report(self) -> dict[str, Any]:
        """What was written by :meth:`write_report`; empty before."""
        path = self.folder / _REPORT
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Keep plain values about how the rows came to be, in place of those before; by one process at a time."""
        self._write_json(_REPORT, report)

    def write(self, indices: Tensor, rows: Tensor) -> None:
        """Write ``rows`` ``(B, dim)`` at ``indices`` ``(B,)``."""
        if rows.shape != (len(indices), self.dim):
            raise ValueError(f"rows must have shape {(len(indices), self.dim)}; got {tuple(rows.shape)}.")
        self._check(indices)
        indices = indices.cpu()
        self.rows[indices] = rows.detach().to("cpu", self.rows.dtype)
        self._done[indices] = 1

    def read(self, indices: Tensor | None = None) -> Tensor:
        """The rows at ``indices``, ``(B, dim)``, default all ``(N, dim)``; an error if one is missing."""
        indices = torch.arange(self.num_samples) if indices is None else indices
        self._check(indices)
        indices = indices.cpu()
        if not bool(self._done[indices].all()):
            absent = indices[self._done[indices] == 0].tolist()
            raise ValueError(f"Rows {absent[:10]} are not in {self.folder} yet; see missing().")
        return self.rows[indices]

    def scores(self, queries: Tensor, chunk: int = 4096) -> Tensor:
        """Inner products of every row with ``queries`` ``(Q, dim)``, as ``(Q, N)``, read ``chunk`` rows at a time.

        Rows that are missing count as zero.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must have shape (Q, {self.dim}); got {tuple(queries.shape)}.")
        parts = torch.split(self.rows, chunk)
        return torch.cat([queries @ part.to(queries).mT for part in parts], dim=1)

    def _check(self, indices: Tensor) -> None:
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_samples:
            raise ValueError(
                f"indices must lie in [0, {self.num_samples - 1}]; got {int(indices.min())} to {int(indices.max())}."
            )

    def __repr__(self) -> str:
        """Say what is there."""
        done = int(self._done.count_nonzero())
        return f"RowStore({str(self.folder)!r}, {done} of {self.num_samples} rows of {self.dim})"
