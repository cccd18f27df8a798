"""APGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from immunonet import _check, models
from immunonet.attacks._base import Attack, Found, Loss, Model, Problem, generator_of
from immunonet.attacks._losses import dlr, gradient, log_odds, targeted_dlr
from immunonet.attacks.norms import spread

LOSSES = ("ce", "dlr", "targeted-dlr")
_LEAST_CLASSES = {"ce": 2, "dlr": 3, "targeted-dlr": 4}
# Croce & Hein 2020, section 3.3: weight of the plain step against momentum, share of steps that must rise.
_PLAIN, _RISING = 0.75, 0.75


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD (Croce & Hein 2020), called as `attack(model, x, y)`: the step starts at 2 `eps` and halves itself.

    At checkpoints that come closer and closer, the step halves and the search goes back to its best point where
    fewer than 75 % of the steps rose, or the best did not improve since the last checkpoint. What is kept is as for
    `PGD`.

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
        model, x, y, low, high, _ = problem
        project_on = functools.partial(self._ball.project, centre=x, eps=self.eps, low=low, high=high)
        value, hit, slope = self._ask(model, start, y, loss)
        curve, found = [value], Found.nothing(start, 0)
        found.keep(Found(start, hit, value, found.losses))
        point = before = start
        top = _Top(start, value.clone(), slope)
        step = torch.full_like(value, 2 * self.eps)
        rose = torch.zeros_like(value)
        at_check, halved = value.clone(), torch.zeros_like(hit)
        checks = dict(_checkpoints(self.iterations))
        for k in range(1, self.iterations + 1):
            plain = project_on(point + spread(step, point).to(point) * self._ball.steepest(slope))
            weight = _PLAIN if k > 1 else 1.0
            before, point = point, project_on(point + weight * (plain - point) + (1 - weight) * (point - before))
            value, hit, slope = self._ask(model, point, y, loss)
            rose += value > curve[-1]
            curve.append(value)
            found.keep(Found(point, hit, value, found.losses))
            top = top.higher(_Top(point, value, slope))
            if k in checks:
                stuck = ~halved & (top.value <= at_check)
                halved = (rose < _RISING * checks[k]) | stuck
                step = torch.where(halved, step / 2, step)
                point, slope = (_where(halved, a, b) for a, b in ((top.point, point), (top.slope, slope)))
                at_check, rose = top.value, torch.zeros_like(rose)
        return found._replace(losses=torch.stack(curve))

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
