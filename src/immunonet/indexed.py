"""Examples that stay where they are, in a Dataset or an array on disk, and are read by their index when needed."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from immunonet import _store, incoming
from immunonet._check import Bounds
from immunonet.incoming import LABEL_KEYS

# Examples by which a source is judged before all of it is read, and those that are read at once.
PROBES, ROWS = 100, 500


class Reader(Protocol):
    """What gives examples by their index. `name`: of the argument that it came as; `kind`: in words."""

    name: str
    kind: str

    def __len__(self) -> int: ...

    def read(self, places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return inputs `(n, *S)` as they are given, and their labels `(n,)` where they come with them.

        `places` in ascending order. ValueError or TypeError names the index of what cannot be read.
        """

    def labels(self) -> Tensor | None:
        """Return the labels of all examples `(N,)` where they are had without the inputs."""


class Origin:
    """Where N examples lie, and what each of them was when it was first read: it must be so ever after."""

    def __init__(self, reader: Reader, shape: Sequence[int], bounds: Bounds, digests: Tensor) -> None:
        """Take what reads examples of `shape` `(*S)`, and `digests` `(N,)` int64 of them, 0 where none is known yet."""
        self._reader, self._bounds, self.shape, self.digests = reader, bounds, tuple(shape), digests
        # Those that come with the inputs are compared with these, where they are known.
        self.labels: Tensor | None = None

    def __deepcopy__(self, _: Any) -> Origin:
        # Nothing of it changes but what is not known yet; what reads may be as large as all examples.
        return self

    def read(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return inputs `(n, *S)` float32 and, where they come with them, labels `(n,)` of examples `places` `(n,)`.

        ValueError or TypeError names the index of an example that cannot be taken, or is not what it was.
        """
        name = self._reader.name
        if (found := len(self._reader)) != len(self.digests):
            raise ValueError(f"{name} must stay as it was, {len(self.digests):,} examples, got {found:,}: fit again")
        # Files like to be read in order, and each example once.
        ordered, back = places.unique(return_inverse=True)
        if not len(ordered):
            return torch.zeros(0, *self.shape), None
        given, y = self._reader.read(ordered.tolist())
        if len(given) != len(ordered):
            raise ValueError(f"{name} must give an example per index, got {len(given)} for {len(ordered)}")
        x = self._checked(given.cpu(), ordered)
        self._compare(digests(x), ordered)
        if y is not None and self.labels is not None and bool((wrong := y != self.labels[ordered]).any()):
            raise ValueError(_changed(f"the label of {name}", int(ordered[wrong.nonzero()[0, 0]])))
        if len(ordered) == len(back) and bool((back.diff() > 0).all()):
            return x, y
        return x[back], None if y is None else y[back]

    def _checked(self, given: Tensor, places: Tensor) -> Tensor:
        name = self._reader.name
        if tuple(given.shape[1:]) != self.shape:
            raise ValueError(f"{name} must hold examples of shape {self.shape}, got {tuple(given.shape[1:])}")
        try:
            return incoming.inputs(name, given, bounds=self._bounds)
        except ValueError:
            for place, row in zip(places.tolist(), given, strict=True):
                incoming.inputs(f"{name}[{place}]", row[None], bounds=self._bounds)
            raise

    def _compare(self, now: Tensor, places: Tensor) -> None:
        before = self.digests[places]
        new = before == 0
        if bool((wrong := ~new & (before != now)).any()):
            raise ValueError(_changed(self._reader.name, int(places[wrong.nonzero()[0, 0]])))
        if bool(new.any()):
            self.digests[places] = now

    def labelled(self, places: Tensor) -> Tensor:
        """Return the labels `(n,)` of examples `places` `(n,)` whose labels come with the inputs."""
        found = self.read(places)[1]
        assert found is not None
        return found

    def record(self) -> dict[str, Any]:
        """Return what the source is, as JSON: its kind, how many examples of which shape, and a checksum of all."""
        known = {"examples": len(self.digests), "shape": list(self.shape), "sha256": _store.digest([self.complete()])}
        return {"kind": self._reader.kind, **known}

    def complete(self) -> Tensor:
        """Return the digests of all examples `(N,)`; those that were never read are read for it."""
        for part in (self.digests == 0).nonzero()[:, 0].split(ROWS):
            self.read(part)
        return self.digests


class Indexed:
    """Some of the examples of an origin, `(N, *S)` float32 in memory only while they are asked for.

    Like a tensor of them it has a `shape`, a length and rows: `[int]`, `[slice]` and `[places]`, `places` of any shape.
    """

    device = torch.device("cpu")

    def __init__(self, origin: Origin, places: Tensor) -> None:
        self.origin, self.places = origin, places

    @property
    def shape(self) -> tuple[int, ...]:
        """How many examples there are, and the shape of each."""
        return (len(self.places), *self.origin.shape)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: int | slice | Tensor) -> Tensor:
        places = self.places[which.cpu() if isinstance(which, Tensor) else which]
        return self.origin.read(places.flatten())[0].reshape(*places.shape, *self.origin.shape)

    def part(self, which: Tensor) -> Indexed:
        """Return some of the examples, none of which is read."""
        return Indexed(self.origin, self.places[which.cpu()])

    def checksum(self) -> str:
        """Return the digest of all of these examples and of their order."""
        return _store.digest([self.origin.complete()[self.places]])


def opened(x: Any, y: Any, *, bounds: Bounds) -> tuple[Indexed, Any]:
    """Return examples that are read when they are needed, and their labels, from what `fit` was given.

    `x`: an array or a tensor, with labels `y`, or a map-style Dataset of both. Labels that cannot be had without the
    inputs are read with them, in a pass of its own that checks all examples. ValueError or TypeError, which names the
    index, for what cannot be read by its index, or an input that is no number, out of bounds or of another shape.
    """
    labelled = incoming.holds_examples(x)
    if y is not None or not labelled:
        incoming.examples(x, y)  # which says what is missing, or too much
    reader = _reader("x", x)
    n = len(reader)
    if not n:
        raise ValueError("x must hold at least one example, got none")
    sample, _ = reader.read((few := _spread(n)).tolist())
    origin = Origin(reader, sample.shape[1:], bounds, torch.zeros(n, dtype=torch.int64))
    origin.read(few)
    incoming.inputs("x", sample, bounds=bounds, fitted=True)
    if labelled:
        found = reader.labels()
        if found is None:
            found = torch.cat([origin.labelled(part) for part in torch.arange(n).split(ROWS)])
        y = origin.labels = incoming.labels("y", found, n=n, own=True)
    return Indexed(origin, torch.arange(n)), y


def again(source: Any, known: Tensor, labels: Tensor, *, bounds: Bounds) -> Origin:
    """Return the origin of examples with digests `known` and `labels` `(N,)`; `source`: what `fit` took as `x`.

    ValueError, after a look at `PROBES` examples, where it holds others; all others are compared when they are read.
    """
    reader = _reader("source", source)
    if len(reader) != len(known):
        raise ValueError(f"source must be what this was fitted on, {len(known):,} examples, got {len(reader):,}")
    try:
        sample, _ = reader.read((few := _spread(len(known))).tolist())
        origin = Origin(reader, sample.shape[1:], bounds, known.cpu().clone())
        origin.labels = labels.cpu()
        origin.read(few)
    except ValueError as error:
        raise ValueError(f"source must be what this was fitted on, in the same order: {error}") from error
    return origin


def outgrows(x: Any, budget: int) -> bool:
    """Return whether float32 copies of all examples take more than `budget` bytes, and more than `x` takes in memory.

    False for what cannot be read by its index. What lies on disk, or is made when it is asked for, takes none.
    """
    if not _readable(x) or not len(x):
        return False
    if not incoming.holds_examples(x):
        copies = 4 * math.prod(x.shape)
        return copies > budget and (isinstance(x, np.memmap) or copies > x.nbytes)
    if isinstance(x, Sequence):
        return False
    one, _ = _Items("x", x).read([0])
    return 4 * len(x) * one.numel() > budget


def digests(x: Tensor) -> Tensor:
    """Return one number per row of `x` `(n, *S)`, `(n,)` int64, never 0: the first eight bytes of a sha256."""
    rows = x.contiguous().numpy().reshape(len(x), -1)
    found = [int.from_bytes(hashlib.sha256(row.data).digest()[:8], "little", signed=True) or 1 for row in rows]
    return torch.tensor(found, dtype=torch.int64)


def _spread(n: int) -> Tensor:
    """Return the places of a few of n examples, from the first to the last."""
    places: Tensor = torch.linspace(0, n - 1, min(PROBES, n), dtype=torch.float64).long().unique()
    return places


def _changed(what: str, place: int) -> str:
    return (
        f"{what}[{place}] is not what it was when it was first read: examples that stay in their source must not "
        "change. Leave out random transforms, fit again after a change, or keep the examples by keep='memory'"
    )


def _readable(x: Any) -> bool:
    """Return whether examples, or inputs alone, are had by their index."""
    if incoming.holds_examples(x):
        return incoming.has_index(x)
    # Sparse tensors tell no size.
    plain = incoming.is_array(x) and getattr(x, "layout", torch.strided) == torch.strided
    return plain and hasattr(x, "shape") and hasattr(x, "nbytes") and not hasattr(x, "columns")


def _reader(name: str, x: Any) -> Reader:
    if not _readable(x):
        raise TypeError(
            f"{name} must be had by its index where examples stay in their source: an array, or a Dataset with "
            f"__len__ and __getitem__, got {type(x).__name__}; of a DataLoader give the dataset, of a stream take the "
            "examples by keep='memory'"
        )
    return _Items(name, x) if incoming.holds_examples(x) else _Rows(name, x)


class _Rows:
    """Rows of an array, on disk or in memory."""

    def __init__(self, name: str, x: Any) -> None:
        self.name, self.kind, self._x = name, f"{type(x).__name__} of {x.dtype}", x

    def __len__(self) -> int:
        return len(self._x)

    def read(self, places: Sequence[int]) -> tuple[Tensor, None]:
        """Return the rows `(n, *S)`; they come without labels."""
        apart = places[-1] - places[0] + 1 != len(places)
        found = self._x[np.asarray(places) if apart else slice(places[0], places[-1] + 1)]
        x = incoming.tensor(self.name, found).clone()
        _release(self._x)
        return x, None

    def labels(self) -> None:
        """Return None: labels are given beside."""


class _Items:
    """Items of a map-style Dataset, several at a time where it can give them so."""

    def __init__(self, name: str, data: Any) -> None:
        self.name, self.kind, self._data = name, type(data).__name__, data

    def __len__(self) -> int:
        return len(self._data)

    def read(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the inputs `(n, *S)` and the labels `(n,)` of items; ValueError or TypeError names one that is odd."""
        xs, ys = [], []
        for place, item in self._items(places):
            where = f"{self.name}[{place}]"
            x, y = incoming.pair(self.name, where, item)
            # Copies: what gives them may use the same memory for the next.
            xs.append(incoming.tensor(f"the input of {where}", x).clone())
            ys.append(incoming.tensor(f"the label of {where}", y).clone())
            for what, rows in (("inputs", xs), ("labels", ys)):
                if rows[-1].shape != rows[0].shape:
                    raise ValueError(
                        f"the {what} of {self.name} must be of one size, got {tuple(rows[0].shape)} in "
                        f"{self.name}[{places[0]}] and {tuple(rows[-1].shape)} in {where}"
                    )
        return torch.stack(xs), torch.stack(ys)

    def _items(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        several = getattr(self._data, "__getitems__", None)
        try:
            found = None if several is None else several(list(places))
        except Exception as error:
            where = f"{self.name}[{places[0]}] to {self.name}[{places[-1]}]"
            raise ValueError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        if found is not None and len(found) != len(places):
            raise ValueError(f"{self.name} must give an item per index, got {len(found)} for {len(places)}")
        for i, place in enumerate(places):
            try:
                item = self._data[place] if found is None else found[i]
            except Exception as error:
                raise ValueError(f"{self.name}[{place}] cannot be read: {type(error).__name__}: {error}") from error
            yield place, item

    def labels(self) -> Tensor | None:
        """Return the labels of all items where they are a column that is read by itself, as those of Arrow are."""
        if not hasattr(self._data, "select_columns"):
            return None
        named = [key for key in LABEL_KEYS if key in self._data.column_names]
        if len(named) != 1:
            return None
        column, step = self._data.select_columns(named), 100 * ROWS
        try:
            parts = [column[start : start + step][named[0]] for start in range(0, len(column), step)]
        except Exception:  # a transform that wants the images, too
            return None
        return torch.cat([incoming.tensor(f"the labels of {self.name}", part) for part in parts])


def _release(x: Any) -> None:
    """Give pages of a mapped file back to the system: else they count as this process's memory once they were read."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    # What was written to a private copy would be lost.
    if advice is None or not isinstance(x, np.memmap) or x.mode == "c":
        return
    base: Any = x
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None:
        base.madvise(advice)
