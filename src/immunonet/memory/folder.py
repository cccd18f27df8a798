"""Rows in a folder, by LanceDB: any number of processes read and write, and what was written outlives them."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunonet.memory.backend import SOME, Version
from immunonet.memory.entries import Which, ids_by_label, quoted

if TYPE_CHECKING:
    import pyarrow as pa

# How often a change is tried again that another process came before.
TRIES = 50
# An age that no version has, and how much older than what stays a version must be to be dropped.
NEVER, MARGIN = timedelta(days=36500), timedelta(seconds=1)


class InFolder:
    """A `Backend` on disk. A change is there, whole, when its method returns; who dies in one leaves no half of it.

    Additions of several processes never stand in each other's way. Other changes are made again where another process
    came before.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema | None = None) -> None:
        """Open the table of that name, or make it, if there is none, where a schema is given."""
        # It tells its log, on stderr, of compactions that another process came before.
        os.environ.setdefault("LANCE_LOG", "error")
        import lancedb

        self._folder = folder
        with self._told("opened" if schema is None else "written"):
            base = lancedb.connect(folder)
            self._table = base.open_table(name) if schema is None else _made(base, name, schema)

    def append(self, rows: pa.Table) -> None:
        """Add rows."""
        self._change(lambda: self._table.add(rows))

    def confirm(self, labels: Mapping[str, int]) -> None:
        """Set the confirmed labels of entries, by their ids, in one version."""
        # Lance knows no CASE: a sum of labels, each times whether it is the entry's.
        parts = [f"{label} * CAST(id IN ({', '.join(map(quoted, ids))}) AS INT)" for label, ids in ids_by_label(labels)]
        where, value = Which(ids=tuple(labels)).sql(), " + ".join(parts)
        self._change(lambda: self._table.update(where=where, values_sql={"confirmed": value}))

    def delete(self, which: Which) -> None:
        """Remove entries."""
        self._change(lambda: self._table.delete(which.sql()))

    def version(self) -> int:
        """Return the number of the latest version, also where another process made it."""
        with self._told("read"):
            return int(self._latest().version)

    def versions(self) -> list[Version]:
        """Return the versions that can be brought back, oldest first."""
        with self._told("read"):
            table, names = self._latest(), self._names()
            return [
                Version(
                    number=one["version"],
                    time=one["timestamp"].astimezone(UTC),
                    entries=int(one["metadata"]["total_rows"]),
                    names=tuple(name for name, number in names.items() if number == one["version"]),
                )
                for one in sorted(table.list_versions(), key=lambda one: one["version"])
            ]

    def rollback(self, number: int) -> None:
        """Make a version that holds what an older one, which is there, holds."""
        self._change(lambda: self._table.restore(number))

    def tag(self, name: str, number: int) -> None:
        """Name a version; a named one stays."""
        with self._told("written"):
            if name in self._names():
                self._table.tags.update(name, number)
            else:
                self._table.tags.create(name, number)

    def untag(self, name: str) -> None:
        """Take a name away."""
        with self._told("written"):
            self._table.tags.delete(name)

    def compact(self, keep: int) -> None:
        """Put small files together, and drop versions before the last `keep` and the oldest that has a name."""
        with self._told("compacted"):
            # Lance drops by age, counted when it is done with the files: by a second call, which finds nothing to do.
            self._latest().optimize(cleanup_older_than=NEVER)
            known = self.versions()
            stay = [*known[-keep:], *(one for one in known if one.names)]
            age = datetime.now(UTC) - min(one.time for one in stay) + MARGIN
            if age > MARGIN:
                self._latest().optimize(cleanup_older_than=age)

    def erase(self) -> None:
        """Drop all older versions, named ones too, and whatever files hold of entries that are gone.

        Files where few rows are gone are never written again by themselves: all rows are. OSError where others write
        so much meanwhile that older versions are still in use.
        """
        for _ in range(TRIES):
            for name in self._names():
                self.untag(name)
            # Versions younger than this are not told from the latest by age.
            time.sleep(1.1 * MARGIN.total_seconds())
            before = self.version()
            self._change(lambda: self._table.update(where="true", values_sql={"place": "place"}))
            self.compact(1)
            if all(one.number > before for one in self.versions()):
                return
        raise OSError(f"memory {self._folder} could not be erased: others write or name versions: try again")

    def count(self) -> int:
        """Return how many entries there are."""
        with self._told("read"):
            return int(self._latest().count_rows())

    def grown(self, since: int) -> bool:
        """Return whether all that happened after a version were additions."""
        with self._told("read"):
            told = {one["version"]: one["metadata"] for one in self._latest().list_versions()}
        last = max(told)
        steps = [(told.get(n), told.get(n + 1)) for n in range(since, last)]
        return all(a is not None and b is not None and _grew(a, b) for a, b in steps)

    def read(self, columns: Sequence[str], which: Which | None = None, first: int | None = None) -> pa.Table:
        """Return columns of entries; `first`: of those with that address or a higher one."""
        conditions = [] if which is None else [which.sql()]
        if first is not None:
            conditions.append(f"_rowid >= {first}")
        with self._told("read"):
            query = self._latest().search().select([name for name in columns if name != "_rowid"] or ["_rowid"])
            if "_rowid" in columns:
                query = query.with_row_id(True)
            if conditions:
                query = query.where(" AND ".join(conditions))
            return query.to_arrow().select(list(columns))

    def batches(self, columns: Sequence[str] | None = None, which: Which | None = None) -> Iterator[pa.RecordBatch]:
        """Yield entries, some at a time: all of them with all columns, unless told which."""
        with self._told("read"):
            query = self._latest().search()
            query = query if columns is None else query.select(list(columns))
            query = query if which is None else query.where(which.sql())
            yield from query.to_batches(batch_size=SOME)

    def _latest(self) -> Any:
        self._table.checkout_latest()
        return self._table

    def _names(self) -> dict[str, int]:
        return {name: int(told["version"]) for name, told in self._table.tags.list().items()}

    def _change(self, change: Callable[[], Any]) -> None:
        for left in reversed(range(TRIES)):
            try:
                with self._told("written"):
                    self._latest()
                    change()
                return
            except OSError as error:
                if not left or "conflict" not in str(error).lower():
                    raise
            time.sleep(random.uniform(0, 0.05))

    @contextlib.contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Let what LanceDB raises be an OSError that names the folder."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            changing = done in ("written", "compacted")
            short = text.split(", /")[0][:300]
            if (
                (changing and not os.access(self._folder, os.W_OK))
                or isinstance(error, PermissionError)
                or "os error 30" in text
                or "os error 13" in text
            ):
                raise PermissionError(
                    f"memory {self._folder} could not be {done}: it is read-only ({short})"
                ) from error
            hint = ". If files were truncated or removed, put them back from a copy, or roll back to a version before"
            raise OSError(f"memory {self._folder} could not be {done} ({short}){'' if changing else hint}") from error


def _made(base: Any, name: str, schema: pa.Schema) -> Any:
    """Return the table of that name, made unless another process just did."""
    try:
        return base.create_table(name, schema=schema, exist_ok=True)
    except Exception:
        return base.open_table(name)


def _grew(before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """Return whether a version has more rows than the one before, and no fewer of the old ones."""
    gone = "total_deletion_file_rows"
    return int(after["total_rows"]) > int(before["total_rows"]) and after[gone] == before[gone]
