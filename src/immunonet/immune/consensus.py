"""Consensus: the plasma cells vote, and what decides where votes are even."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from immunonet.immune import noise

# Shares that differ by less are even: sums over layers are rounded.
EVEN = 1e-6
# Of the logs of two probabilities, as a share of them: four units in the last place, more than a softmax loses.
GAP = 2.0**-21

Settle = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Scores `(R, C)`, the first the more telling, for rows `(R,)` whose labels `(R, C)` are even in all else."""


def cut(distances: Tensor, n: int) -> Tensor:
    """Return the distance `(B, 1)` of the n-th nearest of all cells, `distances` `(B, C, P)`."""
    return distances.flatten(1).topk(n, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)


def counted(distances: Tensor, n: int) -> Tensor:
    """Return how many `(B, C)` of the n nearest of all cells, `distances` `(B, C, P)`, each class has, as `shared`."""
    edge = cut(distances, n)[:, None]
    return shared((distances < edge).sum(2), (distances == edge).sum(2), n)


def shared(nearer: Tensor, level: Tensor, n: int) -> Tensor:
    """Return how many of the n nearest each class has, `(B, C)` float32: a share of those that are equally near.

    `nearer` `(B, C)` are strictly nearer than the n-th, fewer than n in all; `level` are exactly as near as it, and
    each of them counts alike in the places that are left.
    """
    left, all_level = n - nearer.sum(1, keepdim=True), level.sum(1, keepdim=True)
    # One rounding: whole numbers stay whole.
    return (nearer * all_level + left * level).float() / all_level.float()


def consensus(distances: Tensor, n: int) -> Tensor:
    """Return the share `(B, C)` of each class among the n fittest of all cells, `distances` `(B, C, P)`."""
    return counted(distances, n) / n


def winner(votes: Tensor, best: Tensor, settle: Settle) -> Tensor:
    """Return labels `(B,)` of the most votes `(B, C)`; a tie goes to the class with the fittest cell, then by `settle`.

    `best` `(B, C)`: the affinity of each class's fittest cell. `settle` is only asked about the rows that need it.
    """
    leading = _leading(votes >= votes.amax(1, keepdim=True) - EVEN, best)
    rows = (leading.sum(1) > 1).nonzero()[:, 0]
    if len(rows):
        some = leading[rows]
        for scores in settle(rows, some):
            some = _leading(some, scores)
        leading[rows] = some
    return leading.int().argmax(1)


def _leading(among: Tensor, scores: Tensor) -> Tensor:
    """Return which labels `(B, C)` have the highest score of those, `among`, that are left."""
    least = scores.amin(1, keepdim=True)
    return among & (scores == torch.where(among, scores, least).amax(1, keepdim=True))


def lots(numbers: Tensor) -> Tensor:
    """Return the lot of each number below 2^32, int64: a hash, so that numbers that differ never draw the same."""
    x = (numbers * noise.GOLDEN) & noise.MASK
    x = ((x ^ (x >> 16)) * noise.FIRST) & noise.MASK
    x = ((x ^ (x >> 15)) * noise.SECOND) & noise.MASK
    return x ^ (x >> 16)


def decided(logs: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities `(B, C)` whose argmax are `labels` `(B,)`, before and after a log-softmax.

    Rows whose label leads by less than float32 can keep are changed, by about a millionth, and sum to 1 as before.
    """
    chosen = labels[:, None]
    own = logs.gather(1, chosen)
    others = logs.scatter(1, chosen, -torch.inf).amax(1, keepdim=True)
    raised = torch.maximum(own, others * (1 - GAP))
    # Exactly 0 where nothing was raised.
    return logs.scatter(1, chosen, raised) - (raised.exp() - own.exp()).log1p()


def entropy(votes: Tensor) -> Tensor:
    """Return the entropy of votes `(..., C)` over labels, in nats."""
    return -torch.xlogy(votes, votes).sum(-1)
