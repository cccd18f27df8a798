"""Stand-ins for a controlled network: what attackers differentiate in its place, and where control is blind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from immunonet import models
from immunonet.attacks._base import Confined


class Through(models.Asking):
    """A controlled network with the gradient of a part of its control, for attacks that know it.

    `gradient`: "frozen", the controls that were found are constants, as in the BPDA of Croce et al. (2022); "start", it
    goes through the first projection alone, as if there were no further steps; "last", through the last outer step
    alone; "whole", through all. Its values are the defence's own except with "start", whose are those of the
    projection. `defence`: one that gives `logits(x, gradient=...)`, such as a fitted ClosedLoop.
    """

    randomised = False
    thorough = True

    def __init__(self, defence: Any, *, gradient: str) -> None:
        super().__init__()
        if not callable(getattr(defence, "logits", None)):
            raise TypeError(f"defence must be a ClosedLoop, got {type(defence).__name__}")
        defence.check_current()
        self.defence, self.gradient = defence, gradient

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)` of inputs `x` `(B, *S)`."""
        found: Tensor = self.defence.logits(x, gradient=self.gradient).log_softmax(1)
        return found


class Inside(Confined):
    """A network under the condition that perturbations lie in a linear manifold of clean inputs.

    Linear control at the input leaves such a perturbation as it is. `model`: the undefended network; `manifold`: what
    has `within(delta)`, the part of a difference that lies along the manifold.
    """

    randomised = False
    thorough = True

    def __init__(self, model: nn.Module, manifold: Any) -> None:
        super().__init__()
        if not callable(getattr(manifold, "within", None)):
            raise TypeError(f"manifold must be linear, got {type(manifold).__name__}")
        self.model, self.manifold = model, manifold

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits `(B, C)` for inputs `x` `(B, *S)`."""
        return models.logits(self.model, x)

    def confined(self, delta: Tensor) -> Tensor:
        """Return the part of perturbations `(B, *S)` that lies in the manifold."""
        found: Tensor = self.manifold.within(delta)
        return found
