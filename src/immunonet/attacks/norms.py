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


class Norm(abc.ABC):
    """A norm by which perturbations `(B, *S)` are measured, every sample by itself, and the ball of radius `eps`.

    What is random is drawn by a CPU generator, so that a seed means the same points on every device.
    """

    name: ClassVar[str]

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

    def extreme(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Return perturbations like `x` `(B, *S)`, drawn from where the ball reaches farthest, if that can be said."""
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

    def extreme(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
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

    def size(self, delta: Tensor) -> Tensor:
        """Return the sum of absolute values of each perturbation `(B, *S)`: `(B,)`."""
        return delta.flatten(1).abs().sum(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return 1 or -1 at the largest entry of each gradient `(B, *S)`, 0 elsewhere."""
        return _largest(gradient, 1)

    def direction(self, gradient: Tensor, point: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return even steps along the largest 1 % of the gradient, where bounds let `point` move.

        The step of SLIDE (Tramer & Boneh 2019); only moves that lead out of the bounds are forbidden.
        """
        held = ((point <= low) & (gradient < 0)) | ((point >= high) & (gradient > 0))
        return _largest(gradient.masked_fill(held, 0.0), math.ceil(_SLIDE * gradient[0].numel()) if len(point) else 1)

    def farthest(self, gradient: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return where a linear function with this gradient is largest within ball and bounds: exact.

        Values move as far as the bounds let them, those of the largest slope first, until `eps` is spent.
        """
        room = _room(gradient, centre, low, high).flatten(1)
        order = gradient.flatten(1).abs().sort(1, descending=True, stable=True).indices
        ranked = room.gather(1, order)
        spent = torch.minimum(ranked, (eps - (ranked.cumsum(1) - ranked)).clamp(min=0))
        moved = torch.zeros_like(room).scatter(1, order, spent).view_as(centre)
        return (centre + gradient.sign() * moved).clamp(low, high)

    def project(self, x: Tensor, centre: Tensor, eps: float, low: Tensor, high: Tensor) -> Tensor:
        """Return the nearest points to `x` within ball and bounds: exact (Croce & Hein 2021, proposition 2.1).

        Every value moves towards `centre` by the same amount, after which the bounds cut it.
        """
        delta = x - centre
        wish = delta.flatten(1).double().abs()
        room = _room(delta, centre, low, high).flatten(1).double()
        # What is left, as a function of the amount, is linear between these; its slope is how many values still move.
        ends, order = torch.cat([wish, (wish - room).clamp(min=0)], 1).sort(1, descending=True)
        moving = torch.where(order < wish.shape[1], 1.0, -1.0).cumsum(1)[:, :-1]
        left = torch.cat([torch.zeros_like(ends[:, :1]), (moving * -ends.diff(dim=1)).cumsum(1)], 1)
        place = torch.searchsorted(left, torch.full_like(left[:, :1], eps)).clamp(1, left.shape[1] - 1)
        slope = moving.gather(1, place - 1).clamp(min=1)
        amount = ends.gather(1, place - 1) - (eps - left.gather(1, place - 1)) / slope
        amount = amount.where(torch.minimum(wish, room).sum(1, keepdim=True) > eps, 0.0)
        kept = torch.minimum((wish - amount).clamp(min=0), room).to(x).view_as(x)
        return (centre + delta.sign() * kept).clamp(low, high)

    def random_within(self, x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Return perturbations like `x` `(B, *S)`: exponential sizes over their sum and one more, random signs."""
        sizes = torch.empty(len(x), x[0].numel() + 1 if len(x) else 1).exponential_(generator=generator)
        signs = torch.rand(x.shape, generator=generator, dtype=torch.float32).sub(0.5).sign()
        return (signs * (sizes / sizes.sum(1, keepdim=True))[:, 1:].reshape(x.shape)).to(x) * eps

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


def _largest(gradient: Tensor, count: int) -> Tensor:
    """Return the signs of the `count` largest entries of each gradient `(B, *S)`, over as many as are not zero."""
    flat = gradient.flatten(1)
    values, places = flat.abs().topk(count, 1)
    chosen = torch.zeros_like(flat).scatter(1, places, (values > 0).to(flat)) * flat.sign()
    return (chosen / column(chosen.abs().sum(1), chosen)).view_as(gradient)


def _room(delta: Tensor, centre: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far each value of `centre` `(B, *S)` may move in the direction of `delta`."""
    return torch.where(delta > 0, high - centre, centre - low)
