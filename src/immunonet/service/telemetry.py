"""What a service tells of itself: metrics for Prometheus, and a line of JSON per request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from immunonet._imports import require
from immunonet.service.batching import Result

log = logging.getLogger("immunonet.service")


class Telemetry:
    """Counts and times of one service, in a registry of its own. No input, nor what it is like, is in any of them."""

    def __init__(self) -> None:
        made = require("prometheus_client", "serve")
        self._registry = made.CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "immunonet"}
        self._requests = made.Counter("requests", "Requests by route and status.", ["route", "status"], **own)
        times = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self._seconds = made.Histogram("request_seconds", "Time to an answer.", ["route"], buckets=times, **own)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self._batches = made.Histogram("batch_inputs", "Inputs answered together.", buckets=sizes, **own)
        self._counts = {
            name: made.Counter(name, about, **own)
            for name, about in (
                ("inputs", "Inputs answered."),
                ("foreign", "Inputs that looked foreign."),
                ("recalls", "Inputs answered from memory."),
                ("flags", "Queries that looked like one of many near copies."),
                ("resent", "Batches sent again because a replica died."),
            )
        }
        self._gauges = {
            name: made.Gauge(name, about, **own)
            for name, about in (("queue_inputs", "Inputs that wait."), ("memory_entries", "Entries in the memory."))
        }
        self._written: Callable[[Any], bytes] = made.generate_latest
        self.kind: str = made.CONTENT_TYPE_LATEST

    def watch(self, gauge: str, value: Callable[[], float]) -> None:
        """Read a gauge from a function when it is asked for."""
        self._gauges[gauge].set_function(value)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a count."""
        self._counts[name].inc(by)

    def batch(self, size: int) -> None:
        """Note a batch that was answered."""
        self._batches.observe(size)

    def answered(self, results: Sequence[Result]) -> None:
        """Note what was answered."""
        self.count("inputs", len(results))
        for count, key in (("foreign", "foreign"), ("recalls", "recalled")):
            self.count(count, sum(bool(one[key]) for one in results))

    def request(self, began: float, route: str, status: int, **known: Any) -> None:
        """Note a request that began at `time.perf_counter()`, and log it in one line."""
        seconds = time.perf_counter() - began
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        level = logging.INFO if route.startswith("/v1/") else logging.DEBUG
        log.log(level, json.dumps({"time": time.time(), "route": route, "status": status, "seconds": seconds} | known))

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return self._written(self._registry)
