"""Passes of inputs through a model: the cells and all features that it gives on its way, at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from immunonet import models
from immunonet.features.maps import ROWS, FeatureMap, averaged, finite, flat
from immunonet.features.names import Layer, layer_names, layer_parts


def described(
    model: nn.Module, space: str | None, maps: Sequence[FeatureMap], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the cells `(n, *S')` of inputs `(n, *S)`, and their features `(n, D)` by each of the maps of `build`.

    Inputs pass through the model once, whatever the number of layers, and a part at a time. Differentiable in `x`. Of a
    model that steers a network, cells that are inputs are what that network meets.
    """
    taps = [m for m in maps if m.tap is not None]
    names = list(dict.fromkeys([*(str(m.tap) for m in taps), *([] if space is None else [space])]))
    rows = min([m.rows for m in taps] + ([ROWS] if space is not None else []), default=ROWS)
    formats = {m.memory_format for m in taps}
    one_format = formats.pop() if len(formats) == 1 else torch.preserve_format
    found: dict[str, Tensor] = {}
    for start in range(0, max(1, len(x)), rows) if names else ():
        part = x[start : start + rows]
        for name, value in zip(names, tapped(model, names, part, one_format), strict=True):
            if not start:
                found[name] = value.new_empty(len(x), *value.shape[1:], dtype=torch.float32)
            found[name][start : start + rows] = value
    cells = models.met(model, x) if space is None else finite(space, found[space])
    features = []
    for m in maps:
        # Tensors of their own, which callers may overwrite.
        shared = m.tap == space or sum(other.tap == m.tap for other in taps) > 1
        features.append(
            m.chunked(cells)
            if m.tap is None
            else m.finished(finite(m.name, found[m.tap].clone() if shared else found[m.tap]).reshape(len(x), -1))
        )
    return cells, features


def tapped(
    model: nn.Module, names: Sequence[str], x: Tensor, memory_format: torch.memory_format = torch.preserve_format
) -> list[Tensor]:
    """Return what layers, averaged over a grid where their names say so, give for inputs `x` `(n, *S)`, in one pass."""
    modules, sides = zip(*(layer_parts(name, model) for name in names), strict=True)
    raw = models.outputs(model, modules, x, memory_format=memory_format)
    found = []
    for name, side, value in zip(names, sides, raw, strict=True):
        rows = flat(name, value, len(x))
        value = rows if value.ndim == 1 else value.dequantize() if value.is_quantized else value
        found.append((value if side is None else averaged(value, name, side)).to(x.device))
    return found


def witnessed(model: nn.Module, layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """Return what each layer but "input" gives for inputs `x` `(n, *S)` by the model as it now is, `(n, D)`."""
    names = [layer for layer in layers if isinstance(layer, str) and layer != "input"]
    given = [value.flatten(1) for value in tapped(model, names, x)] if names else []
    callables = [(name, layer) for name, layer in zip(layer_names(layers), layers, strict=True) if callable(layer)]
    return given + [FeatureMap(name, layer)(x) for name, layer in callables]
