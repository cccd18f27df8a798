"""The body of a request to inputs: images and JSON, checked before anything is decoded that is too large."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterable, Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from immunonet import data, incoming
from immunonet._imports import require
from immunonet._pictures import first_line
from immunonet.service.answering import Loaded
from immunonet.service.batching import Inputs
from immunonet.service.limits import Limits

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG"}
JSON = "application/json"


class Refused(Exception):
    """A request that is answered by an error: its HTTP `status`, and in words why."""

    def __init__(self, status: int, why: str, **headers: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


async def body(chunks: AsyncIterable[bytes], length: str | None, limits: Limits) -> bytes:
    """Return a body as it comes in; Refused as soon as it is too long, by what it says of its `length` or in fact."""
    too_long = Refused(413, f"the body must have at most {limits.body:,} bytes")
    if length is not None and length.isdecimal() and int(length) > limits.body:
        raise too_long
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        if len(found) > limits.body:
            raise too_long
    return bytes(found)


def inputs(content: bytes, kind: str, loaded: Loaded, limits: Limits) -> Inputs:
    """Return inputs `(n, *S)` float32 of a body of a content type; Refused where nothing in it can be asked about."""
    kind = kind_of(kind)
    if kind not in READERS:
        raise Refused(415, f"the content type must be one of {', '.join(READERS)}, got {kind[:80]!r}")
    try:
        x = incoming.inputs(
            "inputs", READERS[kind](content, kind, loaded, limits), bounds=loaded.defence.bounds, shape=loaded.shape
        )
    except (ValueError, TypeError) as error:
        raise Refused(422, first_line(error)) from error
    if not 0 < len(x) <= limits.batch:
        raise Refused(422, f"a request must hold 1 to {limits.batch} inputs, got {len(x)}")
    found: Inputs = x.numpy()
    return found


def kind_of(header: str | None) -> str:
    """Return the media type of a header Content-Type, "" for none."""
    return (header or "").partition(";")[0].strip().lower()


def parsed(content: bytes) -> dict[str, Any]:
    """Return the object of a JSON text; ValueError where it is none, or holds NaN or infinity."""

    def no_number(name: str) -> Any:
        raise ValueError(f"numbers must be finite, got {name}")

    try:
        found = json.loads(content, parse_constant=no_number)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("the body must be a JSON object")
    return found


def _numbers(content: bytes, kind: str, loaded: Loaded, limits: Limits) -> Tensor:
    found = parsed(content)
    if set(found) != {"inputs"} or not isinstance(found["inputs"], list):
        raise ValueError('the body must be {"inputs": [...]}, a list of inputs')
    given = incoming.tensor("inputs", found["inputs"])
    # JSON writes 1.0 as 1: whole numbers alone are no sign of pixels of 0 to 255.
    return given if given.is_floating_point() or given.dtype == torch.bool else given.double()


def _image(content: bytes, kind: str, loaded: Loaded, limits: Limits) -> Tensor:
    image_module = require("PIL.Image", "data")
    try:
        with image_module.open(io.BytesIO(content), formats=[FORMATS[kind]]) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise ValueError(f"the body is no {FORMATS[kind]} image: {first_line(error)}") from error
    if width * height > limits.pixels:
        raise Refused(413, f"an image must have at most {limits.pixels:,} pixels, got {width} x {height}")
    return data.shaped(data.decode([("the image", content)], "the body", **loaded.reading), loaded.shape, "the image")


READERS: Mapping[str, Callable[[bytes, str, Loaded, Limits], Tensor]] = {
    JSON: _numbers, **dict.fromkeys(FORMATS, _image),
}  # fmt: skip
