"""Consensus: the plasma cells vote."""

from __future__ import annotations

import torch
from torch import Tensor


def consensus(labels: Tensor, classes: int) -> Tensor:
    """Return the share `(B, C)` of each label among the plasma cells' labels `(B, n)`."""
    return torch.nn.functional.one_hot(labels, classes).float().mean(1)


def winner(votes: Tensor, best: Tensor) -> Tensor:
    """Return labels `(B,)` of the most votes `(B, C)`; a tie goes to the class with the fittest cell.

    `best` `(B, C)`: the affinity of each class's fittest cell.
    """
    tied = votes >= votes.amax(1, keepdim=True) - 1e-6
    return best.masked_fill(~tied, -torch.inf).argmax(1)


def entropy(votes: Tensor) -> Tensor:
    """Return the entropy of votes `(..., C)` over labels, in nats."""
    return -torch.xlogy(votes, votes).sum(-1)
