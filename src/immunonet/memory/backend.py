"""What a memory asks of where its rows lie; two backends answer alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from immunonet.memory.entries import Which

if TYPE_CHECKING:
    import pyarrow as pa


# Entries that are read at a time.
SOME = 1000


@dataclass(frozen=True, kw_only=True)
class Version:
    """A state of a memory: its number, when it was made, how many entries it has, and its names."""

    number: int
    time: datetime
    entries: int
    names: tuple[str, ...] = ()


class Backend(Protocol):
    """Rows in versions: every change makes one, and any that is still there can be brought back.

    A row has an address, `_rowid`: a changed row has another one, and rows that are added have higher ones than those
    that are there.
    """

    def append(self, rows: pa.Table) -> None:
        """Add rows."""

    def confirm(self, labels: Mapping[str, int]) -> None:
        """Set the confirmed labels of entries, by their ids, in one version."""

    def delete(self, which: Which) -> None:
        """Remove entries."""

    def version(self) -> int:
        """Return the number of the latest version, also where another process made it."""

    def versions(self) -> list[Version]:
        """Return the versions that can be brought back, oldest first."""

    def rollback(self, number: int) -> None:
        """Make a version that holds what an older one, which is there, holds."""

    def tag(self, name: str, number: int) -> None:
        """Name a version; a named one stays."""

    def untag(self, name: str) -> None:
        """Take a name away."""

    def compact(self, keep: int) -> None:
        """Put small files together, and drop versions before the last `keep` and the oldest that has a name."""

    def erase(self) -> None:
        """Drop all older versions, named ones too, and whatever files hold of entries that are gone."""

    def count(self) -> int:
        """Return how many entries there are."""

    def grown(self, since: int) -> bool:
        """Return whether all that happened after a version were additions."""

    def read(self, columns: Sequence[str], which: Which | None = None, first: int | None = None) -> pa.Table:
        """Return columns of entries, also "_rowid"; `first`: of those with that address or a higher one."""

    def batches(self, columns: Sequence[str] | None = None, which: Which | None = None) -> Iterator[pa.RecordBatch]:
        """Yield entries, some at a time, in any order: all of them with all columns, unless told which."""
