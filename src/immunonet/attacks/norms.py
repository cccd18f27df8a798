"""The balls that attacks move in, one object a norm: sizes, steepest steps, projections, random points.

A norm is added by an entry in `NORMS`: every attack that has no formula of its own per norm then runs in its ball.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import torch
from torch import Tensor

# Share of values that a step in the L1 ball moves (Tramer & Boneh 2019: the 99th percentile).
_SLIDE = 0.01
# Of a projection onto the L1 ball: how near to its radius, relatively, and after how many rounds at the latest; every
# eighth halves the bracket.
_CLOSE, _ROUNDS = 1e-12, 160


class Norm(abc.ABC):
    """A norm by which perturbations `(B, *S)` are measured, every sample by itself, and the ball of radius `eps`.

    What is random is drawn by a CPU generator, so that a seed means the same points on every device.
    """

    name: ClassVar[str]
    effort: ClassVar[int] = 1
    """How many times the steps a search in its ball takes until more change little, beside those in "linf"."""
    sparse: ClassVar[bool] = False
    """Whether the steepest step moves a single value, so that an ascent has to say how many it moves."""

    @abc.abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """Return the norm of each perturbation `(B, *S)`: `(B,)`."""

    @abc.abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the direction of size 1 that climbs fastest; zero where the gradient `(B, *S)` is zero."""

    def direction(self, gradient: Tensor, point: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the direction of size 1 that an ascent takes from `point` `(B, *S)`, between `low` and `high`."""
        return self.steepest(gradient)

    def farthest(self, gradient: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return the points `(B, *S)` of ball and bounds that one step of size `eps` from `centre` leads to."""
        return self.project(centre + eps * self.steepest(gradient), centre, eps, low, high)

    @abc.abstractmethod
    def project(self, x: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return `x` brought into the ball around `centre`, and then between `low` and `high`.

        `centre` lies within the bounds, so that clipping to them only shrinks the perturbation.
        """

    @abc.abstractmethod
    def random_within(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Return perturbations like `x` `(B, *S)`, drawn uniformly from the ball."""

    @abc.abstractmethod
    def reach(self, width: Tensor) -> float:
        """Return the size of the largest perturbation that bounds of this `width` `(*S)` have room for."""

    def extreme(self, x: Tensor, eps: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
        """Return perturbations of `x` `(B, *S)`, drawn from where the ball reaches farthest, if that can be said.

        `low` and `high`: bounds of the perturbed points, which may still have to be clipped to them.
        """
        return self.random_within(x, eps, generator)


class Linf(Norm):
    """The largest absolute value."""

    name = "linf"

    def size(self, delta: Tensor) -> Tensor:
        """Return the largest absolute value of each perturbation `(B, *S)`: `(B,)`."""
        return delta.flatten(1).abs().amax(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the signs of the gradient `(B, *S)`."""
        return gradient.sign()

    def project(self, x: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return `x` with every value clipped."""
        return (centre + (x - centre).clamp(-eps, eps)).clamp(low, high)

    def random_within(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Return perturbations like `x` `(B, *S)` whose values are uniform."""
        return (2 * torch.rand(x.shape, generator=generator, dtype=torch.float32) - 1).to(x) * eps

    def extreme(self, x: Tensor, eps: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
        """Return random corners of the ball, like `x` `(B, *S)`."""
        return self.random_within(x, eps, generator).sign() * eps

    def reach(self, width: Tensor) -> float:
        """Return the largest width."""
        return float(width.max())


class L2(Norm):
    """The Euclidean length."""

    name = "l2"

    def size(self, delta: Tensor) -> Tensor:
        """Return the length of each perturbation `(B, *S)`: `(B,)`."""
        length: Tensor = delta.flatten(1).norm(dim=1)
        return length

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the gradient `(B, *S)` at length 1."""
        # Dividing by the largest entry first keeps the squares of tiny gradients from underflowing.
        scaled = gradient / column(gradient.flatten(1).abs().amax(1), gradient)
        return scaled / column(self.size(scaled), scaled)

    def project(self, x: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return `x` with perturbations shortened, and then clipped to the bounds."""
        delta = x - centre
        return (centre + delta * (eps / column(self.size(delta), delta)).clamp(max=1.0)).clamp(low, high)

    def random_within(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Return perturbations like `x` `(B, *S)`: directions of a Gaussian, lengths such that all of them are even."""
        direction = self.steepest(torch.randn(x.shape, generator=generator, dtype=torch.float32))
        radius = torch.rand(len(x), generator=generator, dtype=torch.float32)
        radius = radius ** (1 / direction[0].numel() if len(x) else 1)
        return (direction * spread(radius, x)).to(x) * eps

    def reach(self, width: Tensor) -> float:
        """Return the diagonal."""
        return math.sqrt(float(width.square().sum()))


class L1(Norm):
    """The sum of absolute values.

    Its ball reaches beyond bounds in single values, so that what is steepest, nearest or farthest within both is not
    what the ball alone says (Croce & Hein 2021, section 3).
    """

    name = "l1"
    sparse = True
    effort = 4

    def size(self, delta: Tensor) -> Tensor:
        """Return the sum of absolute values of each perturbation `(B, *S)`: `(B,)`."""
        return delta.flatten(1).abs().sum(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return 1 or -1 at the largest entry of each gradient `(B, *S)`, 0 elsewhere."""
        return largest(gradient, torch.ones(len(gradient), device=gradient.device))

    def direction(self, gradient: Tensor, point: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return even steps along the largest 1 % of the gradient, where bounds let `point` move.

        The step of SLIDE (Tramer & Boneh 2019); only moves that lead out of the bounds are forbidden.
        """
        moved = inward(gradient, point, low, high)
        return largest(moved, torch.full((len(moved),), math.ceil(_SLIDE * moved[:1].numel()), device=moved.device))

    def farthest(self, gradient: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return where a linear function with this gradient is largest within ball and bounds: exact.

        Values move as far as the bounds let them, those of the largest slope first, until `eps` is spent.
        """
        room = _room(gradient, centre, low, high).flatten(1)
        # Where the slope is 0 nothing is won.
        room = room * (gradient.flatten(1) != 0)
        order = gradient.flatten(1).abs().sort(dim=1, descending=True, stable=True).indices
        ranked = room.gather(1, order).double()
        spent = torch.minimum(ranked, (eps - (ranked.cumsum(1) - ranked)).clamp(min=0)).to(room)
        moved = torch.zeros_like(room).scatter(1, order, spent).view_as(centre)
        return (centre + gradient.sign() * moved).clamp(low, high)

    def project(self, x: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return the nearest points to `x` within ball and bounds: exact (Croce & Hein 2021, proposition 2.1).

        Every value moves towards `centre` by the same amount, after which the bounds cut it. Points of the ball are
        only cut.
        """
        inside = x.clamp(low, high)
        rows = (self.size((inside - centre).double()) > eps).nonzero()[:, 0]
        if len(rows):
            centre = centre[rows]
            delta = x[rows] - centre
            wish = delta.flatten(1).double().abs()
            room = _room(delta, centre, low, high).flatten(1).double()
            kept = torch.minimum((wish - _shrinkage(wish, room, eps)).clamp(min=0), room).to(x).view_as(delta)
            inside[rows] = (centre + delta.sign() * kept).clamp(low, high)
        return inside

    def random_within(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Return perturbations like `x` `(B, *S)`: exponential sizes over their sum and one more, random signs."""
        sizes = torch.empty(len(x), x[0].numel() + 1 if len(x) else 1).exponential_(generator=generator)
        signs = torch.rand(x.shape, generator=generator, dtype=torch.float32).sub(0.5).sign()
        return (signs * (sizes / sizes.sum(1, keepdim=True))[:, 1:].reshape(x.shape)).to(x) * eps

    def extreme(self, x: Tensor, eps: float, generator: torch.Generator, low: Tensor, high: Tensor) -> Tensor:
        """Return random corners of ball and bounds, like `x` `(B, *S)`.

        Values in random order, each as far as the bounds let it either way, until `eps` is spent: a uniform point of
        the ball moves every value by next to nothing.
        """
        way = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
        return self.farthest(way, x, eps, low, high) - x

    def reach(self, width: Tensor) -> float:
        """Return the sum of the widths."""
        return float(width.sum())


NORMS: dict[str, Norm] = {norm.name: norm for norm in (Linf(), L2(), L1())}
"""Every norm by its name, which is what the setting `norm` of an attack says."""


def column(values: Tensor, like: Tensor) -> Tensor:
    """Shape `(B,)` divisors to broadcast over samples, with one in place of zero."""
    return spread(torch.where(values > 0, values, 1.0), like)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Shape values `(B,)` to broadcast over samples `(B, *S)`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def largest(gradient: Tensor, counts: Tensor) -> Tensor:
    """Return even steps of size 1 in L1, along as many of the largest entries of each gradient `(B, *S)`.

    `counts` `(B,)`: how many, at least 1; entries of 0 are left out.
    """
    flat = gradient.flatten(1)
    values, places = flat.abs().topk(int(counts.max()) if len(counts) else 0, 1)
    chosen = (values > 0) & (torch.arange(values.shape[1], device=flat.device) < counts[:, None])
    steps = torch.zeros_like(flat).scatter(1, places, chosen.to(flat)) * flat.sign()
    return (steps / column(chosen.sum(1).to(flat), steps)).view_as(gradient)


def inward(gradient: Tensor, point: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the gradient `(B, *S)` with 0 where it leads out of the bounds that `point` lies on."""
    return gradient.masked_fill(((point <= low) & (gradient < 0)) | ((point >= high) & (gradient > 0)), 0.0)


def _shrinkage(wish: Tensor, room: Tensor, eps: float) -> Tensor:
    """Return by how much `wish` `(B, D)` must shrink, before `room` cuts it, to add up to `eps`: `(B, 1)` float64.

    The sum falls along straight pieces, on whose slope the next guess lies (Newton), and where that leaves the bracket
    it is halved. Exact as soon as a guess is on the right piece. Unless they shrink, the sums are larger than `eps`.
    """
    least, most = torch.zeros_like(wish[:, :1]), wish.amax(1, keepdim=True)
    guess, close = least, torch.zeros_like(least, dtype=torch.bool)
    for turn in range(_ROUNDS):
        left = (wish - guess).clamp_(min=0)
        excess = torch.minimum(left, room).sum(1, keepdim=True) - eps
        close |= excess.abs() <= _CLOSE * eps
        if bool(close.all()):
            break
        least, most = torch.where(excess > 0, guess, least), torch.where(excess > 0, most, guess)
        moving = ((left > 0) & (left < room)).sum(1, keepdim=True)
        following = guess + excess / moving
        halved = (least + most) / 2
        sound = (following > least) & (following < most) & (turn % 8 != 7)
        guess = torch.where(close, guess, torch.where(sound, following, halved))
    return torch.where(close, guess, most)


def _room(delta: Tensor, centre: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far each value of `centre` `(B, *S)` may move in the direction of `delta`."""
    return torch.where(delta > 0, high - centre, centre - low)
