"""Look-ups in what a store holds, which follow what this process and others write."""

from __future__ import annotations

import time
from typing import Any

from immunonet.memory import entries
from immunonet.memory.backend import Backend
from immunonet.memory.index import Lookup
from immunonet.memory.recall import columns_of
from immunonet.memory.space import Space


class Following:
    """A `Lookup` of a store's entries, no older than `refresh` seconds; one thread at a time.

    `credible`: least credibility of an answer that is recalled though nobody confirmed it.
    """

    def __init__(self, *, credible: float, refresh: float) -> None:
        self._credible, self._refresh = credible, refresh
        self._lookup: Lookup | None = None
        self._seen, self._next, self._looked = 0, 0, 0.0
        # Additions of our own since it last followed; None: also other changes.
        self._own: int | None = None

    def changed(self) -> None:
        """Note that something but an addition was changed here."""
        self._own, self._looked = None, 0.0

    def added(self) -> None:
        """Note an addition of our own."""
        self._own, self._looked = None if self._own is None else self._own + 1, 0.0

    def lookup(self, backend: Backend, space: Space) -> Lookup:
        """Return what look-ups search, as new as the store, or as `refresh` allows."""
        moment = time.monotonic()
        if self._lookup is not None and moment - self._looked < self._refresh and self._looked:
            return self._lookup
        version = backend.version()
        if self._lookup is None:
            self._lookup = self._anew(backend, space)
        elif version != self._seen:
            ours = self._own is not None and version == self._seen + self._own
            if not ((ours or backend.grown(self._seen)) and self._grown(self._lookup, backend)):
                self._lookup = self._anew(backend, space)
        self._seen, self._own, self._looked = version, 0, moment
        return self._lookup

    def _grown(self, lookup: Lookup, backend: Backend) -> bool:
        """Take what was added; return whether that is all that is new."""
        new = backend.read([*entries.HOT, "_rowid"], first=self._next)
        if len(lookup) + new.num_rows != backend.count():
            return False
        self._take(lookup, new)
        return True

    def _anew(self, backend: Backend, space: Space) -> Lookup:
        lookup, self._next = Lookup(space.spread.numpy()), 0
        self._take(lookup, backend.read([*entries.HOT, "_rowid"]))
        return lookup

    def _take(self, lookup: Lookup, rows: Any) -> None:
        hot = {name: entries.column(rows, name) for name in entries.HOT}
        lookup.add(columns_of(hot, self._credible))
        if rows.num_rows:
            self._next = max(self._next, int(entries.column(rows, "_rowid").max()) + 1)
