"""A log of what a sentinel flagged, as JSON lines: what is refused has no answer, and so no entry that could tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from immunonet import _check
from immunonet.memory import entries


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How many of the `queries` that a source sent together at some `time` were `flagged`."""

    time: datetime
    source: str
    queries: int
    flagged: int

    @classmethod
    def read(cls, told: Any) -> Self:
        """Return what a line tells, or raise ValueError or TypeError."""
        if not isinstance(told, Mapping) or told.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"it must hold {', '.join(cls.__dataclass_fields__)}, got {told!r}")
        time = datetime.fromisoformat(told["time"])
        if time.tzinfo is None:
            raise ValueError(f"time must tell its zone, as {time.isoformat()}+00:00 does, got {told['time']!r}")
        queries = _check.integer("queries", told["queries"])
        return cls(
            time=time.astimezone(UTC),
            source=entries.text_of("source", told["source"]),
            queries=queries,
            flagged=_check.integer("flagged", told["flagged"], least=0, most=queries),
        )


def note(path: Path, source: str, queries: int, flagged: int) -> None:
    """Append a line to a log, with the time."""
    told = {"time": entries.now().isoformat(), "source": source, "queries": queries, "flagged": flagged}
    # In one piece, so that lines of several processes do not mix.
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps(told).encode() + b"\n")


def log(path: str | Path) -> list[Flags]:
    """Return what a log tells, in its order; a last line that was cut off is passed over.

    ValueError for a line that tells nothing of the kind.
    """
    found = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(Flags.read(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is none of a sentinel's flags: {error}") from error
    return found
