"""How all charts look: colours, marks and axes.

Matplotlib is used through its object-oriented API alone, so nothing here touches pyplot's global state.
Colours are Okabe and Ito's, safe for colour-blind readers; every line also has its own marker, and dash for print.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK, FAINT = "#0072B2", "#D55E00", "#8a8f98", "#1d2129", "#e6e8eb"
# Colour, marker and dash of lines that share axes, without the yellows that print too faint.
STYLES = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    (INK, "v", (0, (5, 1))),
    ("#56B4E9", "P", (0, (3, 1, 1, 1))),
    (GREY, "X", (0, (1, 1))),
)


class Shown(Figure):
    """A figure that notebooks show, which of others only pyplot tells them to."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def blank(width: float, height: float) -> Figure:
    """Return an empty figure, so many inches wide and high."""
    figure = Shown(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, x: str, y: str, *, size: int = 8, weight: str = "bold") -> None:
    """Give some axes the look of all charts."""
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, color=INK, fontsize=size + 2, fontweight=weight, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=size)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=size + 1)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def legend(
    figure: Figure,
    loc: Literal["outside lower center", "outside upper center"] = "outside lower center",
    ncols: int = 2,
) -> None:
    """Draw one legend outside all axes of a figure."""
    figure.legend(loc=loc, ncols=ncols, fontsize=8, frameon=False, labelcolor=INK)


def band(axes: Axes, i: int, centre: np.ndarray, spread: np.ndarray, name: str | None = None, at: Any = None) -> None:
    """Draw the i-th line of some axes; `spread`: half the width of the band around it, or its two ends."""
    colour, mark, dash = STYLES[i % len(STYLES)]
    at = np.arange(len(centre)) if at is None else at
    low, high = spread if spread.ndim == 2 else (centre - spread, centre + spread)
    axes.plot(
        at, centre, color=colour, linestyle=dash, marker=mark, markevery=max(1, len(centre) // 6), markersize=4,
        linewidth=1.6, label=name,
    )  # fmt: skip
    axes.fill_between(at, low, high, color=colour, alpha=0.14, linewidth=0)


def bars(
    axes: Axes, i: int, at: Any, centre: Any, ends: Any, name: str, *, joined: bool = True, across: bool = False
) -> None:
    """Draw the i-th points of some axes with their intervals, `joined` or not; `across`: they lie along the x axis."""
    colour, mark, dash = STYLES[i % len(STYLES)]
    low, high = np.array(ends).T
    errors = np.abs(np.stack([centre - low, high - centre]))
    x, y = (centre, at) if across else (at, centre)
    axes.errorbar(
        x, y, **{"xerr" if across else "yerr": errors}, color=colour, marker=mark,
        linestyle=dash if joined else "none", linewidth=1.6, markersize=5, capsize=2, elinewidth=0.9, label=name,
    )  # fmt: skip
