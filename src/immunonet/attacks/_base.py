"""What every attack takes and gives back, and how it asks a model."""

from __future__ import annotations

import abc
import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from immunonet import _check, incoming, models
from immunonet.attacks.norms import NORMS, Norm

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

# Inputs that a model is asked about before it is attacked.
_LOOKED_AT = 4
# Settings that say what an attack spends, and next to nothing of each.
_LEAST = {"iterations": 2, "restarts": 1, "queries": 5, "samples": 2, "points": 1, "evaluations": 2}


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


class Confined(models.Asking, abc.ABC):
    """A model with a side condition on perturbations: ascents go on from what `confined` leaves of theirs.

    Ball and bounds come after it, so that a point may leave the condition by as much as they cut.
    """

    @abc.abstractmethod
    def confined(self, delta: Tensor) -> Tensor:
        """Return what of perturbations `(B, *S)` is allowed."""


class Refusing(models.Asking, abc.ABC):
    """A model that may refuse to answer: attacks learn nothing from such an input but that it was refused."""

    @abc.abstractmethod
    def heard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(B, C)` for inputs `x` `(B, *S)`, and `(B,)` bool: which of them were answered at all."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, C)`; those of what was refused say nothing."""
        return self.heard(x)[0]


class Reach:
    """How far the next proposals of an attack reach, as a multiple of what it would do by itself.

    Oracle-guided rejection sampling (OARS, Feng et al. 2023): where a model refuses to answer inputs that are too much
    alike, what was refused is drawn anew, farther off, up to `tries` times; answers bring the reach back little by
    little. With one try nothing is drawn anew, and the reach stays 1.
    """

    GROWS, SHRINKS = 1.5, 0.97

    def __init__(self, tries: int) -> None:
        self.tries, self.scale = tries, 1.0

    def heard(self, value: Tensor) -> None:
        """Take in what proposals came to, `value` `(n,)`: minus infinity where the model refused to answer."""
        if self.tries > 1:
            refused = bool((value == -torch.inf).any())
            self.scale = self.scale * self.GROWS if refused else max(1.0, self.scale * self.SHRINKS)


def confined(model: Model, point: Tensor, x: Tensor) -> Tensor:
    """Return a point `(B, *S)` of an ascent from `x`, brought to where a model's condition allows, if it has one."""
    return x + model.confined(point - x) if isinstance(model, Confined) else point


@dataclass(frozen=True, kw_only=True)
class Attack(abc.ABC):
    """Settings and checks that all attacks share; called as `attack(model, x, y)`.

    `norm`: the name of a norm in `NORMS`. `bounds`: the valid range of inputs, scalars or one pair per channel.
    `targeted`: `y` is the wanted label, not the true one. `batch_size`: inputs per call of the model; it changes no
    random number. `eps` >= 0: the radius of the ball, in units of the input.

    Calling it takes a model that maps `(B, *S)` to finite logits or log-probabilities `(B, C)`, inputs within the
    bounds and labels `(B,)`; it raises ValueError or TypeError otherwise. The model is asked in eval mode and left
    as found; gradients of parameters are not touched.

    An attack of one's own is a subclass, a frozen dataclass, with `best`, `calls`, and what it `needs`. Settings that
    are called `iterations`, `step`, `restarts`, `queries`, `points` or `evaluations` mean what they do in the others.
    """

    norm: str = "linf"
    bounds: Any = (0.0, 1.0)
    targeted: bool = False
    batch_size: int = 256
    eps: float | None

    needs: ClassVar[Literal["gradient", "scores", "labels"]]
    """What it must see of the model; each of the three holds the next."""
    bounded: ClassVar[bool] = True
    """Whether all points lie within `eps`; of other attacks only successes do, and `eps` may be None: no limit."""
    norms: ClassVar[tuple[str, ...] | None] = None
    """The norms that it has formulas for; None: all in `NORMS`."""

    def __post_init__(self) -> None:
        valid = [name for name in NORMS if self.norms is None or name in self.norms]
        if self.norm not in valid:
            names = ", ".join(map(repr, valid))
            raise ValueError(f"norm must be one of {names} for {type(self).__name__}, got {self.norm!r}")
        _check.keep(self, _check.choice, "norm", options=valid)
        _check.keep(self, _check.number, "eps", least=0.0, optional=not self.bounded)
        _check.keep(self, _check.boolean, "targeted")
        _check.keep(self, _check.integer, "batch_size")
        _check.keep(self, incoming.bounds, "bounds")

    @abc.abstractmethod
    def best(self, problem: Problem) -> Found:
        """Return the best points that it finds; called without gradients, the model in eval mode and checked."""

    @abc.abstractmethod
    def calls(self) -> int:
        """Return how often the model is asked about each input at most, less a look at a few of them beforehand."""

    def settings(self) -> dict[str, Any]:
        """Return all settings, as JSON."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return found | {"bounds": self.bounds.pairs()}

    def describe(self) -> dict[str, Any]:
        """Return the name of the attack, `method`, and its settings, as JSON."""
        return {"method": type(self).__name__, **self.settings()}

    def cheapest(self) -> Self:
        """Return a twin that spends next to nothing, to see whether it runs."""
        return self._changed({name: least for name, least in _LEAST.items() if hasattr(self, name)})

    def resized(self, eps: float) -> Self:
        """Return a twin of another radius, its step in proportion if it has one; ValueError if that cannot be told."""
        eps = _check.number("eps", eps, least=0.0)
        if (step := getattr(self, "step", None)) is None:
            return self._changed({"eps": eps})
        if eps and not self.eps:
            raise ValueError(f"eps must not be 0 before: {self} has no step in proportion to it; make another attack")
        return self._changed({"eps": eps, "step": eps * step / self.eps if self.eps else 0.0})

    def doubled(self) -> Self | None:
        """Return a twin with twice the iterations, None if it has none."""
        iterations = getattr(self, "iterations", None)
        return None if iterations is None else self._changed({"iterations": 2 * iterations})

    def persistent(self, tries: int) -> Self:
        """Return a twin that draws what is refused anew, so often (OARS); as it is, where it cannot."""
        return self._changed({"tries": tries} if hasattr(self, "tries") else {})

    def _changed(self, settings: dict[str, Any]) -> Self:
        return dataclasses.replace(self, **settings)

    @property
    def _ball(self) -> Norm:
        return NORMS[self.norm]

    def __call__(self, model: Model, x: Any, y: Any) -> AttackResult:
        """Attack `model` at inputs `x` `(B, *S)` with labels `y` `(B,)`."""
        return self._attack(self._problem(model, x, y))

    def _attack(self, problem: Problem) -> AttackResult:
        model = problem.model
        with models.evaluating(model), torch.no_grad():
            self._check_model(problem)
            found = self.best(problem)
        distance = self._ball.size(found.points - problem.x)
        return AttackResult(found.points, found.success, distance, found.losses)

    def _problem(self, model: Model, x: Any, y: Any) -> Problem:
        x = incoming.inputs("x", x, bounds=self.bounds)
        low, high = self.bounds.tensors(x, x.shape[1:])
        return Problem(model, x.clamp(low, high), incoming.labels("y", y, n=len(x), own=True).to(x.device), low, high)

    def _check_model(self, problem: Problem) -> None:
        """Raise ValueError unless the model gives logits and the labels are among its classes; warn of other faults."""
        if len(problem.x):
            first = models.logits(problem.model, problem.x[:_LOOKED_AT])
            if self.needs != "labels":
                models.warn_of_probabilities(first)
            self._warn_of_unsteady(problem, first)
            classes = first.shape[1]
            incoming.labels("y", problem.y, n=len(problem.x), classes=classes)
            if classes < self._least_classes():
                raise ValueError(
                    f"model must tell {self._least_classes()} or more classes apart for {type(self).__name__} with "
                    f"loss={getattr(self, 'loss', None)!r}, got {classes}: use loss='ce'"
                )

    def _warn_of_unsteady(self, problem: Problem, first: Tensor) -> None:
        """Warn if a network's answers change from call to call, or with the batch: what fools it once may not again."""
        if isinstance(problem.model, models.Asking):  # what this package wraps is meant to be as it is
            return
        wrong = models.unsteady(functools.partial(models.logits, problem.model), problem.x[:_LOOKED_AT], first)
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

    def _judge(self, model: Model, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Return what is climbed `(B,)` float64, and whether the inputs succeed `(B,)`.

        What a model refuses to answer does not succeed, and comes to minus infinity.
        """
        logits, answered = asked(model, x)
        value, hit = loss(logits.double(), y), (logits.argmax(1) == y) == self.targeted
        if answered is not None:
            value, hit = value.masked_fill(~answered, -torch.inf), hit & answered
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


def asked(model: Model, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return logits, and which inputs were answered, None where the model never refuses."""
    if isinstance(model, Refusing):
        return model.heard(x)
    return models.logits(model, x), None


def generator_of(seed: int | None) -> torch.Generator:
    """Return a CPU generator with this seed, or a fresh one; a seed means the same numbers on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)
