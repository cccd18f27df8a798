"""Sensing: how foreign an antigen is, by the conformal rule on its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    """Return conformal p-values, the shape of `scores`: (how many calibration scores are >= the score, + 1) / (n + 1).

    `calibration` `(n,)` sorted ascending; a higher score is stranger (Papernot & McDaniel 2018, section 4).
    """
    below = torch.searchsorted(calibration, scores.contiguous(), side="left")
    return (len(calibration) - below + 1).float() / (len(calibration) + 1)


def nonconformity(neighbours: Tensor, classes: int) -> Tensor:
    """Return `(B, C)`: for every label, how many of the neighbours' labels `(B, k)` differ from it."""
    votes = torch.nn.functional.one_hot(neighbours, classes).sum(1)
    return neighbours.shape[1] - votes


def overall_nearest(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances and labels, each `(B, K)`, of the K nearest among the K nearest of every class `(B, C, K)`."""
    k = distances.shape[2]
    near, index = distances.flatten(1).topk(k, dim=1, largest=False)
    return near, index // k
