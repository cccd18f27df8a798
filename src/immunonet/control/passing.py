"""Passes of inputs through a network whose states are steered on their way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
