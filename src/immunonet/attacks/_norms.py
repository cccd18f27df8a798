"""The two balls that attacks move in: steepest steps, projections, random points, sizes.

`norm` is "linf" or "l2" throughout; tensors have shape `(B, *S)`, and every sample counts by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("linf", "l2")


def size(delta: Tensor, norm: str) -> Tensor:
    """Return the norm of each perturbation, `(B,)`."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """Return the direction of size 1 that climbs fastest; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    # Dividing by the largest entry first keeps the squares of tiny gradients from underflowing.
    scaled = gradient / column(size(gradient, "linf"), gradient)
    return scaled / column(size(scaled, "l2"), scaled)


def project(x: Tensor, centre: Tensor, eps: float, norm: str, low: Tensor, high: Tensor) -> Tensor:
    """Return `x` brought into the ball of radius `eps` around `centre`, and then between `low` and `high`.

    `centre` lies within the bounds, so that clipping to them only shrinks the perturbation.
    """
    delta = x - centre
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * (eps / column(size(delta, "l2"), delta)).clamp(max=1.0)
    return (centre + delta).clamp(low, high)


def random_within(x: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """Return perturbations drawn uniformly from the ball of radius `eps`, like `x`, by a CPU generator.

    They are drawn on the CPU, so that a seed means the same points on every device.
    """
    if norm == "linf":
        return (2 * torch.rand(x.shape, generator=generator, dtype=torch.float32) - 1).to(x) * eps
    direction = steepest(torch.randn(x.shape, generator=generator, dtype=torch.float32), "l2")
    radius = torch.rand(len(x), generator=generator, dtype=torch.float32) ** (1 / direction[0].numel() if len(x) else 1)
    return (direction * spread(radius, x)).to(x) * eps


def column(values: Tensor, like: Tensor) -> Tensor:
    """Shape `(B,)` divisors to broadcast over samples, with one in place of zero."""
    return spread(torch.where(values > 0, values, 1.0), like)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Shape values `(B,)` to broadcast over samples `(B, *S)`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
