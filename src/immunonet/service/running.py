"""A service from its start to its end: the front listens at once, and answers when its replicas do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from immunonet._imports import require
from immunonet.memory.sentinel import Sentinel
from immunonet.service.answering import Load, Loaded, settle
from immunonet.service.app import Service, create
from immunonet.service.replicas import Replicas
from immunonet.service.telemetry import log
from immunonet.service.tokens import is_loopback

# Connections that are open at once; more are told to come again.
CONNECTIONS = 1000


def check_address(host: str, port: int, tokens: bool) -> None:
    """Raise ValueError for an address that others reach, without tokens, or that is taken."""
    if not tokens and not is_loopback(host):
        raise ValueError(
            f"--host {host} is reached from other machines: give --token-file FILE, so that not everybody may ask, "
            "confirm and roll back, or --host 127.0.0.1"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise OSError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error


def run(
    service: Service, replicas: Replicas, folder: Path, load: Load, *, host: str = "127.0.0.1", port: int = 8000,
    watch: Callable[[Loaded], Sentinel | None] = lambda loaded: None, around: Callable[[Any], None] = lambda app: None,
) -> None:  # fmt: skip
    """Serve until a signal ends it; whatever was taken by then is answered.

    `watch` gives the sentinel of a defence that is read again; `around` adds pages to the application. Raises what kept
    the replicas, or the front, from starting.
    """
    uvicorn = require("uvicorn", "serve")
    check_address(host, port, bool(service.tokens))
    replicas.connect()
    failed: list[BaseException] = []

    async def reload() -> None:
        loaded = await asyncio.to_thread(load, folder)
        if loaded.shape != service.loaded.shape:
            raise ValueError(f"{folder} takes inputs of shape {loaded.shape}, but this service {service.loaded.shape}")
        watching = await asyncio.to_thread(watch, loaded)
        if replicas.memory is not None:
            # What a replica would refuse is refused before any is asked.
            await asyncio.to_thread(lambda: loaded.defence.remember_in(replicas.opened()))
        await asyncio.to_thread(replicas.read, folder)
        service.loaded, service.sentinel = loaded, watching
        settle()

    async def begin() -> None:
        try:
            await asyncio.to_thread(replicas.start, folder)
            await asyncio.to_thread(replicas.check_memory)
            memory = None if replicas.memory is None else replicas.opened()
        except Exception as error:
            failed.append(error)
            server.should_exit = True
            return
        service.reload = reload
        service.begin(replicas.send, at_once=replicas.most + 1, memory=memory)
        settle()
        log.info('{"ready": true}')

    @contextlib.asynccontextmanager
    async def life() -> AsyncIterator[None]:
        starting = asyncio.create_task(begin())
        yield
        await starting
        await service.end()
        await asyncio.to_thread(replicas.stop)

    app = create(service, lifespan=life)
    around(app)  # pages may have a life of their own, which begins with the application's
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=round(service.limits.seconds),
            timeout_keep_alive=30,
            server_header=False,
        )
    )
    server.run()
    if failed:
        raise failed[0]
    if not server.started:
        raise RuntimeError("the service did not start: its log tells why")
