"""What every attack gives back, and how it asks a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttackResult:
    """Adversarial examples, one per input, and what the attacked model made of them.

    `adversarials` `(B, *S)`: inside the ball and the bounds, also where the attack failed. `success` `(B,)`
    bool: the attacked model answers another label than `y` (of a targeted attack: it answers `y`).
    `distance` `(B,)`: size of the perturbation in the attack's norm. `losses` `(steps + 1, B)` float64: what
    the attack climbs, at its start and after each step: the cross-entropy of `y` in nats (of a targeted attack:
    minus it); with several restarts, the curve of the one that gave the adversarial example.
    """

    adversarials: Tensor
    success: Tensor
    distance: Tensor
    losses: Tensor


def logits_of(model: Model, x: Tensor) -> Tensor:
    """Return the model's logits `(B, C)`, C of 2 or more; raise unless they have that shape and are finite."""
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return a tensor of logits (B, C), got {type(logits).__name__}")
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(
            f"model must return logits ({len(x)}, C), C of 2 or more, for {len(x)} inputs, got {tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"model must return finite logits, got {int((~torch.isfinite(logits)).sum())} NaN or infinite")
    return logits
