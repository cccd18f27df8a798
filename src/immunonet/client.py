"""Asking a service of immunonet, `immunonet serve`, from another process or machine."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from immunonet import _check, incoming
from immunonet._imports import require

# What passes by itself, so that asking again may help.
PASSING = (408, 429, 502, 503, 504)
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
LONGEST = 30.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a service says of one input; None where its defence does not tell.

    `id`: by which feedback names it. `label` and the `name` of its class. `votes`: the share of each label.
    `credibility`: a p-value. `foreign`, `innate`, `recalled`, `suspicious`: as in a response.
    """

    id: str
    label: int
    name: str
    votes: tuple[float, ...] | None
    credibility: float | None
    foreign: bool | None
    innate: bool | None
    recalled: bool | None
    suspicious: bool | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Return the result that a row of an answer holds."""
        votes = row["votes"]
        return cls(**{k: v for k, v in row.items() if k not in ("class", "votes")}, name=row["class"],
                   votes=None if votes is None else tuple(votes))  # fmt: skip


class ServiceError(OSError):
    """An answer that is an error: its HTTP `status`, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"{status}: {why}")
        self.status, self.why = status, why


class _Asking:
    """What both clients share: requests, what comes back, and how long to wait before asking again."""

    def __init__(
        self, url: str, *, token: str | None = None, source: str | None = None, retries: int = 5, timeout: float = 60.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self._httpx, self._url = require("httpx", "serve"), url
        self._retries = _check.integer("retries", retries, least=0)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= {"X-Source": source} if source else {}
        self._settings: dict[str, Any] = {
            "base_url": url, "headers": headers, "timeout": _check.number("timeout", timeout, least=0, above=True),
        }  # fmt: skip
        self._client = self._connected()

    def _connected(self) -> Any:
        raise NotImplementedError

    def _pauses(self) -> Iterator[float | None]:
        """Yield how long to wait after each try that failed, twice as long each time and at random; None: no more."""
        for i in range(self._retries):
            yield min(LONGEST, 0.2 * 2**i) * random.uniform(0.5, 1.5)
        yield None

    def _wait(self, answer: Any, pause: float) -> float:
        told = "" if answer is None else answer.headers.get("Retry-After", "")
        return max(pause, min(LONGEST, float(told) * random.uniform(1, 1.5))) if told.isdecimal() else pause

    @staticmethod
    def _read(answer: Any) -> dict[str, Any]:
        if answer.is_success:
            found: dict[str, Any] = answer.json()
            return found
        try:
            why = answer.json()["detail"]
        except (ValueError, KeyError, TypeError):
            why = answer.reason_phrase or "no reason given"
        raise ServiceError(answer.status_code, str(why))

    @staticmethod
    def _asked(x: Any) -> dict[str, Any]:
        """Return the request about an image file, or inputs `(n, *S)`."""
        if isinstance(x, str | Path):
            path = Path(x)
            if path.suffix.lower() not in KINDS:
                raise ValueError(f"x must be a PNG or JPEG file, or inputs, got {path}")
            kind = {"Content-Type": KINDS[path.suffix.lower()]}
            return {"url": "/v1/respond", "content": path.read_bytes(), "headers": kind}
        return {"url": "/v1/respond", "json": {"inputs": incoming.tensor("x", x).float().tolist()}}

    @staticmethod
    def _results(found: dict[str, Any]) -> list[Result]:
        return [Result.of(row) for row in found["results"]]


class Client(_Asking):
    """A service at a URL, asked one request at a time; use it in a `with` block.

    What passes by itself (too many wait, a restart, a connection that broke) is asked again, `retries` times, after
    pauses that grow and differ. An input that is asked again may be remembered twice by a service with a memory.

    Args:
        url: of the service, such as http://127.0.0.1:8000.
        token: as its token file has it, where it has one.
        source: who asks, for the memory and the sentinel.
        retries: how often a request is sent again.
        timeout: seconds that an answer may take.
    """

    def _connected(self) -> Any:
        return self._httpx.Client(**self._settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def respond(self, x: Any) -> list[Result]:
        """Return the results of inputs `(n, *S)`, or of a PNG or JPEG file; ServiceError says why there are none."""
        return self._results(self._send("POST", **self._asked(x)))

    def feedback(self, id: str, label: int) -> None:
        """Say what an input really was, by the id of its result."""
        self._send("POST", "/v1/feedback", json={"id": id, "label": int(label)})

    def memory(self) -> dict[str, Any]:
        """Return what the service's memory holds."""
        return self._send("GET", "/v1/memory")

    def rollback(self, version: int | str) -> dict[str, Any]:
        """Bring back a version of the memory."""
        return self._send("POST", "/v1/memory/rollback", json={"version": version})

    def _send(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        for pause in self._pauses():
            answer = None
            try:
                answer = self._client.request(method, url, **request)
            except self._httpx.TransportError as error:
                if pause is None:
                    raise ConnectionError(
                        f"no answer from {self._url}: {str(error) or type(error).__name__}"
                    ) from error
            if answer is not None and (pause is None or answer.status_code not in PASSING):
                return self._read(answer)
            assert pause is not None
            time.sleep(self._wait(answer, pause))
        raise AssertionError("the last try returns or raises")


class AsyncClient(_Asking):
    """The same for asyncio: any number of requests at a time, in an `async with` block."""

    def _connected(self) -> Any:
        return self._httpx.AsyncClient(**self._settings, limits=self._httpx.Limits(max_connections=None))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def respond(self, x: Any) -> list[Result]:
        """Return the results of inputs `(n, *S)`, or of a PNG or JPEG file; ServiceError says why there are none."""
        return self._results(await self._send("POST", **self._asked(x)))

    async def feedback(self, id: str, label: int) -> None:
        """Say what an input really was, by the id of its result."""
        await self._send("POST", "/v1/feedback", json={"id": id, "label": int(label)})

    async def _send(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        for pause in self._pauses():
            answer = None
            try:
                answer = await self._client.request(method, url, **request)
            except self._httpx.TransportError as error:
                if pause is None:
                    raise ConnectionError(
                        f"no answer from {self._url}: {str(error) or type(error).__name__}"
                    ) from error
            if answer is not None and (pause is None or answer.status_code not in PASSING):
                return self._read(answer)
            assert pause is not None
            await asyncio.sleep(self._wait(answer, pause))
        raise AssertionError("the last try returns or raises")
