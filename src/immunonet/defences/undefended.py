"""The network itself as a defence (`cnn`)."""

from __future__ import annotations

from typing import Any

from immunonet import models
from immunonet.defences.answers import Answer
from immunonet.defences.base import Defence


class Undefended(Defence):
    """The network itself, asked like a defence: inputs `(B, *S)` to the log-softmax of its logits."""

    kind, title = "cnn", "CNN, undefended"

    def answer(self, x: Any, seed: int | None = None) -> Answer:
        """Return the network's own answer to inputs `x` `(B, *S)`, differentiable in them."""
        return Answer.of(models.logits(self.model, x))

    def sense(self, x: Any) -> None:
        """Return None: a network senses nothing."""
