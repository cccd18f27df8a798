"""Replicas of a defence on Ray Serve: started, asked, changed for another, and asked again where one dies."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from immunonet._imports import require
from immunonet.evaluation import cluster
from immunonet.memory.store import Memory
from immunonet.service.answering import Answering, Load, settle
from immunonet.service.batching import Inputs, Result

# How often a batch is sent again whose replica died, and the seconds before that.
RETRIES, PAUSE = 20, 0.5


class Replica:
    """One of the processes that answer. Ray Serve makes it, tells it which folder, and asks it."""

    def __init__(
        self, load: Load, batch: int, seed: int | None, memory: tuple[str, int | None] | None, threads: int, alone: bool
    ) -> None:
        if alone:
            _stay_inside()
        torch.set_num_threads(threads)
        opened = None if memory is None else Memory(memory[0], capacity=memory[1])
        self._answering = Answering(load, batch=batch, seed=seed, memory=opened)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take the defence of a folder; batches that are under way end with the one before."""
        await asyncio.to_thread(self._answering.read, Path(config["folder"]))
        settle()

    async def answer(self, x: Inputs, sources: Sequence[str]) -> list[Result]:
        """Return the results of a batch."""
        return await asyncio.to_thread(self._answering.answer, x, sources)


class Replicas:
    """Replicas that answer for a front, on the Ray cluster at `address`, or one of their own on this machine alone.

    Args:
        load: reads a defence from a folder; see `answering.Load`.
        memory: the folder that they answer from and remember in, if any.
        capacity: most entries there; None: as many as come.
        replicas: how many, or (least, most) between which Ray Serve chooses by what waits.
        threads: of each; None: this machine's, shared evenly.
        address: "auto" or "HOST:PORT" of a cluster, which must see the folder; None: one of its own on this machine.
        gpu: whether each has one.
    """

    def __init__(
        self, load: Load, *, batch: int, memory: Path | None = None, capacity: int | None = None,
        replicas: int | tuple[int, int] = 1, threads: int | None = None, seed: int | None = None,
        address: str | None = None, gpu: bool = False, resent: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._load, self._batch, self._seed, self._address, self._resent = load, batch, seed, address, resent
        self.memory, self._capacity = memory, capacity
        # Others on the same cluster are left alone.
        self._name = f"immunonet-{uuid.uuid4().hex[:8]}"
        self.least, self.most = replicas if isinstance(replicas, tuple) else (replicas, replicas)
        self.threads = threads or max(1, (os.cpu_count() or 1) // self.most)
        self._gpu = gpu
        self._cluster: cluster.Cluster | None = None
        self._handle: Any = None
        self._read = 0

    def connect(self) -> None:
        """Connect to the cluster, or start one; in the main thread, before signals are handled, which Ray takes."""
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        self._cluster = cluster.Cluster(self._address or cluster.HERE)

    def opened(self) -> Memory:
        """Return their memory as another process of its own opens it."""
        assert self.memory is not None
        return Memory(self.memory, capacity=self._capacity)

    def check_memory(self) -> None:
        """Raise ValueError where their memory holds more than they may keep, before they let any of it go."""
        most = self._capacity
        if self.memory is not None and most is not None and (held := len(self.opened())) > most:
            raise ValueError(f"--capacity must be at least the {held:,} entries of {self.memory}, got {most:,}")

    def start(self, folder: Path) -> None:
        """Start them with the defence of a folder, and return when they answer; the errors of reading it are raised."""
        require("ray.serve", "serve").start(proxy_location="Disabled")
        self.read(folder)

    def read(self, folder: Path) -> None:
        """Have all of them take the defence of a folder, one after the other; nothing that is asked meanwhile is lost.

        What cannot be read is an error before any replica is asked to.
        """
        serve = require("ray.serve", "serve")
        self._load(folder)
        self._read += 1
        scale: dict[str, Any] = (
            {"num_replicas": self.most}
            if self.least == self.most
            else {"autoscaling_config": {"min_replicas": self.least, "max_replicas": self.most,
                                         "target_ongoing_requests": 1.5}}
        )  # fmt: skip
        deployment = serve.deployment(
            Replica, name="Replica", max_ongoing_requests=2, health_check_period_s=2,
            health_check_timeout_s=30, graceful_shutdown_timeout_s=20,
            user_config={"folder": str(folder), "read": self._read},
            ray_actor_options={"num_cpus": self.threads, "num_gpus": int(self._gpu)}, **scale,
        )  # fmt: skip
        # Of one version, so that replicas are told to read again and none is made anew: Serve gives each its own else.
        deployment = deployment.options(version="1", _internal=True)
        memory = None if self.memory is None else (str(self.memory), self._capacity)
        bound = deployment.bind(self._load, self._batch, self._seed, memory, self.threads, self._address is None)
        try:
            self._handle = serve.run(bound, name=self._name, route_prefix=None)
        except RuntimeError as error:
            told = [line for line in str(error).splitlines() if "Error: " in line] or [str(error)]
            raise ValueError(f"the replicas do not start: {told[-1].strip()}") from error

    async def send(self, x: Inputs, sources: Sequence[str]) -> list[Result]:
        """Return the results of a batch, from another replica where one dies over it."""
        gone = require("ray.exceptions", "serve").RayActorError
        for left in reversed(range(RETRIES)):
            try:
                found: list[Result] = await self._handle.answer.remote(x, list(sources))
                return found
            except gone:
                if not left:
                    raise
                self._resent()
                await asyncio.sleep(PAUSE)
        raise AssertionError("a try returns or raises")

    def stop(self) -> None:
        """End the replicas, with the cluster if it was started here; what else runs on another stays."""
        if self._cluster is not None:
            if self._address is not None:
                require("ray.serve", "serve").delete(self._name)
            self._cluster.close()


def _stay_inside() -> None:
    """Have this replica's own port listen on the loopback: Ray Serve opens it on all interfaces and has no setting."""
    replica = require("ray.serve._private.replica", "serve")
    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", "127.0.0.1"))
