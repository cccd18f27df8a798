"""Additions to a store: those of threads that wait for each other in one version, in the order of their arrival."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import numpy as np

from immunonet.memory import entries
from immunonet.memory.backend import Backend
from immunonet.memory.entries import Which
from immunonet.memory.following import Following

# Versions between two compactions, and how many without a name one leaves.
COMPACTED, KEPT = 256, 100
# Where a memory is full, so large a share of it goes at once.
GOING = 20


class Writing:
    """Additions, any number of threads at once, and room for them: `capacity` entries, or None for no limit.

    `lock` is held while a store is written to, of which look-ups `following` it are told.
    """

    def __init__(self, lock: threading.RLock, following: Following, capacity: int | None) -> None:
        self._lock, self._following, self._capacity = lock, following, capacity
        self._queue, self._place = threading.Lock(), -1
        self.waiting: list[_Addition] = []

    def add(self, backend: Backend, rows: Any) -> None:
        """Add rows, with those that other threads wait to add, in one version."""
        own = _Addition(rows)
        with self._queue:
            self.waiting.append(own)
        with self._lock:
            if not own.done:
                with self._queue:
                    group, self.waiting = self.waiting, []
                try:
                    self._append(backend, [one.rows for one in group])
                except BaseException as error:
                    for one in group:
                        one.error = error
                finally:
                    for one in group:
                        one.done = True
        if own.error is not None:
            raise own.error

    def _append(self, backend: Backend, tables: list[Any]) -> None:
        import pyarrow as pa

        rows = pa.concat_tables(tables)
        if self._place < 0 and backend.count():
            self._place = int(entries.column(backend.read(["place"]), "place").max())
        # By the clock, but never backwards: entries stand in the order of their arrival.
        first = max(self._place + 1, time.time_ns() // 1000)
        self._place = first + rows.num_rows - 1
        places = pa.array(np.arange(first, self._place + 1))
        backend.append(rows.set_column(rows.schema.get_field_index("place"), "place", places))
        self._following.added()
        if self._capacity is not None and backend.count() > self._capacity:
            self._make_room(backend, self._capacity)
        if backend.version() % COMPACTED == 0:
            # What was written stands; another process may be at the same.
            with contextlib.suppress(OSError):
                backend.compact(KEPT)

    def _make_room(self, backend: Backend, capacity: int) -> None:
        """Remove what goes first until there is room again."""
        held = backend.read(["place", "confirmed"])
        places, known = entries.column(held, "place"), entries.column(held, "confirmed") >= 0
        over = len(places) - capacity
        going = max(over, capacity // GOING)
        free = np.sort(places[~known])
        if len(free):
            backend.delete(Which(arrived=int(free[min(going, len(free)) - 1]), confirmed=False))
        if over > len(free):
            backend.delete(Which(arrived=int(np.sort(places[known])[over - len(free) - 1])))
        self._following.changed()


class _Addition:
    """Rows that a thread waits to have written."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.done = rows, False
        self.error: BaseException | None = None
