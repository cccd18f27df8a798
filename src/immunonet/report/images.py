"""Images, and the cells that answered them, as pixels, and one response as a figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from immunonet import _check, incoming
from immunonet.report.figures import BLUE, INK, blank
from immunonet.response import Cells, ImmuneResponse

BRIGHTER, DARKER = "#E69F00", "#5E3C99"


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
    figure = blank(0.95 * sum(widths), 0.2 + 1.55 * len(chosen))
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


def is_image(shape: Sequence[int]) -> bool:
    """Return whether samples of `shape` are grey or colour images."""
    return len(shape) == 3 and shape[0] in (1, 3) and 0 not in shape


def require_images(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless samples of `shape` are grey or colour images."""
    if not is_image(shape):
        raise ValueError(f"{name} must be images of shape (1, H, W) or (3, H, W) to be drawn, got shape {tuple(shape)}")


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
