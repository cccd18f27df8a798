"""What happens to a query that looks like one of many near copies: the operator's choice."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from immunonet.service.batching import Result
from immunonet.service.bodies import Refused

# The longest that a flagged query is kept waiting, in seconds.
DELAY = 3.0
# What an answer keeps where it is reduced to its label.
LABEL_ONLY = ("id", "label", "class", "suspicious")


async def mark(ask: Callable[[], Awaitable[list[Result]]]) -> list[Result]:
    """Return the results as they are; `suspicious` says so."""
    return await ask()


async def refuse(ask: Callable[[], Awaitable[list[Result]]]) -> list[Result]:
    """Refuse, before the defence is asked."""
    raise Refused(403, "this looks like one of many near copies of one input, and is not answered")


async def label_only(ask: Callable[[], Awaitable[list[Result]]]) -> list[Result]:
    """Return results without the votes and p-values that lead an attack on."""
    return [{key: value if key in LABEL_ONLY else None for key, value in one.items()} for one in await ask()]


async def random_delay(ask: Callable[[], Awaitable[list[Result]]]) -> list[Result]:
    """Return the results after a random while of at most `DELAY` seconds."""
    await asyncio.sleep(DELAY * secrets.randbelow(1000) / 1000)
    return await ask()


Action = Callable[[Callable[[], Awaitable[list[Result]]]], Awaitable[list[Any]]]
ACTIONS: Mapping[str, Action] = {
    "mark": mark, "refuse": refuse, "label-only": label_only, "random-delay": random_delay,
}  # fmt: skip
