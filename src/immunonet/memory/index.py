"""What look-ups need of a memory's entries, in RAM: signatures within a radius, found in two stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Directions that the first stage looks at, and how many standard deviations a byte of one spans either way.
COARSE, SPAN = 8, 4.0


class Lookup:
    """Signatures `(n, W)` as float16 with what answers need of their entries, and those within a radius of another one.

    Stage one holds the few directions of the largest `spread` `(W,)`, a byte each, and passes over what is farther than
    the radius in any of them, then in all of them together. Stage two measures what is left.
    """

    def __init__(self, spread: Array) -> None:
        self._chosen = np.argsort(-spread, kind="stable")[:COARSE]
        self._step = np.maximum(spread[self._chosen], 1e-12).astype(np.float32) * SPAN / 127
        self._coarse = np.zeros((len(self._chosen), 0), np.uint8)
        self._columns: dict[str, Array] = {}
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._coarse.nbytes + sum(values.nbytes for values in self._columns.values())

    def __getitem__(self, name: str) -> Array:
        """Return one column of the entries."""
        return self._columns[name][: self._n]

    def add(self, columns: Mapping[str, Array]) -> None:
        """Take entries, each column `(n, ...)`; "signature" is one of them."""
        columns = {**columns, "signature": half(columns["signature"])}
        start, n = self._n, len(columns["signature"])
        self._grow(columns, start + n)
        for name, values in columns.items():
            self._columns[name][start : start + n] = values
        self._coarse[:, start : start + n] = self._quantised(columns["signature"]).T
        self._n = start + n

    def within(self, signature: Array, radius: float) -> tuple[Array, Array]:
        """Return which entries lie nearer than `radius` to a signature `(W,)`, nearest first, and their distances."""
        signature = half(signature)
        low = self._quantised(signature - np.float32(radius))
        high = self._quantised(signature + np.float32(radius))
        near: Array | None = None
        for values, first, last in zip(self._coarse, low, high, strict=True):
            # Unsigned bytes wrap around below `first`, so that one comparison tells both ends.
            inside = values[: self._n] - first <= last - first
            near = inside if near is None else np.logical_and(near, inside, out=near)
        assert near is not None
        rows = self._unproved(np.flatnonzero(near), signature, radius)
        # float16 loses a digit in a thousand: what is measured is measured among what both would be stored as.
        difference = self["signature"][rows].astype(np.float32) - signature.astype(np.float32)
        distances = np.sqrt(np.einsum("ij,ij->i", difference, difference))
        inside = distances < radius
        rows, distances = rows[inside], distances[inside]
        order = np.argsort(distances, kind="stable")
        return rows[order], distances[order]

    def _unproved(self, rows: Array, signature: Array, radius: float) -> Array:
        """Return those of `rows` that the bytes do not prove to be farther than `radius`."""
        own = np.clip(signature[self._chosen].astype(np.float32) / self._step, -127, 127)[:, None] + 127
        # A byte is half a step off at most.
        least = np.maximum(np.abs(self._coarse[:, rows] - own) - 0.5, 0) * self._step[:, None]
        return np.asarray(rows[np.einsum("ij,ij->j", least, least) <= radius**2 * (1 + 1e-5)])

    def _quantised(self, signatures: Array) -> Array:
        """Return the chosen directions `(..., COARSE)` as bytes: order is kept, so that intervals are."""
        values = signatures[..., self._chosen].astype(np.float32) / self._step
        return (np.clip(np.rint(values), -127, 127) + 127).astype(np.uint8)

    def _grow(self, columns: Mapping[str, Array], n: int) -> None:
        """Make room for n entries, and for as many again where there are some."""
        held = self._coarse.shape[1]
        if n <= held and self._columns:
            return
        room = 2 * n if self._n else max(n, 64)
        for name, values in columns.items():
            old = self._columns.get(name, values[:0])
            self._columns[name] = np.zeros((room, *values.shape[1:]), values.dtype)
            self._columns[name][: self._n] = old[: self._n]
        coarse = np.zeros((len(self._chosen), room), np.uint8)
        coarse[:, : self._n] = self._coarse[:, : self._n]
        self._coarse = coarse


def half(signatures: Array) -> Array:
    """Return signatures as float16; what is beyond its range is as far as it goes."""
    most = float(np.finfo(np.float16).max)
    return np.clip(signatures, -most, most).astype(np.float16)
