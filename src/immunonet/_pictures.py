"""Encoded pictures to tensors: turned as they are meant, on a plain background, all of one size."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunonet import _check
from immunonet._imports import require

BACKGROUNDS = ("white", "black")
_GREY = {"1", "L"}
_COLOUR = {"P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
_ORIENTATION = 0x0112

Pixels = np.ndarray[Any, np.dtype[Any]]


def decode(
    pictures: Iterable[tuple[str, Any]],
    origin: str,
    *,
    size: int | tuple[int, int] | None = None,
    background: str = "white",
) -> Tensor:
    """Return pictures as float32 (N, C, H, W) in [0, 1]; grey ones become colour if any of them is in colour.

    `pictures` are pairs of a name and an encoded file, its bytes or a Path. They are turned as their EXIF
    orientation says; what is transparent shows `background`, "white" or "black"; 16-bit grey is scaled. `size`:
    (H, W), or both at once: they are resized until they cover it, and the middle is kept. ValueError names the picture
    that cannot be read, the first of another size, or an `origin` without any.
    """
    _check.choice("background", background, BACKGROUNDS)
    if size is not None:
        height, width = (_check.integer("size", side) for side in (size if isinstance(size, tuple) else (size, size)))
        size = height, width
    image_module, ops = require("PIL.Image", "data"), require("PIL.ImageOps", "data")
    found: list[Pixels] = []
    for name, source in pictures:
        if source is None:
            raise ValueError(f"{name} has no image bytes")
        try:
            with image_module.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                pixels = _pixels(image, image_module, ops, size, background)
        # Pillow's plug-ins raise whatever they meet in a damaged file.
        except Exception as error:
            raise ValueError(f"{name} is not a readable image ({first_line(error)})") from error
        if found and pixels.shape[:2] != found[0].shape[:2]:
            (h, w), (h0, w0) = pixels.shape[:2], found[0].shape[:2]
            raise ValueError(
                f"{name} is {w}x{h}, but the images before it are {w0}x{h0}: make all of one size, or give a size "
                "(--size N) to resize and crop them to"
            )
        found.append(pixels)
    if not found:
        raise ValueError(f"{origin} has no images")
    return _stack(found)


def _pixels(image: Any, image_module: Any, ops: Any, size: tuple[int, int] | None, background: str) -> Pixels:
    """Return one picture as (H, W) or (H, W, 3): uint8, or float32 in [0, 1] where it has 16 bits."""
    # A PNG of 16-bit grey is of mode "I" in some versions of Pillow; elsewhere that is 32 bits of no fixed range.
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not deep and image.mode not in _GREY | _COLOUR:
        raise ValueError(f"mode {image.mode} is neither grey of 8 or 16 bits nor colour")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ops.exif_transpose(image)
    if image.has_transparency_data:
        if deep:
            raise ValueError("transparency in 16-bit grey is not supported: save it with 8 bits")
        grey, image = image.mode in _GREY, image.convert("RGBA")
        image = image_module.alpha_composite(image_module.new("RGBA", image.size, background), image)
        image = image.convert("L" if grey else "RGB")
    elif deep:
        image = image.convert("I").convert("F")
    else:
        image = image.convert("L" if image.mode in _GREY else "RGB")
    if size is not None:
        image = ops.fit(image, size[::-1], image_module.Resampling.BILINEAR)
    pixels: Pixels = np.array(image)
    return (pixels / np.float32(65535)).clip(0, 1) if deep else pixels


def _stack(found: list[Pixels]) -> Tensor:
    if any(image.ndim == 3 for image in found):
        found = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in found]
    eight = all(image.dtype == np.uint8 for image in found)
    if not eight:
        found = [image / np.float32(255) if image.dtype == np.uint8 else image for image in found]
    stacked = torch.from_numpy(np.stack(found))
    stacked = stacked.permute(0, 3, 1, 2) if stacked.ndim == 4 else stacked[:, None]
    stacked = stacked.contiguous().float()
    return stacked.div_(255) if eight else stacked


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
