"""An index to which a few examples are added, without being built again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from immunonet.features.search import Index, Kept
from immunonet.immune import flocking


class GrownIndex(Kept):
    """A sealed index of N examples, and M that joined them, numbered from N on: all of these are looked at.

    Distances of both are rounded alike, so that which is nearer does not depend on where it lies.
    """

    keys: Tensor
    squares: Tensor
    order: Tensor
    place: Tensor

    def __init__(self, sealed: Index, examples: int, features: Tensor, labels: Tensor, classes: int) -> None:
        """Take an index of so many examples, and the features `(M, D)` and labels `(M,)` of those that join them."""
        super().__init__()
        self.sealed, self.examples = sealed, examples
        order = labels.argsort(stable=True)
        keys = features[order] - sealed.centre
        self.counts: list[int] = torch.bincount(labels, minlength=classes).tolist()
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("squares", torch.linalg.vector_norm(keys, dim=1).square(), persistent=False)
        self.register_buffer("order", order + examples, persistent=False)
        self.register_buffer("place", order.argsort(), persistent=False)

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""
        return self.sealed.width

    @property
    def centre(self) -> Tensor:
        """The point `(D,)` that distances are taken from."""
        return self.sealed.centre

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest of every class, `(B, C, k)`, or of all, `(B, k)`."""
        distances, found = self.sealed.nearest(features, k, by_class=by_class)
        with torch.autocast(features.device.type, enabled=False):
            queries = features - self.centre
            if not by_class:
                return self._merged(queries, slice(None), distances, found)
            ends = [0, *np.cumsum(self.counts).tolist()]
            parts = [
                self._merged(queries, slice(ends[c], ends[c + 1]), distances[:, c], found[:, c])
                for c in range(len(self.counts))
            ]
        return torch.stack([near for near, _ in parts], 1), torch.stack([one for _, one in parts], 1)

    def within(self, features: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many examples of every class lie within `radius` `(B,)`, and their least number, `(B, C)`."""
        inside, least = self.sealed.within(features, radius)
        everything = self.examples + len(self.order)
        with torch.autocast(features.device.type, enabled=False):
            near = flocking.exact(features - self.centre, self.keys) <= radius[:, None]
        numbers = torch.where(near, self.order, everything).split(self.counts, 1)
        first = least.masked_fill(inside == 0, everything).split(1, 1)
        joined = [torch.cat(pair, 1).amin(1) for pair in zip(first, numbers, strict=True)]
        return inside + torch.stack([(own < everything).sum(1) for own in numbers], 1), torch.stack(joined, 1)

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`."""
        out = self.keys.new_empty(*examples.shape, self.width)
        old = examples < self.examples
        if bool(old.any()):
            out[old] = self.sealed.rows(examples[old])
        out[~old] = self.keys[self.place[examples[~old] - self.examples]] + self.centre
        return out

    def _merged(self, queries: Tensor, part: slice, distances: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k nearest among those found `(B, k)` and a part of those that joined; of equals, the former."""
        keys, k = self.keys[part], found.shape[1]
        if not len(keys):
            return distances, found
        near, index = flocking.nearest(queries, keys, self.squares[part], min(k, len(keys)))
        every, order = torch.cat([distances, near], 1).sort(dim=1, stable=True)
        return every[:, :k], torch.cat([found, self.order[part][index]], 1).gather(1, order[:, :k])
