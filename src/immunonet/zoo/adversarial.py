"""Adversarial training: the loss at the worst points that short attacks find near each training image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check
from immunonet.attacks import PGD
from immunonet.attacks._losses import log_odds
from immunonet.attacks.norms import NORMS, Norm, spread
from immunonet.data import Images, sample

LOSSES = ("pgd", "trades")
COMBINED = ("max", "average", "msd", "random")

Ask = Callable[[Tensor], Tensor]
Climb = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Settings of adversarial training within balls of one or several norms, and [0, 1].

    `loss` "pgd": the cross-entropy at the attacked image (Madry et al. 2018). "trades": the cross-entropy at the
    image itself plus `beta` times the divergence KL(image || attacked image), which the attack climbs in place
    of the cross-entropy (Zhang et al. 2019).

    `threats`: radii by the names of norms, such as `{"linf": .3, "l1": 10.}`; or `eps`, the radius in "linf" alone
    (default 8/255). Of several threats `combine` makes one loss. "max": each is attacked by itself, and per image the
    attack of the highest loss counts; "average": the mean over threats (Tramer & Boneh 2019). "msd": one attack whose
    every step is that of the norm which raises the loss most (Maini et al. 2020). "random": every batch one threat,
    drawn with weight 1 - its accuracy in training so far (E-AT, Croce & Hein 2022).

    An attack starts at a random point of its ball ("msd": at the image) and takes `iterations` steps of size `step`
    (None: a quarter of the radius; given only with `eps`). It asks the network in eval mode, as it will be attacked, so
    that the points on its way do not enter the batch-norm averages (Pang et al. 2021); the loss is taken in training
    mode. Radii and steps grow linearly from 0 over the first `ramp` epochs: at a large radius a network may
    otherwise never leave the constant answer. Validation attacks within `validation_eps` (None: eps; only with `eps`).
    All in units of the input.
    """

    loss: str = "pgd"
    eps: float | None = None
    threats: Mapping[str, float] | None = field(default=None, hash=False)
    combine: str = "max"
    step: float | None = None
    iterations: int = 7
    beta: float = 6.0
    ramp: int = 0
    validation_eps: float | None = None

    def __post_init__(self) -> None:
        _check.keep(self, _check.choice, "loss", options=LOSSES)
        _check.keep(self, _check.choice, "combine", options=COMBINED)
        if self.threats is None:
            object.__setattr__(self, "eps", 8 / 255 if self.eps is None else self.eps)
        else:
            object.__setattr__(self, "threats", radii("threats", self.threats, above=True))
            for name in ("eps", "step", "validation_eps"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with one radius in linf: leave it out where threats are given")
        _check.keep(self, _check.number, "eps", "step", "validation_eps", least=0, most=1, optional=True)
        _check.keep(self, _check.integer, "iterations")
        _check.keep(self, _check.number, "beta", least=0)
        _check.keep(self, _check.integer, "ramp", least=0)

    @property
    def balls(self) -> dict[str, float]:
        """The radii by norm within which training attacks."""
        return dict(self.threats) if self.threats is not None else {"linf": self.eps or 0.0}

    @property
    def measured(self) -> dict[str, float]:
        """The radii by norm within which validation attacks."""
        return self.balls if self.validation_eps is None else {"linf": self.validation_eps}

    def told(self) -> dict[str, Any]:
        """Return all settings, as JSON that tells the order of threats."""
        return asdict(self) | {"threats": None if self.threats is None else [list(one) for one in self.threats.items()]}

    def check_room(self, x: Tensor) -> None:
        """Raise ValueError for a radius that is larger than any perturbation of `x` `(B, *S)` within [0, 1]."""
        for norm, eps in self.balls.items():
            most = NORMS[norm].reach(torch.ones(x.shape[1:]))
            name = "eps" if self.threats is None else f"threats[{norm!r}]"
            _check.number(f"{name} (images have room for {most:.4g})", eps, least=0, most=most)

    def steps(self, strength: float = 1.0) -> dict[str, Ball]:
        """Return the balls and steps by norm, at a share `strength` of their size; those of size 0 are left out."""
        sizes = {name: strength * eps for name, eps in self.balls.items()}
        step = None if self.step is None else strength * self.step
        return {n: Ball(NORMS[n], eps, eps / 4 if step is None else step) for n, eps in sizes.items() if eps}


class Ball(NamedTuple):
    """Where an attack moves: the norm, the radius, and the size of a step."""

    norm: Norm
    eps: float
    step: float

    def random(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return points `(B, *S)` drawn around inputs `x`, within [0, 1]."""
        return (x + self.norm.random_within(x, self.eps, generator)).clamp(*_bounds(x))

    def stepped(self, point: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the points `(B, *S)` one step up the `gradient` from `point`, in the ball around inputs `x`."""
        low, high = _bounds(x)
        moved = point + self.step * self.norm.direction(gradient, point, low, high)
        return self.norm.project(moved, x, self.eps, low, high)


class Adversary:
    """Adversarial training at work: its settings, and how often the network was right under each threat so far.

    `ask` is how its attacks ask the network: inputs `(B, *S)` to logits, differentiable, without a trace in what the
    network keeps. `learn`: the network in training mode.
    """

    def __init__(self, settings: Adversarial) -> None:
        self.settings = settings
        self.right = torch.zeros(len(settings.balls), dtype=torch.float64)
        self.seen = torch.zeros_like(self.right)

    def attacked(
        self, ask: Ask, x: Tensor, y: Tensor, generator: torch.Generator, epoch: float
    ) -> tuple[list[Tensor], int | None]:
        """Return attacked inputs, one tensor `(B, *S)` or one per threat, and which threat was drawn, if one was.

        `epoch`: how many epochs into training, at least 0.
        """
        settings = self.settings
        balls = settings.steps(min(1.0, epoch / settings.ramp) if settings.ramp else 1.0)
        if not balls:
            return [x], None  # no random number is drawn: plain training, bit for bit
        climb = functools.partial(log_odds, y=y)
        if settings.loss == "trades":
            with torch.no_grad():
                climb = functools.partial(divergences, ask(x).float())
        return _COMBINED[settings.combine](self, ask, climb, x, list(balls.values()), generator)

    def objective(self, learn: Ask, x: Tensor, points: list[Tensor], y: Tensor, threat: int | None = None) -> Tensor:
        """Return the mean loss at attacked inputs; of the `threat` that was drawn it is kept who was right."""
        clean = learn(x).float() if self.settings.loss == "trades" else None
        losses = []
        for point in points:
            logits = learn(point).float()
            if threat is not None:
                self.seen[threat] += len(y)
                self.right[threat] += float((logits.detach().argmax(1) == y).sum())
            if clean is None:
                losses.append(F.cross_entropy(logits, y))
            else:
                losses.append(F.cross_entropy(clean, y) + self.settings.beta * divergence(clean, logits) / len(x))
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    @property
    def weights(self) -> Tensor:
        """The weights `(threats,)` that a threat is drawn with: 1 - its accuracy, all alike until each was met."""
        return torch.ones_like(self.seen) if bool((self.seen == 0).any()) else 1 - self.right / self.seen + 1e-6

    def tensors(self) -> dict[str, Tensor]:
        """Return what training depends on beside the network."""
        return {"right": self.right, "seen": self.seen}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.right, self.seen = tensors["right"].clone(), tensors["seen"].clone()


def _slope(ask: Ask, climb: Climb, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss `(B,)` of points, and its gradient `(B, *S)`."""
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        climbed = climb(ask(point).float())
        (gradient,) = torch.autograd.grad(climbed.sum(), point)
    return climbed.detach(), gradient


def _ascent(ask: Ask, climb: Climb, x: Tensor, ball: Ball, iterations: int, generator: torch.Generator) -> Tensor:
    point = ball.random(x, generator)
    for _ in range(iterations):
        point = ball.stepped(point, _slope(ask, climb, point)[1], x)
    return point


Combined = tuple[list[Tensor], int | None]


def _average(
    own: Adversary, ask: Ask, climb: Climb, x: Tensor, balls: list[Ball], generator: torch.Generator
) -> Combined:
    return [_ascent(ask, climb, x, ball, own.settings.iterations, generator) for ball in balls], None


def _max(own: Adversary, ask: Ask, climb: Climb, x: Tensor, balls: list[Ball], generator: torch.Generator) -> Combined:
    points, _ = _average(own, ask, climb, x, balls, generator)
    if len(points) == 1:
        return points, None
    return [_highest(points, _values(ask, climb, points))[0]], None


def _random(
    own: Adversary, ask: Ask, climb: Climb, x: Tensor, balls: list[Ball], generator: torch.Generator
) -> Combined:
    drawn = int(torch.multinomial(own.weights, 1, generator=generator))
    return [_ascent(ask, climb, x, balls[drawn], own.settings.iterations, generator)], drawn


def _msd(own: Adversary, ask: Ask, climb: Climb, x: Tensor, balls: list[Ball], generator: torch.Generator) -> Combined:
    """Return the points of the highest loss on one way, whose every step is that of the norm which leads highest."""
    point = best = x
    (top,) = _values(ask, climb, [x])
    for _ in range(own.settings.iterations):
        _, gradient = _slope(ask, climb, point)
        ahead = [ball.stepped(point, gradient, x) for ball in balls]
        point, value = _highest(ahead, _values(ask, climb, ahead))
        best, top = _highest([point, best], torch.stack([value, top]))
    return [best], None


_COMBINED: dict[str, Callable[..., Combined]] = dict(zip(COMBINED, (_max, _average, _msd, _random), strict=True))


@torch.no_grad()
def _values(ask: Ask, climb: Climb, points: list[Tensor]) -> Tensor:
    return torch.stack([climb(ask(point).float()) for point in points])


def _highest(points: list[Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """Return per input the point of the highest of its `values` `(len(points), B)`, the first of equals; and that."""
    best, value = points[0], values[0]
    for point, other in zip(points[1:], values[1:], strict=True):
        best, value = torch.where(spread(other > value, point), point, best), torch.maximum(value, other)
    return best, value


def _bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(()), x.new_ones(())


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence in nats of softmax(q) from softmax(p), logits (B, C), summed over B."""
    return divergences(p, q).sum()


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence in nats of softmax(q) from softmax(p), logits (B, C): (B,)."""
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)


def radii(name: str, threats: Any, *, above: bool = False) -> dict[str, float]:
    """Return radii by the names of norms, checked, `above` 0 or at least 0; an error names argument and norm."""
    if not isinstance(threats, Mapping):
        raise TypeError(f"{name} must be a table of radii by norm, such as {{'linf': 0.3}}, got {threats!r}")
    if not threats:
        raise ValueError(f"{name} must name at least one of the norms {', '.join(NORMS)}, got none")
    for norm in threats:
        _check.among(norm, NORMS, f"norm (in {name})")
    return {n: _check.number(f"{name}[{n!r}]", eps, least=0, above=above) for n, eps in threats.items()}


def robust_accuracies(
    net: nn.Module, images: Images, *, threats: Mapping[str, float], iterations: int = 10, most: int = 1000
) -> dict[str, float]:
    """Return by norm the share of images that `net` classifies rightly at every point that PGD visits, and "union".

    "union": right under all of them. Of more than `most` images a fixed random sample (`data.sample`) of as many. PGD
    in the ball of each radius in `threats` with one random start and steps of a quarter of it: an upper bound of the
    accuracy in the worst case.
    """
    if len(images) > most:
        images = images[sample(len(images), most)]
    device = next(net.parameters()).device
    x, y, right = images.x.to(device), images.y.to(device), {}
    for norm, eps in radii("threats", threats).items():
        attack = PGD(norm=norm, eps=eps, step=eps / 4, iterations=iterations)
        right[norm] = ~attack(net, x, y).success
    right["union"] = torch.stack(list(right.values())).all(0)
    return {name: float(one.double().mean()) for name, one in right.items()}


def robust_accuracy(net: nn.Module, images: Images, *, eps: float, iterations: int = 10, most: int = 1000) -> float:
    """Return the share of images that `net` classifies rightly at every point PGD visits, in "linf" of radius `eps`.

    The rest: see `robust_accuracies`.
    """
    return robust_accuracies(net, images, threats={"linf": eps}, iterations=iterations, most=most)["union"]
