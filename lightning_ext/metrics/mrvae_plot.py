"""Figures of rate-distortion curves and information matrices. Matplotlib is imported only when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ext.metrics._figure import INK, PALE, axes_of, quieten

__all__: list[str] = []  # drawn through the metrics' own plot()

_MARKERS, _ACCENTS = "sD^v<>P", ("#c2410c", "#be185d", "#92400e", "#6b7280")


def plot_rate_distortion(
    curves: Sequence[Mapping[str, Tensor]], ax: Any = None, baselines: Mapping[str, tuple[Any, Any]] | None = None
) -> tuple[Any, Any]:
    """Draw distortion against rate; the last curve coloured by beta, earlier ones pale, baselines as marked points."""
    if not curves:
        raise ValueError("plot needs at least one computed curve, got an empty sequence.")
    figure, axes = axes_of(ax, (6.4, 4.4))
    for earlier in curves[:-1]:
        axes.plot(*_points(earlier)[1:], color=PALE, lw=1, marker=".", ms=4, zorder=1)
    _draw_curve(figure, axes, *_points(curves[-1]))
    for place, (label, (rate, distortion)) in enumerate((baselines or {}).items()):
        axes.scatter(
            _numbers(rate),
            _numbers(distortion),
            marker=_MARKERS[place % len(_MARKERS)],
            s=70,
            facecolor="none",
            edgecolor=_ACCENTS[place % len(_ACCENTS)],
            lw=1.6,
            label=label,
            zorder=4,
        )
    axes.set(xlabel="rate R (nats)", ylabel="distortion D (nats)")
    axes.margins(0.06)
    quieten(axes)
    axes.grid(color="#e6e8ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    return figure, axes


def plot_information(
    value: Mapping[str, Tensor], ax: Any = None, factor_names: Sequence[str] | None = None
) -> tuple[Any, Any]:
    """Draw a heat map of the mutual information between latents (rows) and factors (columns)."""
    matrix = value["mutual_information"].detach().cpu()
    latents, factors = matrix.shape
    names = [f"factor {f}" for f in range(factors)] if factor_names is None else list(factor_names)
    if len(names) != factors:
        raise ValueError(f"factor_names must name {factors} factors, got {len(names)}: {names}.")
    figure, axes = axes_of(ax, (1.6 + 0.9 * factors, 1.4 + 0.38 * latents))
    image = axes.imshow(matrix.tolist(), cmap="cividis", vmin=0, aspect="auto")
    if latents * factors <= 120:
        middle = matrix.max().item() / 2
        for (row, column), cell in zip(
            torch.cartesian_prod(*map(torch.arange, matrix.shape)), matrix.flatten(), strict=True
        ):
            colour = "#111111" if cell > middle else "#f5f5f5"
            axes.text(int(column), int(row), f"{cell:.2f}", ha="center", va="center", fontsize=8, color=colour)
    gaps = value["gap"].reshape(-1).tolist()
    axes.set_xticks(range(factors), [f"{name}\ngap {gap:.2f}" for name, gap in zip(names, gaps, strict=True)])
    axes.set_yticks(range(latents), [f"$z_{{{j}}}$" for j in range(latents)])
    axes.set_title(f"MIG {value['mig'].item():.3f}", fontsize=11, color=INK)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.03)
    bar.set_label("mutual information (nats)")
    bar.outline.set_visible(False)
    return figure, axes


def _draw_curve(figure: Any, axes: Any, beta: list[float], rate: list[float], distortion: list[float]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.plot(rate, distortion, color=INK, lw=1.2, alpha=0.55, zorder=2)
    shades = ListedColormap(colormaps["viridis"](torch.linspace(0, 0.9, 256).tolist()))  # pale yellow fades on white
    span = LogNorm(min(beta), max(beta)) if len(beta) > 1 else None
    points = axes.scatter(
        rate, distortion, c=beta, cmap=shades, norm=span, s=50, edgecolor="white", lw=0.7, label="curve", zorder=3
    )
    bar = figure.colorbar(points, ax=axes, pad=0.02)
    bar.set_label("\u03b2, the weight of the rate", color=INK)
    bar.outline.set_visible(False)
    if span is not None:
        bar.ax.yaxis.set(
            major_locator=LogLocator(subs=(1.0,) if max(beta) > 99 * min(beta) else (1.0, 2.0, 5.0)),
            minor_locator=NullLocator(),
        )
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    best = min(range(len(beta)), key=lambda k: rate[k] + distortion[k])
    axes.scatter(
        rate[best],
        distortion[best],
        s=170,
        facecolor="none",
        edgecolor=INK,
        lw=1.3,
        zorder=3,
        label=f"best ELBO {-(rate[best] + distortion[best]):.1f} at \u03b2 = {beta[best]:.2g}",
    )


def _points(curve: Mapping[str, Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Beta, rate and distortion of the measured points, by beta."""
    columns = torch.stack([curve[name].detach().cpu().reshape(-1) for name in ("beta", "rate", "distortion")])
    columns = columns[:, columns.isfinite().all(0)]
    if columns.shape[1] == 0:
        raise ValueError("The curve has no finite point to draw.")
    beta, rate, distortion = columns[:, columns[0].argsort()].tolist()
    return beta, rate, distortion


def _numbers(values: Any) -> list[float]:
    numbers: list[float] = torch.as_tensor(values, dtype=torch.float64).reshape(-1).tolist()
    return numbers
