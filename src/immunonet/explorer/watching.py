"""An attacker that only asks, as a sentinel sees him: query by query, while he is at it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from immunonet import models
from immunonet.defences.base import Defence
from immunonet.evaluation.stream import Assault, Guarded, Won
from immunonet.memory.sentinel import Sentinel


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a sentinel has seen so far: scores of `honest` queries, and after them of the attacker's, `scores`.

    A score below `threshold` is flagged; it is infinite before there are enough queries to compare with. `flagged`,
    `won`: the numbers of the attacker's first query that was flagged, and of the first that fooled the defence, from 1
    on, or None. `over`: the attack has ended; `late`: since its time was up.
    """

    honest: list[float]
    scores: list[float]
    threshold: float
    flags: int
    flagged: int | None
    won: int | None
    over: bool
    late: bool


class _Stopped(Exception):
    """Ends an attack whose time is up, or that nobody watches any more."""


def asking(
    defence: Defence, sentinel: Sentinel, x: Tensor, y: int, *, assault: Assault, honest: Tensor, seconds: float,
    every: float = 0.4,
) -> Iterator[Seen]:  # fmt: skip
    """Yield what a twin of `sentinel` sees, `every` so many seconds and at the end, of an attack on `x` `(1, *S)`.

    The defence's light twin is asked about `x`, whose label is `y`, after `honest` queries `(n, *S)` of others. The
    attack ends when it has won, when its queries or `seconds` are spent, or when nobody asks for more.
    """
    twin, target = sentinel.twin(), defence.light()
    before = twin.watch(honest, "honest").score.tolist() if len(honest) else []
    until, left, late = time.monotonic() + seconds, threading.Event(), threading.Event()

    def answers(queries: Tensor) -> Tensor:
        if time.monotonic() > until:
            late.set()
        if left.is_set() or late.is_set():
            raise _Stopped
        return models.logits(target, queries)

    guarded = Guarded(answers, twin, x, torch.tensor([y], device=x.device), assault, traffic=x[:0])

    def run() -> None:
        with contextlib.suppress(Won, _Stopped):
            assault.method(guarded, x, guarded.y)

    def seen(over: bool) -> Seen:
        return Seen(
            honest=before, scores=list(guarded.scores), threshold=float(twin.threshold or 0), flags=guarded.flags,
            flagged=guarded.flagged, won=guarded.won, over=over, late=late.is_set(),
        )  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(run)
        try:
            while wait([work], every).not_done:
                yield seen(False)
        finally:
            left.set()
        work.result()
    yield seen(True)
