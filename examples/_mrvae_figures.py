"""Figures of the MR-VAE reproduction."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_ext.demo import PAGE_STYLE

INK, PALE = "#1d2733", "#9aa6b4"
COLOURS = {
    "mr": "#2f7de1",
    "beta": "#f2762e",
    "slow": "#c79a12",
    "none": "#8a97a6",
    "batch": "#8f63e0",
    "readme": "#14a37f",
}
LATENT_COLOURS = ("#1b4f9c", "#2f7de1", "#14a37f", "#c79a12", "#d6456b")
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
def _panels(widths: Sequence[float] = (1.0, 1.0)) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 4.4))
        grid = figure.add_gridspec(1, len(widths), width_ratios=widths, wspace=0.06)
        yield figure, [figure.add_subplot(cell) for cell in grid]


def _beta_axis(axes: Axes, betas: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(betas)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda beta, _: f"{beta:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("β, the weight of the rate")


def linear(
    excess: Mapping[str, Sequence[float]], limits: Mapping[str, float], labels: Mapping[str, str], shrinkage: Any
):
    """Excess loss of each family, and the response functions of the best joint family against the closed form.

    Args:
        excess: Nats, one number per seed, by family.
        limits: Criterion of each family.
        labels: Its name in the figure.
        shrinkage: ``(betas, eigenvalues, closed form, trained)``; the last two ``(B, k)``.
    """
    with _panels((1.0, 1.15)) as (figure, (left, right)):
        for row, (family, values) in enumerate(excess.items()):
            above = family == "ungated"
            limit = limits[family]
            left.plot([limit, limit], [row - 0.3, row + 0.3], color=COLOURS["beta"], lw=2.2)
            left.annotate(
                "", (limit * (1.9 if above else 0.53), row + 0.3), (limit, row + 0.3),
                arrowprops={"arrowstyle": "->", "color": COLOURS["beta"], "lw": 1.3},
            )  # fmt: skip
            left.scatter(values, [row] * len(values), s=42, color=COLOURS["mr"], alpha=0.35, lw=0)
            left.scatter(min(values), row, s=64, color=COLOURS["mr"], edgecolor="white", zorder=3)
            left.annotate(
                f"{min(values):.2g}", (min(values), row), (10 if above else -10, 0), textcoords="offset points",
                ha="left" if above else "right", va="center",
            )  # fmt: skip
        left.set_xscale("log")
        left.xaxis.set_minor_locator(NullLocator())
        left.set_yticks(range(len(excess)), [labels[family] for family in excess])
        left.set_ylim(len(excess) - 0.5, -0.6)
        left.set_xlim(1e-4, 9)
        left.grid(axis="y", visible=False)
        left.set_xlabel("loss above the optimum (nats), best seed")
        left.set_title("How close training comes (orange: to pass)")

        betas, eigenvalues, exact, trained = shrinkage
        for column, (value, colour) in enumerate(zip(eigenvalues, LATENT_COLOURS, strict=False)):
            right.plot(betas, exact[:, column], color=colour, lw=1.6, alpha=0.8)
            right.scatter(betas[::6], trained[::6, column], color=colour, s=15, lw=0, label=f"λ = {value:g}")
        right.plot([], [], color=INK, lw=1.6, label="closed form")
        _beta_axis(right, (0.01, 0.1, 1, 10))
        right.set_ylabel("share of the direction kept, $(DE)_{ii}$")
        right.set_title("One trained network follows the water level")
        right.legend(loc="lower left")
    return figure


def curves(
    result: Any, recipes: Mapping[str, Any], title: str, bands: Sequence[tuple[float, float, float, float]]
) -> Figure:
    """Rate-distortion curves of all seeds, and the gap to separate beta-VAEs at each beta.

    Args:
        result: The runs.
        recipes: Labels by kind.
        title: What the data are.
        bands: The criteria, ``(lowest beta, highest beta, lowest gap, highest gap)``.
    """
    with _panels((1.15, 1.0)) as (figure, (left, right)):
        _draw_curves(left, result, recipes)
        left.margins(0.09)
        left.set(xlabel="rate R (nats)", ylabel="distortion D (nats)")
        left.set_title(f"One run against one network per β\n{title}")
        left.legend(loc="upper right")

        for low, high, bottom, top in bands:
            right.fill_between([low / 1.25, high * 1.25], bottom, top, color=COLOURS["mr"], alpha=0.09, lw=0)
        right.axhline(0, color=COLOURS["beta"], lw=1.6)
        right.annotate(
            recipes["beta"].label, (0.02, 0), (0, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom", color=COLOURS["beta"], fontsize=9.5,
        )  # fmt: skip
        for kind in [*result.multi_rate, *(kind for kind in result.single_rate if kind != "beta")]:
            gaps = result.gaps_by_beta(kind)
            middle = [statistics.fmean(values) for values in gaps.values()]
            for beta, values in gaps.items():
                right.scatter([beta] * len(values), values, s=18, color=COLOURS[kind], alpha=0.4, lw=0)
            right.plot(
                list(gaps), middle, color=COLOURS[kind], marker="o", ms=6, mec="white", label=recipes[kind].label
            )
        _beta_axis(right, result.betas)
        right.set_ylabel("$L_β$ above that of the β-VAE (nats)")
        right.set_title("Gap at each β, below 0 the one run is better\nshaded: to pass")
        right.legend(loc="best")
    return figure


def _draw_curves(axes: Axes, result: Any, recipes: Mapping[str, Any]) -> None:
    for seed in result.seeds:
        labels = {kind: recipe.label if seed == result.seeds[0] else None for kind, recipe in recipes.items()}
        curve = result.multi_rate["mr"][seed].points.values()
        axes.plot(
            [p.rate for p in curve], [p.distortion for p in curve], color=COLOURS["mr"], marker="o", ms=3.5, lw=1.4,
            alpha=0.75, label=labels["mr"],
        )  # fmt: skip
        for kind, runs in result.single_rate.items():
            points = [run.points[beta] for beta, run in runs[seed].items()]
            axes.scatter(
                [p.rate for p in points], [p.distortion for p in points], s=46, marker="s", facecolor="white",
                edgecolor=COLOURS[kind], lw=1.6, zorder=3, label=labels[kind],
            )  # fmt: skip
        if "none" in result.multi_rate:
            point = next(iter(result.multi_rate["none"][seed].points.values()))
            axes.scatter(
                point.rate, point.distortion, s=60, marker="X", color=COLOURS["none"], zorder=3, lw=0,
                label=labels["none"],
            )  # fmt: skip
    baselines = result.single_rate["beta"][result.seeds[0]]
    widest = max(run.points[beta].rate for beta, run in baselines.items())
    for beta, run in baselines.items():
        near_the_axis = run.points[beta].rate < 0.06 * widest
        axes.annotate(
            f"β = {beta:g}", (run.points[beta].rate, run.points[beta].distortion),
            (8, 4) if near_the_axis else (-6, -4),
            textcoords="offset points", ha="left" if near_the_axis else "right",
            va="bottom" if near_the_axis else "top", fontsize=9, color=COLOURS["beta"],
        )  # fmt: skip


def mnist(multi: Mapping[int, Any], single: Mapping[int, Mapping[float, Any]], readme: Mapping[float, Any]) -> Figure:
    """Curves of all seeds beside the published one, and the deviation from it at each beta."""
    with _panels() as (figure, (left, right)):
        for index, (seed, run) in enumerate(multi.items()):
            points = run.points.values()
            left.plot(
                [p.rate for p in points], [p.distortion for p in points], color=COLOURS["mr"], marker="o", ms=4,
                alpha=0.75, label=None if index else "one MR-VAE run",
            )  # fmt: skip
            points = [run.points[beta] for beta, run in single[seed].items()]
            left.scatter(
                [p.rate for p in points], [p.distortion for p in points], s=46, marker="s", facecolor="white",
                edgecolor=COLOURS["beta"], lw=1.6, zorder=3, label=None if index else "separate β-VAEs",
            )  # fmt: skip
            relative = [100 * (run.points[b].loss(b) / (d + b * r) - 1) for b, (r, d) in readme.items()]
            right.plot(list(readme), relative, color=COLOURS["mr"], marker="o", mec="white", alpha=0.75)
        rates, distortions = zip(*readme.values(), strict=True)
        left.plot(rates, distortions, color=COLOURS["readme"], ls="--", marker="D", ms=4, label="authors' release")
        left.set(xlabel="rate R (nats)", ylabel="distortion D (nats)")
        left.set_title("Binarised MNIST, ResNet")
        left.legend()
        right.axhspan(-5, 5, color=COLOURS["mr"], alpha=0.09, lw=0)
        right.axhline(0, color=COLOURS["readme"], ls="--")
        _beta_axis(right, (0.01, 0.1, 1, 10))
        right.set_ylabel("$L_β$ above the authors' release (%)")
        right.set_title("Shaded: to pass")
    return figure


def dsprites(multi: Mapping[float, Sequence[float]], single: Mapping[float, Sequence[float]]) -> Figure:
    """Mutual information gap of every seed and its mean, against beta."""
    with _panels((1.0,)) as (figure, (axes,)):
        for kind, label, found in (("mr", "one MR-β-TCVAE run", multi), ("beta", "separate β-TCVAEs", single)):
            for beta, values in found.items():
                axes.scatter([beta] * len(values), values, s=22, color=COLOURS[kind], alpha=0.45, lw=0)
            means = [statistics.fmean(values) for values in found.values()]
            axes.plot(list(found), means, color=COLOURS[kind], marker="o", mec="white", label=label)
        _beta_axis(axes, (0.1, 0.3, 1, 3, 10))
        axes.set_ylabel("mutual information gap")
        axes.set_title("dSprites, mean over seeds")
        axes.legend()
    return figure
