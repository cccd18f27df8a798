"""Noise: random perturbations, which only ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from immunonet import _check, models
from immunonet.attacks._base import Attack, Found, Problem, generator_of
from immunonet.attacks._losses import log_odds


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Random perturbations of the attacked size, called as `attack(model, x, y)`: chance, which attacks must beat.

    Of `points` draws (corners of the ball for "linf", of ball and bounds for "l1", else uniform in it) it keeps the one
    least likely to be answered rightly, of a targeted attack the likeliest to be answered `y`, whether it succeeds or
    not. `losses` `(points, B)` is the highest so far. The rest: see `PGD`.
    """

    eps: float = 8 / 255
    points: int = 100
    seed: int | None = 0

    needs = "scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.integer, "points")
        _check.keep(self, _check.seed, "seed")

    def calls(self) -> int:
        """Return how often the model is asked per input: once for every point."""
        return self.points

    def best(self, problem: Problem) -> Found:
        """Return the points of the highest loss."""
        x, generator = problem.x, generator_of(self.seed)
        found = Found.nothing(x, self.points)
        for point in range(self.points if len(x) else 0):
            moved = self._ball.extreme(x, self.eps, generator, problem.low, problem.high)
            tried = (x + moved).clamp(problem.low, problem.high)
            loss, hit = self._judge_all(problem.model, tried, problem.y, self._loss)
            better = loss > found.loss
            for kept, new in ((found.points, tried), (found.success, hit), (found.loss, loss)):
                kept[better] = new[better]
            found.losses[point] = found.loss
        return found

    def _check_model(self, problem: Problem) -> None:
        # A random defence under evaluation counts its calls: after one more it would give other draws.
        if not isinstance(problem.model, models.Asking):
            super()._check_model(problem)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return log_odds(logits, y) * (-1 if self.targeted else 1)
