"""Requests gathered into batches while those before them are answered, and refused where too many wait."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Inputs = np.ndarray[Any, np.dtype[np.float32]]
Result = dict[str, Any]
Send = Callable[[Inputs, Sequence[str]], Awaitable[list[Result]]]
"""Answers a batch of inputs `(B, *S)` from B sources, one result each."""


class Full(Exception):
    """So many inputs wait that no more are taken; in about so many `seconds` there is room."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = max(1, math.ceil(seconds))


class Closed(Exception):
    """Nothing more is taken: the service stops."""


@dataclass(frozen=True)
class _Asked:
    x: Inputs
    source: str
    answer: asyncio.Future[list[Result]]


class Batcher:
    """Gathers requests: whatever waits when a batch has been answered is the next one, at most `batch` inputs.

    So a lone request waits for nobody, and under load batches grow by themselves. `at_once` batches are under way at
    the same time, one per replica and one more; of inputs that wait there are at most `queue`.
    """

    def __init__(
        self, send: Send, *, batch: int, queue: int, at_once: int = 2, seen: Callable[[int], None] = lambda n: None
    ) -> None:
        self._send, self._batch, self._queue, self._seen = send, batch, queue, seen
        self._free, self._waiting = at_once, deque[_Asked]()
        self._under_way = set[asyncio.Task[None]]()
        self._pace = 0.0  # seconds that an input takes, of late
        self._placed = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many inputs wait, or have a place."""
        return self._placed + sum(len(one.x) for one in tuple(self._waiting))

    def admit(self, n: int) -> None:
        """Raise Full or Closed where n more inputs would not be taken."""
        if self._closed:
            raise Closed
        if self.waiting + n > self._queue:
            raise Full(self.waiting * self._pace)

    @contextlib.contextmanager
    def place(self, n: int) -> Iterator[None]:
        """Keep a place for n inputs, which are asked about as soon as the block ends; raise Full or Closed for none."""
        self.admit(n)
        self._placed += n
        try:
            yield
        finally:
            self._placed -= n

    async def ask(self, x: Inputs, source: str) -> list[Result]:
        """Return the results of inputs `(n, *S)`, n at most `batch`; raise Full or Closed where they are not taken."""
        self.admit(len(x))
        asked = _Asked(x, source, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._go()
        return await asked.answer

    async def close(self) -> None:
        """Take nothing more, and return when all that was taken is answered."""
        self._closed = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _go(self) -> None:
        while self._free and (batch := self._next()):
            self._free -= 1
            task = asyncio.create_task(self._answer(batch))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    def _next(self) -> list[_Asked]:
        """Return the next requests that are answered together; who went away meanwhile is left out."""
        found: list[_Asked] = []
        n = 0
        while self._waiting and n + len(self._waiting[0].x) <= self._batch:
            one = self._waiting.popleft()
            if not one.answer.done():
                found.append(one)
                n += len(one.x)
        return found

    async def _answer(self, batch: Sequence[_Asked]) -> None:
        x = np.concatenate([one.x for one in batch])
        began = time.perf_counter()
        try:
            results = await self._send(x, [one.source for one in batch for _ in one.x])
            self._pace = (time.perf_counter() - began) / len(x)
            self._seen(len(x))
            start = 0
            for one in batch:
                if not one.answer.done():
                    one.answer.set_result(results[start : start + len(one.x)])
                start += len(one.x)
        except BaseException as error:
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(error)
            with contextlib.suppress(Exception):
                raise
        finally:
            self._free += 1
            self._go()
