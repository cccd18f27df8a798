"""Immune responses as figures: several at a glance, one by itself, and one as it evolved."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from immunonet import _check, _store
from immunonet.report import images
from immunonet.report.style import BLUE, INK, ORANGE, STYLES, blank, dress
from immunonet.response import Cells, ImmuneResponse, Trace

# Classes with bars, and with lines: more are unreadable. The rest of the votes is small and stays in `votes`.
BARS, LINES = 10, 4
# Cells of each kind that one response shows.
CELLS = 6


def response_figure(
    response: ImmuneResponse,
    antigens: Tensor,
    *,
    indices: Sequence[int] | None = None,
    repertoire: Tensor | None = None,
    names: Sequence[str] | None = None,
    bounds: Any = (0.0, 1.0),
    cells: int = 6,
) -> Figure:
    """Return a figure of the response to each antigen, a row each: antigen, votes, best plasma and memory cells.

    `antigens` `(B, 1, H, W)` or `(B, 3, H, W)`, those that `response` answers, within `bounds`; `indices`:
    which of them (the first four); `names`: one per class; `cells`: how many of each kind at most. Cells
    that live in a hidden layer are no images: give `repertoire` `(N, *S)` (that is `rails.repertoire.shown`) and
    the examples that they descend from are drawn instead. `figure.savefig("response.png")` writes it. Raises
    ValueError for antigens that are no images, or that are not those of the response.
    """
    images.require_images("antigens", antigens.shape[1:])
    cells = _check.integer("cells", cells)
    if len(antigens) != len(response.labels):
        raise ValueError(f"antigens must be those of the response, {len(response.labels)}, got {len(antigens)}")
    chosen = list(range(min(4, len(antigens)))) if indices is None else list(indices)
    if not chosen or not all(-len(antigens) <= i < len(antigens) for i in chosen):
        raise ValueError(f"indices must name some of the {len(antigens)} antigens, got {indices!r}")
    titles = _check.class_names(names, response.votes.shape[1])
    kinds = {"plasma": response.plasma, "memory": response.memory}
    kinds = {kind: part for kind, part in kinds.items() if part.label.shape[1]}
    drawn = {kind: images.cell_images(part, antigens.shape[1:], repertoire) for kind, part in kinds.items()}
    widths = [1.3, 1.8] + [min(cells, part.label.shape[1]) for part in kinds.values()]
    figure = blank(0.95 * sum(widths), 0.2 + 1.55 * len(chosen))
    blocks = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for row, i in enumerate(chosen):
        axes = blocks[0].add_subplot(len(chosen), 1, row + 1)
        _draw(axes, images.image_array(antigens[i], bounds=bounds))
        axes.set_title(titles[int(response.labels[i])], fontsize=11, fontweight="bold", color=INK)
        flag = "foreign" if bool(response.foreign[i]) else "familiar"
        _caption(axes, f"{flag}\ncredibility {float(response.credibility[i]):.2f}")
        _votes(blocks[1].add_subplot(len(chosen), 1, row + 1), response.votes[i], titles)
        for block, (kind, part) in zip(blocks[2:], kinds.items(), strict=True):
            columns = min(cells, part.label.shape[1])
            # One that was recalled, or answered by the network, has no cells.
            for j in range(min(columns, int((part.label[i] >= 0).sum()))):
                axes = block.add_subplot(len(chosen), columns, row * columns + j + 1)
                _draw(axes, images.image_array(drawn[kind][i, j], bounds=bounds))
                _caption(axes, f"{titles[int(part.label[i, j])]}\n{float(part.affinity[i, j]):.3g}")
                if row == j == 0:
                    axes.set_title(f"{kind} cells", fontsize=9, loc="left", color=INK)
    return figure


def figure(response: ImmuneResponse, i: int, *, names: Sequence[str], repertoire: Tensor | None, bounds: Any) -> Figure:
    """Return the figure of `ImmuneResponse.plot`, for an antigen from 0 on and the names of all classes."""
    panels: list[Callable[[Axes], None]] = [lambda axes: _votes(axes, response.votes[i], names)]
    pictured = dict[str, tuple[Cells, Tensor]]()
    if response.antigens is not None and images.is_image(response.antigens.shape[1:]):
        pixels = images.image_array(response.antigens[i], bounds=bounds)
        panels.insert(0, lambda axes: _draw(axes, pixels))
        pictured = _pictured(response, i, repertoire)
    spared = bool(response.recalled[i] | response.innate[i])
    if not spared:
        panels.append(lambda axes: _affinities(axes, response, i, names))
        if response.trace and len(votes := response.trace[0].votes[:, i]) > 1:
            panels.append(lambda axes: _learning(axes, votes, names, "votes"))
    heights = (2.9, 1.5) if pictured else (2.9,)
    made = blank(2.8 * len(panels), sum(heights))
    above, *below = made.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, panel in enumerate(panels):
        panel(above.add_subplot(1, len(panels), place + 1))
    for block in below:
        _row_of_cells(block, pictured, names, bounds)
    made.suptitle(_title(response, i, names), x=0.01, ha="left", fontsize=10, color=INK)
    return made


def animation(trace: Trace, i: int, file: Path, *, names: Sequence[str], seconds: float) -> None:
    """Write the GIF of `ImmuneResponse.animate`: a frame for each generation of one antigen, the last one longer."""
    votes, affinity = trace.votes[:, i], trace.affinity_mean[:, i]
    frames = [_frame(votes, affinity, generation, names) for generation in range(len(votes))]
    still = int(1000 * seconds)
    with _store.replacing(file) as temporary:
        frames[0].save(
            temporary, "GIF", save_all=True, append_images=frames[1:], loop=0,
            duration=[still] * (len(frames) - 1) + [4 * still],
        )  # fmt: skip


def _frame(votes: Tensor, affinity: Tensor, generation: int, names: Sequence[str]) -> Image.Image:
    """Return the picture of one generation, of votes and affinities `(G + 1, C)`."""
    made = blank(7.5, 3.0)
    bars, lines = made.subplots(1, 2)
    _votes(bars, votes[generation], names, _first(votes[-1], BARS))
    _learning(lines, affinity, names, "mean affinity", until=generation, order=votes[-1])
    made.suptitle(f"generation {generation}", x=0.01, ha="left", fontsize=10, color=INK)
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE)


def _title(response: ImmuneResponse, i: int, names: Sequence[str]) -> str:
    how = (
        "from memory" if response.recalled[i] else "by the network" if response.innate[i] else "by the immune response"
    )
    flag = "foreign" if response.foreign[i] else "familiar"
    return f"{names[int(response.labels[i])]}, {how}; {flag}, credibility {float(response.credibility[i]):.2f}"


def _pictured(response: ImmuneResponse, i: int, repertoire: Tensor | None) -> dict[str, tuple[Cells, Tensor]]:
    """Return the fittest cells of one antigen, with a picture of each, by kind; none where there is nothing to draw."""
    assert response.antigens is not None
    shape = response.antigens.shape[1:]
    hidden = response.plasma.x.shape[2:] != shape
    if response.recalled[i] or response.innate[i] or (hidden and repertoire is None):
        return {}
    found = {}
    for kind, cells in (("plasma", response.plasma), ("memory", response.memory)):
        own = Cells(*(part[i : i + 1, :CELLS] for part in (cells.x, cells.label, cells.affinity, cells.origin)))
        if own.label.shape[1]:
            found[kind] = own, images.cell_images(own, shape, repertoire)[0]
    return found


def _row_of_cells(block: Any, pictured: dict[str, tuple[Cells, Tensor]], names: Sequence[str], bounds: Any) -> None:
    """Draw all cells of one response in a row, with their labels and affinities."""
    widths = [len(drawn) for _, drawn in pictured.values()]
    place = 0
    for kind, (cells, drawn) in pictured.items():
        for j, image in enumerate(drawn):
            place += 1
            axes = block.add_subplot(1, sum(widths), place)
            _draw(axes, images.image_array(image, bounds=bounds))
            _caption(axes, f"{names[int(cells.label[0, j])]}\n{float(cells.affinity[0, j]):.3g}")
            if j == 0:
                axes.set_title(f"{kind} cells", fontsize=9, loc="left", color=INK)


def _affinities(axes: Axes, response: ImmuneResponse, i: int, names: Sequence[str]) -> None:
    """Draw each cell of one antigen by its affinity and class, the classes with most votes on top."""
    classes = _first(response.votes[i], BARS)
    rows = {label: row for row, label in enumerate(classes)}
    kinds = (("plasma", response.plasma, BLUE, "o", -0.14), ("memory", response.memory, ORANGE, "s", 0.14))
    for kind, cells, colour, mark, aside in kinds:
        held = [
            (affinity, rows[label] + aside)
            for affinity, label in zip(cells.affinity[i].tolist(), cells.label[i].tolist(), strict=True)
            if label in rows
        ]
        at = np.array(held).reshape(-1, 2)
        axes.scatter(at[:, 0], at[:, 1], s=16, marker=mark, facecolor="none", edgecolor=colour, linewidth=1, label=kind)
    dress(axes, "", "affinity", "", size=7)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set(
        yticks=range(len(classes)), yticklabels=[names[label] for label in classes], ylim=(len(classes) - 0.5, -0.5)
    )
    axes.legend(frameon=False, fontsize=7, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2)


def _learning(
    axes: Axes,
    curves: Tensor,
    names: Sequence[str],
    what: str,
    *,
    until: int | None = None,
    order: Tensor | None = None,
) -> None:
    """Draw curves `(G + 1, C)` of the classes with most votes at the end, until a generation or all of them."""
    last = len(curves) - 1 if until is None else until
    values = curves.detach().double().cpu()
    classes = _first(curves[-1] if order is None else order, LINES)
    for label, (colour, mark, dash) in zip(classes, STYLES, strict=False):
        at = values[: last + 1, label].numpy()
        axes.plot(at, color=colour, marker=mark, linestyle=dash, markersize=3.5, linewidth=1.4, label=names[label])
    dress(axes, "", "generation", what, size=7)
    low, high = float(values[:, classes].min()), float(values[:, classes].max())
    margin = 0.06 * (high - low) or 0.5
    axes.set(xlim=(-0.3, len(values) - 0.7), ylim=(low - margin, high + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=LINES)


def _first(votes: Tensor, most: int) -> list[int]:
    """Return the classes with most votes, in the order of their numbers."""
    order = votes.detach().float().cpu().sort(descending=True, stable=True).indices
    found: list[int] = order[:most].sort().values.tolist()
    return found


def _draw(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#d5d8dc")


def _caption(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, fontsize=8, color=INK)


def _votes(axes: Axes, votes: Tensor, titles: Sequence[str], classes: Sequence[int] | None = None) -> None:
    """Draw the shares of some classes, by default of those with most votes."""
    top = _first(votes, BARS) if classes is None else classes
    axes.barh(range(len(top)), [float(votes[c]) for c in top], color=BLUE, height=0.7)
    axes.set(yticks=range(len(top)), yticklabels=[titles[c] for c in top], xlim=(0, 1), xticks=[0, 1])
    axes.invert_yaxis()
    axes.tick_params(labelsize=7, length=0, colors=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    _caption(axes, "share of votes")
