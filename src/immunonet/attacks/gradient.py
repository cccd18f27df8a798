"""Attacks that follow the gradient of the cross-entropy, in a form that does not vanish: FGSM and PGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from immunonet import _check
from immunonet.attacks._base import Attack, Found, Problem, confined, generator_of
from immunonet.attacks._losses import gradient, log_odds
from immunonet.attacks.norms import column


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018), called as `attack(model, x, y)`.

    What it climbs is the log of the odds against `y`, of which the cross-entropy is the softplus: the same direction
    at any scale of the logits.

    Of all points visited, start included, in all restarts, it keeps per input a successful one before a
    failed one, then the one of the highest loss. `y` is the true label, or the wanted one with `targeted`.

    `eps` >= 0 and `step` >= 0 in units of the input, measured in the norm: a step in "l1" is that of SLIDE (Tramer &
    Boneh 2019), shared by the 1 % of values of the largest slope; `eps / 4` is a good length. With `momentum` above 0
    it follows the running sum of gradients of mean size 1, each earlier one times `momentum` (Dong et al. 2018,
    MI-FGSM), which transfers better. With `random_start` every restart begins at a random point of the ball, without it
    the first one begins at `x` itself. `seed` None draws a fresh one. The rest: see `Attack`; a model whose output has
    no gradient is a ValueError.
    """

    eps: float = 8 / 255
    step: float = 2 / 255
    iterations: int = 10
    restarts: int = 1
    momentum: float = 0.0
    random_start: bool = True
    seed: int | None = 0

    needs = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.number, "step", "momentum", least=0.0)
        _check.keep(self, _check.integer, "iterations", "restarts")
        _check.keep(self, _check.boolean, "random_start")
        _check.keep(self, _check.seed, "seed")

    def calls(self) -> int:
        """Return how often the model is asked per input: about the start and after each step of every restart."""
        return (self.iterations + 1) * self.restarts

    def best(self, problem: Problem) -> Found:
        """Return the best points of all restarts."""
        x, generator = problem.x, generator_of(self.seed)
        best = Found.nothing(x, self.iterations + 1)
        for restart in range(self.restarts):
            start = x
            if self.random_start or restart:
                start = (x + self._ball.random_within(x, self.eps, generator)).clamp(problem.low, problem.high)
            for rows in torch.arange(len(x), device=x.device).split(self.batch_size) if len(x) else ():
                best.keep(self._climb(problem.part(rows), start[rows]), rows)
        return best

    def _climb(self, problem: Problem, start: Tensor) -> Found:
        """Return the best point of one ascent from `start`, and the losses of all its points."""
        model, _, y, *_ = problem
        point, curve, best, velocity = start, [], Found.nothing(start, 0), torch.zeros_like(start)
        for iteration in range(self.iterations + 1):
            last = iteration == self.iterations
            with torch.set_grad_enabled(not last):
                point = point.detach().requires_grad_(not last)
                loss, hit = self._judge(model, point, y, self._loss)
            curve.append(loss.detach())
            best.keep(Found(point.detach(), hit, curve[-1], best.losses))
            if not last:
                velocity = self.momentum * velocity + _of_mean_one(gradient(loss, point))
                point = self._moved(point.detach(), velocity, problem)
        return best._replace(losses=torch.stack(curve))

    def _moved(self, point: Tensor, velocity: Tensor, problem: Problem) -> Tensor:
        """Return where a step from `point` leads."""
        model, x, _, low, high, _ = problem
        point = point + self.step * self._ball.direction(velocity, point, low, high)
        return self._ball.project(confined(model, point, x), x, self.eps, low, high)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return log_odds(logits, y) * (-1 if self.targeted else 1)


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """The fast gradient (sign) method (Goodfellow et al. 2015): one step of size `eps` from `x`.

    Called as `attack(model, x, y)`. It is `PGD` with one iteration and no random start, with PGD's settings,
    arguments and errors; where the step lowers the loss, `x` itself is kept. In "l1" the step leads to the best point
    of ball and bounds for the gradient at `x`.
    """

    eps: float = 8 / 255

    needs = "gradient"

    def calls(self) -> int:
        """Return how often the model is asked per input: before and after the step."""
        return 2

    def best(self, problem: Problem) -> Found:
        """Return the points after the step, or before it."""
        return _Fast(iterations=1, random_start=False, **vars(self)).best(problem)


class _Fast(PGD):
    """PGD whose step goes as far as the ball does."""

    def _moved(self, point: Tensor, velocity: Tensor, problem: Problem) -> Tensor:
        return self._ball.farthest(velocity, point, self.eps, problem.low, problem.high)


def _of_mean_one(gradients: Tensor) -> Tensor:
    """Return gradients scaled to a mean absolute value of 1 per sample; zero where they are zero."""
    # Dividing by the largest entry first keeps the mean of tiny gradients from underflowing.
    scaled = gradients / column(gradients.flatten(1).abs().amax(1), gradients)
    return scaled / column(scaled.flatten(1).abs().mean(1), scaled)
