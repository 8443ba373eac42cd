"""Figures of bounds on mutual information. Matplotlib is imported only when one is drawn."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ext.metrics._figure import INK, PALE, axes_of, quieten

__all__: list[str] = []  # drawn through the metrics' own plot()

_STYLES = {  # told apart in grey by their marks, too
    "lower": ("lower bound", "#1d4ed8", ">"),
    "upper": ("upper bound", "#c2410c", "<"),
    "estimate": ("estimate, no bound", "#15803d", "o"),
}
_ROW, _TRUTH = "row", "truth"
_APART = {"lower": -0.09, "upper": 0.09}
"""Error bars of two sides often overlap: one stands above the row, the other below."""


def plot_bounds(
    rows: Mapping[str, Mapping[str, Tensor]], ax: Any = None, truth: float | None = None
) -> tuple[Any, Any]:
    """Draw one row per bound below those that are there: its sides with standard errors, and the truth as a line."""
    if not rows:
        raise ValueError("plot needs at least one computed value, got an empty mapping.")
    figure, axes = axes_of(ax, (6.4, 1.3 + 0.42 * len(rows)))
    place = len([line for line in axes.lines if line.get_gid() == _ROW])
    names = [text.get_text() for text in axes.get_yticklabels()] if place else []
    for label, value in rows.items():
        _row(axes, len(names), {name: value[name].item() for name in _STYLES if name in value}, value)
        names.append(label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if truth is not None and not [line for line in axes.lines if line.get_gid() == _TRUTH]:
        axes.axvline(truth, color=INK, lw=1.2, ls=(0, (4, 2)), zorder=1, label="truth", gid=_TRUTH)
    axes.set(xlabel="mutual information in nats; bars are one standard error")
    quieten(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e8ec", lw=0.8)
    axes.set_axisbelow(True)
    _legend(axes)
    return figure, axes


def _row(axes: Any, place: int, numbers: Mapping[str, float], value: Mapping[str, Tensor]) -> None:
    finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
    span = [min(finite.values()), max(finite.values())] if finite else []
    axes.plot(span, [place] * len(span), color=PALE, lw=5, solid_capstyle="butt", zorder=2, gid=_ROW)
    for name, number in numbers.items():
        title, colour, marker = _STYLES[name]
        if name not in finite:
            _beyond(axes, place, number, title, colour)
            continue
        error = value[f"{name}_stderr" if f"{name}_stderr" in value else "stderr"].item()
        axes.errorbar(
            [number],
            [place + (_APART[name] if len(numbers) > 1 else 0.0)],
            xerr=[error] if math.isfinite(error) else None,
            color=colour,
            fmt=marker,
            ms=7,
            capsize=3,
            lw=1.6,
            label=title,
            zorder=3,
        )


def _beyond(axes: Any, place: int, number: float, title: str, colour: str) -> None:
    """What is infinite stands at the edge of the figure."""
    told = f"{title} is {'NaN' if math.isnan(number) else '+∞' if number > 0 else '-∞'}"
    right = number > 0 or math.isnan(number)
    axes.annotate(
        f"{told} →" if number > 0 else told if right else f"← {told}",
        (1.0 if right else 0.0, place + 0.12),
        xycoords=("axes fraction", "data"),
        ha="right" if right else "left",
        va="top",
        color=colour,
        fontsize=8,
    )


def _legend(axes: Any) -> None:
    """Each kind of mark once, above the rows."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == _TRUTH))
    if once:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": len(once)}
        axes.legend(list(once.values()), list(once), frameon=False, fontsize=8, **place)
