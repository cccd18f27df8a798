"""Attacks that follow the gradient of the cross-entropy: FGSM and PGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check
from immunonet.attacks._base import AttackResult, Model, logits_of
from immunonet.attacks._norms import NORMS, project, random_within, size, steepest
from immunonet.features import evaluating


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018), called as `attack(model, x, y)`.

    Of all points visited, start included, in all restarts, it keeps per input a successful one before a
    failed one, then the one of the highest loss. `y` is the true label, or the wanted one with `targeted`.

    `eps` >= 0 and `step` >= 0 in units of the input; `norm` "linf" or "l2". With `random_start` every restart
    begins at a random point of the ball, without it the first one begins at `x` itself. `bounds`: the valid
    range of inputs, scalars or one pair per channel. `seed` None draws a fresh one. `batch_size`: inputs
    per call of the model; it changes no random number.

    Calling it takes a model that maps `(B, *S)` to finite logits `(B, C)`, inputs within the bounds and
    labels `(B,)`; it raises ValueError or TypeError otherwise, and for a model whose output has no gradient.
    The model is asked in eval mode and left as found; gradients of parameters are not touched.
    """

    eps: float = 8 / 255
    step: float = 2 / 255
    iterations: int = 10
    restarts: int = 1
    norm: str = "linf"
    random_start: bool = True
    bounds: Any = (0.0, 1.0)
    targeted: bool = False
    seed: int | None = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check.number("eps", self.eps, least=0.0)
        _check.number("step", self.step, least=0.0)
        _check.integer("iterations", self.iterations)
        _check.integer("restarts", self.restarts)
        _check.choice("norm", self.norm, NORMS)
        _check.boolean("random_start", self.random_start)
        _check.boolean("targeted", self.targeted)
        _check.seed("seed", self.seed)
        _check.integer("batch_size", self.batch_size)
        if not isinstance(self.bounds, _check.Bounds):
            object.__setattr__(self, "bounds", _check.Bounds.of("bounds", self.bounds))

    def __call__(self, model: Model, x: Any, y: Any) -> AttackResult:
        """Attack `model` at inputs `x` `(B, *S)` with labels `y` `(B,)`."""
        x = _check.inputs("x", x, bounds=self.bounds)
        low, high = self.bounds.tensors(x, x.shape[1:])
        x = x.clamp(low, high)
        y = _check.labels("y", y, n=len(x)).to(x.device)
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        best = _Found.nothing(x, self.iterations + 1)
        with evaluating(*[model] if isinstance(model, nn.Module) else []), torch.no_grad():
            if len(x):
                _check.labels("y", y, n=len(x), classes=logits_of(model, x[:1]).shape[1])
            for restart in range(self.restarts):
                start = x
                if self.random_start or restart:
                    start = (x + random_within(x, self.eps, self.norm, generator)).clamp(low, high)
                for i in range(0, len(x), self.batch_size):
                    part = slice(i, i + self.batch_size)
                    best.keep(self._climb(model, start[part], x[part], y[part], low, high), part)
        return AttackResult(best.points, best.success, size(best.points - x, self.norm), best.losses)

    def _climb(self, model: Model, start: Tensor, x: Tensor, y: Tensor, low: Tensor, high: Tensor) -> _Found:
        """Return the best point of one ascent from `start`, and the losses of all its points."""
        point, curve, best = start, [], _Found.nothing(start, 0)
        for iteration in range(self.iterations + 1):
            last = iteration == self.iterations
            with torch.set_grad_enabled(not last):
                point = point.detach().requires_grad_(not last)
                logits = logits_of(model, point)
                loss = _cross_entropy(logits, y) * (-1 if self.targeted else 1)
            curve.append(loss.detach())
            hit = (logits.argmax(1) == y) == self.targeted
            best.keep(_Found(point.detach(), hit, curve[-1], best.losses))
            if not last:
                direction = steepest(_gradient(loss, point), self.norm)
                point = project(point.detach() + self.step * direction, x, self.eps, self.norm, low, high)
        return best._replace(losses=torch.stack(curve))


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """The fast gradient (sign) method (Goodfellow et al. 2015): one step of size `eps` from `x`.

    Called as `attack(model, x, y)`. It is `PGD` with one iteration and no random start, with PGD's settings,
    arguments and errors; where the step lowers the loss, `x` itself is kept.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    bounds: Any = (0.0, 1.0)
    targeted: bool = False
    batch_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", self._pgd().bounds)

    def __call__(self, model: Model, x: Any, y: Any) -> AttackResult:
        """Attack `model` at inputs `x` `(B, *S)` with labels `y` `(B,)`."""
        return self._pgd()(model, x, y)

    def _pgd(self) -> PGD:
        return PGD(step=self.eps, iterations=1, random_start=False, **vars(self))


class _Found(NamedTuple):
    """Points `(B, *S)`, whether they succeed `(B,)`, their loss `(B,)`, and the curves `(steps + 1, B)`."""

    points: Tensor
    success: Tensor
    loss: Tensor
    losses: Tensor

    @classmethod
    def nothing(cls, points: Tensor, steps: int) -> _Found:
        """Return a copy of `points` that anything is better than."""
        losses = points.new_full((steps + 1, len(points)), -torch.inf, dtype=torch.float64)
        return cls(points.clone(), torch.zeros_like(losses[0], dtype=torch.bool), losses[0].clone(), losses[1:])

    def keep(self, other: _Found, part: slice = slice(None)) -> None:
        """Replace what is worse than `other` among the inputs of `part`: success comes first, then loss."""
        success, loss = self.success[part], self.loss[part]
        better = (other.success & ~success) | ((other.success == success) & (other.loss > loss))
        rows = better.nonzero().squeeze(1) + (part.start or 0)
        self.points[rows], self.success[rows] = other.points[better], other.success[better]
        self.loss[rows], self.losses[:, rows] = other.loss[better], other.losses[:, better]


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy `(B,)` float64, in a form that stays exact where the network is sure.

    Single precision would round a loss below 1e-7 to zero, and the gradient with it: a network that is sure
    enough would look robust (Carlini & Wagner 2017).
    """
    logits = logits.double()
    label = F.one_hot(y, logits.shape[1]).bool()
    return F.softplus(logits.masked_fill(label, -torch.inf).logsumexp(1) - logits[label])


def _gradient(loss: Tensor, point: Tensor) -> Tensor:
    """Return d(sum of loss)/d(point); ValueError if the model cut the graph."""
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, point, torch.ones_like(loss), allow_unused=True)
    if gradient is None:
        raise ValueError(
            "model must be differentiable in its input, but its output has no gradient: attack the network "
            "itself, or a surrogate of a defence such as attacks.SoftNeighbours(defence)"
        )
    return gradient
