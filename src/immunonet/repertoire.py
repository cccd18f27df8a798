"""The repertoire: the labelled training examples that cells come from, and their features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from immunonet.immune.flocking import flock


class Index(nn.Module):
    """Features of the examples at one layer, in groups, for exact nearest-neighbour search within each."""

    keys: Tensor
    squares: Tensor
    order: Tensor
    centre: Tensor

    def __init__(self, features: Tensor, order: Tensor, counts: list[int]) -> None:
        """Take the features `(N, D)`, overwritten, of examples `order` `(N,)`; `counts` are the groups' sizes."""
        super().__init__()
        # Small norms keep the digits of small distances in the quadratic expansion.
        centre = features.mean(0)
        keys = features.sub_(centre)
        self.counts = counts
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("squares", torch.linalg.vector_norm(keys, dim=1).square(), persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("centre", centre, persistent=False)

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return Euclidean distances and example indices, each `(B, groups, k)`, of the k nearest of every group."""
        distances, index = flock(features - self.centre, self.keys, self.squares, self.counts, k)
        return distances, self.order[index]


class Repertoire(nn.Module):
    """Training examples `x` `(N, *S)` and labels `y` `(N,)`, in the order they were given."""

    x: Tensor
    y: Tensor

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x, persistent=False)
        self.register_buffer("y", y, persistent=False)

    def __len__(self) -> int:
        return len(self.x)


def gather(x: Any, y: Any = None) -> tuple[Any, Any]:
    """Return inputs and labels from tensors or arrays, or from a Dataset or DataLoader of `(x, y)` as `x` alone."""
    if not isinstance(x, DataLoader | Dataset):
        if y is None:
            raise TypeError("y is missing: give labels, or a Dataset or DataLoader of (x, y) as x")
        return x, y
    if y is not None:
        raise TypeError(f"y must be left out when x is a {type(x).__name__}, which holds the labels")
    loader = x if isinstance(x, DataLoader) else DataLoader(x, batch_size=512)
    xs, ys = [], []
    for batch in loader:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TypeError(f"x must yield pairs (x, y), got {type(batch).__name__}")
        xs.append(torch.as_tensor(batch[0]))
        ys.append(torch.as_tensor(batch[1]))
    if not xs:
        raise ValueError("x is empty: a repertoire needs examples of every class")
    return torch.cat(xs), torch.cat(ys)


def hold_out(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of examples to keep and to hold out, each sorted: a random `fraction`, the same for a seed."""
    n = round(fraction * len(y))
    if not 0 < n < len(y):
        raise ValueError(f"calibration={fraction:g} of {len(y)} examples leaves {n} to calibrate on; need 1 or more")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return order[n:].sort().values, order[:n].sort().values


def check_classes(y: Tensor, classes: int, least: int) -> None:
    """Raise ValueError unless every class has at least `least` examples among the labels `y`."""
    counts = torch.bincount(y, minlength=classes).tolist()
    for label, count in enumerate(counts):
        if count == 0:
            raise ValueError(f"y has no example of class {label}; each of the model's {classes} classes needs {least}")
        if count < least:
            raise ValueError(
                f"neighbours={least} is more than the {count} examples of class {label}; use neighbours={min(counts)}"
            )
