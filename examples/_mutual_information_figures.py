"""Figures of the mutual-information reproduction."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from lightning_ext.demo import PAGE_STYLE

_FLOOR = 0.5  # of a logarithmic axis, in nats
_BELOW, _ABOVE = ("lower", -14), ("upper", 7)
_LABELS = {
    "IWAE from the prior": [_BELOW] * 3,
    "IWAE from the encoder": [_BELOW],  # the rest lies where the others do
    "AIS from the prior": [_ABOVE] * 3,
}

Sides = tuple[float, float | None]

_MARKS = {"AIS": "o", "Barber-Agakov": "s", "GIWAE, K = 64": "D", "InfoNCE": "v", "MINE-AIS, certified": "P"}


def against_compute(rows: Mapping[str, Sequence[tuple[str, Any]]]) -> plt.Figure:
    """Both sides of each bound over the seconds that they took; ``rows`` has pairs of a label and bounds by name."""
    with plt.rc_context(PAGE_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        for colour, (name, points) in zip(("C1", "C2", "C0"), rows.items(), strict=False):
            seconds = [bounds.seconds for _, bounds in points]
            lower, upper = ([getattr(bounds, side) for _, bounds in points] for side in ("lower", "upper"))
            axes.fill_between(seconds, lower, upper, color=colour, alpha=0.12, lw=0)
            for side in (lower, upper):
                axes.plot(seconds, side, color=colour, marker="o", ms=4, label=name if side is lower else None)
            for (label, found), (side, height) in zip(points, _LABELS[name], strict=False):
                axes.annotate(
                    label, (found.seconds, getattr(found, side)), (0, height), textcoords="offset points", ha="center",
                    fontsize=8,
                )  # fmt: skip
        axes.margins(x=0.08)
        axes.set(xscale="log", xlabel="seconds on one core", ylabel="mutual information, nats", ylim=(0, None))
        axes.set_title("Lower and upper bounds of one VAE of the digits")
        axes.legend()
        return figure


def against_truth(
    truths: Sequence[float], found: Mapping[str, Sequence[tuple[float, float | None]]], cap: float
) -> Any:
    """Each estimator over the true information."""
    with plt.rc_context(PAGE_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 5.2))
        axes.plot([truths[0], truths[-1]], [truths[0], truths[-1]], color="#8a97a6", ls="--", lw=1.2, label="truth")
        axes.axhline(cap, color="#8a97a6", ls=":", lw=1)
        axes.annotate("log of a batch of 128", (truths[0], cap), (0, 3), textcoords="offset points", fontsize=8)
        for index, (name, sides) in enumerate(found.items()):
            style: dict[str, Any] = {"color": f"C{index}", "marker": _MARKS.get(name, "."), "ms": 5, "lw": 1.5}
            axes.plot(truths, [max(lower, _FLOOR) for lower, _ in sides], label=name, **style)
            upper = [above for _, above in sides if above is not None]
            if upper:
                axes.plot(truths, upper, ls="--", **style)
        axes.set(
            xscale="log", yscale="log", xlabel="true mutual information, nats", ylabel="bound or estimate, nats",
            ylim=(_FLOOR, 400),
        )  # fmt: skip
        axes.set_xticks(truths, [f"{truth:g}" for truth in truths])
        axes.set_yticks([1, 10, 100], ["1", "10", "100"])
        axes.set_title("From 1 to 80 nats (dashed: upper bounds; below 0.5 drawn at 0.5)", fontsize=10)
        axes.legend(fontsize=8, ncols=2)
        return figure


def against_beta(found: Sequence[Any]) -> plt.Figure:
    """The sandwich of a multi-rate VAE's model and the rates of its encoder, over beta."""
    with plt.rc_context(PAGE_STYLE):
        figure, axes = plt.subplots(figsize=(6.8, 4.2))
        betas = [point.beta for point in found]
        lower, upper = ([getattr(point.bounds, side) for point in found] for side in ("lower", "upper"))
        axes.fill_between(betas, lower, upper, color="C0", alpha=0.3, lw=0)
        axes.plot(betas, lower, color="C0", marker="o", ms=4, label="information of the model, AIS")
        axes.plot(betas, upper, color="C0", marker="o", ms=4)
        axes.plot(betas, [point.data_rate for point in found], color="C1", marker="s", ms=4, label="rate on digits")
        axes.plot(
            betas, [point.encoder_upper for point in found], color="C3", marker="^", ms=4, ls="--",
            label="Barber-Agakov upper bound with the encoder",
        )  # fmt: skip
        axes.set(xscale="log", xlabel=r"$\beta$, the variance of the pixels", ylabel="nats", ylim=(0, None))
        axes.set_title("One multi-rate VAE: what its latents carry at each rate")
        axes.legend()
        return figure
