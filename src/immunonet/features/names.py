"""Names of layers: "input", a submodule's, "block2:4" (its output averaged over a 4 x 4 grid), a callable's own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from immunonet import models

Layer = str | Callable[[Tensor], Tensor]


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
    names = [name for name, _ in models.inside(model).named_modules() if name]
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


def layer_parts(name: str, model: nn.Module | None = None) -> tuple[str, int | None]:
    """Return a layer's submodule and the side of the grid that its output is averaged over: "block2:4" is block2, 4.

    It is a submodule as it is where `model` has one called "block2:4".
    """
    module, _, side = name.rpartition(":")
    if not module or not side.isdecimal():
        return name, None
    itself = model is not None and any(found == name for found, _ in models.inside(model).named_modules())
    return (name, None) if itself else (module, int(side))


def _callable_name(layer: Callable[[Tensor], Tensor]) -> str:
    return str(getattr(layer, "__name__", type(layer).__name__))
