"""Passes of inputs through a network whose states are steered on their way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunonet import models

INPUT = "input"
"""What the state before the network is called."""

Steer = Callable[[Tensor], Tensor]
"""What a state `(B, *S)` becomes under its control."""


class Way(NamedTuple):
    """One pass: what reached every controlled layer, `states`, what went on from it, `steered`, and the `logits`."""

    states: list[Tensor]
    steered: list[Tensor]
    logits: Tensor


def passed(model: nn.Module, layers: Sequence[str], x: Tensor, steers: Sequence[Steer]) -> Way:
    """Return the way of inputs `x` `(B, *S)` through a network, the outputs of `layers` being steered, one steer each.

    States are float32, and go on in the network's own dtype. Layers stand in running order, "input" first. ValueError
    for one that gives no floating tensor with a row for every input.
    """
    states, after = dict[str, Tensor](), dict[str, Tensor]()

    def steer(name: str, how: Steer, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != x.shape[:1]:
            shape = f"{tuple(output.shape)} of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"layer {name!r} must give one floating tensor row per input to be controlled, got {shape}"
            )
        states[name] = output.float()
        after[name] = how(states[name])
        return after[name].to(output)

    named = dict(zip(layers, steers, strict=True))
    if INPUT in named:
        x = steer(INPUT, named[INPUT], x)
    inner = {name: functools.partial(steer, name, how) for name, how in named.items() if name != INPUT}
    logits = models.steered(model, inner, x)
    return Way([states[name] for name in layers], [after[name] for name in layers], logits)


def unsteered(state: Tensor) -> Tensor:
    """Return a state as it is."""
    return state


def bare(model: nn.Module, layers: Sequence[str], x: Tensor) -> list[Tensor]:
    """Return the states of the bare network at some layers, in a pass of inputs `x` that ends with the last of them."""
    named = [layer for layer in layers if layer != INPUT]
    with models.unwatched():
        found = models.outputs(model, named, x) if named else []
    return [x] * (len(layers) - len(named)) + [state.float() for state in found]


def check_way(model: nn.Module, layers: Sequence[str], x: Tensor) -> None:
    """Raise ValueError unless every layer, and the answer, is a function of the layer before it alone.

    Judged by a few inputs `x` `(B, *S)`, which must also get the same answer twice.
    """
    for layer in layers:
        if layer != INPUT and (count := models.calls(model, layer, x)) != 1:
            raise ValueError(f"layer {layer!r} is called {count} times in one pass of the model; it must be once")
    way = passed(model, layers, x, [unsteered] * len(layers))
    again = passed(model, layers, x, [unsteered] * len(layers))
    if not torch.allclose(way.logits, again.logits, rtol=1e-3, atol=1e-4):
        raise ValueError(f"model {models.VARIES}: controls cannot be found for it")
    # With the state put in place of what others inputs give there, nothing after it may change.
    other = x.flip(0).roll(1, 0) * 0.5
    for place, layer in enumerate(layers):
        replaced: list[Steer] = [unsteered] * len(layers)
        replaced[place] = functools.partial(_instead, way.states[place])
        found = passed(model, layers, other, replaced)
        following = [*zip(layers, found.states, way.states, strict=True)][place + 1 :]
        for name, a, b in [*following[:1], ("the answer", found.logits, way.logits)]:
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max())):
                what = name if name == "the answer" else f"layer {name!r}"
                raise ValueError(
                    f"{what} is not a function of layer {layer!r} alone: it comes before it, or a branch goes "
                    "around it; give layers in running order, and none inside of a branch"
                )


def _instead(state: Tensor, _: Tensor) -> Tensor:
    return state
