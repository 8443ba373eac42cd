"""Figures of the influence reproduction."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from lightning_ext.demo import PAGE_STYLE

PALE = "#9aa6b4"
COLOURS = {
    "warm-start": "#2f7de1", "proximity": "#14a37f", "non-convergence": "#8f63e0",
    "linearization": "#f2762e", "solver": "#d6456b",
    "self-influence": "#d6456b", "PBRF": "#2f7de1", "training loss": "#14a37f", "gradient norm": "#8f63e0",
    "random": "#8a97a6", "influence": "#2f7de1", "gradient dot": "#c79a12", "EK-FAC": "#14a37f", "TRAK": "#8f63e0",
}  # fmt: skip
MARKERS = dict(zip(("warm-start", "proximity", "non-convergence", "linearization", "solver"), "osD^v", strict=True))
DASHES = {"PBRF": (0, (5, 1.5)), "training loss": (0, (1.5, 1)), "gradient norm": (0, (6, 1.5, 1.5, 1.5))}
RESPONSES = {"cold": "Cold start", "warm": "Warm start", "pbrf": "PBRF"}
UNITS = {"digits": "nats", "diabetes": "squared error of standardized targets"}
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
def _grid(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", visible=False)


def gaps(results: Mapping[str, Sequence[Any]]) -> Figure:
    """The five gaps in outputs: bars for the means, a point for each seed."""
    with _grid(1, len(results), (10.5, 4.0), sharey=True) as (figure, panels):
        for axes, (name, found) in zip(panels[0], results.items(), strict=True):
            order = list(MARKERS)
            for place, gap in enumerate(order):
                values = [one.output_gaps[gap].mean().item() for one in found]
                axes.bar(place, statistics.fmean(values), width=0.66, color=COLOURS[gap], alpha=0.9)
                spots = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
                axes.scatter(place + np.asarray(spots), values, s=14, color="#1d2733", zorder=3, lw=0)
            axes.set_xticks(range(len(order)), [gap.replace("-", "-\n") for gap in order])
            ratio = statistics.fmean(one.ratio() for one in found)
            axes.set_title(f"{name.capitalize()}: the first three sum to {ratio:.0f} x the last two")
            _logarithmic(axes)
        panels[0][0].set_ylabel("gap, rms of test outputs")
    return figure


def scatter(results: Mapping[str, Sequence[Any]]) -> Figure:
    """Effect on the mean test loss against influence's prediction, one point per removal, each seed around its mean."""
    with _grid(len(results), len(RESPONSES), (10.5, 3.6 * len(results)), sharey="row") as (figure, panels):
        for row, (name, found) in zip(panels, results.items(), strict=True):
            for axes, (response, title) in zip(row, RESPONSES.items(), strict=True):
                for seed, (one, marker) in enumerate(zip(found, "osD^vP*X" * len(found), strict=False)):
                    x, y = (_thousandths(values.mean(1)) for values in (one.influence, one.measured[response]))
                    axes.scatter(
                        x, y, s=22, marker=marker, color=COLOURS["influence"], alpha=0.75, lw=0, zorder=3,
                        label=f"seed {seed}",
                    )  # fmt: skip
                mean = statistics.fmean(one.correlations[response]["pearson"] for one in found)
                axes.axline((0, 0), slope=1, color=PALE, lw=1.2, ls=(0, (4, 3)), zorder=1, label="equal")
                axes.set_title(f"{title}, {name}: r = {mean:.2f}")  # per test point, as the table has it
                axes.margins(0.08)
                axes.set_xlabel("predicted by influence, $10^{-3}$")
            row[0].set_ylabel(f"actual effect on test loss,\n$10^{{-3}}$ {UNITS.get(name, '')}".rstrip())
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found) + 1)
    return figure


def _thousandths(values: Tensor) -> np.ndarray:
    return 1e3 * (values - values.mean()).cpu().numpy()


def factors(part: Any, seeds: Sequence[int]) -> Figure:
    """The five gaps against each factor; the range over the seeds is shaded."""
    with _grid(1, len(part.FACTORS), (13.5, 4.2), sharey=True) as (figure, panels):
        for axes, (factor, values) in zip(panels[0], part.FACTORS.items(), strict=True):
            places = range(len(values))
            for gap, marker in MARKERS.items():
                runs = [[part.at(factor, value, seed)[gap] for value in values] for seed in seeds]
                columns = list(zip(*runs, strict=True))
                means = [statistics.fmean(column) for column in columns]
                axes.plot(places, means, color=COLOURS[gap], marker=marker, ms=5.5, label=gap)
                low, high = [min(column) for column in columns], [max(column) for column in columns]
                axes.fill_between(places, low, high, color=COLOURS[gap], alpha=0.15, lw=0)
            axes.set_xticks(list(places), [_short(value) for value in values])
            axes.set_title(factor.capitalize())
            _logarithmic(axes)
        panels[0][0].set_ylabel("gap, rms of test outputs")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _short(value: float) -> str:
    return f"{value:g}" if value >= 0.1 or value == 0 else f"$10^{{{round(np.log10(value))}}}$"


def detection(found: Sequence[Any]) -> Figure:
    """Left the share found against the share inspected, right the precision: means over the seeds."""
    with _grid(1, 2, (10.5, 4.3)) as (figure, ((left, right),)):
        inspected = np.linspace(0, 1, 301)
        prevalence = float(next(iter(found[0].detection.values()))["prevalence"])
        for name in found[0].detection:
            curves = [_interpolated(one.detection[name], inspected) for one in found]
            area = statistics.fmean(one.auc(name) for one in found)
            mean, style = np.mean(curves, axis=0), {"color": COLOURS[name], "ls": DASHES.get(name, "-")}
            left.plot(inspected, mean, label=f"{name}, AUC {area:.3f}", zorder=3, **style)
            left.fill_between(inspected, np.min(curves, 0), np.max(curves, 0), color=COLOURS[name], alpha=0.1, lw=0)
            ranks = slice(int(np.argmax(mean > 0)), 1 + int(np.argmax(mean >= 1 - 1e-9)))  # from first to last found
            right.plot(mean[ranks], prevalence * mean[ranks] / inspected[ranks], zorder=3, **style)
        left.plot([0, prevalence, 1], [0, 1, 1], color=PALE, lw=1.2, zorder=1, label="perfect order")
        left.set(xlabel="fraction of samples inspected", ylabel="fraction of flipped labels found", xlim=(0, 0.4))
        left.set_title(f"Digits, {100 * prevalence:.0f} % of the labels flipped")
        left.set_ylim(0, 1.03)
        right.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
        right.set_title("Precision against recall")
        left.legend(loc="center right", bbox_to_anchor=(1.0, 0.68))
    return figure


def _interpolated(value: Mapping[str, Tensor], at: np.ndarray) -> np.ndarray:
    return np.interp(at, value["inspected"].numpy(), value["found"].numpy())


def subsets(removed: Mapping[str, Sequence[Any]], lds: Sequence[Mapping[str, float]], part: Any) -> Figure:
    """Rise of the test loss against the share removed, with standard errors; and linear datamodeling scores."""
    with _grid(1, len(removed) + 1, (12.5, 4.2)) as (figure, panels):
        *left, right = panels[0]
        for axes, (name, results) in zip(left, removed.items(), strict=True):
            for ranking in part.RANKINGS:
                runs = [torch.cat([one.increase[ranking, share] for one in results]) for share in part.SHARES]
                means = [float(values.mean()) for values in runs]
                errors = [float(values.std() / len(values) ** 0.5) for values in runs]
                percent = [100 * share for share in part.SHARES]
                axes.errorbar(
                    percent, means, errors, color=COLOURS[ranking], marker="o", ms=4.5, capsize=3, label=ranking
                )
            axes.axhline(0, color=PALE, lw=1)
            axes.set_xlabel("training samples removed, %")
            axes.set_title(f"{name.capitalize()}, trained afresh")
        left[0].set_ylabel("rise of the mean test loss")
        left[0].legend(loc="upper left")
        for place, name in enumerate(lds[0]):
            values = [one[name] for one in lds]
            right.bar(place, statistics.fmean(values), width=0.66, color=COLOURS[name], alpha=0.9)
            right.scatter([place] * len(values), values, s=14, color="#1d2733", zorder=3, lw=0)
        right.set_xticks(range(len(lds[0])), [name.replace(" ", "\n") for name in lds[0]])
        right.grid(axis="x", visible=False)
        right.set_title("Digits: linear datamodeling score")
    return figure
