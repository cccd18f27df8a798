"""The charts of studies."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from immunonet._words import show
from immunonet.report.style import BLUE, GREY, INK, ORANGE, STYLES, band, bars, blank, dress, legend

Row = Mapping[str, Any]


def value_curves(title: str, vary: str, lines: Mapping[str, Sequence[tuple[Any, Row]]]) -> Figure:
    """Return a figure of accuracy against the setting `vary`; points are joined if its values are several numbers.

    `lines`: by name, values and their rows, with `accuracy` and `ci95`.
    """
    values = {show(value): value for line in lines.values() for value, _ in line}
    numeric = all(isinstance(value, int | float) for value in values.values()) and len(values) > 2
    places = {text: float(value) if numeric else i for i, (text, value) in enumerate(values.items())}
    figure = blank(6.4, 3.6)
    axes = figure.subplots()
    for i, (name, line) in enumerate(lines.items()):
        shift = 0.0 if numeric else (i - (len(lines) - 1) / 2) * 0.7 / len(lines)
        at = np.array([places[show(value)] for value, _ in line]) + shift
        centre, ends = ([row[key] for _, row in line] for key in ("accuracy", "ci95"))
        bars(axes, i, at, centre, ends, name, joined=numeric)
    if numeric:
        numbers = sorted(set(places.values()))
        if numbers[0] > 0 and numbers[-1] / numbers[0] > 20:
            axes.set_xscale("log")
            axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
            axes.minorticks_off()
    else:
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlim(-0.6, len(values) - 0.4)
    dress(axes, title, vary.replace("_", " "), "accuracy")
    bottom = min(row["ci95"][0] for line in lines.values() for _, row in line)
    axes.set_ylim(max(-0.02, bottom - 0.05), 1.02)
    legend(figure)
    return figure


def generation_curves(curves: Sequence[Row]) -> Figure:
    """Return a figure of affinity, true share and entropy against the generation, a line per size of the attack.

    `curves`: each with `eps`, and means and half widths of intervals as `affinity`, `affinity_half` and so on.
    """
    figure = blank(9.0, 3.2)
    panels = figure.subplots(1, 3)
    kinds = {
        "affinity": "affinity, true class",
        "true_share": "votes for the true class",
        "entropy": "entropy of votes (nats)",
    }
    for axes, (name, label) in zip(panels, kinds.items(), strict=True):
        for i, curve in enumerate(curves):
            told = f"eps {curve['eps']:.3g}" if axes is panels[0] else None
            band(axes, i, np.array(curve[name]), np.array(curve[f"{name}_half"]), told)
        dress(axes, "", "generation", label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(bottom=0)
    legend(figure)
    return figure


def alarm_curves(strangers: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Return ROC curves, a panel per stranger; by rule the share of it flagged, at even steps of false alarms."""
    figure = blank(3.1 * len(strangers), 3.6)
    panels = figure.subplots(1, len(strangers), squeeze=False)[0]
    for axes, (stranger, rules) in zip(panels, strangers.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
        for (name, rates), (colour, _, dash) in zip(rules.items(), itertools.cycle(STYLES), strict=False):
            told = name if axes is panels[0] else None
            at = np.linspace(0, 1, len(rates))
            axes.plot(at, np.array(rates), color=colour, linestyle=dash, linewidth=1.6, label=told)
        dress(axes, stranger, "clean images flagged", "strangers flagged")
        axes.set_aspect("equal")
    legend(figure)
    return figure


def trial_scores(title: str, scores: Sequence[float]) -> Figure:
    """Return a figure of the score of every trial of a search in order, the best so far, and the start."""
    figure = blank(6.4, 3.2)
    axes = figure.subplots()
    axes.axhline(scores[0], color=GREY, linestyle=":", linewidth=1.2, label="the start (trial 0)")
    number = np.arange(len(scores))
    axes.plot(number, scores, color=BLUE, marker="o", markersize=5, linestyle="none", label="trial")
    best = np.maximum.accumulate(scores)
    axes.plot(number, best, color=ORANGE, linestyle="-", linewidth=1.6, drawstyle="steps-post", label="best so far")
    dress(axes, title, "trial", "mean accuracy, trial images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure)
    return figure


def path_curves(places: Sequence[float], panels: Mapping[str, Mapping[str, Row]], y: str) -> Figure:
    """Return a figure of what is measured along paths against t, a panel each.

    `places`: the values of t. `panels`: by title and line a row with `values`, one per place, and maybe their `ci95`.
    """
    figure = blank(2.5 * len(panels) + 0.3, 3.4)
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(drawn, panels.items(), strict=True):
        for i, (name, row) in enumerate(lines.items()):
            values = np.array(row["values"])
            ends = np.array(row["ci95"]).T if "ci95" in row else np.stack([values, values])
            band(axes, i, values, ends, name if axes is drawn[0] else None, at=np.array(places))
        dress(axes, title, "t", y if axes is drawn[0] else "")
    legend(figure)
    return figure


def innate_curves(levels: Sequence[float], panels: Mapping[str, tuple[Mapping[str, Row], Mapping[str, Row]]]) -> Figure:
    """Return a figure of what a network that may answer itself changes, against the p-value it answers above.

    `levels`: those p-values. `panels`: by title, a column each, shares by line with `values` and `ci95`, and below them
    costs by line with `values`, as shares of what every answer would cost.
    """
    figure = blank(3.2 * len(panels) + 0.2, 5.4)
    highest = 1.05 * max(max(row["values"]) for _, costs in panels.values() for row in costs.values())
    drawn = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    for column, (title, (shares, costs)) in zip(drawn.T, panels.items(), strict=True):
        first = column[0] is drawn[0, 0]
        for i, (name, row) in enumerate(shares.items()):
            band(column[0], i, np.array(row["values"]), np.array(row["ci95"]).T, name if first else None, at=levels)
        for i, (name, row) in enumerate(costs.items(), len(shares)):
            band(column[1], i, np.array(row["values"]), np.zeros(len(levels)), name if first else None, at=levels)
        dress(column[0], title, "", "share of images" if first else "")
        dress(column[1], "", "innate", "cost, of RAILS always" if first else "")
        column[0].set_ylim(-0.03, 1.03)
        column[1].set(xscale="log", ylim=(0, highest))
        column[1].set_xticks(levels, [f"{level:g}" for level in levels])
        column[1].minorticks_off()
    legend(figure)
    return figure


def loss_plane(planes: Mapping[str, Row]) -> Figure:
    """Return a figure of the loss in the plane through both ends and the bend of paths, a panel each.

    `planes`: by title the coordinates `x`, `y`, the `loss` `(y, x)`, the `bend` and the `curve`. Ends are at (0, 0) and
    (1, 0).
    """
    figure = blank(4.6 * len(planes), 3.6)
    for axes, (title, plane) in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes.items(), strict=True):
        loss = np.log10(np.maximum(np.array(plane["loss"]), 1e-3))
        drawn = axes.contourf(plane["x"], plane["y"], loss, levels=16, cmap="cividis")
        bar = figure.colorbar(drawn, ax=axes)
        bar.set_label("log10 of the loss", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7)
        curve = np.array(plane["curve"]).T
        axes.plot(*curve, color="white", linewidth=1.8)
        axes.plot([0, 1], [0, 0], color="white", linewidth=1.0, linestyle="--")
        axes.plot([0, 1], [0, 0], color=ORANGE, marker="o", linestyle="none", label="ends")
        axes.plot(*plane["bend"], color=ORANGE, marker="D", linestyle="none", label="bend")
        dress(axes, title, "between the ends", "towards the bend")
        axes.legend(frameon=False, fontsize=7, labelcolor="white", loc="upper right")
    return figure


def watching(rows: Sequence[Row]) -> Figure:
    """Return a figure of the share of attacks that a sentinel stops, by attack and way to ask.

    `rows`: `attack`, `way`, `stopped_share` and its interval `ci95`, None where none fell without it.
    """
    figure, ways = blank(6.4, 3.4), list(dict.fromkeys(row["way"] for row in rows))
    axes = figure.subplots()
    for i, attack in enumerate(names := list(dict.fromkeys(row["attack"] for row in rows))):
        own = [row for row in rows if row["attack"] == attack and row["stopped_share"] is not None]
        at = np.array([ways.index(row["way"]) + 0.2 * (i - (len(names) - 1) / 2) for row in own])
        centre, ends = (np.array([row[key] for row in own], dtype=float) for key in ("stopped_share", "ci95"))
        bars(axes, i, at, centre, ends.reshape(-1, 2), attack, joined=False)
    axes.set_xticks(range(len(ways)), ways)
    axes.set(xlim=(-0.5, len(ways) - 0.5), ylim=(-0.05, 1.05))
    dress(axes, "Stopped by the sentinel", "how the attacker asks", "share of attacks")
    axes.legend(frameon=False, fontsize=7)
    return figure


def healing(entry: Row) -> Figure:
    """Return a figure of what control changes: distances to the manifolds, and pictures of attacked images, if any.

    `entry`: `layers`, `rows` with the `mean` per layer and its `half` width before and after, clean and attacked, and
    `pictures` as bytes.
    """
    pictures = entry["pictures"]["attacked"]
    n = len(pictures["truth"]) if "given" in pictures else 0
    figure = blank(3.2 + 0.85 * n, 3.4)
    parts: Any = figure.subfigures(1, 2, width_ratios=[3.2, 0.85 * n]) if n else (figure, figure)
    left, right = parts
    axes = left.subplots()
    for i, row in enumerate(entry["rows"]):
        at = np.arange(len(row["mean"])) + 0.14 * (i - 1.5)
        centre, half = np.array(row["mean"]), np.array(row["half"])
        ends = np.stack([centre - half, centre + half], 1)
        bars(axes, i, at, centre, ends, f"{row['images']}, {row['when']}", joined=False)
    axes.set_xticks(range(len(entry["layers"])), entry["layers"])
    axes.set(xlim=(-0.5, len(entry["layers"]) - 0.5), ylim=(0, None))
    dress(axes, "Distance to the manifold", "", "in units of clean images")
    axes.legend(frameon=False, fontsize=7)
    if n:
        _pictures(right, entry, n)
    return figure


def _pictures(figure: Any, entry: Row, n: int) -> None:
    """Draw clean images, attacked ones, these after control, and what control added, in four rows."""
    clean, attacked = entry["pictures"]["clean"], entry["pictures"]["attacked"]

    def read(source: Row, name: str) -> np.ndarray:
        values = np.frombuffer(base64.b64decode(source[name]), dtype=np.uint8)
        return values.reshape(n, *source["shape"]).transpose(0, 2, 3, 1).astype(int)

    given, met = read(attacked, "given"), read(attacked, "met")
    rows = {
        "clean": (read(clean, "given"), clean["truth"]), "attacked": (given, attacked["bare"]),
        "controlled": (met, attacked["healed"]), "control": (np.clip(128 + met - given, 0, 255), None),
    }  # fmt: skip
    for (name, (images, labels)), drawn in zip(rows.items(), figure.subplots(4, n, squeeze=False), strict=True):
        for i, axes in enumerate(drawn):
            pixels = images[i].astype(np.uint8)
            axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            if labels is not None:
                right = labels[i] == attacked["truth"][i]
                axes.set_title(str(labels[i]), fontsize=7, color=INK if right else ORANGE, pad=2)
        drawn[0].set_ylabel(name, fontsize=7, color=INK)
