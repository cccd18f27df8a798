"""Batches: what waits together is answered together, nobody gets another's answer, and no more wait than may."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from immunonet.service.batching import Batcher, Closed, Full


def inputs(*values: int) -> Any:
    return np.array(values, np.float32)[:, None]


class Replica:
    """Answers by the value itself, one batch at a time, when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.let = asyncio.Event()

    async def send(self, x: Any, sources: Sequence[str]) -> list[dict[str, Any]]:
        assert len(sources) == len(x)
        self.batches.append(x[:, 0].tolist())
        await self.let.wait()
        return [{"value": float(v), "source": s} for v, s in zip(x[:, 0], sources, strict=True)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), max_size=12), st.integers(4, 6), st.integers(1, 3))
def test_each_gets_his_own_answers_and_no_batch_is_too_large(sizes: list[int], batch: int, at_once: int) -> None:
    async def go() -> None:
        replica = Replica()
        replica.let.set()
        batcher = Batcher(replica.send, batch=batch, queue=100, at_once=at_once)
        asked = [inputs(*range(10 * i, 10 * i + n)) for i, n in enumerate(sizes)]
        found = await asyncio.gather(*(batcher.ask(x, f"s{i}") for i, x in enumerate(asked)))
        for i, (x, answers) in enumerate(zip(asked, found, strict=True)):
            assert [(a["value"], a["source"]) for a in answers] == [(v, f"s{i}") for v in x[:, 0].tolist()]
        assert all(len(one) <= batch for one in replica.batches)
        assert sum(map(len, replica.batches)) == sum(sizes)

    asyncio.run(go())


def test_who_has_a_place_is_taken_and_leaves_none_to_others() -> None:
    async def go() -> None:
        replica = Replica()
        replica.let.set()
        batcher = Batcher(replica.send, batch=4, queue=4, at_once=1)
        with batcher.place(3):
            assert batcher.waiting == 3
            with pytest.raises(Full):
                batcher.admit(2)
            with batcher.place(1):
                await asyncio.sleep(0)
        assert batcher.waiting == 0
        assert len(await batcher.ask(inputs(1, 2, 3, 4), "a")) == 4

    asyncio.run(go())


def test_what_waits_is_the_next_batch_and_more_than_the_queue_is_refused() -> None:
    async def go() -> None:
        replica = Replica()
        batcher = Batcher(replica.send, batch=4, queue=4, at_once=1)
        first = asyncio.create_task(batcher.ask(inputs(0), "a"))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(batcher.ask(inputs(i), "a")) for i in range(1, 5)]
        await asyncio.sleep(0)
        assert batcher.waiting == 4
        with pytest.raises(Full) as full:
            await batcher.ask(inputs(9), "a")
        assert full.value.seconds >= 1
        waiting[0].cancel()
        replica.let.set()
        await asyncio.gather(first, *waiting[1:])
        assert replica.batches == [[0.0], [2.0, 3.0, 4.0]]

    asyncio.run(go())


def test_an_error_reaches_those_who_asked_and_the_next_are_answered() -> None:
    async def go() -> None:
        async def send(x: Any, sources: Sequence[str]) -> list[dict[str, Any]]:
            if x[0, 0] < 0:
                raise ValueError("negative")
            return [{"value": 1}] * len(x)

        batcher = Batcher(send, batch=1, queue=4, at_once=1)
        found = await asyncio.gather(batcher.ask(inputs(-1), "a"), batcher.ask(inputs(1), "a"), return_exceptions=True)
        assert isinstance(found[0], ValueError)
        assert found[1] == [{"value": 1}]

    asyncio.run(go())


def test_closing_answers_what_was_taken_and_takes_no_more() -> None:
    async def go() -> None:
        replica = Replica()
        batcher = Batcher(replica.send, batch=1, queue=4, at_once=1)
        asked = [asyncio.create_task(batcher.ask(inputs(i), "a")) for i in range(3)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Closed):
            await batcher.ask(inputs(9), "a")
        replica.let.set()
        await closing
        assert [one.result()[0]["value"] for one in asked] == [0.0, 1.0, 2.0]

    asyncio.run(go())
