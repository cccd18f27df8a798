"""From a picture that somebody drew or brought to an antigen: read, cut, made grey or coloured, and scaled."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from immunonet._check import Bounds
from immunonet._imports import require
from immunonet._pictures import decode
from immunonet.report.images import require_images

# A picture's pixels: more take more memory to decode than a visitor should be able to ask for.
PIXELS = 25_000_000
# Letters of a drawing: the canvas is small, and plain.
LETTERS = 400_000
# What eyes see of red, green and blue (ITU-R BT.601), as in Pillow.
GREY = (0.299, 0.587, 0.114)
_DRAWN = "data:image/png;base64,"


def drawn(address: object, shape: Sequence[int], *, bounds: Bounds) -> Tensor:
    """Return the antigen `(1, *shape)` of a drawing, white on black, given as the `data:` address of a PNG.

    ValueError where nothing was drawn, or for anything else than such an address.
    """
    if not address:
        raise ValueError("the drawing is empty: draw something in the dark square first")
    if not isinstance(address, str) or not address.startswith(_DRAWN) or len(address) > LETTERS:
        raise ValueError(
            f"the drawing must be the address of a PNG of at most {LETTERS:,} letters, it is something else"
        )
    try:
        encoded = base64.b64decode(address.removeprefix(_DRAWN), validate=True)
    except binascii.Error as error:
        raise ValueError("the drawing is damaged: clear it, and draw again") from error
    low, _ = bounds.tensors(torch.zeros(1), shape)
    found = read(encoded, shape, bounds=bounds)
    if bool((found <= low).all()):
        raise ValueError("the drawing is empty: draw something in the dark square first")
    return found


def read(encoded: bytes, shape: Sequence[int], *, bounds: Bounds, swap: bool = False) -> Tensor:
    """Return the antigen `(1, *shape)` within `bounds` that an encoded picture gives.

    The middle of the picture in the antigen's proportions is kept and resized; `swap` takes dark for light. ValueError
    for what is no picture, or one of more than `PIXELS`, and for antigens that are no images.
    """
    require_images("antigens", shape)
    channels, height, width = shape
    _check_size(encoded)
    picture = decode([("the picture", encoded)], "the picture", size=(height, width))[0]
    if channels == 1 and len(picture) == 3:
        picture = (picture * torch.tensor(GREY)[:, None, None]).sum(0, keepdim=True)
    picture = picture.expand(channels, height, width)
    low, high = bounds.tensors(picture, shape)
    scaled = low + (high - low) * (1 - picture if swap else picture)
    return scaled.clamp(low, high)[None].contiguous()


def _check_size(encoded: bytes) -> None:
    """Raise ValueError for a picture that is too large to decode, by what its head says of it."""
    try:
        with require("PIL.Image", "data").open(io.BytesIO(encoded)) as picture:
            width, height = picture.size
    except Exception as error:
        # Pillow's plug-ins raise whatever they meet in a damaged file.
        raise ValueError("the picture cannot be read: give a PNG, JPEG, GIF or WebP file") from error
    if width * height > PIXELS:
        raise ValueError(
            f"the picture must have at most {PIXELS:,} pixels, it has {width:,} x {height:,}: make it smaller"
        )
