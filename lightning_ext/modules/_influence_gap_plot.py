"""The figure of the five gaps. Matplotlib is imported only when it is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ext.metrics.influence_plot import outlier_limit, within

if TYPE_CHECKING:
    from lightning_ext.modules.influence_gaps import InfluenceGaps

_INK, _PALE = "#3a3f4a", "#9aa1ad"
_QUESTION, _ERROR = "#c2410c", "#2a6f97"
_PANELS = {"cold": "cold start", "warm": "warm start", "pbrf": "Bregman response"}


def plot_gaps(gaps: "InfluenceGaps", axes: Sequence[Any] | None = None) -> tuple[Any, Any]:
    """Draw bars of the gaps, and influence against three responses: four axes."""
    figure, axes = _axes(axes)
    _bars(axes[0], gaps)
    centred = torch.stack([_centred(gaps.measured[name]) for name in _PANELS])
    limits = sorted(map(outlier_limit, centred))
    inside, beyond = within(centred, limits[1])  # one of the responses may have diverged
    reach = 1.08 * float(inside.abs().max())
    for place, (name, title) in enumerate(_PANELS.items(), 1):
        _scatter(axes[place], _centred(gaps.influence), inside[place - 1], reach)
        count = int(beyond[place - 1].sum())
        r, rho = gaps.correlations[name]["pearson"], gaps.correlations[name]["spearman"]
        far = f"\n{count} far out, at the edge" if count else ""
        axes[place].set_title(f"{title}\nr = {r:.2f}, \u03c1 = {rho:.2f}{far}", fontsize=10, color=_INK)
    axes[1].set_ylabel("actual change of the measurement", fontsize=9, color=_INK)
    axes[2].set_xlabel("change that influence predicts (dashed: equal)", color=_INK)
    return figure, axes


def _bars(axes: Any, gaps: "InfluenceGaps") -> None:
    names, means = list(gaps.output_gaps), {name: gap.mean().item() for name, gap in gaps.output_gaps.items()}
    for place, name in enumerate(names):
        each = gaps.output_gaps[name].tolist()
        axes.barh(place, means[name], color=_QUESTION if place < 3 else _ERROR, alpha=0.85, height=0.62, zorder=2)
        axes.plot(each, [place] * len(each), "|", color=_INK, ms=7, alpha=0.45, zorder=3)
        axes.text(
            1.02, place, f"{means[name]:.2g}", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=_INK
        )
    positive = [mean for mean in means.values() if mean > 0]
    if positive:
        axes.set_xscale("log")
        seen = torch.cat([gap.reshape(-1).cpu() for gap in gaps.output_gaps.values()])
        axes.set_xlim(min(0.1 * min(positive), 0.8 * float(seen[seen > 0].min())), 2 * float(seen.max()))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("rms distance of outputs\nbar: mean over removals, |: each", color=_INK)
    axes.set_title("from retraining to an influence estimate\n", fontsize=10, color=_INK)
    axes.text(0.0, 1.03, "another question", transform=axes.transAxes, fontsize=9, color=_QUESTION)
    axes.text(1.0, 1.03, "error", transform=axes.transAxes, fontsize=9, color=_ERROR, ha="right")
    _quieten(axes)
    axes.tick_params(axis="y", length=0)


def _centred(values: Tensor) -> Tensor:
    """Less each query's mean over the removals, which no correlation sees."""
    return (values - values.mean(0)).cpu().flatten()


def _scatter(axes: Any, influence: Tensor, actual: Tensor, reach: float) -> None:
    axes.axline((0, 0), slope=1, color=_PALE, lw=1, ls="--", zorder=1)
    axes.plot(influence.tolist(), actual.tolist(), "o", ms=3, mew=0, color=_ERROR, alpha=0.35, rasterized=True)
    if reach > 0:
        axes.set_ylim(-reach, reach)
    _quieten(axes)
    axes.locator_params(axis="x", nbins=4)


def _axes(axes: Sequence[Any] | None) -> tuple[Any, Any]:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plotting needs matplotlib, which is not installed: pip install 'lightning-ext[plot]'"
        ) from error
    if axes is None:
        return plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained", width_ratios=[1.5, 1, 1, 1])
    if len(axes) != 4:
        raise ValueError(f"plot needs 4 axes, for the bars and three scatters; got {len(axes)}.")
    return axes[0].figure, axes


def _quieten(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_PALE)
    axes.tick_params(color=_PALE, labelcolor=_INK, labelsize=8)
