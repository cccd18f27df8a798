"""From names of layers to feature maps, probed: a layer that is no fixed function of its input is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from immunonet import models
from immunonet.features.affine import affine
from immunonet.features.maps import FeatureMap, IdentityMap, LayerMap, TailMap, finite
from immunonet.features.names import Layer, layer_names, layer_parts
from immunonet.features.passes import described

# Inputs on which a layer must answer steadily.
_STEADY = 4


@torch.no_grad()
def build(
    model: nn.Module, layers: Sequence[Layer], space: str | None, x: Tensor, *, reduced: bool = True
) -> list[FeatureMap]:
    """Return one feature map per layer, from cells in `space` to features, probed on a few inputs `x`.

    Raises ValueError for a layer that the model does not call exactly once, that gives no tensor, whose answer changes
    from call to call or with the rest of the batch, or that is no function of `space` alone. An affine map is found
    numerically and reduced to its root, unless `reduced` is False: what is reduced no longer meets what happens to
    states on their way.
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
        maps.append((affine(found, cells) if reduced else None) or found)
    return maps


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
