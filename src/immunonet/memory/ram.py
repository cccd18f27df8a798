"""Rows in RAM: versions are Arrow tables, which share what they have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from immunonet.memory.backend import SOME, Version
from immunonet.memory.entries import Which, now

if TYPE_CHECKING:
    import pyarrow as pa


class InRam:
    """A `Backend` that is gone with its process."""

    def __init__(self, schema: pa.Schema) -> None:
        import pyarrow as pa

        empty = schema.append(pa.field("_rowid", pa.uint64())).empty_table()
        self._tables = {1: empty}
        self._told = {1: Version(number=1, time=now(), entries=0)}
        self._names = dict[str, int]()
        self._next, self._last, self._grown = 0, 1, dict[int, bool]()

    def append(self, rows: pa.Table) -> None:
        """Add rows."""
        import pyarrow as pa

        self._commit(pa.concat_tables([self._latest, self._addressed(rows)]), grown=True)

    def confirm(self, labels: Mapping[str, int]) -> None:
        """Set the confirmed labels of entries, by their ids, in one version."""
        import pyarrow as pa

        # In one piece: what a filter gives has as many, empty or not, as what it was taken from.
        chosen = self._latest.filter(Which(ids=tuple(labels)).expression()).combine_chunks()
        values = pa.array([labels[one] for one in chosen["id"].to_pylist()], pa.int32())
        changed = chosen.set_column(chosen.schema.get_field_index("confirmed"), "confirmed", values)
        rest = self._latest.filter(~Which(ids=tuple(labels)).expression())
        self._commit(pa.concat_tables([rest, self._addressed(changed.drop_columns("_rowid"))]))

    def delete(self, which: Which) -> None:
        """Remove entries."""
        self._commit(self._latest.filter(~which.expression()))

    def version(self) -> int:
        """Return the number of the latest version."""
        return self._last

    def versions(self) -> list[Version]:
        """Return the versions that can be brought back, oldest first."""
        named = {number: tuple(k for k, v in self._names.items() if v == number) for number in self._tables}
        return [
            Version(number=n, time=told.time, entries=told.entries, names=named[n]) for n, told in self._told.items()
        ]

    def rollback(self, number: int) -> None:
        """Make a version that holds what an older one, which is there, holds."""
        self._commit(self._tables[number])

    def tag(self, name: str, number: int) -> None:
        """Name a version; a named one stays."""
        self._names[name] = number

    def untag(self, name: str) -> None:
        """Take a name away."""
        del self._names[name]

    def compact(self, keep: int) -> None:
        """Drop versions before the last `keep` and the oldest that has a name."""
        first = min([*list(self._tables)[-keep:], *self._names.values()])
        for number in [n for n in self._tables if n < first]:
            del self._tables[number], self._told[number]
        self._tables[self._last] = self._latest.combine_chunks()

    def erase(self) -> None:
        """Drop all older versions, named ones too."""
        self._names.clear()
        self.compact(1)

    def count(self) -> int:
        """Return how many entries there are."""
        return int(self._latest.num_rows)

    def grown(self, since: int) -> bool:
        """Return whether all that happened after a version were additions."""
        return all(self._grown.get(n, False) for n in range(since + 1, self._last + 1))

    def read(self, columns: Sequence[str], which: Which | None = None, first: int | None = None) -> pa.Table:
        """Return columns of entries; `first`: of those with that address or a higher one."""
        import pyarrow.compute as pc

        found = self._latest
        if which is not None:
            found = found.filter(which.expression())
        if first is not None:
            found = found.filter(pc.field("_rowid") >= first)
        return found.select(list(columns))

    def batches(self, columns: Sequence[str] | None = None, which: Which | None = None) -> Iterator[pa.RecordBatch]:
        """Yield entries, some at a time: all of them with all columns, unless told which."""
        names = [name for name in self._latest.column_names if name != "_rowid"] if columns is None else columns
        yield from self.read(names, which).to_batches(max_chunksize=SOME)

    @property
    def _latest(self) -> pa.Table:
        return self._tables[self._last]

    def _addressed(self, rows: pa.Table) -> pa.Table:
        """Return rows with addresses that no row had before."""
        import pyarrow as pa

        first = self._next
        self._next += rows.num_rows
        return rows.append_column("_rowid", pa.array(range(first, self._next), pa.uint64()))

    def _commit(self, table: pa.Table, grown: bool = False) -> None:
        self._last += 1
        self._tables[self._last] = table
        self._grown[self._last] = grown
        self._told[self._last] = Version(number=self._last, time=now(), entries=table.num_rows)
