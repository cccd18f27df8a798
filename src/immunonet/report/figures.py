"""All charts: learning curves, and accuracies with their intervals.

Matplotlib is used through its object-oriented API alone, so nothing here touches pyplot's global state.
Colours are Okabe and Ito's, safe for colour-blind readers; every line also has its own marker, and dash for print.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from immunonet import _store, incoming
from immunonet._words import show
from immunonet.response import Trace

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

Row = Mapping[str, Any]


def svg_uri(figure: Figure) -> str:
    """Return a figure as the `data:` address of an SVG: text stays text, same figure, same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "immunonet"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def save(figures: Mapping[str, Figure], folder: Path, prefix: str) -> None:
    """Write figures as `<folder>/<prefix>-<name>.png`, at 200 dots per inch, each whole or not at all."""
    for name, figure in figures.items():
        with _store.replacing(folder / f"{prefix}-{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})


def class_series(values: Tensor, label: Tensor) -> Tensor:
    """Return one class's curve per antigen: `values` `(G + 1, B, C)` at `label` `(B,)` gives `(G + 1, B)`."""
    return values.gather(2, label.to(values.device).reshape(1, -1, 1).expand(len(values), -1, 1)).squeeze(2)


def mean_band(series: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over antigens and the half width of its 95 % interval (normal approximation).

    `(G + 1, B)` gives two arrays `(G + 1,)`. One antigen alone has no interval: its half width is 0.
    """
    series = series.detach().double().cpu()
    n = series.shape[1]
    spread = series.std(1) if n > 1 else torch.zeros(len(series), dtype=series.dtype)
    return series.mean(1).numpy(), (1.96 * spread / math.sqrt(n)).numpy()


def learning_curves(clean: Trace, adversarial: Trace, truth: Tensor, wrong: Tensor) -> tuple[Figure, Figure]:
    """Return how the cells learn: a figure for clean and one for adversarial antigens, on the same scales.

    `clean`, `adversarial`: traces of one layer for the same B antigens before and after an attack; `truth`,
    `wrong`: `(B,)`, the true class and the one to compare it with. Top to bottom, against the generation:
    affinity of the cells of both classes (mean of the population), share of the true class in the votes,
    entropy of the votes in nats; means over antigens with the 95 % interval of the mean. Raises ValueError
    unless all are of one B.
    """
    truth, wrong = incoming.tensor("truth", truth), incoming.tensor("wrong", wrong)
    sizes = [clean.votes.shape[1], adversarial.votes.shape[1], len(truth), len(wrong)]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(f"clean, adversarial, truth and wrong must be of the same antigens, got {sizes} antigens")
    both = [
        [class_series(trace.affinity_mean, truth), class_series(trace.affinity_mean, wrong),
         class_series(trace.votes, truth), trace.entropy]
        for trace in (clean, adversarial)
    ]  # fmt: skip
    bands = [[mean_band(series) for series in own] for own in both]
    low = min((mean - half).min() for own in bands for mean, half in own[:2])
    high = max((mean + half).max() for own in bands for mean, half in own[:2])
    most = max(0.1, 1.08 * max((own[3][0] + own[3][1]).max() for own in bands))
    margin = 0.15 * (high - low) or 1.0
    limits = ((low - margin, high + margin), (-0.03, 1.03), (0, most))
    labels = ("affinity", "votes for true class", "entropy of votes (nats)")
    figures = blank(4.2, 6.0), blank(4.2, 6.0)
    for figure, own, title in zip(figures, bands, ("Clean antigens", "Adversarial antigens"), strict=True):
        axes = figure.subplots(3, 1, sharex=True)
        names = ("true class", "wrong class", None, None)
        for place, style, band, name in zip((0, 0, 1, 2), (0, 1, 0, 4), own, names, strict=True):
            _band(axes[place], style, *band, name)
        for place, (label, ends) in enumerate(zip(labels, limits, strict=True)):
            dress(axes[place], "" if place else title, "generation" if place == 2 else "", label)
            axes[place].set_ylim(*ends)
        axes[0].legend(frameon=False, fontsize=8)
        axes[2].xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()
    return figures


def accuracy_curves(curves: Mapping[str, Row]) -> Figure:
    """Return a figure of accuracy against eps, one line per attack with its 95 % interval.

    `curves`: per attack `eps`, `accuracy` (lists of one length) and `ci95` (pairs).
    """
    figure = blank(6.4, 3.6)
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        _bars(axes, i, curve["eps"], curve["accuracy"], curve["ci95"], name)
    dress(axes, "", "eps", "accuracy")
    axes.set_ylim(-0.03, 1.03)
    _legend(figure)
    return figure


def accuracy_points(lines: Mapping[str, Mapping[str, Row]]) -> Figure:
    """Return a figure with a line per defence: a point, its accuracy with the interval, for each way it was attacked.

    `lines`: per defence and attack a row, with `accuracy` and `ci95`; the first attack named is drawn topmost.
    """
    figure = blank(7.0, 1.2 + 0.45 * len(lines))
    axes = figure.subplots()
    attacks = list(dict.fromkeys(name for line in lines.values() for name in line))
    for i, attack in enumerate(attacks):
        rows = {place: line[attack] for place, line in enumerate(lines.values()) if attack in line}
        places = np.array(list(rows)) + (i - (len(attacks) - 1) / 2) * 0.22
        centre, ends = ([row[key] for row in rows.values()] for key in ("accuracy", "ci95"))
        _bars(axes, i, places, centre, ends, attack, joined=False, across=True)
    dress(axes, "", "accuracy", "")
    axes.set(yticks=range(len(lines)), yticklabels=list(lines), xlim=(-0.03, 1.03))
    axes.invert_yaxis()
    _legend(figure, "outside upper center", len(attacks))
    return figure


def rejection_curves(curves: Mapping[str, Mapping[str, Sequence[Row]]]) -> Figure:
    """Return a figure of what is held in the worst case against the clean inputs that are still answered.

    `curves`: per panel and defence the levels of rejection, each with `accepted`, `held` and its `ci95`.
    """
    figure = blank(3.4 * len(curves) + 0.4, 3.6)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(panels, curves.items(), strict=True):
        for i, (name, levels) in enumerate(lines.items()):
            at, held = (np.array([level[key] for level in levels]) for key in ("accepted", "held"))
            ends = np.array([level["ci95"] for level in levels]).T
            _band(axes, i, held, ends, name, at=at)
        dress(axes, title, "clean images that are answered", "", size=7, weight="normal")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.legend(frameon=False, fontsize=7)
    panels[0].set_ylabel("attacked images held (right, or declined)")
    return figure


def loss_curves(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Return a figure of each attack's mean loss against its steps, a small panel each: losses differ in scale."""
    columns = min(4, len(losses))
    rows = math.ceil(len(losses) / columns)
    figure = blank(2.1 * columns, 1.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, values) in zip(panels, losses.items(), strict=False):
        axes.plot(range(len(values)), values, color=BLUE, linewidth=1.5)
        dress(axes, name, "", "", size=6, weight="normal")
    for axes in panels[len(losses) :]:
        axes.set_visible(False)
    return figure


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
        _bars(axes, i, at, centre, ends, name, joined=numeric)
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
    _legend(figure)
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
            _band(axes, i, np.array(curve[name]), np.array(curve[f"{name}_half"]), told)
        dress(axes, "", "generation", label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(bottom=0)
    _legend(figure)
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
    _legend(figure)
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
    _legend(figure)
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
            _band(axes, i, values, ends, name if axes is drawn[0] else None, at=np.array(places))
        dress(axes, title, "t", y if axes is drawn[0] else "")
    _legend(figure)
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
            _band(column[0], i, np.array(row["values"]), np.array(row["ci95"]).T, name if first else None, at=levels)
        for i, (name, row) in enumerate(costs.items(), len(shares)):
            _band(column[1], i, np.array(row["values"]), np.zeros(len(levels)), name if first else None, at=levels)
        dress(column[0], title, "", "share of images" if first else "")
        dress(column[1], "", "innate", "cost, of RAILS always" if first else "")
        column[0].set_ylim(-0.03, 1.03)
        column[1].set(xscale="log", ylim=(0, highest))
        column[1].set_xticks(levels, [f"{level:g}" for level in levels])
        column[1].minorticks_off()
    _legend(figure)
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
        _bars(axes, i, at, centre, ends.reshape(-1, 2), attack, joined=False)
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
        _bars(axes, i, at, centre, ends, f"{row['images']}, {row['when']}", joined=False)
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


def _legend(
    figure: Figure,
    loc: Literal["outside lower center", "outside upper center"] = "outside lower center",
    ncols: int = 2,
) -> None:
    figure.legend(loc=loc, ncols=ncols, fontsize=8, frameon=False, labelcolor=INK)


def _band(axes: Axes, i: int, centre: np.ndarray, spread: np.ndarray, name: str | None = None, at: Any = None) -> None:
    """Draw the i-th line of some axes; `spread`: half the width of the band around it, or its two ends."""
    colour, mark, dash = STYLES[i % len(STYLES)]
    at = np.arange(len(centre)) if at is None else at
    low, high = spread if spread.ndim == 2 else (centre - spread, centre + spread)
    axes.plot(
        at, centre, color=colour, linestyle=dash, marker=mark, markevery=max(1, len(centre) // 6), markersize=4,
        linewidth=1.6, label=name,
    )  # fmt: skip
    axes.fill_between(at, low, high, color=colour, alpha=0.14, linewidth=0)


def _bars(
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
