"""How the figures of all metrics look. Matplotlib is imported only when one is drawn."""

from typing import Any

INK, PALE = "#3a3f4a", "#c3c8d1"


def axes_of(ax: Any, size: tuple[float, float]) -> tuple[Any, Any]:
    """The figure and axes to draw in: those of ``ax``, or new ones of that size in inches."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plotting needs matplotlib, which is not installed: pip install 'lightning-ext[plot]'"
        ) from error
    return (ax.figure, ax) if ax is not None else plt.subplots(figsize=size, layout="constrained")


def quieten(axes: Any) -> None:
    """Leave the left and bottom lines, in grey."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa1ad")
    axes.tick_params(color="#9aa1ad", labelcolor=INK)
