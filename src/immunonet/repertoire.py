"""The repertoire: the labelled training examples that cells come from, their features, and their calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from immunonet.immune import sensing
from immunonet.immune.flocking import flock


class Kept(nn.Module):
    """Buffers that follow `.to(device)` but keep their dtype: a cast, such as `.bfloat16()`, is for the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: t.to(fn(t[:0]).device), recurse)  # type: ignore[no-untyped-call]
        return self


class Index(Kept):
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
        # Autocast is for the model; the search needs every digit.
        with torch.autocast(features.device.type, enabled=False):
            distances, index = flock(features - self.centre, self.keys, self.squares, self.counts, k)
        return distances, self.order[index]


class Repertoire(Kept):
    """Training examples `x` `(N, *S)` and labels `y` `(N,)`, in the order they were given."""

    x: Tensor
    y: Tensor

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x, persistent=False)
        self.register_buffer("y", y, persistent=False)

    def __len__(self) -> int:
        return len(self.x)


class Calibration(Kept):
    """What sensing measures antigens by, from n calibration examples.

    `label_scores` `(n,)`, sorted: the nonconformity of their true labels. `strangeness` `(n,)`, sorted: their
    mean distances to the nearest repertoire examples, in units of `scales` `(L,)`, summed over layers.
    """

    label_scores: Tensor
    strangeness: Tensor
    scales: Tensor

    def __init__(self, label_scores: Tensor, strangeness: Tensor, scales: Tensor) -> None:
        super().__init__()
        for name, value in (("label_scores", label_scores), ("strangeness", strangeness), ("scales", scales)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of(cls, scores: Tensor, far: Tensor) -> Calibration:
        """Take the examples' nonconformity `(n,)` and their mean distances to the nearest `(n, L)`."""
        # Layers differ in scale; each counts in units of its own typical distance.
        scales = far.mean(0).clamp(min=1e-12)
        return cls(scores.float().sort().values, (far / scales).sum(1).sort().values, scales)

    def is_foreign(self, far: Tensor, false_alarm: float) -> Tensor:
        """Return whether `(B,)` mean distances `(B, L)` are stranger than all but `false_alarm` of calibration."""
        return sensing.p_values(self.strangeness, (far / self.scales).sum(1)).le(false_alarm)


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
        raise ValueError(
            f"calibration={fraction:g} holds out {n} of {len(y)} examples; at least 1 must be held out, and 1 kept"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return order[n:].sort().values, order[:n].sort().values


def check_classes(y: Tensor, classes: int, least: int) -> None:
    """Raise ValueError unless every class has at least `least` examples among the labels `y`."""
    counts = torch.bincount(y, minlength=classes).tolist()
    for label, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"y has no example of class {label} (those held out for calibration not counted); "
                f"each of the model's {classes} classes needs {least}"
            )
        if count < least:
            raise ValueError(
                f"neighbours={least} is more than the {count} examples of class {label} (those held out for "
                f"calibration not counted); use neighbours={max(1, min(counts))}"
            )
