"""Figures of a study: curves, learning curves, ROC; the palette and habits of `report.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from immunonet.report.figures import BLUE, GREY, INK, ORANGE, _figure
from immunonet.studies import tables
from immunonet.studies.tasks import show

# Okabe and Ito's colours without the yellows that print too faint; each line has its own marker and dash as well.
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", INK, "#56B4E9", GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

Record = Mapping[str, Any]


def draw(record: Record) -> dict[str, Figure]:
    """Return the figures of a study's record, by the name of their experiment."""
    found = {}
    for name, title in record["study"]["curves"]:
        rows = [row for row in record["results"] if row["settings"]["experiment"] == name]
        found[name] = _curve(title, rows)
    found |= {entry["name"]: _learning(entry) for entry in record["learning"]}
    found |= {entry["name"]: _sensing(entry) for entry in record["sensing"]}
    found |= {entry["name"]: _search(entry) for entry in record["search"]}
    return found


def _curve(title: str, rows: Sequence[Record]) -> Figure:
    """Accuracy against what varies, one line per defence and attack; bars where it is no number."""
    vary = rows[0]["settings"]["vary"]
    values = list(dict.fromkeys(show(row["settings"]["value"]) for row in rows))
    numeric = all(isinstance(row["settings"]["value"], int | float) for row in rows) and len(values) > 2
    lines: dict[str, dict[str, Record]] = {}
    several = len({row["settings"]["base"] for row in rows}) > 1
    placed = vary != "layers" and len({str(row["settings"]["layers"]) for row in rows if row["defence"] != "cnn"}) > 1
    attacked = vary != "eps" or len({row["attack"] for row in rows} - {"none"}) > 1
    for row in rows:
        name = (f"{row['settings']['base']}: " if several else "") + tables.TITLES[row["defence"]]
        if row["defence"] != "cnn" and placed:
            name += f" at {' + '.join(row['settings']['layers'])}"
        name += ", clean" if row["attack"] == "none" else f", {row['attack'].upper()}" if attacked else ""
        lines.setdefault(name, {})[show(row["settings"]["value"])] = row
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    for i, (name, found) in enumerate(lines.items()):
        at = [value for value in values if value in found]
        places = [float(found[v]["settings"]["value"]) if numeric else float(values.index(v)) for v in at]
        centre = np.array([found[v]["accuracy"] for v in at])
        low, high = (np.array([found[v]["ci95"][end] for v in at]) for end in (0, 1))
        shift = 0.0 if numeric else (i - (len(lines) - 1) / 2) * 0.7 / len(lines)
        axes.errorbar(
            np.array(places) + shift,
            centre,
            yerr=np.abs(np.stack([centre - low, high - centre])),
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i % len(DASHES)] if numeric else "none",
            linewidth=1.6,
            markersize=5,
            capsize=2,
            elinewidth=0.9,
            label=name,
        )
    if numeric:
        numbers = sorted({float(row["settings"]["value"]) for row in rows})
        if numbers[0] > 0 and numbers[-1] / numbers[0] > 20:
            axes.set_xscale("log")
            axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
            axes.minorticks_off()
    else:
        axes.set_xticks(range(len(values)), values)
        axes.set_xlim(-0.6, len(values) - 0.4)
    _style(axes, title, vary.replace("_", " "), "accuracy")
    bottom = min(row["ci95"][0] for row in rows)
    axes.set_ylim(max(-0.02, bottom - 0.05), 1.02)
    _legend(figure)
    return figure


def _learning(entry: Record) -> Figure:
    """Affinity, share of the true class and entropy against the generation, a line per size of the attack."""
    figure = _figure(9.0, 3.2)
    panels = figure.subplots(1, 3)
    kinds = (
        ("affinity", "affinity, true class"),
        ("true_share", "votes for the true class"),
        ("entropy", "entropy of votes (nats)"),
    )
    for axes, (name, label) in zip(panels, kinds, strict=True):
        for i, curve in enumerate(entry["curves"]):
            mean, half = (np.array(curve[key]) for key in (name, f"{name}_half"))
            generation = np.arange(len(mean))
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(
                generation,
                mean,
                color=colour,
                linestyle=DASHES[i % len(DASHES)],
                marker=MARKERS[i % len(MARKERS)],
                markevery=max(1, len(mean) // 6),
                markersize=4,
                linewidth=1.6,
                label=f"eps {curve['eps']:.3g}" if axes is panels[0] else None,
            )
            axes.fill_between(generation, mean - half, mean + half, color=colour, alpha=0.14, linewidth=0)
        _style(axes, "", "generation", label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(bottom=0)
    _legend(figure)
    return figure


def _sensing(entry: Record) -> Figure:
    """ROC of both rules, one panel per stranger."""
    strangers = list(dict.fromkeys(row["stranger"] for row in entry["rows"]))
    figure = _figure(3.1 * len(strangers), 3.6)
    for axes, stranger in zip(figure.subplots(1, len(strangers), squeeze=False)[0], strangers, strict=True):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
        rows = [row for row in entry["rows"] if row["stranger"] == stranger]
        for i, row in enumerate(rows):
            rates = np.array(row["true_alarms"])
            axes.plot(
                np.linspace(0, 1, len(rates)),
                rates,
                color=COLOURS[i % len(COLOURS)],
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.6,
                label=f"{tables.TITLES[row['defence']]}, {row['rule']}" if stranger == strangers[0] else None,
            )
        _style(axes, stranger, "clean images flagged", "strangers flagged")
        axes.set_aspect("equal")
    _legend(figure)
    return figure


def _search(entry: Record) -> Figure:
    """Score of every trial in order, the best so far, and the start."""
    scores = np.array([trial["score"] for trial in entry["trials"]])
    number = np.arange(len(scores))
    figure = _figure(6.4, 3.2)
    axes = figure.subplots()
    axes.axhline(scores[0], color=GREY, linestyle=":", linewidth=1.2, label="the start (trial 0)")
    axes.plot(number, scores, color=BLUE, marker="o", markersize=5, linestyle="none", label="trial")
    best = np.maximum.accumulate(scores)
    axes.plot(number, best, color=ORANGE, linestyle="-", linewidth=1.6, drawstyle="steps-post", label="best so far")
    _style(axes, entry["title"], "trial", "mean accuracy, trial images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    return figure


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, color=INK, fontsize=10, fontweight="bold", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
