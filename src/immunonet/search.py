"""Nearest-neighbour search among the features of the repertoire at one layer."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from immunonet import _store
from immunonet.immune import flocking

# Directions of a signature, and examples that they are fitted on.
DIRECTIONS, SAMPLE = 128, 2000
# Examples whose features are computed at once when all of them pass by.
ROWS = 500
# Values of the examples' features that are compared with the antigens' at once: near the size of a last-level cache.
PAIR_VALUES = 2**22
# Examples by which a feature file is recognised.
PROBES = 8

_log = logging.getLogger("immunonet")

Rows = Callable[[Tensor], Tensor]
"""The features `(n, D)` of the repertoire's examples `(n,)`."""
Progress = Callable[[int, int], None]
"""Called with how many examples are done, and how many there are."""


class Kept(nn.Module):
    """Buffers that follow `.to(device)` but keep their dtype: a cast, such as `.bfloat16()`, is for the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: t.to(fn(t[:0]).device), recurse)  # type: ignore[no-untyped-call]
        return self


class Index(Protocol):
    """What every index answers."""

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest of every class, `(B, C, k)`, or of all, `(B, k)`."""

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`."""


class ExactIndex(Kept):
    """All features in memory, grouped by class and centred; the search is exact."""

    keys: Tensor
    squares: Tensor
    order: Tensor
    place: Tensor
    centre: Tensor

    def __init__(self, features: Tensor, order: Tensor, counts: list[int]) -> None:
        """Take features `(N, D)`, overwritten, of examples `order` `(N,)`, by class; `counts` per class."""
        super().__init__()
        # Small norms keep the digits of small distances in the quadratic expansion.
        centre = features.mean(0)
        keys = features.sub_(centre)
        self.counts = counts
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("squares", torch.linalg.vector_norm(keys, dim=1).square(), persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)
        self.register_buffer("centre", centre, persistent=False)

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""
        return self.keys.shape[1]

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest of every class, `(B, C, k)`, or of all, `(B, k)`."""
        # Autocast is for the model; the search needs every digit.
        with torch.autocast(features.device.type, enabled=False):
            counts = self.counts if by_class else [len(self.keys)]
            distances, index = flocking.flock(features - self.centre, self.keys, self.squares, counts, k)
        found = self.order[index]
        return (distances, found) if by_class else (distances[:, 0], found[:, 0])

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`."""
        return self.keys[self.place[examples]] + self.centre


class SignatureIndex(Kept):
    """Features too wide to keep: short signatures find twice as many candidates as asked for; features rank them.

    A signature is a projection on the principal directions of a sample, and the length of what the projection
    leaves out; distances of signatures are lower bounds of those of features, to float precision.
    """

    mean: Tensor
    directions: Tensor
    signatures: Tensor
    squares: Tensor
    order: Tensor

    def __init__(self, rows: Rows, order: Tensor, counts: list[int], *, on_progress: Progress | None = None) -> None:
        """Take the features by example, and the examples `order` `(N,)`, grouped by class; `counts` per class."""
        super().__init__()
        self._rows, self.counts = rows, counts
        sample = computed(rows, order[torch.linspace(0, len(order) - 1, min(SAMPLE, len(order))).long()])
        mean = sample.mean(0)
        sample -= mean
        # Projections are lower bounds only on directions that are orthonormal, which those of small variance are not.
        directions = torch.linalg.qr(sample.T @ torch.linalg.eigh(sample @ sample.T)[1][:, -DIRECTIONS:])[0]
        del sample
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("directions", directions, persistent=False)
        parts = []
        for part in order.split(ROWS):
            parts.append(self._sign(rows(part)))
            if on_progress is not None:
                on_progress(sum(map(len, parts)), len(order))
        signatures = torch.cat(parts)
        self.register_buffer("signatures", signatures, persistent=False)
        self.register_buffer("squares", signatures.square().sum(1), persistent=False)
        self.register_buffer("order", order, persistent=False)

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""
        return len(self.directions)

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest found of every class, `(B, C, k)`, or of all, `(B, k)`."""
        counts = self.counts if by_class else [len(self.order)]
        candidates = self._candidates(features, counts, 2 * k)
        distances = self._distances(features, torch.cat(candidates, 1))
        near, found = [], []
        for part, examples in zip(distances.split([c.shape[1] for c in candidates], 1), candidates, strict=True):
            nearest, best = part.topk(k, dim=1, largest=False)
            near.append(nearest)
            found.append(examples.gather(1, best))
        return (torch.stack(near, 1), torch.stack(found, 1)) if by_class else (near[0], found[0])

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`, computed or read now."""
        return self._rows(examples.flatten()).reshape(*examples.shape, -1)

    def _candidates(self, features: Tensor, counts: list[int], n: int) -> list[Tensor]:
        """Return the examples of the nearest signatures, at most n per group, `(B, <= n)` each."""
        groups = zip(*(part.split(counts) for part in (self.order, self.signatures, self.squares)), strict=True)
        with torch.autocast(features.device.type, enabled=False):
            own = self._sign(features)
            return [
                order[flocking.nearest(own, signatures, squares, min(n, len(order)))[1]]
                for order, signatures, squares in groups
            ]

    def _distances(self, features: Tensor, candidates: Tensor) -> Tensor:
        """Return the distances of `features` `(B, D)` to `candidates` `(B, C, m)`; each example is computed once."""
        examples, place = candidates.flatten().unique(return_inverse=True)
        antigens = torch.arange(len(features), device=place.device).repeat_interleave(candidates.shape[1])
        grouped = place.argsort()
        counts = place.bincount()
        out = features.new_empty(len(place))
        step = max(1, PAIR_VALUES // features.shape[1])
        for part, sizes in zip(examples.split(step), counts.split(step), strict=True):
            pairs, grouped = grouped.tensor_split([int(sizes.sum())])
            rows = self._rows(part)
            first = int(place[pairs[0]])
            for some in pairs.split(step):
                out[some] = (rows[place[some] - first] - features[antigens[some]]).norm(dim=1)
        return out.view_as(candidates)

    def _sign(self, features: Tensor) -> Tensor:
        centred = features - self.mean
        projection = centred @ self.directions
        left = centred.square().sum(1, keepdim=True) - projection.square().sum(1, keepdim=True)
        return torch.cat([projection, left.clamp(min=0).sqrt()], dim=1)


class FeatureFile:
    """The features of all examples as float16 in a memory-mapped file, with a record beside it that is checked."""

    def __init__(self, path: str | Path, rows: Rows, n: int, *, on_progress: Progress | None = None) -> None:
        """Open the file, or write it from `rows` where there is none.

        Raises ValueError if the file is not of these examples and this model, was truncated, or float16 cannot
        hold the features; OSError, before anything is written, if the disk has too little room.
        """
        self._path = path = Path(path)
        probes = torch.linspace(0, n - 1, min(PROBES, n)).long()
        features = rows(probes).cpu()
        record = {"format": 1, "shape": [n, features.shape[1]], "dtype": "float16"}
        self._size = 2 * n * features.shape[1]
        beside = path.with_name(path.name + ".json")
        if not path.exists():
            self._write(rows, n, on_progress, beside, record)
        elif not beside.exists():
            raise ValueError(f"{path} has no {beside.name} beside it; delete it or give another path")
        elif _store.read_json(beside) != record:
            raise ValueError(f"{path} holds features of another repertoire or layer; delete it or give another path")
        self._check_size()
        self._values: np.ndarray[Any, np.dtype[np.float16]] = np.memmap(
            path, np.float16, "r", shape=(n, features.shape[1])
        )
        if not torch.allclose(self(probes), features, rtol=2e-2, atol=2e-3 * float(features.abs().max())):
            raise ValueError(
                f"{path} holds features of other examples or of a model with other weights; "
                "delete it or give another path"
            )

    def __call__(self, examples: Tensor) -> Tensor:
        """Return the features `(n, D)` of examples `(n,)`; ValueError if the file shrank."""
        self._check_size()
        return torch.from_numpy(self._values[examples.cpu().numpy()]).float().to(examples.device)

    def _check_size(self) -> None:
        # Reading past the end of a mapped file ends the process.
        if (found := self._path.stat().st_size) != self._size:
            raise ValueError(
                f"{self._path} was truncated: {found:,} bytes, {self._size:,} expected; delete it and fit again"
            )

    def _write(self, rows: Rows, n: int, on_progress: Progress | None, beside: Path, record: dict[str, Any]) -> None:
        path, size = self._path, self._size
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"{path} needs {size:,} bytes, more than the disk has left")
        _log.info("writing %s: %s bytes of features", path, f"{size:,}")
        with _store.replacing(path) as temporary, open(temporary, "wb") as file:
            for start in range(0, n, ROWS):
                half = rows(torch.arange(start, min(start + ROWS, n))).half()
                if not bool(torch.isfinite(half).all()):
                    raise ValueError(f"{path}: features are too large for float16; fit without a feature file")
                file.write(half.cpu().numpy().tobytes())
                if on_progress is not None:
                    on_progress(min(start + ROWS, n), n)
            # The record comes first, so that there is never a file without one.
            _store.write_json(beside, record)


def auto_budget() -> int:
    """Return a quarter of the machine's memory in bytes, or 2 GiB where that is not told."""
    if not hasattr(os, "sysconf"):  # Windows
        return 2**31
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def computed(rows: Rows, examples: Tensor, on_progress: Progress | None = None) -> Tensor:
    """Return the features of examples, computed `ROWS` at a time into one tensor."""
    first = rows(examples[:1])
    out = first.new_empty(len(examples), first.shape[1])
    for start in range(0, len(examples), ROWS):
        out[start : start + ROWS] = rows(examples[start : start + ROWS])
        if on_progress is not None:
            on_progress(min(start + ROWS, len(examples)), len(examples))
    return out
