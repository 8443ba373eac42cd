"""Figures of the LAFTR reproduction."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from lightning_ext.demo import PAGE_STYLE
from lightning_ext.metrics import ContinualMetrics

ERRORS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
NOTHING = 3.0  # where methods stand that keep nothing, in kB
PALE, INK = "#9aa6b4", "#1d2733"
KINDS = {"laftr": "#2f7de1", "official": "#c79a12", "stored": "#14a37f", "weights": "#d6456b", "none": "#8a97a6"}
MARKERS = {"laftr": "o", "official": "D", "stored": "s", "weights": "^", "none": "X"}
MEANING = {
    "laftr": "LAFTR", "official": "official formula", "stored": "stores data", "weights": "distance of weights",
    "none": "fine-tuning",
}  # fmt: skip
STYLE: dict[str, Any] = {
    **PAGE_STYLE,
    "axes.edgecolor": PALE,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "font.size": 10.5,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}


def kind(name: str) -> str:
    """Which family a method or an estimator is of."""
    words = {
        "official": "official", "laftr": "laftr", "same": "laftr", "frozen": "laftr",
        "influence, exact": "stored", "NTK": "stored", "exact": "stored", "fine": "none",
    }  # fmt: skip
    return next((family for word, family in words.items() if word in name), "weights")


@contextlib.contextmanager
def _grid(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns, squeeze=False, **shared)


def tracking(part: Any, seeds: Sequence[int]) -> Figure:
    """Estimate against true distance along the training of a second task, one panel per estimator."""
    columns = 6
    rows = -(-len(part.NAMES) // columns)
    with _grid(rows, columns, (14, 2.5 * rows), sharex=True, sharey=True) as (figure, panels):
        tracks = [part.tracked(seed) for seed in seeds]
        for axes, name in zip(panels.flat, part.NAMES, strict=False):
            axes.axline((0.1, 0.1), (10, 10), color=PALE, lw=1.2, ls=(0, (4, 3)), zorder=1)
            for track, marker in zip(tracks, "osD^vP*X" * len(tracks), strict=False):
                axes.plot(
                    track.true, track.estimates[name], color=KINDS[kind(name)], marker=marker, ms=2.6, lw=1, alpha=0.85
                )
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(numticks=6))
                axis.set_minor_locator(NullLocator())
            off = statistics.fmean(track.log_ratio(name) for track in tracks)
            axes.set_title(f"{name}: {off:.2f}", fontsize=9.2)
        for axes in panels.flat[len(part.NAMES) :]:
            axes.set_axis_off()
        figure.supxlabel("true distance on the first task, half squared output units")
        figure.supylabel("estimate")
        figure.suptitle("Number: mean |log(estimate / truth)|; dashed: equal; one marker per seed", fontsize=10.5)
    return figure


def memory(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Average error, one minus the accuracy, against the bytes kept, for each benchmark."""
    titles = {"five": "Five permuted-digits tasks", "ten": "Ten permuted-digits tasks"}
    with _grid(1, len(results), (13, 5.2), sharey=True) as (figure, panels):
        for axes, (benchmark, rows) in zip(panels[0], results.items(), strict=True):
            for row in rows:
                style = {"color": KINDS[kind(row["method"])], "marker": MARKERS[kind(row["method"])]}
                axes.errorbar(_place(row), 1 - row["accuracy"], row["std"], ms=7, capsize=3, **style)
            axes.set(xscale="log", yscale="log", xlabel="kB kept after the last task (nothing: at the left edge)")
            axes.set_title(titles.get(benchmark, benchmark))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
            axes.set_yticks(ERRORS, map(str, ERRORS))
            axes.set_xlim(NOTHING / 1.5, 8 * max(map(_place, rows)))
        panels[0][0].set_ylabel("mean error on all tasks, after the last")
        present = {kind(row["method"]) for rows in results.values() for row in rows}
        handles = [
            mpl.lines.Line2D([], [], color=KINDS[family], marker=MARKERS[family], lw=0, label=MEANING[family])
            for family in KINDS
            if family in present
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figure.draw_without_rendering()  # the layout is done: places are those of the picture
        for axes, rows in zip(panels[0], results.values(), strict=True):
            _label(axes, rows)
    return figure


def _place(row: Mapping[str, Any]) -> float:
    return row["bytes"] / 1000 or NOTHING


# Where a name may stand, in points from its mark, and which of its sides is there; the nearest come first.
OFFSETS = [
    (reach * x, reach * y, side)
    for reach in (9, 16, 26, 38, 52, 68)
    for x, y, side in (
        (1, 0, "left"), (-1, 0, "right"), (0.8, 0.8, "left"), (0.8, -0.8, "left"), (-0.8, 0.8, "right"),
        (-0.8, -0.8, "right"), (0, 1.2, "center"), (0, -1.2, "center"),
    )
]  # fmt: skip


def _label(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Names beside their marks, where they cover no other name, no mark and no error bar."""
    frame = axes.get_window_extent()
    taken = [_mark(axes, row) for row in rows]
    for row in sorted(rows, key=lambda row: row["accuracy"]):
        at = (_place(row), 1 - row["accuracy"])
        for x, y, side in OFFSETS:
            line = {"arrowstyle": "-", "color": PALE, "lw": 0.6, "shrinkB": 3}
            name = axes.annotate(
                row["method"].replace("the same", "laftr-relu"), at, (x, y), textcoords="offset points", fontsize=8.5,
                color=INK, ha=side, va="center",
                arrowprops=line if abs(x) + abs(y) > 20 else None,
            )  # fmt: skip
            name.get_window_extent()  # moves the text to where it will be drawn
            box = mpl.text.Text.get_window_extent(name).padded(1)  # without its line
            inside = box.x0 > frame.x0 and box.x1 < frame.x1 and box.y0 > frame.y0 and box.y1 < frame.y1
            if (inside and box.count_overlaps(taken) == 0) or (x, y, side) == OFFSETS[-1]:
                taken.append(box)
                break
            name.remove()


def _mark(axes: Any, row: Mapping[str, Any]) -> Bbox:
    """What a mark and its error bar cover."""
    error, spread = 1 - row["accuracy"], row["std"] or 0.0
    ends = axes.transData.transform([(_place(row), max(error - spread, ERRORS[0] / 10)), (_place(row), error + spread)])
    centre = axes.transData.transform((_place(row), error))
    reach = 5 * axes.figure.dpi / 72
    return Bbox.union([Bbox(ends).padded(reach), Bbox([centre, centre]).padded(reach)])


def matrices(part: Any, seed: int) -> Figure:
    """The accuracy matrix of four methods on ten tasks."""
    chosen = ("fine-tuning", "EWC", "laftr-relu by class", "exact, all data")
    with _grid(2, 2, (13, 11)) as (figure, panels):
        for axes, name in zip(panels.flat, chosen, strict=True):
            values = part.learned("ten", name, seed).values
            axes.grid(visible=False)
            ContinualMetrics(len(values["cl/matrix"])).plot(values, ax=axes)
            axes.set_title(f"{name}: {axes.get_title('left')}", fontsize=10.5)
    return figure


SCORES = {
    "exact Gauss-Newton": (INK, "-"), "laftr-relu by class": ("#2f7de1", "-"),
    "laftr-sample by class": ("#8f63e0", "-."),
    "diagonal Gauss-Newton": ("#d6456b", "--"), "gradient norm": ("#c79a12", ":"), "training loss": ("#14a37f", "--"),
}  # fmt: skip


def detection(found: Sequence[Any]) -> Figure:
    """Share of the wrong labels found against the share inspected, means over the seeds."""
    inspected = np.linspace(0, 0.4, 201)
    with _grid(1, 1, (7, 4.6)) as (figure, ((axes,),)):
        share = float(found[0].wrong.double().mean())
        axes.plot([0, share, 1], [0, 1, 1], color=PALE, lw=1.2, zorder=1, label="perfect order")
        for name, (colour, dashes) in SCORES.items():
            curves = [one.detection(name) for one in found]
            values = [np.interp(inspected, curve["inspected"].numpy(), curve["found"].numpy()) for curve in curves]
            area = statistics.fmean(float(curve["auc"]) for curve in curves)
            axes.plot(inspected, np.mean(values, 0), color=colour, ls=dashes, lw=1.6, label=f"{name}, AUC {area:.3f}")
        axes.set(xlabel="fraction of samples inspected", ylabel="fraction of wrong labels found", xlim=(0, 0.4))
        axes.set_title(f"Digits, {100 * share:.0f} % of the labels wrong, {len(found)} seeds")
        axes.legend(loc="lower right")
    return figure


def removal(results: Sequence[Any], names: Sequence[str]) -> Figure:
    """The actual effect of removing a sample against each prediction, in ranks."""
    with _grid(2, 3, (11, 7), sharex=True, sharey=True) as (figure, panels):
        for axes, name in zip(panels.flat, names, strict=True):
            for one, marker in zip(results, "osD^vP*X" * len(results), strict=False):
                ranks = [values.argsort().argsort().numpy() + 1 for values in (one.predicted[name], one.actual)]
                axes.scatter(*ranks, s=20, marker=marker, color=KINDS[kind(name)], alpha=0.75, lw=0, zorder=3)
            axes.axline((0, 0), slope=1, color=PALE, lw=1.2, ls=(0, (4, 3)), zorder=1)
            mean = statistics.fmean(one.correlation(name) for one in results)
            axes.set_title(f"{name}: Spearman {mean:.2f}")
        figure.supxlabel("rank of the predicted effect on the mean test loss")
        figure.supylabel("rank of the actual effect, PBRF on the data")
    return figure
