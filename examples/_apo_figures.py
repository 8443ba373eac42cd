"""Figures of the APO reproduction."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lightning_ext.demo import PAGE_STYLE

PALE = "#9aa6b4"
COLOURS = {
    "fixed": "#8a97a6",
    "cosine": "#c79a12",
    "apo": "#2f7de1",
    "auto": "#8f63e0",
    "SGD": "#8a97a6",
    "SGDm": "#8a97a6",
    "Adam": "#f2762e",
    "SOAP": "#d6456b",
    "Gauss-Newton": "#1d2733",
    "APO-P additive": "#c79a12",
    "APO-P kron": "#2f7de1",
    "APO-P ekfac": "#14a37f",
    "APO-P, K = 1": "#14a37f",
    "APO-P, K = 10": "#2f7de1",
}
LABELS = {
    "fixed": "fixed rate",
    "cosine": "cosine decay",
    "apo": "APO",
    "auto": 'APO, $\\lambda_F$ = "auto"',
    "APO-P additive": "APO-P, additive steps as in the paper",
    "APO-P kron": "APO-P kron, multiplicative",
    "APO-P ekfac": "APO-P EKFAC-like, multiplicative",
    "Gauss-Newton": "Gauss-Newton, dense solves",
}
STYLE: dict[str, Any] = {
    **PAGE_STYLE,
    "axes.edgecolor": PALE,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "font.size": 10.5,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
}


@contextlib.contextmanager
def _panels(count: int, width: float = 11.0, sharey: bool = False) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 4.2))
        panels = figure.subplots(1, count, sharey=sharey, squeeze=False)[0]
        yield figure, list(panels)


def _decades(axis: Any) -> None:
    axis.set_major_locator(LogLocator(numticks=9))
    axis.set_minor_locator(NullLocator())


def _trajectories(axes: Axes, sweep: Any, title: str) -> None:
    """Learning rate against step from every initial rate, first seed."""
    starts = sweep.runs["apo"]
    colours = mpl.colormaps["viridis"].resampled(len(starts) + 1)
    for i, (start, runs) in enumerate(starts.items()):
        rates = [start, *runs[0].rates]
        axes.plot(range(len(rates)), rates, color=colours(i), lw=1.5)
        axes.scatter(0, start, color=[colours(i)], s=16, zorder=3, clip_on=False)
    axes.axhline(sweep.best(), color=COLOURS["Adam"], lw=1.4, ls=(0, (4, 3)), label="best fixed rate")
    axes.set_yscale("log")
    _decades(axes.yaxis)
    length = max(len(runs[0].rates) for runs in starts.values())
    axes.set_xscale("function", functions=(_root, _square))  # most happens at the start
    ticks = [tick for tick in (0, 10, 50, 100, 200, 400, 800) if tick <= length]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0, length)
    axes.set_xlabel("step")
    axes.set_title(title)


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0.0))


def _square(x: np.ndarray) -> np.ndarray:
    return np.square(x)


def _sensitivity(axes: Axes, sweep: Any, title: str, limit: float) -> None:
    """Final loss against initial rate: every seed, and the median."""
    for kind in ("fixed", "apo", "auto"):
        if kind not in sweep.runs:
            continue
        starts = sweep.runs[kind]
        for start, runs in starts.items():
            axes.scatter([start] * len(runs), [run.loss for run in runs], s=12, color=COLOURS[kind], alpha=0.45, lw=0)
        middle = [sweep.loss(kind, start) for start in starts]
        axes.plot(list(starts), middle, color=COLOURS[kind], marker="o", ms=5, mec="white", label=LABELS[kind])
    if "cosine" in sweep.runs:
        axes.axhline(sweep.loss("cosine", sweep.best("cosine")), color=COLOURS["cosine"], lw=1.4, ls=(0, (4, 3)))
        axes.plot([], [], color=COLOURS["cosine"], lw=1.4, ls=(0, (4, 3)), label="best cosine decay")
    near = sweep.near_best("fixed")
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.fill_between([min(near), max(near)], bottom, limit, color=COLOURS["apo"], alpha=0.09, lw=0)
    axes.set_ylim(bottom, top)
    axes.set_xscale("log")
    _decades(axes.xaxis)
    _decades(axes.yaxis)
    axes.set_xlabel("initial learning rate")
    axes.set_title(title)


def trajectories(sweeps: Sequence[Any], names: Mapping[str, str]) -> Figure:
    """Learning rates from ten starts, one panel per base optimizer."""
    with _panels(len(sweeps)) as (figure, panels):
        for axes, sweep in zip(panels, sweeps, strict=True):
            _trajectories(axes, sweep, names[sweep.base])
        panels[0].set_ylabel("learning rate")
        panels[-1].legend(loc="lower right")
    return figure


def sensitivity(sweeps: Sequence[Any], names: Mapping[str, str], allowed: Callable[[str, float], float]) -> Figure:
    """Final loss against initial rate, one panel per base optimizer; shaded what passes."""
    with _panels(len(sweeps)) as (figure, panels):
        for axes, sweep in zip(panels, sweeps, strict=True):
            _sensitivity(axes, sweep, names[sweep.base], allowed(sweep.base, sweep.loss("fixed", sweep.best())))
        panels[0].set_ylabel("final training loss (nats); shaded: to pass")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def lightning(sweep: Any, title: str, limit: float) -> Figure:
    """Both for one base optimizer."""
    with _panels(2) as (figure, (left, right)):
        _trajectories(left, sweep, title)
        left.set_ylabel("learning rate")
        left.legend(loc="lower right")
        _sensitivity(right, sweep, "Final loss from each start; shaded: to pass", limit)
        right.set_ylabel("final training loss (nats)")
        right.legend()
    return figure


def _curve(axes: Axes, comparison: Any, method: str, label: str, against: str = "steps") -> None:
    """Median over the seeds of the setting that is best at the end, and the range; a cross where the median ends."""
    last = comparison.last(method)
    runs = comparison.runs[method][comparison.best(method, last)]
    whole = max(runs, key=lambda run: len(run.steps))  # one that broke down ends early, and stays infinite
    losses = [[run.at(step) for run in runs] for step in whole.steps]
    if against == "steps":
        where: Sequence[float] = whole.steps
    else:
        complete = [run.seconds for run in runs if len(run.steps) == len(whole.steps)]
        where = [statistics.median(times) for times in zip(*complete, strict=True)]
    middle = [statistics.median(values) for values in losses]
    axes.plot(where, middle, color=COLOURS[method], label=label, lw=2.2 if "APO" in method else 1.6)
    low, high = [min(v) for v in losses], [max(v) for v in losses]
    axes.fill_between(where, low, high, color=COLOURS[method], alpha=0.13, lw=0)
    finite = [i for i, loss in enumerate(middle) if math.isfinite(loss)]
    if finite[-1] + 1 < len(middle):
        axes.plot(where[finite[-1]], middle[finite[-1]], marker="x", ms=8, mew=2.2, color=COLOURS[method])


def regression(comparisons: Mapping[float, Any]) -> Figure:
    """Loss against steps at each condition number."""
    with _panels(len(comparisons), sharey=True) as (figure, panels):
        for axes, (kappa, comparison) in zip(panels, comparisons.items(), strict=True):
            for method in comparison.runs:
                _curve(axes, comparison, method, LABELS.get(method, f"{method}, best rate"))
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("step")
            axes.set_title(f"Condition number $10^{{{round(math.log10(kappa))}}}$")
        panels[0].set_ylabel("loss")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def autoencoder(comparison: Any, title: str = "Digits autoencoder, batches of 500") -> Figure:
    """Loss against steps and against seconds."""
    with _panels(2, sharey=True) as (figure, (left, right)):
        for method in comparison.runs:
            setting = comparison.best(method, comparison.last(method))
            _curve(left, comparison, method, f"{method} ({setting})")
            _curve(right, comparison, method, method, "seconds")
        ends = [comparison.at(method, comparison.last(method)) for method in comparison.runs]
        lowest = min(filter(math.isfinite, ends), default=1.0)
        for axes, what in ((left, "step"), (right, "seconds")):
            axes.set_yscale("log")
            axes.set_ylim(0.85 * lowest, 8.5 * lowest)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_xlim(left=0)
            axes.set_xlabel(what)
        left.set_ylabel("training loss per image, half the squared error")
        left.set_title(title)
        right.set_title("The same runs against time, one thread")
        left.legend()
    return figure
