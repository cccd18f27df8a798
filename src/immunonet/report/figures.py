"""Pictures of immune responses: cells as small PNGs, learning curves, and one response as a figure.

Matplotlib is used through its object-oriented API alone, so nothing here touches pyplot's global state.
Colours are Okabe and Ito's, safe for colour-blind readers; every line also has its own dash for print.
"""

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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from immunonet import _check, _store, incoming
from immunonet.response import Cells, ImmuneResponse, Trace

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8a8f98", "#1d2129"
BRIGHTER, DARKER = "#E69F00", "#5E3C99"
# Colour, marker and dash of lines that share axes.
STYLES = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (DARKER, "^", ":"),
    (GREY, "D", "-."),
    ("#009E73", "v", (0, (5, 1))),
    ("#CC79A7", "P", (0, (1, 1))),
)


def image_array(image: Tensor, *, bounds: Any = (0.0, 1.0)) -> np.ndarray:
    """Return an image as bytes to draw.

    `image`: `(1, H, W)` or `(3, H, W)` within `bounds` (scalars or one pair per channel); the result is
    uint8, `(H, W)` or `(H, W, 3)`, 0 at the lower bound and 255 at the upper. Raises ValueError for another
    shape.
    """
    require_images("image", image.shape)
    low, high = incoming.bounds("bounds", bounds).tensors(image, image.shape)
    scaled = ((image - low) / (high - low)).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    pixels: np.ndarray = (scaled[0] if len(scaled) == 1 else scaled.permute(1, 2, 0)).numpy()
    return pixels


def difference_array(clean: Tensor, other: Tensor) -> tuple[np.ndarray, float]:
    """Return the picture of `other - clean`, its largest change at full strength, and that largest change.

    Both `(1, H, W)` or `(3, H, W)`; the result is uint8 `(H, W, 3)`: no change is white and brighter or
    darker pixels are gold or purple for one channel; for three, no change is mid-grey and each channel moves
    on its own.
    """
    require_images("clean", clean.shape)
    if clean.shape != other.shape:
        raise ValueError(f"clean and other must have one shape, got {tuple(clean.shape)} and {tuple(other.shape)}")
    delta = (other - clean).detach().double().cpu()
    largest = float(delta.abs().max())
    delta = delta / largest if largest else delta
    if clean.shape[0] == 3:
        rgb = 0.5 + 0.5 * delta.permute(1, 2, 0).numpy()
    else:
        ends = [np.array(matplotlib.colors.to_rgb(colour)) for colour in (BRIGHTER, DARKER)]
        amount = delta[0].numpy()[..., None]
        rgb = 1 - np.clip(amount, 0, 1) * (1 - ends[0]) - np.clip(-amount, 0, 1) * (1 - ends[1])
    return np.rint(rgb * 255).astype(np.uint8), largest


def png_uri(pixels: np.ndarray) -> str:
    """Return uint8 pixels `(H, W)` or `(H, W, 3)` as the `data:` address of a PNG of that very size."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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
    """Draw how the cells learn: one figure for clean and one for adversarial antigens, on the same scales.

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
    panels = []
    for trace in (clean, adversarial):
        affinity = [mean_band(class_series(trace.affinity_mean, label)) for label in (truth, wrong)]
        panels.append((affinity, mean_band(class_series(trace.votes, truth)), mean_band(trace.entropy)))
    curves = [curve for affinity, _, _ in panels for curve in affinity]
    low, high = min((m - h).min() for m, h in curves), max((m + h).max() for m, h in curves)
    margin = 0.15 * (high - low) or 1.0  # room for the lines' names
    entropy = max(0.1, 1.08 * max((m + h).max() for _, _, (m, h) in panels))
    figures = []
    for title, (affinity, votes, surprise) in zip(("Clean antigens", "Adversarial antigens"), panels, strict=True):
        figure = _figure(4.2, 6.0)
        axes = figure.subplots(3, 1, sharex=True)
        above = bool(affinity[0][0][-1] >= affinity[1][0][-1])
        _line(axes[0], affinity[0], BLUE, "-")
        _line(axes[0], affinity[1], ORANGE, "--")
        _name(axes[0], affinity[0], BLUE, "true class", above=above)
        _name(axes[0], affinity[1], ORANGE, "wrong class", above=not above)
        _line(axes[1], votes, BLUE, "-")
        _line(axes[2], surprise, INK, "-")
        axes[0].set(title=title, ylabel="affinity", ylim=(low - margin, high + margin))
        axes[1].set(ylabel="votes for true class", ylim=(-0.03, 1.03))
        axes[2].set(ylabel="entropy of votes (nats)", ylim=(0, entropy), xlabel="generation")
        axes[0].title.set(color=INK, fontsize=11, fontweight="bold")
        axes[2].xaxis.get_major_locator().set_params(integer=True)
        figure.align_ylabels()
        figures.append(figure)
    return figures[0], figures[1]


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
    """Draw the response to each antigen in a row: antigen, votes, best plasma cells, best memory cells.

    `antigens` `(B, 1, H, W)` or `(B, 3, H, W)`, those that `response` answers, within `bounds`; `indices`:
    which of them (the first four); `names`: one per class; `cells`: how many of each kind at most. Cells
    that live in a hidden layer are no images: give `repertoire` `(N, *S)` (that is `rails.repertoire.x`) and
    the examples that they descend from are drawn instead. Returns a matplotlib Figure
    (`figure.savefig("response.png")`). Raises ValueError for antigens that are no images, or that are not
    those of the response.
    """
    require_images("antigens", antigens.shape[1:])
    cells = _check.integer("cells", cells)
    if len(antigens) != len(response.labels):
        raise ValueError(f"antigens must be those of the response, {len(response.labels)}, got {len(antigens)}")
    chosen = list(range(min(4, len(antigens)))) if indices is None else list(indices)
    if not chosen or not all(-len(antigens) <= i < len(antigens) for i in chosen):
        raise ValueError(f"indices must name some of the {len(antigens)} antigens, got {indices!r}")
    titles = class_names(names, response.votes.shape[1])
    kinds = {"plasma": response.plasma, "memory": response.memory}
    kinds = {kind: part for kind, part in kinds.items() if part.label.shape[1]}
    drawn = {kind: cell_images(part, antigens.shape[1:], repertoire) for kind, part in kinds.items()}
    widths = [1.3, 1.8] + [min(cells, part.label.shape[1]) for part in kinds.values()]
    figure = _figure(0.95 * sum(widths), 0.2 + 1.55 * len(chosen))
    blocks = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for row, i in enumerate(chosen):
        axes = blocks[0].add_subplot(len(chosen), 1, row + 1)
        _draw(axes, image_array(antigens[i], bounds=bounds))
        axes.set_title(titles[int(response.labels[i])], fontsize=11, fontweight="bold", color=INK)
        flag = "foreign" if bool(response.foreign[i]) else "familiar"
        _caption(axes, f"{flag}\ncredibility {float(response.credibility[i]):.2f}")
        _votes(blocks[1].add_subplot(len(chosen), 1, row + 1), response.votes[i], titles)
        for block, (kind, part) in zip(blocks[2:], kinds.items(), strict=True):
            columns = min(cells, part.label.shape[1])
            for j in range(columns):
                axes = block.add_subplot(len(chosen), columns, row * columns + j + 1)
                _draw(axes, image_array(drawn[kind][i, j], bounds=bounds))
                _caption(axes, f"{titles[int(part.label[i, j])]}\n{float(part.affinity[i, j]):.3g}")
                if row == j == 0:
                    axes.set_title(f"{kind} cells", fontsize=9, loc="left", color=INK)
    return figure


def require_images(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless samples of `shape` are grey or colour images."""
    if len(shape) != 3 or shape[0] not in (1, 3) or 0 in shape:
        raise ValueError(f"{name} must be images of shape (1, H, W) or (3, H, W) to be drawn, got shape {tuple(shape)}")


def accuracy_curves(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw accuracy against eps, one line per attack with its 95 % interval.

    `curves`: per attack `eps`, `accuracy` (lists of one length) and `ci95` (pairs).
    """
    figure = _figure(6.2, 3.6)
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        colour, mark, dash = STYLES[i % len(STYLES)]
        axes.plot(curve["eps"], curve["accuracy"], color=colour, marker=mark, linestyle=dash, linewidth=1.8, label=name)
        low, high = zip(*curve["ci95"], strict=True)
        axes.fill_between(curve["eps"], low, high, color=colour, alpha=0.14, linewidth=0)
    axes.set(xlabel="eps", ylabel="right", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)
    return figure


def accuracy_points(lines: Mapping[str, Mapping[str, tuple[float, Sequence[float]]]]) -> Figure:
    """Draw one line per defence with a point, an accuracy and its interval, for each way it was attacked.

    `lines`: per defence and attack the accuracy and `(low, high)`; the first attack named is drawn topmost.
    """
    figure = _figure(7.0, 1.2 + 0.45 * len(lines))
    axes = figure.subplots()
    attacks = list(dict.fromkeys(name for line in lines.values() for name in line))
    for i, attack in enumerate(attacks):
        colour, mark, _ = STYLES[i % len(STYLES)]
        found = [(place, line[attack]) for place, line in enumerate(lines.values()) if attack in line]
        centre = np.array([accuracy for _, (accuracy, _) in found])
        low, high = (np.array([ends[end] for _, (_, ends) in found]) for end in (0, 1))
        places = np.array([place for place, _ in found]) + (i - (len(attacks) - 1) / 2) * 0.22
        axes.errorbar(
            centre, places, xerr=np.abs(np.stack([centre - low, high - centre])), color=colour, marker=mark,
            linestyle="none", markersize=5, capsize=2, elinewidth=1, label=attack,
        )  # fmt: skip
    axes.set(yticks=range(len(lines)), yticklabels=list(lines), xlabel="right", xlim=(-0.03, 1.03))
    axes.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, ncols=len(attacks), loc="outside upper center")
    _plain(axes, size=8)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def rejection_curves(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draw what is held in the worst case against the clean inputs that are still answered.

    `curves`: per panel and defence the levels of rejection, each with `accepted`, `held` and its `ci95`.
    """
    figure = _figure(3.4 * len(curves) + 0.4, 3.6)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(panels, curves.items(), strict=True):
        for i, (name, levels) in enumerate(lines.items()):
            colour, mark, dash = STYLES[i % len(STYLES)]
            at = [level["accepted"] for level in levels]
            held = [level["held"] for level in levels]
            axes.plot(at, held, color=colour, marker=mark, linestyle=dash, linewidth=1.6, markersize=4.5, label=name)
            low, high = zip(*(level["ci95"] for level in levels), strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.set(xlabel="clean images that are answered", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set_title(title, fontsize=9, color=INK)
        axes.legend(frameon=False, fontsize=7)
        _plain(axes)
    panels[0].set_ylabel("attacked images held (right, or declined)")
    return figure


def loss_curves(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the mean loss of each attack against its steps, one small panel each: losses differ in scale."""
    columns = min(4, len(losses))
    rows = math.ceil(len(losses) / columns)
    figure = _figure(2.1 * columns, 1.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, values) in zip(panels, losses.items(), strict=False):
        axes.plot(range(len(values)), values, color=BLUE, linewidth=1.5)
        axes.set_title(name, fontsize=8, color=INK)
        _plain(axes, size=7)
    for axes in panels[len(losses) :]:
        axes.set_visible(False)
    return figure


def class_names(names: Sequence[str] | None, classes: int) -> list[str]:
    """Return one name per class, by default its number; ValueError unless there are `classes`."""
    if names is not None and len(names) != classes:
        raise ValueError(f"names must hold one name per class, {classes}, got {len(names)}")
    return [str(name) for name in (range(classes) if names is None else names)]


def cell_images(cells: Cells, shape: Sequence[int], repertoire: Tensor | None) -> Tensor:
    """Return what to draw for each cell `(B, n, *shape)`: itself, or its origin if cells are hidden.

    Raises ValueError if cells are not of `shape` and there is no `repertoire` `(N, *shape)` to look their
    origin up in.
    """
    if tuple(cells.x.shape[2:]) == tuple(shape):
        return cells.x
    found = None if repertoire is None else tuple(repertoire.shape)
    if repertoire is None or found is None or found[1:] != tuple(shape):
        raise ValueError(
            f"repertoire must be the training images (N, {', '.join(map(str, shape))}) to draw cells "
            f"that live in a hidden layer of shape {tuple(cells.x.shape[2:])}, got {found}"
        )
    return repertoire[cells.origin.to(repertoire.device)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, size: int = 9) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=size)


def _line(axes: Axes, curve: tuple[np.ndarray, np.ndarray], colour: str, dash: str) -> None:
    mean, half = curve
    generation = np.arange(len(mean))
    axes.plot(generation, mean, color=colour, linestyle=dash, linewidth=1.8)
    axes.fill_between(generation, mean - half, mean + half, color=colour, alpha=0.16, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _name(axes: Axes, curve: tuple[np.ndarray, np.ndarray], colour: str, name: str, *, above: bool) -> None:
    """Write a line's name beside its end, away from the other line."""
    mean, half = curve
    axes.annotate(
        name,
        (len(mean) - 1, mean[-1] + (half[-1] if above else -half[-1])),
        xytext=(0, 3 if above else -3),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color=colour,
        fontsize=9,
    )


def _draw(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#d5d8dc")


def _caption(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, fontsize=8, color=INK)


def _votes(axes: Axes, votes: Tensor, titles: Sequence[str]) -> None:
    # More than ten bars are unreadable at this size; the rest of the votes is small and stays in `votes`.
    top = votes.detach().float().cpu().sort(descending=True, stable=True).indices[:10].sort().values.tolist()
    axes.barh(range(len(top)), [float(votes[c]) for c in top], color=BLUE, height=0.7)
    axes.set(yticks=range(len(top)), yticklabels=[titles[c] for c in top], xlim=(0, 1), xticks=[0, 1])
    axes.invert_yaxis()
    axes.tick_params(labelsize=7, length=0, colors=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    _caption(axes, "share of votes")
