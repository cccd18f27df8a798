"""What long work shows where nobody asked to hear of it: in terminals and notebooks a bar, or lines; else nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

# Seconds after which it is shown.
PATIENCE = 2.0
TAKEN = ContextVar("taken", default=False)
"""Whether somebody else shows how far work is, as the command line does."""


def watched() -> bool:
    """Return whether somebody looks, in a terminal or a notebook, and nothing else shows them how far work is."""
    if TAKEN.get():
        return False
    if sys.stderr.isatty():
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def shown(given: Callable[..., None] | None, what: str) -> Iterator[Callable[..., None] | None]:
    """Give what hears of `(done, of how many, ...)`: `given`, or else a bar of that name, None where nobody looks."""
    if given is not None or not watched():
        yield given
        return
    with tqdm(desc=what, delay=PATIENCE, leave=False, file=sys.stderr) as bar:

        def show(done: int, whole: int, *_: Any) -> None:
            bar.total = whole
            bar.update(done - bar.n)

        yield show


def lines() -> Callable[[str], None]:
    """Return what prints lines as they come, those of the first two seconds with the first after; nothing unwatched."""
    if not watched():
        return lambda text: None
    waiting, began = list[str](), time.perf_counter()

    def show(text: str) -> None:
        waiting.append(text)
        if time.perf_counter() - began >= PATIENCE:
            print(*waiting, sep="\n", file=sys.stderr)
            waiting.clear()

    return show
