"""The balls that attacks move in, one object a norm: sizes, steepest steps, projections, random points.

A norm is added by an entry in `NORMS`: every attack that has no formula of its own per norm then runs in its ball.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import torch
from torch import Tensor


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


NORMS: dict[str, Norm] = {norm.name: norm for norm in (Linf(), L2())}
"""Every norm by its name, which is what the setting `norm` of an attack says."""


def column(values: Tensor, like: Tensor) -> Tensor:
    """Shape `(B,)` divisors to broadcast over samples, with one in place of zero."""
    return spread(torch.where(values > 0, values, 1.0), like)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Shape values `(B,)` to broadcast over samples `(B, *S)`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
