"""What an entry of a memory holds, as rows of an Arrow table, and how rows are chosen."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from immunonet import _check
from immunonet.memory.space import Space
from immunonet.response import Cells, ImmuneResponse

if TYPE_CHECKING:
    import pyarrow as pa

# The longest name of a source, and the longest note, in characters.
LONGEST = 256
# What look-ups need of an entry; the rest is read where it is asked for.
HOT = ("id", "signature", "label", "votes", "credibility", "foreign", "far", "confirmed")


def schema(space: Space) -> pa.Schema:
    """Return the columns of a memory whose signatures lie in `space`."""
    import pyarrow as pa

    real, whole = pa.float32(), pa.int32()
    return pa.schema(
        [
            ("id", pa.string()),
            ("place", pa.int64()),  # the order of arrival: clocks may run backwards
            ("time", pa.timestamp("us", "UTC")),
            ("source", pa.string()),
            ("note", pa.string()),
            ("model", pa.string()),
            ("signature", pa.list_(real, space.width)),
            ("label", whole),
            ("votes", pa.list_(real, space.classes)),
            ("credibility", real),
            ("foreign", pa.bool_()),
            ("far", pa.list_(real, len(space.scales))),
            ("confirmed", whole),
            ("x", pa.large_binary()),
            ("cells", pa.large_binary()),
            ("cell_labels", pa.list_(whole)),
            ("cell_affinities", pa.list_(real)),
            ("cell_origins", pa.list_(pa.int64())),
            ("plasma", whole),  # so many of the cells, the first ones, are plasma cells
        ]
    )


def written(
    response: ImmuneResponse,
    x: Tensor | None,
    space: Space,
    *,
    most: int | None,
    sources: Sequence[str],
    note: str | None,
) -> pa.Table:
    """Return the rows of a response's antigens `x` `(B, *S)`, with new ids; without `x`, no cells are kept either.

    `sources`: where each came from. Of each antigen at most `most` plasma and `most` memory cells are kept, the
    fittest. `place` is left at 0.
    """
    import pyarrow as pa

    assert response.imprint is not None
    n, imprint, shape = len(response.labels), response.imprint, schema(space)
    columns: dict[str, Any] = {
        "id": [uuid.uuid4().hex for _ in range(n)],
        "place": np.zeros(n, np.int64),
        "time": [now()] * n,
        "source": sources,
        "note": [note] * n,
        "model": [space.fingerprint] * n,
        "signature": listed(imprint.signature, shape.field("signature").type),
        "label": array(response.labels).astype(np.int32),
        "votes": listed(response.votes, shape.field("votes").type),
        "credibility": array(response.credibility),
        "foreign": array(response.foreign),
        "far": listed(imprint.far, shape.field("far").type),
        "confirmed": [None] * n,
        **kept(response, x, most),
    }
    return pa.table({name: columns[name] for name in shape.names}, schema=shape)


def kept(response: ImmuneResponse, x: Tensor | None, most: int | None) -> dict[str, list[Any]]:
    """Return the columns of antigens and cells; a recalled antigen has no cells."""
    n = len(response.labels)
    if x is None:
        names = ("x", "cells", "cell_labels", "cell_affinities", "cell_origins", "plasma")
        return {name: [None] * n for name in names}
    plasma, memory = response.plasma.part(slice(most)), response.memory.part(slice(most))
    found = Cells.cat([plasma, memory], dim=1)
    real = found.label >= 0
    return {
        "x": [array(one).tobytes() for one in x],
        "cells": [array(cells[some]).tobytes() for cells, some in zip(found.x, real, strict=True)],
        "cell_labels": [values[some].tolist() for values, some in zip(found.label, real, strict=True)],
        "cell_affinities": [values[some].tolist() for values, some in zip(found.affinity, real, strict=True)],
        "cell_origins": [values[some].tolist() for values, some in zip(found.origin, real, strict=True)],
        "plasma": (plasma.label >= 0).sum(1).tolist(),
    }


def carried(batch: pa.RecordBatch, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor, int]]:
    """Yield each confirmed entry's place, its cells of that label `(n, *shape)`, and the label."""
    for row in batch.to_pylist():
        labels = torch.tensor(row["cell_labels"] or [], dtype=torch.long)
        # A copy: what a buffer holds cannot be written to.
        cells = torch.from_numpy(np.frombuffer(row["cells"] or b"", np.float32).copy()).reshape(len(labels), *shape)
        yield row["place"], cells[labels == row["confirmed"]], row["confirmed"]


CARRIED = ("place", "confirmed", "cells", "cell_labels")


def listed(values: Tensor, kind: Any) -> pa.Array:
    """Return `(n, D)` values as rows of lists of length D."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(array(values).reshape(-1)), type=kind)


def array(values: Tensor) -> np.ndarray[Any, Any]:
    """Return values as an array, floats as float32."""
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).contiguous().numpy()


def column(table: pa.Table, name: str, missing: float = -1) -> np.ndarray[Any, Any]:
    """Return one column of a table as an array, `(n,)` or `(n, D)`; what is null becomes `missing`."""
    import pyarrow as pa

    found = table[name].combine_chunks()
    if pa.types.is_fixed_size_list(found.type):
        values = found.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(values.reshape(len(found), found.type.list_size))
    if found.null_count:
        found = found.fill_null(missing)
    return np.asarray(found.to_numpy(zero_copy_only=False))


def now() -> datetime:
    """Return the time as the clock tells it, to the microsecond."""
    return datetime.fromtimestamp(time.time(), UTC)


@dataclass(frozen=True)
class Which:
    """Entries with one of `ids`, from one `source`, not before `since` nor at or after `until`; None: any.

    Those of "site/camera" are from "site" as well. `arrived`: no later than that place in the order of arrival;
    `confirmed`: only those that were, or were not.
    """

    ids: tuple[str, ...] | None = None
    source: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    arrived: int | None = None
    confirmed: bool | None = None

    def sql(self) -> str:
        """Return the condition as SQL."""
        parts = []
        if self.ids is not None:
            parts.append(f"id IN ({', '.join(map(quoted, self.ids))})" if self.ids else "false")
        if self.source is not None:
            below = quoted(f"{self.source}/")
            parts.append(f"(source = {quoted(self.source)} OR starts_with(source, {below}))")
        if self.since is not None:
            parts.append(f"time >= {_literal(self.since)}")
        if self.until is not None:
            parts.append(f"time < {_literal(self.until)}")
        if self.arrived is not None:
            parts.append(f"place <= {self.arrived}")
        if self.confirmed is not None:
            parts.append(f"confirmed IS {'NOT ' if self.confirmed else ''}NULL")
        return " AND ".join(parts) or "true"

    def expression(self) -> Any:
        """Return the condition as an Arrow expression."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = pc.scalar(True)
        if self.ids is not None:
            found = found & pc.field("id").isin(pa.array(self.ids, pa.string()))
        if self.source is not None:
            found = found & (
                (pc.field("source") == self.source) | pc.starts_with(pc.field("source"), pattern=f"{self.source}/")
            )
        if self.since is not None:
            found = found & (pc.field("time") >= _stamp(self.since))
        if self.until is not None:
            found = found & (pc.field("time") < _stamp(self.until))
        if self.arrived is not None:
            found = found & (pc.field("place") <= self.arrived)
        if self.confirmed is not None:
            found = found & (pc.field("confirmed").is_valid() if self.confirmed else pc.field("confirmed").is_null())
        return found


def ids_by_label(labels: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """Return every label with the ids that have it."""
    return [(label, [one for one, own in labels.items() if own == label]) for label in sorted(set(labels.values()))]


def quoted(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _stamp(moment: datetime) -> Any:
    import pyarrow as pa

    return pa.scalar(moment, pa.timestamp("us", "UTC"))


def _literal(moment: datetime) -> str:
    return f"TIMESTAMP '{moment.astimezone(UTC).strftime('%Y-%m-%d %H:%M:%S.%f')}+00:00'"


# What callers give.


def ids_of(name: str, value: Any) -> tuple[str, ...]:
    """Return ids given as one or several; raise where one is no text, or comes twice."""
    found = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if wrong := [one for one in found if not isinstance(one, str)]:
        raise TypeError(f"{name} must be ids as remember() returned them, strings, got {wrong[0]!r}")
    if len(set(found)) < len(found):
        twice = next(one for one in found if found.count(one) > 1)
        raise ValueError(f"{name} must name every entry once, got {twice!r} twice")
    return found


def text_of(name: str, value: Any) -> str:
    """Return a short text; raise where it is empty, or longer than is kept."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if not 0 < len(value) <= LONGEST:
        raise ValueError(f"{name} must have 1 to {LONGEST} characters, got {len(value):,}: give a shorter name")
    if not value.isprintable():
        raise ValueError(f"{name} must be printable text, got {value!r}")
    return value


def sources_of(source: str | Sequence[str], n: int) -> list[str]:
    """Return the source of each of n antigens, given as one or one for each; raise where one is no short text."""
    if not isinstance(source, list | tuple):
        return [text_of("source", source)] * n
    found = list(source)
    for one in found:
        text_of("source", one)
    if len(found) != n:
        raise ValueError(f"source must be one text, or {n}, one for each, got {len(found)}")
    return found


def moment_of(name: str, value: Any) -> datetime:
    """Return a time given as a datetime (local, where it tells no zone) or in seconds since 1970."""
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    return datetime.fromtimestamp(_check.number(name, value, least=0, most=253e9), UTC)


def confirmed_of(labels: Any, n: int, classes: int) -> list[int]:
    """Return n labels in [0, classes)."""
    given = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    found = [given] if not isinstance(given, Sequence) or isinstance(given, str) else list(given)
    if len(found) != n:
        raise ValueError(f"labels must be {n}, one for each of ids, got {len(found)}")
    return [_check.integer("labels", label, least=0, most=classes - 1) for label in found]


def check_response(response: ImmuneResponse, x: Tensor | None) -> None:
    """Raise where a response carries no imprint, or one that is no number, or `x` is not what it answers."""
    if response.imprint is None:
        raise ValueError("response carries no signatures: ask a RAILS(..., memory=memory) for it")
    n = len(response.labels)
    if x is not None and len(x) != n:
        raise ValueError(f"x must hold the {n} antigens that were answered, got shape {tuple(x.shape)}")
    for name, values in (("signatures", response.imprint.signature), ("votes", response.votes)):
        if not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values)).any(1).nonzero()[0])
            raise ValueError(f"response must have finite {name}, got {math.nan} for antigen {row}: nothing was kept")
