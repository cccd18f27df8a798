"""Anything that gives log-probabilities, as a defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from immunonet import models
from immunonet._imports import blame
from immunonet.defences.answers import Answer
from immunonet.defences.base import Defence


class Wrapped(Defence):
    """A module or function of somebody's own, inputs `(B, *S)` to log-probabilities `(B, C)`, asked like a defence.

    Its argument `seed`, if it has one, is its randomness, and its `bounds`, if any, are those of inputs.
    """

    kind, title = "wrapped", "Own function"

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise TypeError(f"a Defence, a module or a function must be returned, got {type(function).__name__}")
        super().__init__(model, bounds=getattr(function, "bounds", (0.0, 1.0)))
        self.function = function
        self.randomised = models.takes_seed(function)

    def answer(self, x: Any, seed: int | None = None) -> Answer:
        """Return its answer to inputs `x` `(B, *S)`; ValueError names the file of the user's code that failed."""
        how: dict[str, Any] = {"seed": seed} if self.randomised and seed is not None else {}
        try:
            found = models.ask(self.function, x, **how)
        except Exception as error:  # whatever a user's function raises
            raise ValueError(f"{type(self.function).__name__} fails: {blame(error, self.function)}") from error
        return Answer(found.argmax(-1), found)
