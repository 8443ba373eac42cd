"""Figures of influence scores and of how good they are. Matplotlib is imported only when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.metrics._figure import INK, PALE, axes_of, quieten

__all__: list[str] = []  # drawn through the metrics' own plot()

_COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#92400e")  # told apart in grey by their dashes, too
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP"
_HELPFUL, _HARMFUL = "#1d4ed8", "#c2410c"
_REFERENCES = ("perfect order", "random order", "equal")


def plot_detection(curves: Mapping[str, Mapping[str, Tensor]], ax: Any = None) -> tuple[Any, Any]:
    """Draw found against inspected, one line per named curve, over the lines of random and perfect order."""
    if not curves:
        raise ValueError("plot needs at least one computed value, got an empty mapping.")
    figure, axes = axes_of(ax, (5.6, 4.4))
    for name, value in curves.items():
        inspected, found = _numbers(value["inspected"]), _numbers(value["found"])
        if any(f != f for f in found):
            raise ValueError(f"{name!r} has no curve to draw: no label is flipped.")
        place = len([line for line in axes.lines if line.get_gid() == "curve"]) % len(_COLOURS)
        axes.plot(
            inspected,
            found,
            color=_COLOURS[place],
            ls=_DASHES[place],
            lw=1.8,
            label=f"{name} (AUC {value['auc'].item():.3f})",
            gid="curve",
            zorder=3,
        )
        _reference(axes, [0.0, value["prevalence"].item(), 1.0], [0.0, 1.0, 1.0], "perfect order")
    _reference(axes, [0.0, 1.0], [0.0, 1.0], "random order")
    axes.set(xlabel="fraction of samples inspected", ylabel="fraction of flipped labels found")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    quieten(axes)
    axes.grid(color="#e6e8ec", lw=0.8)
    axes.set_axisbelow(True)
    _legend(axes, "lower right")
    return figure, axes


def plot_effects(
    predicted: Tensor, actual: Tensor, told: str, title: str, ax: Any = None, label: str | None = None
) -> tuple[Any, Any]:
    """Draw actual against predicted effects with the line on which they are equal; what is far out, at the edge."""
    figure, axes = axes_of(ax, (4.8, 4.4))
    place = len(axes.collections) % len(_COLOURS)
    (x, beyond_x), (y, beyond_y) = within(predicted, outlier_limit(predicted)), within(actual, outlier_limit(actual))
    beyond = int((beyond_x | beyond_y).sum())
    axes.scatter(
        _numbers(x),
        _numbers(y),
        s=26,
        marker=_MARKERS[place],
        facecolor=_COLOURS[place],
        edgecolor="white",
        lw=0.6,
        alpha=0.85,
        label=f"{label + ', ' if label else ''}{told}{f' ({beyond} far out, at edge)' if beyond else ''}",
        zorder=3,
    )
    if place == 0 and not axes.lines:
        axes.axline((0, 0), slope=1, color=PALE, lw=1.2, zorder=1, label="equal")
    axes.set(xlabel="predicted effect of removal", ylabel="actual effect of removal")
    axes.set_title(title, fontsize=10, color=INK)
    axes.margins(0.06)
    quieten(axes)
    axes.ticklabel_format(style="sci", scilimits=(-3, 4), axis="both")
    _legend(axes, "best")
    return figure, axes


def outlier_limit(values: Tensor) -> float:
    """Twenty times what nine of ten absolute values stay below: points beyond would flatten all others."""
    size = values.detach().double().abs().reshape(-1)
    usual = size.quantile(0.9, interpolation="lower").item() if len(size) > 4 else 0.0
    return 20 * usual or torch.inf


def within(values: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Values, those beyond the limit moved to the edge of the others; and which were moved."""
    far = values.abs() > limit
    edge = 1.2 * values.where(~far, 0).abs().max()
    return values.where(~far, values.sign() * edge), far


def plot_extremes(ends: Mapping[str, Tensor], query: int, ax: Any = None) -> tuple[Any, Any]:
    """Draw the most helpful samples as bars from the top, the most harmful ones to the bottom."""
    helpful, best = _numbers(ends["helpful_values"]), ends["helpful_indices"].tolist()
    harmful, worst = _numbers(ends["harmful_values"]), ends["harmful_indices"].tolist()
    bars = list(zip(best, helpful, strict=True))
    bars += [(index, value) for index, value in reversed(list(zip(worst, harmful, strict=True))) if index not in best]
    figure, axes = _sample_bars(bars, f"measurement of query {query}", "change when the sample is removed", ax)
    for bar, (_, value) in zip(axes.patches, bars, strict=False):
        bar.set_facecolor(_HELPFUL if value > 0 else _HARMFUL)
    for name, colour in (("rises (helpful, of a loss)", _HELPFUL), ("falls (harmful)", _HARMFUL)):
        axes.plot([], [], "s", color=colour, label=name)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.axvline(0, color="#9aa1ad", lw=0.8)
    return figure, axes


def plot_largest(values: Tensor, indices: Tensor, ax: Any = None) -> tuple[Any, Any]:
    """Draw samples of large self-influence as bars, from the top."""
    bars = list(zip(indices.tolist(), _numbers(values), strict=True))
    return _sample_bars(bars, "largest self-influence", "self-influence", ax)


def _sample_bars(bars: Sequence[tuple[int, float]], title: str, quantity: str, ax: Any) -> tuple[Any, Any]:
    """One bar per sample, named by its position in the data set, from the top."""
    figure, axes = axes_of(ax, (5.2, 1.6 + 0.24 * len(bars)))
    axes.barh(range(len(bars)), [value for _, value in bars], color=_HARMFUL, height=0.72)
    axes.set_yticks(range(len(bars)), [str(index) for index, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(quantity)
    axes.set_ylabel("position in the training set", labelpad=8)
    axes.set_title(title, fontsize=10, color=INK)
    axes.ticklabel_format(style="sci", scilimits=(-3, 4), axis="x")
    quieten(axes)
    return figure, axes


def plot_mean(
    mean: Tensor, error: Tensor, name: str, bounds: tuple[float | None, float | None], ax: Any, label: str
) -> tuple[Any, Any]:
    """Draw a mean over queries and its standard error, to the right of those that are there."""
    figure, axes = axes_of(ax, (4.0, 3.6))
    there = [text.get_text() for text in axes.get_xticklabels()] if axes.containers else []
    place = len(axes.containers)
    bar = None if bool(error.isnan()) else _numbers(error)  # of a single query there is none
    colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
    axes.errorbar([place], _numbers(mean), yerr=bar, color=colour, fmt=marker, ms=7, capsize=4, lw=1.6)
    axes.set_xticks(range(place + 1), [*there, label])
    axes.set(ylabel=f"{name}, mean and standard error over queries", xlim=(-0.6, place + 0.6), ylim=bounds)
    quieten(axes)
    return figure, axes


def _legend(axes: Any, place: str) -> None:
    """What was measured first, what it is compared with last."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in _REFERENCES)
    axes.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9, loc=place)


def _reference(axes: Any, x: list[float], y: list[float], name: str) -> None:
    """A pale line, once per axes."""
    if name not in [line.get_label() for line in axes.lines]:
        style = {"perfect order": "-", "random order": ":"}[name]
        axes.plot(x, y, color=INK if style == ":" else PALE, ls=style, lw=1.2, label=name, zorder=1)


def _numbers(values: Tensor) -> list[float]:
    numbers: list[float] = values.detach().cpu().double().reshape(-1).tolist()
    return numbers
