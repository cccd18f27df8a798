"""What a sentinel compares queries by: vectors that small perturbations do not move, of images or of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet.features.maps import FeatureMap, LayerMap
from immunonet.features.names import check_names

View = Callable[[Tensor], Tensor]
"""Inputs `(n, *S)` to vectors `(n, D)`."""

# Pixels along each side of a field that is averaged, and frequencies along each side that are kept.
FIELD, FREQUENCIES = 4, 6


def pooled(x: Tensor) -> Tensor:
    """Return images `(n, c, h, w)` averaged over fields of about 4 x 4 pixels, `(n, D)`; other inputs as they are."""
    return averaged(x, FIELD).flatten(1)


def spectrum(x: Tensor) -> Tensor:
    """Return sizes of the lowest frequencies of images `(n, c, h, w)`, as roots, `(n, D)`: no shift of a periodic image
    changes them; other inputs as they are.
    """
    if x.ndim != 4:
        return x.flatten(1)
    height, width = x.shape[2:]
    down, across = min(FREQUENCIES, (height + 1) // 2), min(FREQUENCIES, width // 2 + 1)
    found = waves(1 - down, down, height, x) @ x.to(torch.complex64) @ waves(0, across, width, x).T
    return found.abs().sqrt().flatten(1)


def waves(first: int, end: int, n: int, like: Tensor) -> Tensor:
    """Return waves of the frequencies from `first` to before `end` over n values, `(F, n)`, of length 1.

    A few products take less than a whole transform, which fails on an empty batch besides.
    """
    frequencies, places = (torch.arange(*ends, device=like.device) for ends in ((first, end), (0, n)))
    angles = torch.outer(frequencies, places).float()
    return torch.polar(torch.full_like(angles, n**-0.5), -2 * math.pi / n * angles)


def averaged(x: Tensor, field: int) -> Tensor:
    """Return images averaged over fields of about so many pixels along each side; other inputs as they are."""
    if x.ndim != 4:
        return x
    height, width = (max(1, round(side / field)) for side in x.shape[2:])
    return F.adaptive_avg_pool2d(x, (height, width))


def whole(x: Tensor) -> Tensor:
    """Return inputs as they are, `(n, D)`."""
    return x.flatten(1)


VIEWS: Mapping[str, View] = {"pooled": pooled, "spectrum": spectrum, "input": whole}


def view(model: nn.Module, space: str | View) -> View:
    """Return the view of a name in `VIEWS`, of a layer of a model, or of a callable on inputs."""
    if not isinstance(space, str):
        return FeatureMap(getattr(space, "__name__", "space"), space)
    if space in VIEWS:
        return VIEWS[space]
    check_names(model, [space], None)
    return LayerMap(model, space)
