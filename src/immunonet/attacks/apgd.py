"""APGD: projected gradient ascent that chooses its own step size, and in sparse norms how many values a step moves."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from immunonet import _check, models
from immunonet.attacks._base import Attack, Found, Loss, Model, Problem, confined, generator_of
from immunonet.attacks._losses import dlr, gradient, log_odds, targeted_dlr
from immunonet.attacks.norms import Norm, inward, largest, spread

LOSSES = ("ce", "dlr", "targeted-dlr")
_LEAST_CLASSES = {"ce": 2, "dlr": 3, "targeted-dlr": 4}
# Croce & Hein 2020, section 3.3: weight of the plain step against momentum, share of steps that must rise.
_PLAIN, _RISING = 0.75, 0.75
# Croce & Hein 2021, section 4: the share of values that the first step moves, and by what the number of values that
# the best point has moved is divided for later ones; the share of that number which counts as fewer; what a step is
# divided by, and most by in all; and the share of iterations between two looks.
_MOVED, _THINNED, _FEWER, _SHORTENED, _SHORTEST, _LOOKS = 0.2, 1.5, 0.95, 1.5, 10, 0.04
# Below so many iterations one ball is searched: every ball costs a question about its first point.
_LEAST_STAGED = 10


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD (Croce & Hein 2020), called as `attack(model, x, y)`: the step starts at 2 `eps` and halves itself.

    At checkpoints that come closer and closer, the step halves and the search goes back to its best point where
    fewer than 75 % of the steps rose, or the best did not improve since the last checkpoint. What is kept is as for
    `PGD`.

    In "l1" it is the variant of Croce & Hein 2021: steps move few values, ever fewer as the best point has moved fewer,
    and no momentum; 30 % of the iterations search the ball of 3 `eps`, 30 % that of 2 `eps`, and the rest begin at what
    these found, brought into the ball of `eps`, which alone counts.

    `loss`: "ce" (cross-entropy), "dlr" (difference of logits ratio, 3 or more classes), or "targeted-dlr" (4 or
    more): one ascent per restart towards each of the `targets` likeliest wrong classes of `x` (all there are, if
    fewer). `eps` >= 0. The first ascent begins at `x` unless `random_start`, further restarts at random points.
    With `early_stop` an input that is fooled is left out of further restarts and targets; without it they go on
    for a higher loss, which may transfer better. `targeted` goes with "ce" and "dlr", whose `y` is the wanted
    label. The rest: see `PGD`.
    """

    eps: float = 8 / 255
    iterations: int = 100
    restarts: int = 1
    loss: str = "ce"
    targets: int = 9
    random_start: bool = True
    early_stop: bool = True
    seed: int | None = 0

    needs = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.integer, "iterations", "restarts", "targets")
        _check.keep(self, _check.choice, "loss", options=LOSSES)
        _check.keep(self, _check.boolean, "random_start", "early_stop")
        _check.keep(self, _check.seed, "seed")
        if self.targeted and self.loss == "targeted-dlr":
            raise ValueError("loss='targeted-dlr' chooses its own targets from the true label: use 'ce' or 'dlr'")

    def _least_classes(self) -> int:
        return _LEAST_CLASSES[self.loss]

    def calls(self) -> int:
        """Return how often the model is asked per input, at most."""
        if self.loss != "targeted-dlr":
            return (self.iterations + 1) * self.restarts
        # Which labels are the likeliest is asked before each ascent.
        return (self.iterations + 2) * self.restarts * self.targets

    def best(self, problem: Problem) -> Found:
        """Return the best points of all ascents."""
        x, generator = problem.x, generator_of(self.seed)
        best = Found.nothing(x, self.iterations + 1)
        for restart in range(self.restarts):
            start = x
            if self.random_start or restart:
                start = (x + self._ball.random_within(x, self.eps, generator)).clamp(problem.low, problem.high)
            for target in range(self.targets if self.loss == "targeted-dlr" else 1):
                rows = (~best.success | (not self.early_stop)).nonzero()[:, 0]
                for some in rows.split(self.batch_size) if len(rows) else ():
                    part = problem.part(some)
                    if (loss := self._loss(part, target)) is not None:
                        best.keep(self._climb(part, start[some], loss), some)
        return best

    def _loss(self, problem: Problem, target: int) -> Loss | None:
        """Return what is climbed; None where there is no such target."""
        if self.loss == "targeted-dlr":
            logits = models.logits(problem.model, problem.x).scatter(1, problem.y[:, None], -torch.inf)
            if target >= logits.shape[1] - 1:
                return None
            return functools.partial(targeted_dlr, wanted=logits.argsort(1, descending=True)[:, target])
        climbed = log_odds if self.loss == "ce" else dlr
        return (lambda logits, y: -climbed(logits, y)) if self.targeted else climbed

    def _climb(self, problem: Problem, start: Tensor, loss: Loss) -> Found:
        """Return the best point of one ascent from `start`, and the losses of all its points."""
        curves: list[Tensor] = []
        point = start
        for times, asked in self._pace.balls(self.iterations):
            eps = times * self.eps
            if curves:
                point = self._ball.project(point, problem.x, eps, problem.low, problem.high)
            found, point = self._ascend(problem, point, loss, eps, asked)
            curves.append(found.losses)
        return found._replace(losses=torch.cat(curves))

    def _ascend(self, problem: Problem, start: Tensor, loss: Loss, eps: float, asked: int) -> tuple[Found, Tensor]:
        """Return the best of `asked` points in the ball of radius `eps`, and the highest, on which others may build."""
        model, _, y, *_ = problem
        value, hit, slope = self._ask(model, start, y, loss)
        curve, found = [value], Found.nothing(start, 0)
        found.keep(Found(start, hit, value, found.losses))
        point, top = start, _Top(start, value.clone(), slope)
        pace = self._pace(self._ball, problem, eps, asked - 1, top)
        for k in range(1, asked):
            point = pace.moved(point, slope)
            value, hit, slope = self._ask(model, point, y, loss)
            curve.append(value)
            found.keep(Found(point, hit, value, found.losses))
            top = top.higher(_Top(point, value, slope))
            if (back := pace.look(k, value, top)) is not None:
                point, slope = (_where(back, a, b) for a, b in ((top.point, point), (top.slope, slope)))
        return found._replace(losses=torch.stack(curve)), top.point

    @property
    def _pace(self) -> type[_Pace]:
        return _Thinning if self._ball.sparse else _Halving

    def _ask(self, model: Model, point: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss `(B,)`, the success `(B,)` and the gradient at `point`."""
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            value, hit = self._judge(model, point, y, loss)
            return value.detach(), hit, gradient(value, point)


@dataclass(frozen=True)
class _Top:
    """The highest points of an ascent, their losses and gradients."""

    point: Tensor
    value: Tensor
    slope: Tensor

    def higher(self, other: _Top) -> _Top:
        better = other.value > self.value
        return _Top(*(_where(better, getattr(other, name), getattr(self, name)) for name in vars(self)))


class _Pace(abc.ABC):
    """How far an ascent in one ball steps, and when it goes back to the highest point so far.

    It takes `steps` steps; `top`: where it begins.
    """

    def __init__(self, norm: Norm, problem: Problem, eps: float, steps: int, top: _Top) -> None:
        self.norm, self.problem, self.eps, self.steps = norm, problem, eps, steps
        self.step = torch.full_like(top.value, self.longest())

    @staticmethod
    @abc.abstractmethod
    def balls(iterations: int) -> list[tuple[float, int]]:
        """Return the balls to search, as multiples of the radius, and how many points to ask about in each."""

    @abc.abstractmethod
    def longest(self) -> float:
        """Return the length of the first step."""

    @abc.abstractmethod
    def moved(self, point: Tensor, slope: Tensor) -> Tensor:
        """Return the next points."""

    @abc.abstractmethod
    def look(self, k: int, value: Tensor, top: _Top) -> Tensor | None:
        """Return which ascents go back after step `k`, which led to `value`: `(B,)` bool, or None."""

    def inside(self, point: Tensor) -> Tensor:
        model, x, _, low, high, _ = self.problem
        return self.norm.project(confined(model, point, x), x, self.eps, low, high)


class _Halving(_Pace):
    """Steps with momentum, halved at checkpoints (Croce & Hein 2020)."""

    def __init__(self, norm: Norm, problem: Problem, eps: float, steps: int, top: _Top) -> None:
        super().__init__(norm, problem, eps, steps, top)
        self.checks, self.before = dict(_checkpoints(steps)), top.point
        self.weight, self.last = 1.0, top.value
        self.rose, self.at_check = torch.zeros_like(top.value), top.value
        self.halved = torch.zeros_like(top.value, dtype=torch.bool)

    @staticmethod
    def balls(iterations: int) -> list[tuple[float, int]]:
        return [(1.0, iterations + 1)]

    def longest(self) -> float:
        return 2 * self.eps

    def moved(self, point: Tensor, slope: Tensor) -> Tensor:
        plain = self.inside(point + spread(self.step, point).to(point) * self.norm.steepest(slope))
        weight, self.weight, before, self.before = self.weight, _PLAIN, self.before, point
        return self.inside(point + weight * (plain - point) + (1 - weight) * (point - before))

    def look(self, k: int, value: Tensor, top: _Top) -> Tensor | None:
        self.rose += value > self.last
        self.last = value
        if k not in self.checks:
            return None
        stuck = ~self.halved & (top.value <= self.at_check)
        self.halved = (self.rose < _RISING * self.checks[k]) | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.at_check, self.rose = top.value, torch.zeros_like(self.rose)
        return self.halved


class _Thinning(_Pace):
    """Steps without momentum that move ever fewer values (Croce & Hein 2021)."""

    def __init__(self, norm: Norm, problem: Problem, eps: float, steps: int, top: _Top) -> None:
        super().__init__(norm, problem, eps, steps, top)
        self.size, self.gap = problem.x[0].numel(), max(int(_LOOKS * steps), 1)
        moved = self._moved_by(top)
        self.moving = torch.where(moved > 0, moved / _THINNED, _MOVED * self.size)
        self.moved_before = torch.where(moved > 0, moved, self.size)

    @staticmethod
    def balls(iterations: int) -> list[tuple[float, int]]:
        if iterations < _LEAST_STAGED:
            return [(1.0, iterations + 1)]
        first, second = 3 * iterations // 10, 6 * iterations // 10
        return [(3.0, first + 1), (2.0, second - first), (1.0, iterations - second)]

    def longest(self) -> float:
        return self.eps

    def moved(self, point: Tensor, slope: Tensor) -> Tensor:
        # Values at a bound would take up the step of those that can still move.
        slope = inward(slope, point, self.problem.low, self.problem.high)
        step = largest(slope, self.moving.clamp(min=1, max=self.size).long())
        return self.inside(point + spread(self.step, point).to(point) * step)

    def look(self, k: int, value: Tensor, top: _Top) -> Tensor | None:
        if k % self.gap:
            return None
        moved = self._moved_by(top)
        fewer = moved < _FEWER * self.moved_before
        shortened = (self.step / _SHORTENED).clamp(min=self.longest() / _SHORTEST)
        self.step = torch.where(fewer, self.longest(), shortened)
        self.moving, self.moved_before = moved / _THINNED, moved
        return fewer

    def _moved_by(self, top: _Top) -> Tensor:
        """Return how many values differ from those of the input, `(B,)`."""
        return (top.point != self.problem.x).flatten(1).sum(1).to(top.value)


def _checkpoints(iterations: int) -> Iterator[tuple[int, int]]:
    """Give the iterations at which the step may halve, and how many came since the last (Croce & Hein, eq. 5)."""
    last, at, gap = 0, 0.0, 0.22
    while at + gap < 1:
        at += gap
        gap = max(gap - 0.03, 0.06)
        # Rounded first: sums such as .22 + .19 + .16 lie a digit above .57.
        if (now := math.ceil(round(at * iterations, 6))) > last:
            yield now, now - last
            last = now


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(spread(mask, a), a, b)
