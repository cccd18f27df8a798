"""HopSkipJump: an attack that sees labels only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunonet import _check, incoming
from immunonet.attacks._base import Attack, AttackResult, Found, Model, Problem, Reach, generator_of
from immunonet.attacks._losses import margin
from immunonet.attacks.norms import NORMS, column, spread

# Halvings of a step before it is given up.
_HALVINGS = 25
# Points around the boundary that are asked about at once, per input.
_BLOCK = 32
# Random points that are tried before an input is given up.
_STARTS = 100


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(Attack):
    """HopSkipJump (Chen et al. 2020), called as `attack(model, x, y)`: closer and closer points that fool the model.

    From a wrongly answered point it searches the line to `x` for the boundary, estimates the boundary's direction from
    the labels of points around (`evaluations` in the first iteration, times the square root of the iteration later, at
    most `most_evaluations`), steps along it, and begins again. It keeps the closest point that it saw fool the model,
    which lies in no ball: `success` means that there is one, within `eps` where that is given. `losses`
    `(iterations + 1, B)` is minus the smallest distance so far, minus infinity where there is none.

    It begins at the first of 100 uniform random points that fools the model, or at `starts` `(B, *S)`, the keyword of
    the call, which a targeted attack needs: such as examples of the wanted class. Where neither fools the model,
    `x` is given back. `tries`: where the model refuses to answer, points around are drawn anew, farther off (see
    `Square`); those that stay refused count as none. The rest: see `PGD`.
    """

    eps: float | None = None
    iterations: int = 50
    evaluations: int = 100
    most_evaluations: int = 10_000
    tries: int = 1
    seed: int | None = 0

    needs = "labels"
    bounded = False
    norms = ("linf", "l2")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.integer, "iterations", "evaluations", "tries")
        _check.keep(self, _check.integer, "most_evaluations", least=self.evaluations)
        _check.keep(self, _check.seed, "seed")

    def __call__(self, model: Model, x: Any, y: Any, *, starts: Any = None) -> AttackResult:
        """Attack `model` at inputs `x` `(B, *S)` with labels `y` `(B,)`, from `starts` `(B, *S)` if given."""
        if starts is None and self.targeted:
            raise ValueError("starts must be given for a targeted attack: for every input one that has the label y")
        problem = self._problem(model, x, y)
        if starts is not None:
            shape = problem.x.shape[1:]
            starts = incoming.inputs("starts", starts, bounds=self.bounds, shape=shape, own=True).to(problem.x.device)
            if len(starts) != len(problem.x):
                raise ValueError(f"starts must be one per input, {len(problem.x)}, got {len(starts)}")
        return self._attack(problem._replace(starts=starts))

    def calls(self) -> int:
        """Return how often the model is asked per input, at most: all of the search, not only the directions."""
        around = sum(self._evaluations(iteration) for iteration in range(1, self.iterations + 1))
        # The input itself, the starts, a search on the line at first and in each iteration, and the halved steps.
        return 1 + _STARTS + _HALVINGS + 2 * _HALVINGS * self.iterations + around * self.tries

    def _evaluations(self, iteration: int) -> int:
        return min(int(self.evaluations * math.sqrt(iteration)), self.most_evaluations)

    def best(self, problem: Problem) -> Found:
        """Return the closest points that fool the model."""
        points = problem.x.clone()
        hit = self._fools(problem, points)
        distance = torch.where(hit, 0.0, torch.inf).double()
        losses = -distance.repeat(self.iterations + 1, 1)
        generator = generator_of(self.seed)
        begun, found = self._begin(problem, generator)
        rows = (found & ~hit).nonzero()[:, 0]
        if len(rows):
            points[rows], losses[:, rows] = self._approach(problem.part(rows), begun[rows], generator)
            hit[rows] = True
        distance = self._ball.size(points - problem.x)
        success = hit if self.eps is None else hit & (distance <= self.eps)
        return Found(points, success, losses[-1], losses)

    def _begin(self, problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return points `(B, *S)`, and whether they fool the model."""
        if problem.starts is not None:
            return problem.starts, self._fools(problem, problem.starts)
        points, found = problem.x.clone(), torch.zeros_like(problem.y, dtype=torch.bool)
        for _ in range(_STARTS):
            if bool(found.all()):
                break
            noise = torch.rand(points.shape, generator=generator, dtype=torch.float32).to(points)
            tried = problem.low + noise * (problem.high - problem.low)
            better = self._fools(problem, tried) & ~found
            points[better], found = tried[better], found | better
        return points, found

    def _approach(self, problem: Problem, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the closest points that fool the model, found from `points` that do, and the curve."""
        x, values = problem.x, problem.x[0].numel()
        # Chen et al. 2020, section 4: how near to the boundary the search ends, as a share of the way.
        near = 1 / (values * math.sqrt(values) if self.norm == "l2" else values**2)
        points, reach = self._to_boundary(problem, points, near), Reach(self.tries)
        best, nearest = points, self._ball.size(points - x)
        curve = [-nearest.double()]
        for iteration in range(1, self.iterations + 1):
            distance = self._ball.size(points - x)
            width = float((problem.high - problem.low).max())
            radius = near * distance * (math.sqrt(values) if self.norm == "l2" else values)
            radius = torch.full_like(radius, 0.1 * width) if iteration == 1 else radius
            around = self._evaluations(iteration)
            direction = self._direction(problem, points, radius, around, reach, generator)
            further = self._step(problem, points, direction, distance / math.sqrt(iteration))
            # The end of a search on the line is a row of points that are as much alike.
            points = self._to_boundary(problem, further, min(0.5, near * reach.scale))
            distance = self._ball.size(points - x)
            closer = distance < nearest
            best = torch.where(spread(closer, x), points, best)
            nearest = torch.minimum(nearest, distance)
            curve.append(-nearest.double())
        return best, torch.stack(curve)

    def _to_boundary(self, problem: Problem, points: Tensor, near: float) -> Tensor:
        """Return the points that still fool the model when brought towards `x` as far as halving finds."""
        x, delta = problem.x, points - problem.x
        distance = self._ball.size(delta)
        least, most, ends = torch.zeros_like(distance), torch.ones_like(distance), points
        for _ in range(min(_HALVINGS, math.ceil(-math.log2(near)))):
            share = (least + most) / 2
            if self.norm == "l2":
                tried = x + spread(share, x) * delta
            else:
                limit = spread(share * distance, x)
                tried = x + torch.minimum(torch.maximum(delta, -limit), limit)
            hit = self._fools(problem, tried)
            least, most = torch.where(hit, least, share), torch.where(hit, share, most)
            ends = torch.where(spread(hit, x), tried, ends)
        return ends

    def _direction(
        self, problem: Problem, points: Tensor, radius: Tensor, evaluations: int, reach: Reach,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """Return the estimated way `(n, *S)` deeper into what fools the model, of size 1 (section 3.2)."""
        n = len(points)
        total, along, score, heard = (torch.zeros_like(part) for part in (points, points, radius, radius))
        for done in range(0, evaluations, _BLOCK):
            times = min(_BLOCK, evaluations - done)
            around = points.repeat(times, *(1,) * (points.ndim - 1))
            many = problem._replace(y=problem.y.repeat(times))
            noise, sign = self._looked(many, around, radius.repeat(times).clamp(min=1e-12), reach, generator)
            total += noise.unflatten(0, (times, n)).sum(0)
            along += (spread(sign, noise) * noise).unflatten(0, (times, n)).sum(0)
            score += sign.view(times, n).sum(0)
            heard += sign.abs().view(times, n).sum(0)
        mean = spread(score / heard.clamp(min=1), points)
        # Where all agree, the mean noise is the way, or its opposite.
        way = torch.where(mean.abs() == 1, along, along - mean * total)
        return self._ball.steepest(way)

    def _looked(
        self, problem: Problem, points: Tensor, radius: Tensor, reach: Reach, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return random ways from points `(n, *S)`, in units of their radius, and where they lead, `(n,)`.

        1: it fools the model, -1: it does not, 0: the model did not answer, and the way is 0.
        """
        ways, sign = torch.zeros_like(points), torch.zeros_like(radius)
        left = torch.arange(len(points), device=points.device)
        for _ in range(self.tries):
            noise = torch.randn(len(left), *points.shape[1:], generator=generator, dtype=torch.float32)
            if self.norm == "linf":
                noise = 2 * torch.rand(noise.shape, generator=generator, dtype=torch.float32) - 1
            noise = (noise / column(NORMS["l2"].size(noise), noise)).to(points)
            far = spread(radius[left] * reach.scale, points)
            tried = (points[left] + far * noise).clamp(problem.low, problem.high)
            value, hit = self._judge_all(problem.model, tried, problem.y[left], margin)
            answered = value > -torch.inf
            rows = left[answered]
            ways[rows] = ((tried - points[left]) / far)[answered]
            sign[rows] = torch.where(hit, 1.0, -1.0).to(points.dtype)[answered]
            reach.heard(value)
            left = left[~answered]
            if not len(left):
                break
        return ways, sign

    def _step(self, problem: Problem, points: Tensor, direction: Tensor, step: Tensor) -> Tensor:
        """Return points a step further that fool the model; the step is halved until they do."""
        ends, open_ = points, torch.ones_like(step, dtype=torch.bool)
        for _ in range(_HALVINGS):
            tried = (points + spread(step, points) * direction).clamp(problem.low, problem.high)
            hit = self._fools(problem, tried) & open_
            ends, open_, step = torch.where(spread(hit, points), tried, ends), open_ & ~hit, step / 2
            if not bool(open_.any()):
                break
        return ends

    def _fools(self, problem: Problem, x: Tensor) -> Tensor:
        """Return whether the model answers inputs as wanted, `(B,)`."""
        return self._judge_all(problem.model, x, problem.y, margin)[1] if len(x) else x.new_zeros(0, dtype=torch.bool)
