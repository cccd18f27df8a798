"""Control of one network: its layers, their manifolds, and passes under the controls that these ask for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from immunonet import models
from immunonet.control.linear import kept_off
from immunonet.control.manifolds import flat_norm, off
from immunonet.control.passing import INPUT, Steer, Way, bare, passed
from immunonet.control.solving import Objective, Solved, held, solve


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How inputs are steered through `model`: `manifolds`, one per layer, clean states' distances to them, `scales`
    `(T,)`, and the settings of `ClosedLoop` by which controls are found.
    """

    model: nn.Module
    layers: Sequence[str]
    manifolds: Sequence[nn.Module]
    scales: Tensor
    penalty: float
    look_ahead: bool
    outer: int
    inner: int
    step: float | Literal["auto"]

    @property
    def closed(self) -> bool:
        """Whether controls have a closed form: all manifolds are linear."""
        return all(getattr(manifold, "linear", False) for manifold in self.manifolds)

    def controlled(self, x: Tensor, gradient: str) -> Way:
        """Return the way of checked inputs `(B, *S)` under their controls, differentiable as `gradient` says."""
        if self.closed:
            steers = self._linear()
            if gradient != "frozen":
                return passed(self.model, self.layers, x, steers)
            with torch.no_grad(), models.unwatched():
                way = passed(self.model, self.layers, x, steers)
            return passed(self.model, self.layers, x, held(_difference(way)))
        graph = {"whole": max(1, self.outer), "last": 1, "start": 0, "frozen": 0}[gradient]
        if not (torch.is_grad_enabled() and x.requires_grad):
            graph = 0
        if gradient == "start":
            objective = self._objective()
            return passed(self.model, self.layers, x, [objective.greedy(t) for t in range(len(self.layers))])
        with torch.inference_mode(False), models.unwatched():
            solved = self._solved(x if graph else x.detach().clone(), graph)
        return passed(self.model, self.layers, x, held(solved.controls))

    def met(self, x: Tensor, gradient: str) -> Tensor:
        """Return inputs `(B, *S)` after control: what reaches the network; themselves where it begins in a layer."""
        if self.layers[0] != INPUT:
            return x
        if self.closed:
            return self._linear()[0](x)
        with models.unwatched():
            return self.controlled(x, gradient).steered[0]

    def lying(self, states: Sequence[Tensor]) -> Tensor:
        """Return the distances `(B, T)` of one state per layer to its manifold."""
        return torch.stack([flat_norm(off(m, z)) for m, z in zip(self.manifolds, states, strict=True)], 1)

    def lying_bare(self, x: Tensor) -> Tensor:
        """Return the same of the states that the bare network gives for inputs `(B, *S)`, differentiable."""
        return self.lying(bare(self.model, self.layers, x))

    def _solved(self, x: Tensor, graph: int) -> Solved:
        run = functools.partial(passed, self.model, self.layers, x)
        step = 0.5 / (1 + self.penalty) if isinstance(self.step, str) else self.step
        solved = solve(run, self._objective(), outer=self.outer, inner=self.inner, step=step, graph=graph)
        if bool(solved.lost.any()):
            warnings.warn(
                f"controls of {int(solved.lost.sum())} of {len(x)} inputs did not go down: their objective rose or "
                "became NaN, and the best that was met is kept; a smaller step, or another manifold, may help",
                UserWarning, stacklevel=2,
            )  # fmt: skip
        return solved

    def _objective(self) -> Objective:
        return Objective(manifolds=list(self.manifolds), scales=self.scales, penalty=self.penalty)

    def _linear(self) -> list[Steer]:
        shares = kept_off(self.penalty, len(self.layers), look_ahead=self.look_ahead)
        return [functools.partial(_towards, m, share) for m, share in zip(self.manifolds, shares, strict=True)]


def _towards(manifold: nn.Module, share: float, state: Tensor) -> Tensor:
    """Return a state of which a share of what lies off its manifold is left."""
    return state + (1 - share) * off(manifold, state)


def _difference(way: Way) -> list[Tensor]:
    return [(after - before).detach() for after, before in zip(way.steered, way.states, strict=True)]
