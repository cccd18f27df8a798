"""What happened to a memory over time, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np

from immunonet import _check
from immunonet.memory import entries
from immunonet.memory.backend import Version
from immunonet.memory.flags import Flags
from immunonet.memory.index import Array
from immunonet.memory.store import Memory


def history(memory: Memory, flags: Sequence[Flags] = (), *, parts: int = 60) -> dict[str, Any]:
    """Return a memory's history as JSON: `stats`, `versions`, and per source what it did `from` one time `to` another.

    These are the first and the last of entries and flags, and the time between is cut into as many `parts` alike. Of
    each of them `sources` tell how many entries that are held now were `written`, of how many of these the confirmed
    label is `contradicting` the answer, and how many queries were `flagged`. A version's `change` is how many entries
    more it has than the one before, None for the first. ValueError for a memory that belongs to no model yet.
    """
    parts = _check.integer("parts", parts)
    versions, table = memory.versions(), memory.columns("time", "source", "label", "confirmed")
    written, raised = stamps(table["time"].to_pylist()), stamps([one.time for one in flags])
    names, of = np.unique([*table["source"].to_pylist(), *(one.source for one in flags)], return_inverse=True)
    every = np.concatenate([written, raised]) if len(names) else stamps([one.time for one in versions])
    first, last = float(every.min()), max(float(every.max()), float(every.min()) + 1)

    def counted(source: Array, times: Array, weights: Any = None) -> list[list[int]]:
        places = np.minimum((times - first) / (last - first) * parts, parts - 1).astype(int)
        found = np.bincount(source * parts + places, weights, minlength=len(names) * parts)
        return found.astype(int).reshape(-1, parts).tolist()

    confirmed, by = entries.column(table, "confirmed"), of[: len(written)]
    wrong = (confirmed >= 0) & (confirmed != entries.column(table, "label"))
    counts = zip(
        counted(by, written),
        counted(by[wrong], written[wrong]),
        counted(of[len(written) :], raised, [one.flagged for one in flags]),
        strict=True,
    )
    parted = [dict(zip(("written", "contradicting", "flagged"), count, strict=True)) for count in counts]
    return {
        "stats": memory.stats(),
        "from": moment(first),
        "to": moment(last),
        "parts": parts,
        "versions": changes(versions),
        "sources": dict(zip(names.tolist(), parted, strict=True)),
    }


def changes(versions: Sequence[Version]) -> list[Mapping[str, Any]]:
    """Return versions as JSON, each with how many entries more it has than the one before."""
    more = [None, *(b.entries - a.entries for a, b in pairwise(versions))]
    return [
        {"number": one.number, "time": one.time.isoformat(), "entries": one.entries, "change": change,
         "names": list(one.names)}
        for one, change in zip(versions, more, strict=False)
    ]  # fmt: skip


def stamps(times: Sequence[datetime]) -> Array:
    """Return times in seconds since 1970, `(n,)`."""
    return np.array([one.timestamp() for one in times])


def moment(stamp: float) -> str:
    """Return a time in seconds since 1970 as text."""
    return datetime.fromtimestamp(stamp, UTC).isoformat()
