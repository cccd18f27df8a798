"""The charts of evaluations and responses: learning curves, and accuracies with their intervals."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from immunonet import _store, incoming
from immunonet.report.style import BLUE, band, bars, blank, dress, legend
from immunonet.response import Trace

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
        figure.set_layout_engine("none")  # what is where stays: to find it again takes as long as to draw


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
        for place, style, drawn, name in zip((0, 0, 1, 2), (0, 1, 0, 4), own, names, strict=True):
            band(axes[place], style, *drawn, name)
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
        bars(axes, i, curve["eps"], curve["accuracy"], curve["ci95"], name)
    dress(axes, "", "eps", "accuracy")
    axes.set_ylim(-0.03, 1.03)
    legend(figure)
    return figure


def accuracy_points(panels: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> Figure:
    """Return a figure of a panel per network, in it a line per defence, and on that a point for each way of attack.

    `panels`: by title the lines by name, each of a row per attack, with `accuracy` and `ci95`; the first attack named
    is drawn topmost.
    """
    sizes = [len(lines) for lines in panels.values()]
    figure = blank(7.0 if len(sizes) == 1 else 9.5, 1.2 + 0.36 * sum(sizes) + 0.35 * (len(sizes) - 1))
    every = figure.subplots(len(sizes), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": sizes})[:, 0]
    attacks = list(dict.fromkeys(name for lines in panels.values() for line in lines.values() for name in line))
    named = set[str]()
    for axes, (title, lines) in zip(every, panels.items(), strict=True):
        for i, attack in enumerate(attacks):
            rows = {place: line[attack] for place, line in enumerate(lines.values()) if attack in line}
            if not rows:
                continue
            places = np.array(list(rows)) + (i - (len(attacks) - 1) / 2) * 0.22
            centre, ends = ([row[key] for row in rows.values()] for key in ("accuracy", "ci95"))
            bars(axes, i, places, centre, ends, "" if attack in named else attack, joined=False, across=True)
            named.add(attack)
        dress(axes, title, "accuracy" if axes is every[-1] else "", "", size=7, weight="normal")
        axes.set(yticks=range(len(lines)), yticklabels=list(lines), xlim=(-0.03, 1.03), ylim=(len(lines) - 0.5, -0.5))
    legend(figure, "outside upper center", len(attacks))
    return figure


def rejection_curves(curves: Mapping[str, Mapping[str, Sequence[Row]]]) -> Figure:
    """Return a figure of what is held in the worst case against the clean inputs that are still answered.

    `curves`: per panel and defence the levels of rejection, each with `accepted`, `held` and its `ci95`.
    """
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = blank(5.6 * columns + 0.4, (3.8 + 0.13 * max(map(len, curves.values()))) * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flatten()[len(curves) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(panels.flatten(), curves.items(), strict=False):
        for i, (name, levels) in enumerate(lines.items()):
            at, held = (np.array([level[key] for level in levels]) for key in ("accepted", "held"))
            ends = np.array([level["ci95"] for level in levels]).T
            band(axes, i, held, ends, name, at=at)
        dress(axes, title, "clean images that are answered", "", size=7, weight="normal")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(0, -0.13))
    for axes in panels[:, 0]:
        axes.set_ylabel("attacked images held (right, or declined)")
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
