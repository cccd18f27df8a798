"""What every attack takes and gives back, and how it asks a model."""

from __future__ import annotations

import abc
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from immunonet import _check, incoming, models
from immunonet.attacks._norms import NORMS, size

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

# Inputs that a model is asked about before it is attacked.
_LOOKED_AT = 4


@dataclass(frozen=True)
class AttackResult:
    """Adversarial examples, one per input, and what the attacked model made of them.

    `adversarials` `(B, *S)`: inside the ball (if the attack has one) and the bounds, also where the attack failed.
    `success` `(B,)` bool: the attacked model answers another label than `y` (of a targeted attack: it answers `y`).
    `distance` `(B,)`: size of the perturbation in the attack's norm. `losses` `(steps + 1, B)` float64: what
    the attack climbs, at its start and after each step; with several restarts or targets, the curve of the one
    that gave the adversarial example.
    """

    adversarials: Tensor
    success: Tensor
    distance: Tensor
    losses: Tensor


class Penalised(models.Asking, abc.ABC):
    """A model with a side condition: attacks climb their loss minus `penalty`, and succeed only where it is 0."""

    @abc.abstractmethod
    def penalty(self, x: Tensor) -> Tensor:
        """Return how much inputs `x` `(B, *S)` violate the condition: `(B,)`, at least 0, differentiable in x."""


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """Settings and checks that all attacks share; called as `attack(model, x, y)`.

    `norm` "linf" or "l2". `bounds`: the valid range of inputs, scalars or one pair per channel. `targeted`: `y` is
    the wanted label, not the true one. `batch_size`: inputs per call of the model; it changes no random number.

    Calling it takes a model that maps `(B, *S)` to finite logits or log-probabilities `(B, C)`, inputs within the
    bounds and labels `(B,)`; it raises ValueError or TypeError otherwise. The model is asked in eval mode and left
    as found; gradients of parameters are not touched.
    """

    norm: str = "linf"
    bounds: Any = (0.0, 1.0)
    targeted: bool = False
    batch_size: int = 256

    # Whether more than the label of an answer counts.
    _of_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check.keep(self, _check.choice, "norm", options=NORMS)
        _check.keep(self, _check.boolean, "targeted")
        _check.keep(self, _check.integer, "batch_size")
        _check.keep(self, incoming.bounds, "bounds")

    def __call__(self, model: Model, x: Any, y: Any) -> AttackResult:
        """Attack `model` at inputs `x` `(B, *S)` with labels `y` `(B,)`."""
        return self._attack(self._problem(model, x, y))

    def _attack(self, problem: Problem) -> AttackResult:
        model = problem.model
        with models.evaluating(model), torch.no_grad():
            self._check_model(problem)
            found = self._search(problem)
        return AttackResult(found.points, found.success, size(found.points - problem.x, self.norm), found.losses)

    def _problem(self, model: Model, x: Any, y: Any) -> Problem:
        x = incoming.inputs("x", x, bounds=self.bounds)
        low, high = self.bounds.tensors(x, x.shape[1:])
        return Problem(model, x.clamp(low, high), incoming.labels("y", y, n=len(x), own=True).to(x.device), low, high)

    def _check_model(self, problem: Problem) -> None:
        """Raise ValueError unless the model gives logits and the labels are among its classes; warn of other faults."""
        if len(problem.x):
            first = models.logits(problem.model, problem.x[:_LOOKED_AT])
            if self._of_scores:
                models.warn_of_probabilities(first)
            self._warn_of_unsteady(problem)
            classes = first.shape[1]
            incoming.labels("y", problem.y, n=len(problem.x), classes=classes)
            if classes < self._least_classes():
                raise ValueError(
                    f"model must tell {self._least_classes()} or more classes apart for {type(self).__name__} with "
                    f"loss={getattr(self, 'loss', None)!r}, got {classes}: use loss='ce'"
                )

    def _warn_of_unsteady(self, problem: Problem) -> None:
        """Warn if a network's answers change from call to call, or with the batch: what fools it once may not again."""
        if isinstance(problem.model, models.Asking):  # what this package wraps is meant to be as it is
            return
        wrong = models.unsteady(functools.partial(models.logits, problem.model), problem.x[:_LOOKED_AT])
        if wrong == models.DEPENDS or (wrong == models.VARIES and not self._averages()):
            advice = (
                "look for normalisation over the batch, or a network in train mode inside the function"
                if wrong == models.DEPENDS
                else "if it is meant to be random attack attacks.Eot(model), else look for dropout left on in eval mode"
            )
            warnings.warn(
                f"model {wrong}, so that success at one call says little: {advice}", UserWarning, stacklevel=4
            )

    def _averages(self) -> bool:
        """Return whether several answers of a random model are asked for."""
        return False

    def _least_classes(self) -> int:
        return 2

    @abc.abstractmethod
    def _search(self, problem: Problem) -> Found: ...

    def _judge(self, model: Model, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return what is climbed `(B,)` float64, and whether the inputs succeed `(B,)`."""
        logits = models.logits(model, x)
        value, hit = loss(logits.double(), y), (logits.argmax(1) == y) == self.targeted
        if isinstance(model, Penalised):
            penalty = model.penalty(x)
            value, hit = value - penalty, hit & (penalty <= 0)
        return value, hit

    def _judge_all(self, model: Model, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Do the same, `batch_size` inputs at a time; at least one input."""
        parts = zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
        values, hits = zip(*(self._judge(model, *part, loss) for part in parts), strict=True)
        return torch.cat(values), torch.cat(hits)


class Problem(NamedTuple):
    """A model, checked inputs `(B, *S)` and labels `(B,)`, and the valid range, which broadcasts against `*S`.

    `starts` `(B, *S)`: where to begin, for attacks that are told.
    """

    model: Model
    x: Tensor
    y: Tensor
    low: Tensor
    high: Tensor
    starts: Tensor | None = None

    def part(self, rows: Tensor) -> Problem:
        """Return the same for some of the inputs."""
        starts = None if self.starts is None else self.starts[rows]
        return self._replace(x=self.x[rows], y=self.y[rows], starts=starts)


class Found(NamedTuple):
    """Points `(B, *S)`, whether they succeed `(B,)`, their loss `(B,)`, and the curves `(steps + 1, B)`."""

    points: Tensor
    success: Tensor
    loss: Tensor
    losses: Tensor

    @classmethod
    def nothing(cls, points: Tensor, steps: int) -> Found:
        """Return a copy of `points` that anything is better than."""
        losses = points.new_full((steps + 1, len(points)), -torch.inf, dtype=torch.float64)
        return cls(points.clone(), torch.zeros_like(losses[0], dtype=torch.bool), losses[0].clone(), losses[1:])

    def keep(self, other: Found, rows: Tensor | None = None) -> None:
        """Replace what is worse than `other` among the inputs `rows` (None: all): success comes first, then loss."""
        rows = torch.arange(len(self.points), device=self.loss.device) if rows is None else rows
        success, loss = self.success[rows], self.loss[rows]
        better = (other.success & ~success) | ((other.success == success) & (other.loss > loss))
        rows = rows[better]
        self.points[rows], self.success[rows] = other.points[better], other.success[better]
        self.loss[rows], self.losses[:, rows] = other.loss[better], other.losses[:, better]


def generator_of(seed: int | None) -> torch.Generator:
    """Return a CPU generator with this seed, or a fresh one; a seed means the same numbers on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)
