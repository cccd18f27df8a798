"""The layers that a defence looks at: their names, and the maps from cells to their features."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import models
from immunonet.maps import ROWS, FeatureMap, IdentityMap, LayerMap, TailMap, affine, averaged, finite, flat, layer_parts

Layer = str | Callable[[Tensor], Tensor]

# Inputs on which a layer must answer steadily.
_STEADY = 4


def layer_names(layers: Sequence[Layer]) -> tuple[str, ...]:
    """Return each layer's name; a callable is called by its own name."""
    return tuple(layer if isinstance(layer, str) else _callable_name(layer) for layer in layers)


def as_layers(layers: Layer | Sequence[Layer]) -> tuple[Layer, ...]:
    """Return one or several layers as a tuple; TypeError unless each is a name or a callable."""
    # An nn.Sequential or nn.ModuleList is a sequence by protocol; it is one callable here.
    several = isinstance(layers, Sequence) and not isinstance(layers, str) and not callable(layers)
    out: tuple[Any, ...] = tuple(layers) if several else (layers,)  # type: ignore[arg-type]
    if not out or not all(isinstance(layer, str) or callable(layer) for layer in out):
        raise TypeError(
            "layers must be a submodule's name, 'input', a callable that maps inputs to features, "
            f"or a non-empty list of these, got {layers!r}"
        )
    return out


def check_names(model: nn.Module, layers: Sequence[Layer], space: str | None) -> None:
    """Raise ValueError, naming the nearest names, unless every named layer is a submodule of `model`."""
    names = [name for name, _ in models.eager(model).named_modules() if name]
    for argument, layer in [*(("layers", layer) for layer in layers), ("space", space)]:
        if not isinstance(layer, str) or (argument == "layers" and layer == "input"):
            continue
        if (module := layer_parts(layer, model)[0]) not in names:
            near = difflib.get_close_matches(module, names, n=5, cutoff=0.4) or names[:8]
            wrapped = module.startswith(("_orig_mod.", "module.")) and module.partition(".")[2] in names
            bare = (
                f": leave {module.partition('.')[0]} out, layers of a wrapped network have bare names"
                if wrapped
                else ""
            )
            raise ValueError(
                f"{argument}={layer!r} is no submodule of the model{bare}; nearest names: {', '.join(near)}"
            )
    if space is not None and layer_parts(space, model)[1] is not None and any(layer != space for layer in layers):
        raise ValueError(
            f"layers={list(layer_names(layers))} must be the space itself when space={space!r} is averaged: "
            "the model cannot go on from there"
        )
    if space is not None and any(layer == "input" or not isinstance(layer, str) for layer in layers):
        raise ValueError(
            f"layers={list(layer_names(layers))} must be names of submodules when space={space!r}: "
            "affinity is then computed from cells, not from inputs"
        )


def described(
    model: nn.Module, space: str | None, maps: Sequence[FeatureMap], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the cells `(n, *S')` of inputs `(n, *S)`, and their features `(n, D)` by each of the maps of `build`.

    Inputs pass through the model once, whatever the number of layers, and a part at a time. Differentiable in `x`.
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
    cells = x if space is None else finite(space, found[space])
    features = []
    for m in maps:
        # Tensors of their own, which callers may overwrite.
        shared = m.tap == space or sum(other.tap == m.tap for other in taps) > 1
        features.append(
            m.chunked(cells)
            if m.tap is None
            else finite(m.name, found[m.tap].clone() if shared else found[m.tap]).reshape(len(x), -1)
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


@torch.no_grad()
def build(model: nn.Module, layers: Sequence[Layer], space: str | None, x: Tensor) -> list[FeatureMap]:
    """Return one feature map per layer, from cells in `space` to features, probed on a few inputs `x`.

    Raises ValueError for a layer that the model does not call exactly once, that gives no tensor, whose answer changes
    from call to call or with the rest of the batch, or that is no function of `space` alone. An affine map is found
    numerically and reduced to its root.
    """
    if space is not None:
        _check_layer(model, space, x)
        _check_fixed(LayerMap(model, space), x)
    cells, _ = described(model, space, (), x)
    maps: list[FeatureMap] = []
    for layer, name in zip(layers, layer_names(layers), strict=True):
        if layer == "input" or (layer == space and space is not None):
            maps.append(IdentityMap(name))
            continue
        found: FeatureMap
        if not isinstance(layer, str):
            found = FeatureMap(name, layer)
            _check_fixed(found, x)
        else:
            _check_layer(model, layer, x)
            found = LayerMap(model, layer)
            _check_fixed(found, x)
            found = found if space is None else _tail(model, layer, space, x, cells, found(x))
        found.probe(cells)
        maps.append(affine(found, cells) or found)
    return maps


def _callable_name(layer: Callable[[Tensor], Tensor]) -> str:
    return str(getattr(layer, "__name__", type(layer).__name__))


def _check_layer(model: nn.Module, name: str, x: Tensor) -> None:
    models.check_watchable(model)
    if (count := models.calls(model, layer_parts(name, model)[0], x)) != 1:
        raise ValueError(
            f"layer {name!r} is called {count} times in one pass of the model; it must be called once (inside a part "
            "that was compiled by torch.compile, no call is seen: give the model as it was before)"
        )


def _check_fixed(found: FeatureMap, x: Tensor) -> None:
    """Raise ValueError unless the features of inputs `x` are finite, of one width, and each input's own."""
    name = found.name
    together, alone = found(x[:2])[:1], None
    with contextlib.suppress(Exception):  # one input by itself may be too few, which is told below
        alone = found(x[:1])
    if alone is not None and alone.shape != together.shape:
        raise ValueError(f"layer {name!r} must give features of one width, whatever the batch")
    finite(name, found(x[:_STEADY]))
    if wrong := models.unsteady(found, x[:_STEADY]):
        raise ValueError(
            f"layer {name!r} {wrong}: features must be a fixed function of each input by itself. Look for dropout "
            "or random numbers that eval mode does not switch off, networks in train mode inside a function, "
            "counters, and normalisation over the batch (BatchNorm with track_running_stats=False)"
        )


def _tail(model: nn.Module, layer: str, space: str, x: Tensor, cells: Tensor, expected: Tensor) -> FeatureMap:
    """Return the map from cells at `space` on to `layer`, or raise if the layer depends on more than the space."""
    for single in (True, False):
        tail = TailMap(model, layer, space, x, single=single)
        with contextlib.suppress(RuntimeError, ValueError):
            found = tail(cells)
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
                return tail
    raise ValueError(
        f"layer {layer!r} must come after space={space!r} and depend on it alone (no path around it): "
        "cells that live there could not be followed"
    )
