"""A service whose replicas are this process: a small defence, asked through the real application."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image

from immunonet import RAILS, Maturation, Memory
from immunonet.defences.undefended import Undefended
from immunonet.service.answering import Answering, Loaded
from immunonet.service.app import Service, create

SHAPE = (1, 4, 4)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.rand(3, *SHAPE, generator=generator)[y] * 0.8 + torch.rand(90, *SHAPE, generator=generator) * 0.2
    return x, y


def plain(folder: Path = Path()) -> Loaded:
    return Loaded(defence=Undefended(network()), shape=SHAPE, classes=("a", "b", "c"))


def rails(folder: Path = Path()) -> Loaded:
    fitted = RAILS(network(), "input", maturation=Maturation(population=30, generations=1), seed=0).fit(*examples())
    return Loaded(defence=fitted, shape=SHAPE, classes=("a", "b", "c"))


def begun(loaded: Loaded, memory: Memory | None = None, **settings: Any) -> Service:
    """Return a service that is ready, answered by this process."""
    service = Service(loaded, **settings)
    answering = Answering(lambda folder: loaded, batch=8, seed=0)
    answering.read(Path())
    if memory is not None:
        loaded.defence.remember_in(memory)

    async def send(x: Any, sources: Any) -> Any:
        return answering.answer(x, sources)

    service.begin(send, at_once=1, memory=memory)
    return service


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on the loopback and yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def application(service: Service) -> Any:
    return create(service)


def png(size: tuple[int, int] = (4, 4), kind: str = "PNG", mode: str = "L") -> bytes:
    written = io.BytesIO()
    Image.new(mode, size).save(written, kind)
    return written.getvalue()
