"""A Ray cluster that does the parts of an evaluation or study: several machines, or the cores of this one.

Ray moves scenes and values between its own processes by pickle, while they run; no pickle is ever read from a file.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from immunonet._imports import require
from immunonet._pictures import first_line
from immunonet.evaluation.bench import Done, Kept, Part, Value, Workers
from immunonet.evaluation.records import VERSION

# Parts handed out per CPU: none waits for work, and what is done does not pile up.
_AHEAD = 4
HERE = "here"
"""The address of a cluster that is started on this machine, for this process alone."""
# How often a part is done again whose worker or machine died, or was out of memory.
_RETRIES = 3
# Ray itself tries for minutes, and may then end the process: so another process tries first, for so many seconds.
_PATIENCE = 12
_QUIET: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
_HOW = (
    "start one with `ray start --head`, join this machine to it with `ray start --address=HOST:PORT`, set "
    "RAY_AUTH_MODE=token if it asks for a token, or give --ray auto for this machine alone (docs/cluster.md)"
)


def workers(address: str | None) -> Workers | None:
    """Return who does the parts: the cluster at `address`, "HOST:PORT", or None, which is this process, for None.

    "auto": the cluster at RAY_ADDRESS, or that this machine was joined to (`ray start`); without any, one is started
    on its CPUs, open to this machine alone, that ends with what is returned. Where Ray is connected already, that
    cluster. ConnectionError for an address where no cluster answers, ImportError without Ray.
    """
    if address is not None and address != "auto" and ":" not in address:
        raise ValueError(f"--ray must be auto or HOST:PORT, got {address!r}: {_HOW}")
    return None if address is None else Cluster(address)


class Cluster:
    """Does parts on a Ray cluster, each on one CPU, and on one GPU if the scene's `device` is one.

    `address`: as `workers` takes it, or `HERE`, one that is started on this machine whatever others there are. A scene
    is sent once, and each worker keeps the last one: it changes with its `revision` alone. `close()`
    leaves the cluster, or ends it if it was started here; so does the end of this object.
    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))  # else it tries for ever
        self._ray = require("ray", "cluster")
        self.close: Callable[[], Any] = lambda: None
        if not self._ray.is_initialized():
            if address == HERE:
                _start(self._ray)
            else:
                _connect(self._ray, address)
            self.close = weakref.finalize(self, self._ray.shutdown)
        self._do = self._ray.remote(max_retries=_RETRIES)(_done)
        self._sent: tuple[Any, Any, Any] = (None, None, None)  # a scene, its revision, and where it is

    def run(self, scene: Any, parts: Sequence[Part], kept: Kept, done: Done) -> None:
        """Do parts, but none that is kept, in any order; `done` is called here, as they come.

        What a part raises is raised, of its own type. Where a worker or a machine dies, its parts are done again;
        OSError where that is in vain. What is there by then is handed to `done`, the rest is given up.
        """
        if not (todo := list(_ordered(parts, kept, set()))):
            return
        ray, there = self._ray, self._ray.cluster_resources()
        gpus = int(getattr(scene, "device", torch.device("cpu")).type == "cuda")
        if there.get("CPU", 0) < 1 or there.get("GPU", 0) < gpus:
            raise ValueError(f"--ray must be a cluster with {'GPUs' if gpus else 'CPUs'}, this one has {there}")
        do, sent = self._do.options(num_cpus=1, num_gpus=gpus), self._send(scene)
        uses = Counter(before.key for part in todo for before in part.after)
        values: dict[str, Any] = {}  # of parts that others to come depend on
        flying: dict[Any, Part] = {}
        try:
            for part in todo:
                while len(flying) >= _AHEAD * there["CPU"]:
                    self._land(flying, done)
                for before in part.after:
                    if before.key not in values:
                        values[before.key] = ray.put(kept(before))
                # A slice of a tensor would bring all of it along.
                args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in part.args]
                value = do.remote(VERSION, [sent], part.run, args, *(values[before.key] for before in part.after))
                flying[value], values[part.key] = part, value
                uses.subtract(before.key for before in part.after)
                values = {key: value for key, value in values.items() if uses[key] > 0}
            while flying:
                self._land(flying, done)
        finally:
            for value in flying:
                ray.cancel(value, force=True)

    def _land(self, flying: dict[Any, Part], done: Done) -> None:
        """Wait until a part is done, and hand on all that are."""
        self._ray.wait(list(flying))
        failed: Exception | None = None
        for value in self._ray.wait(list(flying), num_returns=len(flying), timeout=0)[0]:
            part = flying.pop(value)
            try:
                given = self._ray.get(value)
            except self._ray.exceptions.RayError as error:
                failed = failed or blamed(error, part)
            else:
                done(part, given)
        if failed is not None:
            raise failed

    def _send(self, scene: Any) -> Any:
        revision = getattr(scene, "revision", 0)
        if self._sent[0] is not scene or self._sent[1] != revision:
            try:
                self._sent = scene, revision, self._ray.put(scene)
            except (TypeError, ValueError, AttributeError) as error:
                raise TypeError(
                    f"--ray must be left out: network, defence or attacks cannot be sent to other processes "
                    f"({first_line(error)})"
                ) from error
        return self._sent[2]


def blamed(error: Exception, part: Part) -> Exception:
    """Return what to raise for a part that failed: its own error, or OSError that says what happened to its worker."""
    known = require("ray", "cluster").exceptions
    while isinstance(error, known.RayTaskError) and error.cause is not None:
        error = error.cause
    if not isinstance(error, known.RayError):
        return error
    what = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, known.OutOfMemoryError):
        what = (
            "its machine is out of memory: ask for fewer images per part (--chunk), for fewer parts at a time "
            "(ray start --num-cpus), or take machines with more memory"
        )
    own = OSError(f"--ray: {part.about or part.key} could not be done: {what} (docs/cluster.md)")
    own.__cause__ = error
    return own


def _ordered(parts: Sequence[Part], kept: Kept, seen: set[str]) -> Iterator[Part]:
    """Yield parts that are not kept, each once, after those that they depend on."""
    for part in parts:
        if part.key not in seen:
            seen.add(part.key)
            if kept(part) is None:
                yield from _ordered(part.after, kept, seen)
                yield part


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one; ConnectionError if none answers."""
    told = "" if address == "auto" else address  # else Ray looks for one itself, and for the token to it
    known = told or os.environ.get("RAY_ADDRESS")
    where = known or ray._private.utils.read_ray_address()
    refused = _refused(told) if where else "there is none"
    if not refused:
        ray.init(told or None, **_QUIET)
    elif known:
        raise ConnectionError(f"--ray {address}: no Ray cluster is reached at {where} ({refused}): {_HOW}")
    else:
        _start(ray)


def _start(ray: Any) -> None:
    """Start a cluster for this machine alone."""
    # It listens on all interfaces but where Ray takes the machine for one that never has others beside it.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init("local", include_dashboard=False, **_QUIET)


def _refused(address: str) -> str:
    """Return why a cluster cannot be reached, "" if it can."""
    command = [sys.executable, "-c", "import sys, ray; ray.init(sys.argv[1] or None, log_to_driver=False)", address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as trial:
        with contextlib.suppress(subprocess.TimeoutExpired):
            trial.wait(_PATIENCE)
        trial.kill()
        said = trial.communicate()[1].strip() or f"no answer within {_PATIENCE} seconds"
        return said.splitlines()[-1].rpartition("] ")[2] if trial.returncode else ""


_scene: tuple[Any, Any] = (None, None)  # in a worker: what it came as, and itself


def _done(version: int, sent: list[Any], run: Callable[..., Value], args: Sequence[Any], *given: Value) -> Value:
    """Return what a part gives, in a worker; `sent` holds where its scene is, which is unpacked once."""
    global _scene
    ray = require("ray", "cluster")
    if version != VERSION:
        raise OSError(f"--ray: a machine has another version of immunonet: results {VERSION}, not {version}")
    if _scene[0] != sent[0]:
        _scene = (None, None)  # two may not fit
        _scene = (sent[0], ray.get(sent[0]))
    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources()["CPU"])))
    return run(_scene[1], *args, *given)
