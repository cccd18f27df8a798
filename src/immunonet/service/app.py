"""The front of a service: routes, who may use them, and what is said where something is wrong."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from immunonet import __version__, _check
from immunonet._pictures import first_line
from immunonet.memory.entries import text_of
from immunonet.memory.sentinel import Sentinel
from immunonet.memory.store import Memory
from immunonet.service import bodies, schema
from immunonet.service.answering import Loaded
from immunonet.service.batching import Batcher, Closed, Full, Inputs, Result, Send
from immunonet.service.bodies import Refused
from immunonet.service.flags import ACTIONS
from immunonet.service.limits import Limits
from immunonet.service.telemetry import Telemetry, log
from immunonet.service.tokens import Holder, Tokens, is_loopback


class Service:
    """What stands behind the routes: it takes inputs, watches, gathers and answers.

    `send` answers batches; it is None, and the service not ready, until `begin`. `sentinel`: watches all queries, if
    there is one; `on_flag`, a name of `ACTIONS`: what happens to those it flags.
    """

    def __init__(
        self, loaded: Loaded, *, limits: Limits | None = None, tokens: Tokens | None = None,
        sentinel: Sentinel | None = None, on_flag: str = "mark",
    ) -> None:  # fmt: skip
        self.loaded, self.limits, self.tokens = loaded, limits or Limits(), tokens or Tokens()
        self.sentinel = sentinel
        self.memory: Memory | None = None
        self._action = ACTIONS[_check.choice("on_flag", on_flag, tuple(ACTIONS))]
        self.telemetry = Telemetry()
        self.telemetry.watch("queue_inputs", lambda: self._batcher.waiting if self._batcher else 0)
        self.telemetry.watch("memory_entries", lambda: 0 if self.memory is None else len(self.memory))
        self._batcher: Batcher | None = None
        self.reload: Callable[[], Awaitable[None]] | None = None

    @property
    def ready(self) -> bool:
        """Whether answers are given."""
        return self._batcher is not None

    def begin(self, send: Send, *, at_once: int, memory: Memory | None = None) -> None:
        """Answer from now on, so many batches at once; `memory`: where what is answered is kept."""
        self.memory, limits = memory, self.limits
        self._batcher = Batcher(send, batch=limits.batch, queue=limits.room, at_once=at_once, seen=self.telemetry.batch)

    async def end(self) -> None:
        """Take nothing more, and return when all that was taken is answered."""
        if self._batcher is not None:
            await self._batcher.close()

    def admit(self, n: int = 1) -> Batcher:
        """Return who gathers, where n more inputs are taken; else Refused, before anything is read of them."""
        if self._batcher is None:
            raise Refused(503, "the service is not ready yet", Retry_After="2")
        try:
            self._batcher.admit(n)
        except Full as full:
            raise Refused(429, "too many inputs wait: try again later", Retry_After=str(full.seconds)) from full
        except Closed as closed:
            raise Refused(503, "the service stops", Retry_After="5") from closed
        return self._batcher

    async def respond(self, x: Inputs, source: str) -> list[Result]:
        """Return the results of inputs `(n, *S)` from a source; Refused where they are not answered."""
        # Whoever is watched has a place: to be refused for want of one, and to come again, would look like an attack.
        with self.admit(len(x)).place(len(x)):
            flagged = await asyncio.to_thread(self._watched, x, source)
        if flagged is None:
            return await self._asked(x, source)
        self.telemetry.count("flags", sum(flagged))
        action = self._action if any(flagged) else ACTIONS["mark"]
        results = await action(lambda: self._asked(x, source))
        return [one | {"suspicious": flag} for one, flag in zip(results, flagged, strict=True)]

    def _watched(self, x: Inputs, source: str) -> list[bool] | None:
        if self.sentinel is None:
            return None
        flags: list[bool] = self.sentinel.watch(x, source).flagged.tolist()
        return flags

    async def _asked(self, x: Inputs, source: str) -> list[Result]:
        batcher = self.admit(len(x))
        try:
            async with asyncio.timeout(self.limits.seconds):
                results = await batcher.ask(x, source)
        except TimeoutError as late:
            why = f"no answer within {self.limits.seconds:g} seconds"
            raise Refused(504, why, Retry_After="5") from late
        self.telemetry.answered(results)
        return results


def create(service: Service, *, lifespan: Callable[[], Any] | None = None) -> FastAPI:
    """Return the application in front of a service; `lifespan`: a context that surrounds its life."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        if lifespan is None:
            yield
        else:
            async with lifespan():
                yield

    app = FastAPI(title="immunonet", version=__version__, lifespan=life, description=schema.ABOUT)
    app.openapi = lambda: schema.openapi(app)  # type: ignore[method-assign]

    @app.middleware("http")
    async def noted(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        """Time, log and name every request, and answer whatever went wrong inside without a word of how."""
        began, name = time.perf_counter(), uuid.uuid4().hex
        request.state.known = {"request": name}
        try:
            stranger = None if service.tokens else _stranger(request)
            response = await call(request) if stranger is None else _error(403, stranger, {})
        except Exception:
            log.exception("request %s failed", name)
            response = _error(500, "this is a fault of the service; its log names the request", {})
        response.headers["X-Request-Id"] = name
        route = getattr(request.scope.get("route"), "path", "other")
        service.telemetry.request(began, route, response.status_code, **request.state.known)
        return response

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error.status, error.why, error.headers)

    @app.exception_handler(HTTPException)
    async def missed(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), dict(error.headers or {}))

    def let(request: Request, role: str) -> Holder:
        holder = service.tokens.holder(request.headers.get("Authorization"))
        if holder is None:
            raise Refused(401, "give a token: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        if not holder.may(role):
            raise Refused(403, f"this needs a token of the role {role}, {holder.name} has {holder.role}")
        return holder

    async def content(request: Request) -> bytes:
        try:
            async with asyncio.timeout(service.limits.seconds):
                return await bodies.body(request.stream(), request.headers.get("Content-Length"), service.limits)
        except TimeoutError as late:
            raise Refused(408, "the body took too long to come") from late
        except ClientDisconnect as gone:
            raise Refused(400, "the body broke off") from gone

    async def given(request: Request, *keys: str) -> dict[str, Any]:
        """Return the JSON object of a body with these keys, and no others."""
        if bodies.kind_of(request.headers.get("Content-Type")) != bodies.JSON:
            raise Refused(415, f"the content type must be {bodies.JSON}")
        try:
            found = bodies.parsed(await content(request))
        except ValueError as error:
            raise Refused(422, first_line(error)) from error
        if set(found) != set(keys):
            raise Refused(422, f"the body must be an object with {' and '.join(keys)}, and nothing else")
        return found

    def memory() -> Memory:
        if service.memory is None:
            raise Refused(404, "this service has no memory: start it with --memory DIR")
        return service.memory

    async def kept(work: Callable[..., Any], *args: Any) -> Any:
        """Return what a call of the memory gives; what the caller got wrong is Refused."""
        try:
            return await asyncio.to_thread(work, *args)
        except (ValueError, TypeError) as error:
            raise Refused(422, first_line(error)) from error

    @app.post("/v1/respond")
    async def respond(request: Request) -> dict[str, Any]:
        holder = let(request, "ask")
        source = _source(holder, request.headers.get("X-Source"))
        service.admit()
        kind = request.headers.get("Content-Type", "")
        x = await asyncio.to_thread(bodies.inputs, await content(request), kind, service.loaded, service.limits)
        results = await service.respond(x, source)
        request.state.known |= {
            "source": source, "inputs": len(x), "flags": sum(bool(one["suspicious"]) for one in results),
        }  # fmt: skip
        return {"results": results}

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> dict[str, Any]:
        let(request, "confirm")
        found = await given(request, "id", "label")
        await kept(memory().confirm, found["id"], found["label"])
        return {"id": found["id"], "label": found["label"]}

    @app.get("/v1/memory")
    async def stats(request: Request) -> dict[str, Any]:
        let(request, "confirm")
        found: dict[str, Any] = await kept(memory().stats)
        return found

    @app.post("/v1/memory/rollback")
    async def rollback(request: Request) -> dict[str, Any]:
        let(request, "admin")
        found, own = await given(request, "version"), memory()
        if type(found["version"]) not in (int, str):
            raise Refused(422, "version must be a number or a name")
        await kept(own.rollback, found["version"])
        return {"version": own.version, "entries": len(own)}

    @app.post("/v1/memory/forget")
    async def forget(request: Request) -> dict[str, Any]:
        let(request, "admin")
        found, own = await given(request, "source"), memory()
        forgotten = await kept(lambda: own.forget(source=text_of("source", found["source"])))
        return {"forgotten": forgotten, "version": own.version, "entries": len(own)}

    @app.post("/v1/reload")
    async def reload(request: Request) -> dict[str, Any]:
        let(request, "admin")
        if service.reload is None:
            raise Refused(503, "the service is not ready yet", Retry_After="2")
        try:
            await service.reload()
        except (ValueError, TypeError, OSError) as error:
            raise Refused(409, f"the defence stays the one before: {first_line(error)}") from error
        return {"defence": service.loaded.defence.kind}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> Response:
        status = 200 if service.ready else 503
        return JSONResponse({"status": "ready" if service.ready else "starting"}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(service.telemetry.text), media_type=service.telemetry.kind)

    return app


def _stranger(request: Request) -> str | None:
    """Return why a request to a service without tokens may be some page's in a browser on this machine; None if not.

    Such a page may send what needs no leave from the service, or call the service by a name of its own.
    """
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    if not is_loopback(request.url.hostname or ""):
        return f"Host {host!r} is none of this machine's own names: give the service a --token-file"
    if origin is not None and urlsplit(origin).netloc != host:
        return f"a page of {origin} may not ask: give the service a --token-file"
    return None


def _source(holder: Holder, given: str | None) -> str:
    """Return where a query comes from: who holds the token, and what he says of it."""
    try:
        return text_of("X-Source", "/".join(filter(None, (holder.name, given))) or "unknown")
    except ValueError as error:
        raise Refused(422, first_line(error)) from error


def _error(status: int, why: str, headers: dict[str, str]) -> Response:
    return JSONResponse({"detail": why}, status, headers)
