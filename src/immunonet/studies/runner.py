"""Runs the tasks of a study, all or a share of them, and puts shares together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from immunonet.evaluation.journal import Journal
from immunonet.studies.tasks import Task, missing

Shard = tuple[int, int]


def journal_path(folder: Path, shard: Shard | None) -> Path:
    """Return the file that finished parts are kept in: each shard has its own."""
    return folder / ("parts.jsonl" if shard is None else f"parts-{shard[0]}-of-{shard[1]}.jsonl")


def read_shard(text: str) -> Shard:
    """Read `0/2`: the first of two shards; ValueError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard must be I/N with 0 <= I < N, such as 0/2, got {text!r}")
    return int(found[1]), int(found[2])


def run(
    tasks: Sequence[Task],
    journal: Journal,
    *,
    shard: Shard | None = None,
    advance: Callable[[Task], None] = lambda task: None,
) -> None:
    """Run the tasks that the journal lacks, in order; a shard takes every N-th of all. `advance` follows each task."""
    index, count = shard or (0, 1)
    for task in tasks[index::count]:
        if task.key not in journal:
            journal.add(task.key, task.run())
        advance(task)


def merge(folder: Path, settings: dict[str, Any], tasks: Sequence[Task]) -> Journal:
    """Return the journal of a folder's shards put together, which it keeps as `parts.jsonl`.

    ValueError if there are none, if a shard or some of its parts are missing, or if their settings differ.
    """
    found: dict[Shard, Path] = {}
    for path in sorted(folder.glob("parts-*-of-*.jsonl")):
        if name := re.fullmatch(r"parts-(\d+)-of-(\d+)\.jsonl", path.name):
            found[int(name[1]), int(name[2])] = path
    counts = sorted({count for _, count in found})
    if len(counts) != 1:
        what = f"shards of {' and of '.join(map(str, counts))} parts" if counts else "no shards"
        raise ValueError(f"{folder} must hold the parts of one sharded run (parts-I-of-N.jsonl), found {what}")
    count = counts[0]
    if absent := [i for i in range(count) if (i, count) not in found]:
        raise ValueError(
            f"{folder} lacks {journal_path(folder, (absent[0], count)).name}: run --shard {absent[0]}/{count}, "
            "or copy it here"
        )
    whole = Journal(journal_path(folder, None), settings)
    for path in found.values():
        for key, value in Journal(path, settings).items():
            if key not in whole:
                whole.add(key, value)
            elif key.startswith("tuning ") and whole[key] != value:
                raise ValueError(f"{path} holds results of other settings ({key} was {whole[key]}, there {value})")
    if left := missing(tasks, whole):
        shard = next(i for i in range(count) if left[0] in tasks[i::count])
        raise ValueError(
            f"{folder} lacks {len(left)} of {len(tasks)} parts, such as {left[0].about}: "
            f"shard {shard}/{count} is not finished"
        )
    return whole
