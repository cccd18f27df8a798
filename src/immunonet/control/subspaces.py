"""Linear manifolds of states: their mean and directions of largest variance, from any number of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Up to so many values of a state all directions are found, from their covariance.
EXACT = 3072
# Directions that a first look at wider states takes, beyond those wanted, and how often it is sharpened (Halko et al.
# 2011: power iterations).
_FIRST, _MORE, _POWERS = 64, 10, 2

States = Callable[[], Iterable[Tensor]]
"""The states `(n, D)` of all examples in batches, anew at every call."""


class Basis(NamedTuple):
    """The `mean` `(D,)` of states, orthonormal `directions` `(D, r)`, and the `share` of variance along them."""

    mean: Tensor
    directions: Tensor
    share: float


def basis(states: States, rank: float | int, *, seed: int = 0) -> Basis:
    """Return the principal directions of states, in float64 sums of any number of batches.

    `rank`: how many, an int of at least 1, or the share of variance (sum of squares) that they must hold, a float in
    (0, 1]. States of up to 3,072 values are solved exactly; of wider ones as many directions as it takes are found by
    randomised subspace iteration (Halko et al. 2011), a few passes each time. ValueError where there are fewer
    examples, or fewer values, than directions.
    """
    count, mean, total, gram = _moments(states)
    width = len(mean)
    most = min(count, width)
    if isinstance(rank, int) and rank > most:
        raise ValueError(f"rank must be at most {most} for {count} examples of {width} values, got {rank}")
    wanted = min(rank + _MORE if isinstance(rank, int) else _FIRST, most)
    while True:
        values, vectors = _leading(states, mean, wanted, seed) if gram is None else _whole(gram)
        held = values.clamp(min=0).cumsum(0) / max(total, 1e-300)
        kept = rank if isinstance(rank, int) else 1 + int((held < rank - 1e-12).sum())
        if kept <= len(values) or wanted >= most:
            kept = max(1, min(kept, len(values), most))
            return Basis(mean.float(), vectors[:, :kept].float().contiguous(), min(1.0, float(held[kept - 1])))
        wanted = min(2 * wanted, most)


def _moments(states: States) -> tuple[int, Tensor, float, Tensor | None]:
    """Return number, mean and sum of squares about it of states, and the matrix of these unless they are too wide."""
    count, squares = 0, 0.0
    # About a state, not about 0: no large numbers are subtracted.
    origin = total = gram = torch.zeros(0, dtype=torch.float64)
    for part in states():
        rows = part.double()
        if not count:
            origin, total = rows[0], torch.zeros_like(rows[0])
            gram = rows.new_zeros(len(origin), len(origin)) if len(origin) <= EXACT else gram
        rows = rows - origin
        count, total, squares = count + len(rows), total + rows.sum(0), squares + float(rows.square().sum())
        if len(gram):
            gram.addmm_(rows.T, rows)
    if not count:
        raise ValueError("states must hold at least one example, got none")
    mean = total / count
    squares -= count * float(mean.square().sum())
    return count, origin + mean, squares, gram - count * torch.outer(mean, mean) if len(gram) else None


def _whole(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of squares along all directions, largest first, and the directions."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def _leading(states: States, mean: Tensor, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the same of the leading directions alone."""
    start = torch.randn(len(mean), wanted, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = torch.linalg.qr(start.to(mean))[0]
    for _ in range(1 + _POWERS):
        image = torch.zeros_like(directions)
        for part in states():
            centred = part.double() - mean
            image.addmm_(centred.T, centred @ directions)
        directions = torch.linalg.qr(image)[0]
    small = mean.new_zeros(wanted, wanted)
    for part in states():
        inside = (part.double() - mean) @ directions
        small.addmm_(inside.T, inside)
    values, turn = torch.linalg.eigh(small)
    return values.flip(0), directions @ turn.flip(1)
