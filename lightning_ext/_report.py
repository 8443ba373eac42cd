"""How results reach people and machines: aligned text tables, and JSON files that are never half written."""

import json
import math
import os
import shutil
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TextTable", "format_cell", "plain", "text_table", "write_json"]

_GAP = "  "
_NUMBER = (int, float, type(None))


def format_cell(value: object) -> str:
    """Format one table cell: four significant digits for a float, yes or no for a truth value, a dash for nothing.

    >>> [format_cell(v) for v in (1234.5678, 0.00012, True, None, "a", 3)]
    ['1235', '0.00012', 'yes', '-', 'a', '3']
    """
    value = plain(value, keep_nan=True)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any, *, keep_nan: bool = False) -> Any:
    """Turn tensors, NumPy scalars, paths, mappings and sequences into what JSON knows; NaN and infinity become null.

    >>> plain({"a": (1.0, float("nan")), 2: Path("x")})
    {'a': [1.0, None], '2': 'x'}
    """
    if hasattr(value, "tolist"):  # torch tensors and NumPy arrays and scalars
        value = value.tolist()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) or keep_nan else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item, keep_nan=keep_nan) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, keep_nan=keep_nan) for item in value]
    return str(value)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` in one step, so that an interruption leaves the former file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


class TextTable:
    r"""A table whose rows can be printed one by one: the widths are fixed at the start and long cells wrap.

    Args:
        header: Column names.
        widths: Width of each column in characters.
        right: Columns that are aligned to the right, as numbers are.

    >>> table = TextTable(["name", "loss"], [6, 5], right={1})
    >>> print(table.head(), table.row(["a long one", 0.25]), sep="\n")
    name     loss
    ------  -----
    a long   0.25
    one
    """

    def __init__(self, header: Sequence[str], widths: Sequence[int], right: Collection[int] = ()) -> None:
        self.header, self.widths, self.right = list(header), list(widths), right

    def head(self) -> str:
        """Return the column names and the rule below them."""
        return self.row(self.header) + "\n" + _GAP.join("-" * width for width in self.widths)

    def row(self, cells: Sequence[object]) -> str:
        """Return one row, over as many lines as its longest cell needs."""
        columns = [textwrap.wrap(format_cell(c), w) or [""] for c, w in zip(cells, self.widths, strict=True)]
        height = max(len(column) for column in columns)
        lines = []
        for i in range(height):
            texts = [column[i] if i < len(column) else "" for column in columns]
            padded = [
                text.rjust(width) if j in self.right else text.ljust(width)
                for j, (text, width) in enumerate(zip(texts, self.widths, strict=True))
            ]
            lines.append(_GAP.join(padded).rstrip())
        return "\n".join(lines)


def _fit(widths: list[int], total: int) -> list[int]:
    """Take from the widest column until the table fits; no column goes below eight characters."""
    widths = list(widths)
    while sum(widths) + len(_GAP) * (len(widths) - 1) > total and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    return widths


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], total: int | None = None) -> str:
    """Return a whole table, columns as wide as their longest cell and narrowed to the terminal.

    Args:
        header: Column names.
        rows: Cells; numbers are formatted and a column of numbers is aligned to the right.
        total: Characters per line; default the terminal's.

    >>> print(text_table(["beta", "rate"], [[0.1, 23.456789], [1.0, 9.5]], total=80))
    beta   rate
    ----  -----
     0.1  23.46
       1    9.5
    """
    texts = [[format_cell(cell) for cell in row] for row in rows]
    widths = [max(len(line[j]) for line in [list(header), *texts]) for j in range(len(header))]
    columns = list(zip(*rows, strict=True))
    numeric = [j for j, column in enumerate(columns) if all(isinstance(plain(v), _NUMBER) for v in column)]
    table = TextTable(header, _fit(widths, total or shutil.get_terminal_size((110, 24)).columns), numeric)
    return "\n".join([table.head(), *(table.row(row) for row in rows)])
