"""Which images of a split are evaluated, and how a row says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from immunonet import data


def between(text: str) -> tuple[int, int]:
    """Read FROM:TO; ValueError for anything else."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ValueError(f"--slice must be FROM:TO, two numbers such as 0:1000, got {text!r}")
    return int(start), int(stop)


def chosen(n: int, count: int, part: tuple[int, int] | None) -> tuple[Tensor, dict[str, Any] | list[int], Tensor]:
    """Return the places of the images to evaluate on, what a row says about them, and the others in random order."""
    order = data.sample(n)
    if part is None:
        few = min(count, n)
        return order[:few], {"sample": [few, n], "seed": 0}, order[few:]
    start, stop = part
    if stop > n:
        raise ValueError(f"--slice must end at {n}, the number of images, or before, got {start}:{stop}")
    return torch.arange(start, stop), [start, stop], order[(order < start) | (order >= stop)]
