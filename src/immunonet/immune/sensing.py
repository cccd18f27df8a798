"""Sensing: how foreign an antigen is, by the conformal rule on its neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from immunonet.immune.consensus import counted


def p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    """Return conformal p-values, the shape of `scores`: (how many calibration scores are >= the score, + 1) / (n + 1).

    `calibration` `(n,)` sorted ascending; a higher score is stranger (Papernot & McDaniel 2018, section 4).
    """
    below = torch.searchsorted(calibration, scores.contiguous(), side="left")
    return (len(calibration) - below + 1).float() / (len(calibration) + 1)


def tolerated(calibration: Tensor, level: float) -> float:
    """Return the highest score whose p-value is above `level`, in [0, 1], among `calibration` `(n,)`, sorted ascending.

    Infinity where every score has a higher p-value, minus infinity where none has.
    """
    # The p-value of the m-th largest calibration score is (m + 1) / (n + 1), the first above the level.
    rank = math.floor(level * (len(calibration) + 1))
    return float(calibration[-rank]) if 0 < rank <= len(calibration) else (-1 if rank else 1) * math.inf


def nonconformity(distances: Tensor) -> Tensor:
    """Return `(B, C)`: for every label, how many of the K nearest carry another.

    `distances` `(B, C, K)`: of each class's K nearest. Those that are exactly as near as the K-th of all share the
    places that those nearer leave.
    """
    k = distances.shape[2]
    return k - counted(distances, k)


def remoteness(distances: Tensor) -> Tensor:
    """Return the mean distance `(B,)` to the K nearest, from `distances` `(B, C, K)` to each class's K nearest."""
    return distances.flatten(1).topk(distances.shape[2], dim=1, largest=False).values.mean(1)
