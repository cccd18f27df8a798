"""NES: a gradient estimated from scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from immunonet import _check
from immunonet.attacks._base import Attack, Found, Problem, Reach, generator_of
from immunonet.attacks._losses import margin


@dataclass(frozen=True, kw_only=True)
class NES(Attack):
    """Ascent by natural evolution strategies (Ilyas et al. 2018), called as `attack(model, x, y)`: needs no gradient.

    Each step asks about `samples` points around, `sigma` times normal noise away in pairs of opposite signs, adds the
    noise up, weighed by the difference of the pair's margins, and moves by `step` along it, in the norm.

    `queries`: calls per input after the one on `x`, those around and the points themselves. `sigma` > 0 and `step` >=
    0 in units of the input; `samples` is even. With `early_stop` an input that is fooled is left alone. `tries`: see
    `Square`. `losses` holds one margin per step. What is kept is as for `PGD`. `eps` >= 0.
    """

    eps: float = 8 / 255
    step: float = 2 / 255
    queries: int = 5000
    samples: int = 20
    sigma: float = 0.01
    early_stop: bool = True
    tries: int = 1
    seed: int | None = 0

    needs = "scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.integer, "queries", "samples", "tries")
        if self.samples % 2:
            raise ValueError(f"samples must be even, in pairs of opposite signs, got {self.samples}")
        _check.keep(self, _check.number, "step", least=0.0)
        _check.keep(self, _check.number, "sigma", least=0.0, above=True)
        _check.keep(self, _check.boolean, "early_stop")
        _check.keep(self, _check.seed, "seed")

    def calls(self) -> int:
        """Return how often the model is asked per input, at most: about the input itself, and at every query."""
        return 1 + self._steps() * (self.samples + 1) * self.tries

    def _steps(self) -> int:
        return self.queries // (self.samples + 1)

    def best(self, problem: Problem) -> Found:
        """Return the points of the largest margin."""
        steps, best = self._steps(), Found.nothing(problem.x, self._steps() + 1)
        if not len(problem.x):
            return best
        generator, reach = generator_of(self.seed), Reach(self.tries)
        loss, hit = self._judge_all(problem.model, problem.x, problem.y, self._margin)
        points, curve = problem.x.clone(), [loss.clone()]
        best.keep(Found(points, hit, loss, best.losses))
        for _ in range(steps):
            rows = (~(best.success & self.early_stop)).nonzero()[:, 0]
            if not len(rows):
                break
            part, here = problem.part(rows), points[rows]
            way = self._ball.steepest(self._slope(part, here, reach, generator))
            there, value, fooled = self._moved(part, here, way, reach)
            heard = value > -torch.inf
            points[rows[heard]] = there[heard]
            loss = loss.index_copy(0, rows, value)
            best.keep(Found(there, fooled, value, best.losses[:, rows]), rows)
            curve.append(loss.clone())
        return best._replace(losses=torch.stack(curve + curve[-1:] * (steps + 1 - len(curve))))

    def _slope(self, problem: Problem, points: Tensor, reach: Reach, generator: torch.Generator) -> Tensor:
        """Return the estimated gradient of the margin `(n, *S)`, up to its size; pairs of which one is refused are
        left out, after as many others as there are tries."""
        total, pairs = torch.zeros_like(points), self.samples // 2
        open_ = torch.full((pairs, len(points)), True, device=points.device)
        for _ in range(self.tries):
            noise = torch.randn(pairs, *points.shape, generator=generator, dtype=torch.float32).to(points)
            which, rows = open_.nonzero().T
            noise = noise[which, rows]
            values = []
            for sign in (1, -1):
                tried = points[rows] + sign * self.sigma * reach.scale * noise
                tried = self._ball.project(tried, problem.x[rows], self.eps, problem.low, problem.high)
                values.append(self._judge_all(problem.model, tried, problem.y[rows], self._margin)[0])
            reach.heard(torch.cat(values))
            slope = values[0] - values[1]
            heard = torch.isfinite(slope)
            weighed = torch.where(heard, slope, 0.0).to(points).reshape(-1, *(1,) * (points.ndim - 1)) * noise
            total.index_add_(0, rows, weighed)
            open_[which, rows] = ~heard
            if bool(heard.all()):
                break
        return total

    def _moved(self, problem: Problem, points: Tensor, way: Tensor, reach: Reach) -> tuple[Tensor, Tensor, Tensor]:
        """Return points a step along a way, what they come to, and whether they fool the model."""
        found = points.clone()
        value = torch.full((len(points),), -torch.inf, dtype=torch.float64, device=points.device)
        fooled, rows = torch.zeros_like(value, dtype=torch.bool), torch.arange(len(points), device=points.device)
        for _ in range(self.tries):
            tried = points[rows] + self.step * reach.scale * way[rows]
            part = problem.part(rows)
            found[rows] = self._ball.project(tried, part.x, self.eps, part.low, part.high)
            value[rows], fooled[rows] = self._judge_all(part.model, found[rows], part.y, self._margin)
            reach.heard(value[rows])
            rows = rows[value[rows] == -torch.inf]
            if not len(rows):
                break
        return found, value, fooled

    def _margin(self, logits: Tensor, y: Tensor) -> Tensor:
        return margin(logits, y) * (-1 if self.targeted else 1)
