"""Nearest-neighbour search among the features of the repertoire at one layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from immunonet._estimates import told
from immunonet.immune import flocking

# Directions of a signature, and examples that they are fitted on.
DIRECTIONS, SAMPLE = 256, 2000
# Values of features in memory from which signatures are worth their search, if a quarter of the width holds all but
# this share of the sample's variance.
MANY_VALUES, LEFT_OUT = 2**27, 0.01
# What the length that a signature leaves out loses to float32, as a share of the features' norms.
LOSS = 2**-10
# Examples whose features are computed at once when all of them pass by.
ROWS = 500
# Values of the examples' features that are computed or read at once: near the size of a last-level cache.
CHUNK_VALUES = 2**22
# Examples of a class whose features are computed again to count those that are equally near.
COUNTED = 256

Rows = Callable[[Tensor], Tensor]
"""The features `(n, D)` of the repertoire's examples `(n,)`."""
Progress = Callable[[int, int], None]
"""Called with how many examples are done, and how many there are."""


class Kept(nn.Module):
    """Buffers that follow `.to(device)` but keep their dtype: a cast, such as `.bfloat16()`, is for the model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: t.to(fn(t[:0]).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def shares(self, n: int) -> list[tuple[Tensor, ExactIndex]]:
        """Return n indices of shares of the examples, with their numbers; ValueError where it cannot."""
        raise ValueError(
            "the search is in parts only where all features are kept in memory and no cells have joined: give more "
            "memory_budget, or harden(None) before"
        )


class Index(Protocol):
    """What every index answers."""

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""

    @property
    def centre(self) -> Tensor:
        """The point `(D,)` that distances are taken from: features less it are compared."""

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest of every class, `(B, C, k)`, or of all, `(B, k)`.

        Which of those that are exactly as near as the last are found says nothing: `within` counts them all.
        """

    def within(self, features: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many examples of every class lie within `radius` `(B,)`, and their least number, `(B, C)`.

        The number is N, that of all examples, where there is none.
        """

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`."""


class Signatures(Kept):
    """Projections of features on the principal directions of a sample, and the lengths of what they leave out.

    Distances of signatures are lower bounds of those of features, but for what float32 loses of the lengths (`LOSS`).
    """

    mean: Tensor
    directions: Tensor
    values: Tensor
    squares: Tensor

    def __init__(self, mean: Tensor, directions: Tensor) -> None:
        """Take the sample's mean `(D,)` and orthonormal directions `(D, p)`; the signatures come by `keep`."""
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("directions", directions, persistent=False)

    @classmethod
    def of(cls, sample: Tensor, most: int, left_out: float = 0.0) -> Signatures | None:
        """Return signatures on the principal directions of `sample` `(n, D)`, overwritten.

        At most `most` directions: as many as leave out no more than a share `left_out` of the variance; None where
        more would be needed. 0: just as many.
        """
        mean = sample.mean(0)
        sample -= mean
        variances, vectors = torch.linalg.eigh(sample @ sample.T)
        if left_out:
            held = variances.clamp(min=0).flip(0).cumsum(0)
            needed = int((held < (1 - left_out) * held[-1]).sum()) + 1
            if needed > most:
                return None
            most = min(most, needed)
        # Projections are lower bounds only on directions that are orthonormal, which those of small variance are not.
        return cls(mean, torch.linalg.qr(sample.T @ vectors[:, -most:])[0])

    def keep(self, values: Tensor) -> None:
        """Take the signatures of the examples `(N, p + 1)`."""
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("squares", values.square().sum(1), persistent=False)

    def sign(self, features: Tensor) -> Tensor:
        """Return the signatures `(n, p + 1)` of features `(n, D)`."""
        centred = features - self.mean
        projection = centred @ self.directions
        left = centred.square().sum(1, keepdim=True) - projection.square().sum(1, keepdim=True)
        return torch.cat([projection, left.clamp(min=0).sqrt()], dim=1)


class ExactIndex(Kept):
    """All features in memory, grouped by class and centred; the search is exact.

    Where many features lie near few directions, their signatures are searched first, and an answer stands if no
    signature that was passed over can be nearer; where one might be, all features are searched.
    """

    keys: Tensor
    squares: Tensor
    order: Tensor
    place: Tensor
    centre: Tensor

    def __init__(self, features: Tensor, order: Tensor, counts: list[int], centre: Tensor | None = None) -> None:
        """Take features `(N, D)`, overwritten, of examples `order` `(N,)`, by class; `counts` per class.

        With a `centre` `(D,)` they are those less it.
        """
        super().__init__()
        keys = features
        if centre is None:
            # Small norms keep the digits of small distances in the quadratic expansion.
            centre = _centre(features, order)
            keys = features.sub_(centre)
        self.counts = counts
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("squares", torch.linalg.vector_norm(keys, dim=1).square(), persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)
        self.register_buffer("centre", centre, persistent=False)
        self.signatures: Signatures | None = None
        if keys.numel() >= MANY_VALUES:
            self.signatures = Signatures.of(keys[_spread(len(keys))], keys.shape[1] // 4, LEFT_OUT)
        if self.signatures is not None:
            self.signatures.keep(torch.cat([self.signatures.sign(part) for part in keys.split(ROWS)]))

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""
        return self.keys.shape[1]

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest of every class, `(B, C, k)`, or of all, `(B, k)`."""
        # Autocast is for the model; the search needs every digit.
        with torch.autocast(features.device.type, enabled=False):
            counts = self.counts if by_class else [len(self.keys)]
            queries = features - self.centre
            if self.signatures is None:
                distances, index = flocking.flock(queries, self.keys, self.squares, counts, k)
            else:
                distances, index = self._screened(queries, self.signatures, counts, k)
        found = self.order[index]
        return (distances, found) if by_class else (distances[:, 0], found[:, 0])

    def within(self, features: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many examples of every class lie within `radius` `(B,)`, and their least number, `(B, C)`."""
        step = max(1, flocking.CHUNK_VALUES // len(self.keys))
        found = []
        with torch.autocast(features.device.type, enabled=False):
            for some, limit in zip((features - self.centre).split(step), radius.split(step), strict=True):
                inside = flocking.exact(some, self.keys) <= limit[:, None]
                numbers = torch.where(inside, self.order, len(self.order))
                found.append(_tally(numbers.split(self.counts, 1), len(self.order)))
        numbers_within, least = zip(*found, strict=True)
        return torch.cat(numbers_within), torch.cat(least)

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`."""
        return self.keys[self.place[examples]] + self.centre

    def shares(self, n: int) -> list[tuple[Tensor, ExactIndex]]:
        """Return n indices of its examples, each of every n-th of a class, with the numbers of their examples."""
        known = self.order.new_tensor(self.counts)
        classes = torch.repeat_interleave(known)
        turn = (torch.arange(len(classes), device=known.device) - (known.cumsum(0) - known)[classes]) % n
        found = []
        for i in range(n):
            places = (turn == i).nonzero()[:, 0]
            numbers = self.order[places].sort().values
            own = torch.searchsorted(numbers, self.order[places])
            counts: list[int] = torch.bincount(classes[places], minlength=len(self.counts)).tolist()
            found.append((numbers, ExactIndex(self.keys[places], own, counts, self.centre)))
        return found

    def _screened(self, queries: Tensor, signatures: Signatures, counts: list[int], k: int) -> tuple[Tensor, Tensor]:
        """Return what `flocking.flock` does, by signatures as far as they prove it."""
        own = signatures.sign(queries)
        norms = own.square().sum(1)
        distances, indices, start = [], [], 0
        for count in counts:
            part = slice(start, start + count)
            keys, squares = self.keys[part], self.squares[part]
            rough = torch.addmm(signatures.squares[part], own, signatures.values[part].T, alpha=-2)
            farthest, candidates = flocking.smallest(rough, min(count, 4 * k))
            near, index = flocking.rank(queries, keys, candidates, k)
            bound = (farthest[:, -1] + norms).clamp(min=0).sqrt() - LOSS * (norms + squares.max()).sqrt()
            unsure = (near[:, -1] > bound) & (candidates.shape[1] < count)
            if bool(unsure.any()):
                near[unsure], index[unsure] = flocking.nearest(queries[unsure], keys, squares, k)
            distances.append(near)
            indices.append(index + start)
            start += count
        return torch.stack(distances, 1), torch.stack(indices, 1)


class SignatureIndex(Kept):
    """Features too wide to keep: signatures find twice as many candidates as asked for; features rank them."""

    order: Tensor
    centre: Tensor

    def __init__(self, rows: Rows, order: Tensor, counts: list[int], *, on_progress: Progress | None = None) -> None:
        """Take the features by example, and the examples `order` `(N,)`, grouped by class; `counts` per class."""
        super().__init__()
        self._rows, self.counts = rows, counts
        # A sample of every class, whatever their order.
        ordered = torch.cat(sorted(order.split(counts), key=lambda group: int(group[0])))
        signatures = Signatures.of(computed(rows, ordered[_spread(len(order))]), DIRECTIONS)
        assert signatures is not None
        self.signatures = signatures
        signatures.keep(computed(lambda examples: signatures.sign(rows(examples)), order, on_progress))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("centre", torch.zeros_like(signatures.mean), persistent=False)

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""
        return len(self.signatures.directions)

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest found of every class, `(B, C, k)`, or of all, `(B, k)`."""
        counts = self.counts if by_class else [len(self.order)]
        candidates = self._candidates(features, counts, max(2 * k, k + flocking.SLACK))
        distances = self._distances(features, torch.cat(candidates, 1))
        near, found = [], []
        for part, examples in zip(distances.split([c.shape[1] for c in candidates], 1), candidates, strict=True):
            nearest, best = part.topk(k, dim=1, largest=False)
            near.append(nearest)
            found.append(examples.gather(1, best))
        return (torch.stack(near, 1), torch.stack(found, 1)) if by_class else (near[0], found[0])

    def within(self, features: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many examples of every class lie within `radius` `(B,)`, and their least number, `(B, C)`.

        Only the `COUNTED` of a class with the nearest signatures are looked at.
        """
        candidates = self._candidates(features, self.counts, COUNTED)
        inside = self._distances(features, torch.cat(candidates, 1)) <= radius[:, None]
        numbers = torch.where(inside, torch.cat(candidates, 1), len(self.order))
        return _tally(numbers.split([c.shape[1] for c in candidates], 1), len(self.order))

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`, computed or read now."""
        return self._rows(examples.flatten()).reshape(*examples.shape, -1)

    def _candidates(self, features: Tensor, counts: list[int], n: int) -> list[Tensor]:
        """Return the examples of the nearest signatures, at most n per group, `(B, <= n)` each."""
        with torch.autocast(features.device.type, enabled=False):
            own = self.signatures.sign(features)
            left = self.signatures.values[:, -1]
            # What projections leave out of two neighbours is about half alike, whatever its length in an antigen.
            own[:, -1] = 0
            squares = self.signatures.squares - left.square() / 2
            groups = zip(*(part.split(counts) for part in (self.order, self.signatures.values, squares)), strict=True)
            return [
                order[flocking.smallest(torch.addmm(squares, own, values.T, alpha=-2), min(n, len(order)))[1]]
                for order, values, squares in groups
            ]

    def _distances(self, features: Tensor, candidates: Tensor) -> Tensor:
        """Return the distances of `features` `(B, D)` to `candidates` `(B, m)`; each example is computed once."""
        out = features.new_empty(candidates.numel())
        examples, place = candidates.flatten().unique(return_inverse=True)
        pairs = iter(place.argsort().split(place.bincount(minlength=len(examples)).tolist()))
        for part in examples.split(max(1, CHUNK_VALUES // features.shape[1])):
            # An example at a time: its few differences stay in the cache. An empty batch has no examples.
            for row, own in zip(self._rows(part) if len(part) else (), pairs, strict=False):
                antigens = own // candidates.shape[1]
                out[own] = flocking.exact(features[antigens], row[None])[:, 0]
        return out.view_as(candidates)


def _spread(n: int) -> Tensor:
    """Return the places of a sample, spread evenly over n."""
    return torch.linspace(0, n - 1, min(SAMPLE, n)).long()


def _centre(features: Tensor, order: Tensor) -> Tensor:
    """Return a point `(D,)` near the mean of `features` `(N, D)`, whose examples have the numbers `order` `(N,)`.

    It has few binary digits, so that differences of whole numbers, say, stay exact, and equal distances equal; and it
    is the same whatever the order.
    """
    mean = torch.stack([features[some].sum(0) for some in order.argsort().split(ROWS)]).sum(0) / len(features)
    low, high = features.aminmax(dim=0)
    step = (high - low).log2().floor().sub(5).exp2()
    near = (mean / step).round() * step
    return torch.where(near.isfinite(), near, low)


def _tally(numbers: Sequence[Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Return how many of each class's `numbers` `(B, m)` are below n, and the least of them, `(B, C)`."""
    return torch.stack([(own < n).sum(1) for own in numbers], 1), torch.stack([own.amin(1) for own in numbers], 1)


def auto_budget() -> int:
    """Return a quarter of the machine's memory in bytes, or 2 GiB where that is not told."""
    if not hasattr(os, "sysconf"):  # Windows
        return 2**31
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def computed(rows: Rows, examples: Tensor, on_progress: Progress | None = None) -> Tensor:
    """Return the features of examples, computed about `ROWS` at a time, by their numbers, into one tensor."""
    places = examples.argsort()
    out: Tensor | None = None
    parts = list(batches(len(examples)))
    said = f"computing the features of {len(examples):,} examples", "they are more than memory_budget holds"
    for some in told(parts, len(parts), *said):
        found = rows(examples[places[some]])
        out = found.new_empty(len(examples), found.shape[1]) if out is None else out
        out[places[some]] = found
        if on_progress is not None:
            on_progress(some.stop, len(examples))
    assert out is not None
    return out


def batches(n: int) -> Iterator[slice]:
    """Yield the parts in which n examples are computed: `ROWS` at most, all of nearly one size.

    A network rounds by the size of a batch: a small last one would part equal examples.
    """
    count = math.ceil(n / ROWS)
    for i in range(count):
        yield slice(i * n // count, (i + 1) * n // count)
