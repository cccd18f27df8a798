"""`Memory`: what an immune system met, kept in a folder or in RAM, in versions."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from immunonet import _check, _looks, _store, incoming
from immunonet._imports import require
from immunonet.memory import entries, record
from immunonet.memory.backend import Backend, Version
from immunonet.memory.entries import Which
from immunonet.memory.folder import InFolder
from immunonet.memory.following import Following
from immunonet.memory.ram import InRam
from immunonet.memory.recall import Recalled, recalled
from immunonet.memory.space import Space
from immunonet.memory.writing import KEPT, Writing
from immunonet.response import ImmuneResponse

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure


class Memory:
    """Responses with the antigens that they answered, where those came from, and what was confirmed of them.

    It takes the space of its signatures, and its model, from the first RAILS that it is given to, and refuses others.
    Every change makes a version, which `rollback` brings back. Any number of threads and processes may read and write
    one folder; a call that changes something returns when that is written. At every 256th version small files are put
    together, and versions are dropped that are neither among the last 100 nor younger than one that has a name.

    Args:
        folder: where it lies, made where nothing is yet; None: in RAM, gone with the process.
        keep: "cells": antigens and their fittest cells; "signatures": neither, for privacy; None: as the folder's was
            made, else "cells".
        capacity: most entries; beyond it those that came first go, a twentieth of it at once, what was confirmed only
            where nothing else is left; None: no limit.
        cells: most plasma and most memory cells that are kept of an antigen; None: all of the response.
        credible: least credibility of an answer that is recalled though nobody confirmed it.
        refresh: seconds after which look-ups see what other processes wrote.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        keep: Literal["cells", "signatures"] | None = None,
        capacity: int | None = None,
        cells: int | None = 16,
        credible: float = 0.1,
        refresh: float = 1.0,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._keep = _check.choice("keep", keep, (None, "cells", "signatures"))
        self.capacity = None if capacity is None else _check.integer("capacity", capacity)
        self.cells = None if cells is None else _check.integer("cells", cells, least=0)
        self.credible = _check.number("credible", credible, least=0, most=1)
        self.refresh = _check.number("refresh", refresh, least=0)
        require("pyarrow" if folder is None else "lancedb", "memory")
        self._space: Space | None = None
        self._backend: Backend | None = None
        self._begin()
        if self.folder is not None:
            record.check_folder(self.folder)
            self._open()

    def _begin(self) -> None:
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._following = Following(credible=self.credible, refresh=self.refresh)
        self._writing = Writing(self._lock, self._following, self.capacity)

    # What it is.

    @property
    def keep(self) -> str:
        """What is kept of antigens: "cells" or "signatures"."""
        return self._keep or "cells"

    @property
    def space(self) -> Space | None:
        """The space of its signatures; None where it belongs to no model yet."""
        with self._lock:
            self._open()
            return self._space

    def bind(self, fingerprint: str, probes: Sequence[Tensor], make: Callable[[], Space]) -> Space:
        """Return the space of signatures for a model, made by `make` where the memory belongs to none yet.

        ValueError where it belongs to another: by its `fingerprint`, or by features of its `probes`.
        """
        with self._lock:
            self._open()
            if self._space is None:
                space, keep = make(), self.keep
                if self.folder is None:
                    self._space, self._backend = space, InRam(entries.schema(space))
                else:
                    record.create(self.folder, space, keep, lambda name: self._made(name, space))
                    self._open()
            assert self._space is not None
            self._space.check(fingerprint, probes, self.where)
            return self._space

    @property
    def where(self) -> str:
        """Where it lies, in words."""
        return "in RAM" if self.folder is None else str(self.folder)

    def __len__(self) -> int:
        with self._lock:
            return backend.count() if (backend := self._opened()) else 0

    def __repr__(self) -> str:
        return f"Memory({self.where}, {len(self):,} entries, version {self.version})"

    def _repr_html_(self) -> str:
        told = self.stats()
        lines = [("source", "entries", "confirmed", "contradicted")]
        for source, counts in told.get("sources", {}).items():
            lines.append((source, *(str(counts[name]) for name in lines[0][1:])))
        trusted = f"{told['trusted']:,} are trusted, {told['foreign']:,} looked foreign." if len(lines) > 1 else ""
        return _looks.markup(repr(self), lines, trusted)

    def plot(self) -> Figure:
        """Return a figure of how many entries it had over time, its named versions marked.

        Notebooks show it, `.savefig("memory.png")` writes it. Needs `immunonet[report]`.
        """
        # By name: reports are about memories, and imports point that way alone.
        figure: Figure = importlib.import_module("immunonet.report.memory").figure(self.versions())
        return figure

    @property
    def version(self) -> int:
        """The number of the latest version; 0 where it belongs to no model yet."""
        with self._lock:
            return backend.version() if (backend := self._opened()) else 0

    def versions(self) -> list[Version]:
        """Return the versions that can be brought back, oldest first."""
        with self._lock:
            return backend.versions() if (backend := self._opened()) else []

    def identity(self) -> list[Any]:
        """Return what answers from it depend on."""
        return [self.where, self.version, self.credible]

    # What changes it.

    def remember(
        self, response: ImmuneResponse, x: Any = None, *, source: str | Sequence[str] | None = None,
        note: str | None = None,
    ) -> list[str]:  # fmt: skip
        """Keep the response to antigens `x` `(B, *S)`, from one `source` or one each; return the ids of its B entries.

        Without a source it is the one that the response names, or "unknown".
        An antigen that was recalled gets no entry, and its id is that of the entry it was recalled from: no chain of
        near copies leads farther from what was met. Several threads' entries are written together.
        """
        said = response.source or "unknown" if source is None else source
        sources = entries.sources_of(said, len(response.labels))
        note = None if note is None else entries.text_of("note", note)
        x = None if x is None else incoming.tensor("x", x)
        entries.check_response(response, x)
        assert response.imprint is not None
        space = self._known_space()
        if response.imprint.fingerprint != space.fingerprint:
            raise ValueError(f"response is another model's than memory {self.where}: ask a RAILS(..., memory=memory)")
        if self.keep == "cells" and (x is None or tuple(x.shape[1:]) != space.shape):
            shape = ", ".join(map(str, space.shape))
            raise ValueError(f"x must hold the antigens, (B, {shape}), got {None if x is None else tuple(x.shape)}")
        kept = x if self.keep == "cells" else None
        rows = entries.written(response, kept, space, most=self.cells, sources=sources, note=note)
        ids: list[str] = rows["id"].to_pylist()
        new = [one is None for one in response.imprint.entries]
        if any(new):
            self._writing.add(self._required(), rows.filter(new))
        return [own if one is None else one for own, one in zip(ids, response.imprint.entries, strict=True)]

    def confirm(self, ids: str | Sequence[str], labels: Any) -> None:
        """Set what entries really are: `labels`, one for each of `ids`; a later confirmation replaces an earlier one.

        ValueError for ids that are not there, and for labels that are none, before anything is changed.
        """
        known = entries.ids_of("ids", ids)
        with self._lock:
            backend = self._required()
            assert self._space is not None
            given = entries.confirmed_of(labels, len(known), self._space.classes)
            self._check_ids(backend, known)
            if known:
                backend.confirm(dict(zip(known, given, strict=True)))
                self._following.changed()

    def forget(
        self,
        ids: str | Sequence[str] | None = None,
        *,
        source: str | None = None,
        since: Any = None,
        until: Any = None,
        erase: bool = False,
    ) -> int:
        """Remove the entries that all of what is given holds for, and return how many: of these `ids`, from a `source`
        or one below it ("site/camera" is below "site"), written at `since` or later, and before `until` (datetimes, or
        seconds since 1970).

        Older versions hold them until they are dropped; `erase` drops all of these at once, named ones too, and what
        files hold of entries that are gone, which takes seconds. ValueError where nothing is given, and for ids that
        are not there.
        """
        erase = _check.boolean("erase", erase)
        which = Which(
            ids=None if ids is None else entries.ids_of("ids", ids),
            source=source if source is None or isinstance(source, str) else entries.text_of("source", source),
            since=None if since is None else entries.moment_of("since", since),
            until=None if until is None else entries.moment_of("until", until),
        )
        if which == Which():
            raise ValueError("forget needs to be told what: ids, source, since or until")
        with self._lock:
            backend = self._required()
            if which.ids is not None:
                self._check_ids(backend, which.ids)
            n = backend.read(["id"], which).num_rows
            if n:
                backend.delete(which)
            if erase:
                backend.erase()
            self._following.changed()
            return int(n)

    def rollback(self, version: int | str) -> None:
        """Bring back what a version, by its number or name, held, as a new version; those between stay as well."""
        with self._lock:
            backend = self._required()
            backend.rollback(self._number(version))
            self._following.changed()

    def tag(self, name: str, version: int | str | None = None) -> None:
        """Name a version, the latest if none is given: it, and those after it, stay until `untag`."""
        name = entries.text_of("name", name)
        if not all(char.isascii() and (char.isalnum() or char in ".-_") for char in name):
            raise ValueError(f"name must be of ASCII letters, digits, '.', '-' and '_', got {name!r}")
        with self._lock:
            backend = self._required()
            backend.tag(name, self._number(version))

    def untag(self, name: str) -> None:
        """Take a version's name away."""
        with self._lock:
            backend = self._required()
            _check.among(name, self.tags(), "tag")
            backend.untag(name)

    def tags(self) -> dict[str, int]:
        """Return the named versions' numbers by their names."""
        return {name: one.number for one in self.versions() for name in one.names}

    def compact(self, keep: int = KEPT) -> None:
        """Put small files together, and drop versions before the last `keep` and the oldest that has a name."""
        keep = _check.integer("keep", keep)
        with self._lock:
            self._required().compact(keep)

    # What it tells.

    def recall(self, signatures: Tensor) -> Recalled:
        """Return answers to antigens by their signatures `(B, W)`: from trusted entries within the radius."""
        if not bool(torch.isfinite(signatures).all()):
            raise ValueError("signatures must be finite, got NaN or infinity: the model gave such features")
        with self._lock:
            space = self._known_space()
            return recalled(self._following.lookup(self._required(), space), signatures, space.radius)

    def stats(self) -> dict[str, Any]:
        """Return what it holds in numbers: entries, confirmed ones and those that contradict the answer, per source."""
        with self._lock:
            if (backend := self._opened()) is None:
                return {"entries": 0, "version": 0}
            assert self._space is not None
            held = backend.read(["source", "time", "label", "confirmed", "foreign", "credibility"])
            version = backend.version()
        confirmed, label = entries.column(held, "confirmed"), entries.column(held, "label")
        known = confirmed >= 0
        wrong = known & (confirmed != label)
        trusted = known | ((entries.column(held, "credibility") >= self.credible) & ~_bools(held, "foreign"))
        sources, source = np.unique(np.array(held["source"].to_pylist(), dtype=object), return_inverse=True)
        by_source = {
            part: np.bincount(source[mask], minlength=len(sources)) for part, mask in _counts(known, wrong).items()
        }
        times = sorted(held["time"].to_pylist())
        return {
            "entries": held.num_rows,
            "version": version,
            "keep": self.keep,
            "model": self._space.fingerprint,
            "radius": self._space.radius,
            "confirmed": int(known.sum()),
            "contradicted": int(wrong.sum()),
            "foreign": int(_bools(held, "foreign").sum()),
            "trusted": int(trusted.sum()),
            "first": times[0].isoformat() if times else None,
            "last": times[-1].isoformat() if times else None,
            "labels": np.bincount(np.where(known, confirmed, label), minlength=self._space.classes).tolist(),
            "sources": {
                name: {part: int(counts[i]) for part, counts in by_source.items()} for i, name in enumerate(sources)
            },
        }

    def columns(self, *names: str) -> pa.Table:
        """Return columns of all entries, of those in `entries.schema`; ValueError where it belongs to no model yet."""
        with self._lock:
            return self._required().read(names)

    def confirmed_cells(self) -> tuple[Tensor, Tensor]:
        """Return the kept cells `(M, *S')` of confirmed entries that carry the confirmed label, and it, `(M,)` int64.

        In the order in which the entries arrived; their antigens are not among the cells. ValueError where no cells are
        kept.
        """
        with self._lock:
            backend = self._required()
            assert self._space is not None
            if self.keep != "cells":
                raise ValueError(f"keep must be 'cells' for cells to be there, memory {self.where} has {self.keep!r}")
            shape, found = self._space.cell_shape, list[tuple[int, Tensor, int]]()
            for batch in backend.batches(entries.CARRIED, Which(confirmed=True)):
                found += entries.carried(batch, shape)
        found.sort(key=lambda one: one[0])
        return (
            torch.cat([torch.zeros(0, *shape), *(cells for _, cells, _ in found)]),
            torch.tensor([label for _, cells, label in found for _ in cells], dtype=torch.long),
        )

    def export(self, path: str | Path) -> int:
        """Write all entries to a Parquet file, whole or not at all, and return how many they are."""
        import pyarrow.parquet as pq

        with self._lock:
            backend = self._required()
            assert self._space is not None
            schema, n = entries.schema(self._space), 0
            with _store.replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
                for batch in backend.batches():
                    writer.write_batch(batch)
                    n += batch.num_rows
        return n

    # How it does that.

    def _open(self) -> None:
        """Take what the folder says of itself, if it does."""
        if self.folder is None or self._space is not None or (told := record.read(self.folder)) is None:
            return
        if self._keep is not None and self._keep != told.keep:
            raise ValueError(f"keep must be {told.keep!r}, as memory {self.folder} was made, got {self._keep!r}")
        self._backend = InFolder(self.folder, told.table)
        self._space, self._keep = told.space, told.keep

    def _made(self, name: str, space: Space) -> None:
        assert self.folder is not None
        InFolder(self.folder, name, entries.schema(space))

    def _opened(self) -> Backend | None:
        if self.folder is not None and self._pid != os.getpid():
            raise RuntimeError(
                f"memory {self.where} was opened before this process was forked, and LanceDB does not survive that: "
                "start processes by 'spawn', or open it in each"
            )
        self._open()
        return self._backend

    def _required(self) -> Backend:
        if (backend := self._opened()) is None:
            raise ValueError(f"memory {self.where} is empty and belongs to no model: remember() something first")
        return backend

    def _known_space(self) -> Space:
        # Once it is known it stays, so that writers who wait for each other need not wait for this as well.
        if self._space is None:
            with self._lock:
                self._required()
        assert self._space is not None
        return self._space

    def _check_ids(self, backend: Backend, ids: tuple[str, ...]) -> None:
        found = set(backend.read(["id"], Which(ids=ids))["id"].to_pylist())
        if gone := [one for one in ids if one not in found]:
            raise ValueError(
                f"ids must be of entries that are there, got {gone[0]!r}"
                + (f" and {len(gone) - 1} others" if gone[1:] else "")
                + ": forgotten, made room for others, or never remembered here"
            )

    def _number(self, version: int | str | None) -> int:
        """Return the number of a version that is there, given by it or by a name; None: the latest."""
        known = self.versions()
        if version is None:
            return known[-1].number
        if isinstance(version, str):
            _check.among(version, self.tags(), "tag")
            return self.tags()[version]
        number = _check.integer("version", version, least=0)
        numbers = [one.number for one in known]
        if number not in numbers:
            shown = ", ".join(map(str, numbers[:8])) + (" ... " + str(numbers[-1]) if numbers[8:] else "")
            raise ValueError(f"version {number} is not there: it never was, or was compacted away; there are {shown}")
        return number

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: a folder's opens it again, one in RAM has the same entries."""
        with self._lock:
            mine = ("folder", "_keep", "capacity", "cells", "credible", "refresh", "_space")
            state = {name: getattr(self, name) for name in mine}
            return state | {"_backend": self._backend if self.folder is None else None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
        if self.folder is not None:
            self._space = None
            self._open()


def _bools(table: Any, name: str) -> Any:
    return entries.column(table, name).astype(bool)


def _counts(known: Any, wrong: Any) -> dict[str, Any]:
    return {"entries": np.ones(len(known), bool), "confirmed": known, "contradicted": wrong}
