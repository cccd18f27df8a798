"""A study's work in chunks, each kept in the journal under a key of all it depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from immunonet.evaluation.journal import Journal

# Decimal digits of what the journal keeps.
DIGITS = 5


@dataclass(frozen=True)
class Task:
    """A chunk of an experiment: `run` returns what the journal keeps under `key`; `cost` is a rough share of work."""

    key: str
    about: str
    cost: float
    run: Callable[[], Any]


def missing(tasks: Sequence[Task], journal: Journal) -> list[Task]:
    """Return the tasks whose value is not kept yet."""
    return [task for task in tasks if task.key not in journal]


def chunks(n: int, chunk: int) -> list[slice]:
    """Return the chunks of n images."""
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]


def key_of(name: str, part: slice) -> str:
    """Return the key of one chunk of an experiment."""
    return f"{name} / {part.start}-{part.stop}"


def rounded(values: Tensor) -> list[float]:
    """Return values `(n,)` as the journal keeps them."""
    return [round(float(v), DIGITS) for v in values]


def show(value: Any) -> str:
    """Return a setting's value as a short text."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " + ".join(map(show, value))
    return str(value)
