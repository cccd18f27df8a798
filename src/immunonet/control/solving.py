"""Controls for manifolds of any kind: steps on the objective of each antigen by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from immunonet.control.manifolds import off
from immunonet.control.passing import Steer, Way

# How much an objective must rise, relatively, to count as more than rounding.
_ROUNDING = 1e-3

Run = Callable[[Sequence[Steer]], Way]
"""A pass of the inputs through the network, one steer a layer."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """J(u) = sum over layers of (||z - E(z)||^2 + c ||u||^2) / s^2, z = x + u, one value for each antigen.

    `manifolds`: E, one a layer. `scales` `(T,)`: s, the root mean square of what clean states lie off them; layers of
    different scale count alike (the published code weighs them by it). `penalty`: c >= 0.
    """

    manifolds: Sequence[nn.Module]
    scales: Tensor
    penalty: float

    def term(self, layer: int, state: Tensor, control: Tensor) -> Tensor:
        """Return what one layer adds `(B,)` for a state `(B, *S)` after its control."""
        missing = off(self.manifolds[layer], state).flatten(1).square().sum(1)
        spent = control.flatten(1).square().sum(1)
        return (missing + self.penalty * spent) / self.scales[layer].square()

    def greedy(self, layer: int) -> Steer:
        """Return the steer that is best for one layer by itself, if projecting twice is projecting once."""
        return lambda state: state + off(self.manifolds[layer], state) / (1 + self.penalty)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """The `controls` of every layer `(B, *S)`, the `objective` `(B,)` of the best of them, and which were `lost`.

    `lost` `(B,)` bool: no step was better than the start, and one was worse, or not finite. `history`: the best
    objective after every step, `(steps + 1, B)`.
    """

    controls: list[Tensor]
    objective: Tensor
    lost: Tensor
    history: Tensor


def held(controls: Sequence[Tensor]) -> list[Steer]:
    """Return steers that add controls which stay as they are."""
    return [lambda state, control=control: state + control for control in controls]  # type: ignore[misc]


def solve(run: Run, objective: Objective, *, outer: int, inner: int, step: float, graph: int = 0) -> Solved:
    """Return the controls that lower each antigen's objective most, from the greedy start.

    The method of successive approximations (Chen et al. 2022, algorithm 1) with a line search of its own for every
    antigen: `outer` passes forward and backward give the slope that later layers add, which stands as a linear term
    while each layer takes `inner` steps by itself, of `step` in units of s^2, halved wherever they climb; of all these
    proposals the best is kept, and after a worse one an antigen goes half as far. `graph`: of how many of the last
    outer rounds, and of the start if of all, the controls stay differentiable in the inputs.
    """
    whole = graph >= max(1, outer)
    layers = range(len(objective.manifolds))
    with torch.set_grad_enabled(whole):
        way = run([objective.greedy(layer) for layer in layers])
        controls = [after - before for after, before in zip(way.steered, way.states, strict=True)]
    finite = torch.stack([torch.isfinite(u).flatten(1).all(1) for u in controls]).all(0)
    controls = [torch.where(_spread(finite, u), u, 0.0) for u in controls]
    with torch.enable_grad():
        point = _Point.at(run, objective, controls, graph=whole)
        reach, history = torch.ones_like(point.value), [point.value.detach()]
        better = rose = torch.zeros_like(finite)
        for turn in range(outer):
            unrolled = turn >= outer - graph
            if unrolled and not whole and turn == outer - graph:
                point = _Point.at(run, objective, point.controls, graph=True)
            moved = [
                u + _spread(reach, u) * (_descended(objective, layer, point, inner, step, unrolled) - u)
                for layer, u in enumerate(point.controls)
            ]
            following = _Point.at(run, objective, moved, graph=unrolled)
            won = following.value.detach() < point.value.detach()
            rose = rose | ~(following.value.detach() <= point.value.detach() * (1 + _ROUNDING))
            better = better | won
            point = _Point.chosen(won, following, point)
            reach = torch.where(won, reach, reach / 2)
            history.append(point.value.detach())
    lost = ~finite | (rose & ~better)
    found = point.controls if graph else [u.detach() for u in point.controls]
    return Solved(controls=found, objective=point.value.detach(), lost=lost, history=torch.stack(history))


class _Point(NamedTuple):
    """Controls, the states that they meet, the objective `(B,)`, and its slope in each of them."""

    controls: list[Tensor]
    states: list[Tensor]
    value: Tensor
    slopes: list[Tensor]

    @classmethod
    def at(cls, run: Run, objective: Objective, controls: Sequence[Tensor], *, graph: bool) -> _Point:
        own = list(controls) if graph else [u.detach() for u in controls]
        own = [u if u.requires_grad else u.requires_grad_() for u in own]
        way = run(held(own))
        terms = [objective.term(layer, z, own[layer]) for layer, z in enumerate(way.steered)]
        value = torch.stack(terms).sum(0)
        slopes = list(torch.autograd.grad(value.sum(), own, create_graph=graph))
        if graph:
            return cls(own, way.states, value, slopes)
        return cls([u.detach() for u in own], [x.detach() for x in way.states], value.detach(), slopes)

    @classmethod
    def chosen(cls, won: Tensor, a: _Point, b: _Point) -> _Point:
        """Return `a` for the antigens that `won`, `b` for the others."""
        parts = zip(
            (*a.controls, *a.states, a.value, *a.slopes), (*b.controls, *b.states, b.value, *b.slopes), strict=True
        )
        mixed = [torch.where(_spread(won, new), new, old) for new, old in parts]
        n = len(a.controls)
        return cls(mixed[:n], mixed[n : 2 * n], mixed[2 * n], mixed[2 * n + 1 :])


def _descended(objective: Objective, layer: int, point: _Point, inner: int, step: float, graph: bool) -> Tensor:
    """Return one layer's control after steps on its own term and the slope that later layers add."""
    state, start, slope = point.states[layer], point.controls[layer], point.slopes[layer]
    value, own = _own(objective, layer, state, start, graph)
    ahead = slope - own
    best, slope_there = start, slope
    pace = torch.full_like(value, step) * objective.scales[layer].square()
    for _ in range(inner):
        trial = best - _spread(pace, best) * slope_there
        found, gradient = _own(objective, layer, state, trial, graph)
        found = found + (ahead * (trial - start)).flatten(1).sum(1)
        won = found.detach() <= value.detach()
        value = torch.where(won, found, value)
        best = torch.where(_spread(won, best), trial, best)
        slope_there = torch.where(_spread(won, best), gradient + ahead, slope_there)
        pace = torch.where(won, pace, pace / 2)
    return best


def _own(objective: Objective, layer: int, state: Tensor, control: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    """Return one layer's term `(B,)` and its slope in the control."""
    if not (graph and control.requires_grad):
        control = control.detach().requires_grad_()
    term = objective.term(layer, state + control, control)
    (slope,) = torch.autograd.grad(term.sum(), control, create_graph=graph)
    return (term, slope) if graph else (term.detach(), slope)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))
