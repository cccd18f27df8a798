"""What long work takes, said as soon as a small part of it was timed."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

from immunonet._progress import watched

# Seconds from which work is worth a word.
LONG = 30.0
# Rows by which the time of many is judged: a few, and more where that is long, for few take what a call does.
_TRIED = 64, 4096
LOG = logging.getLogger("immunonet.estimates")
"""Where it is said, at level INFO; the command line prints it."""

T = TypeVar("T")


def told(parts: Iterable[T], count: float, what: str, why: str) -> Iterator[T]:
    """Yield the parts of some work; say after the first what it takes, which is `count` times as much as that."""
    start = time.perf_counter()
    for i, part in enumerate(parts):
        yield part
        if not i:
            tell((time.perf_counter() - start) * count, what, why)


def tell(seconds: float, what: str, why: str) -> None:
    """Say how long `what` takes, and why, if that is long."""
    if seconds >= LONG:
        LOG.info("%s takes about %s: %s", what, in_words(seconds), why)
        if watched() and not LOG.isEnabledFor(logging.INFO):
            print(f"{what} takes about {in_words(seconds)}: {why}", file=sys.stderr)


def timed(work: Callable[[], Tensor]) -> float:
    """Return the seconds of some work that was done once before: what is compiled is compiled by then."""
    work()
    start = time.perf_counter()
    # A value is waited for, on whatever device.
    float(work().sum())
    return time.perf_counter() - start


def of_many(work: Callable[[int], Tensor], count: int, *, most: int) -> float:
    """Return the seconds that `count` rows take, by `work` on a number of them, at most `most` and a hundredth of all.

    0 where a hundredth is none: that is not long.
    """
    found = 0.0
    for few in _TRIED:
        if not (rows := min(most, few, count // 100)):
            return found
        found = timed(functools.partial(work, rows)) / rows * count
        if found < LONG:
            break
    return found


def in_words(seconds: float) -> str:
    """Return a time in its largest unit, to two digits: "45 seconds", "3.5 minutes", "12 hours"."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} seconds"
