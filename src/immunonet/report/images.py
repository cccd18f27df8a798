"""Images, and the cells that answered them, as pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from immunonet import incoming
from immunonet.response import Cells

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


def is_image(shape: Sequence[int]) -> bool:
    """Return whether samples of `shape` are grey or colour images."""
    return len(shape) == 3 and shape[0] in (1, 3) and 0 not in shape


def require_images(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless samples of `shape` are grey or colour images."""
    if not is_image(shape):
        raise ValueError(f"{name} must be images of shape (1, H, W) or (3, H, W) to be drawn, got shape {tuple(shape)}")


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
