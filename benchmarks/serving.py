"""What a service costs: throughput against in-process batches, latency under load, replicas and services killed, fuzz.

Everything runs on this machine, on the loopback; every loop is bounded in count and time.

    python benchmarks/serving.py --data DIR --json results/serving.json
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import torch

import common
from common import Row
from immunonet import Memory, data
from immunonet.cli import main as command
from immunonet.cli.serve import loaded
from immunonet.client import AsyncClient, ServiceError

JSON = {"Content-Type": "application/json"}
PORT, PATIENCE = 8950, 300


class Served:
    """`immunonet serve` of a folder, in a `with` block."""

    def __init__(self, folder: Path, weights: Path, *options: str) -> None:
        self._command = [
            sys.executable, "-c", "from immunonet.cli import main; main()", "serve", str(folder), "--weights",
            str(weights), "--port", str(PORT), "--no-explore", *options,
        ]  # fmt: skip
        self.url = f"http://127.0.0.1:{PORT}"

    def __enter__(self) -> Served:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(10 * PATIENCE):
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError("the service was not ready in time")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def replicas(self) -> list[int]:
        found = subprocess.run(["pgrep", "-f", "ray::ServeReplica"], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]


def fitted(folder: Path, directory: Path, weights: Path, spec: str) -> None:
    with contextlib.suppress(SystemExit):
        command(["fit", "--dataset", "mnist", "--data", str(directory), "--weights", str(weights), "--defence", spec,
                 "--out", str(folder)])  # fmt: skip


def in_process(folder: Path, weights: Path, x: torch.Tensor, batch: int) -> float:
    """Return images per second of `predict` in this process, on all threads."""
    defence = loaded(folder, model=None, weights=weights, device="cpu").defence
    defence.predict(x[:batch])
    began = time.perf_counter()
    for part in x.split(batch):
        defence.predict(part)
    return len(x) / (time.perf_counter() - began)


def connected(url: str) -> aiohttp.ClientSession:
    """Return a client that takes little of the cores which it shares with the service."""
    everywhere = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(url, connector=everywhere, timeout=aiohttp.ClientTimeout(60), headers=JSON)


async def closed_loop(url: str, x: torch.Tensor, clients: int, seconds: float) -> dict[str, Any]:
    """Return what clients that ask one image after the other get: images per second and latencies in ms."""
    bodies = [json.dumps({"inputs": x[i : i + 1].tolist()}) for i in range(len(x))]
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def one(client: aiohttp.ClientSession, k: int) -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            async with client.post("/v1/respond", data=bodies[k % len(bodies)]) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            times.append(time.perf_counter() - began)
            k += clients

    began = time.perf_counter()
    async with connected(url) as client:
        await asyncio.gather(*(one(client, k) for k in range(clients)))
    return {"clients": clients, "rate": len(times) / (time.perf_counter() - began)} | quantiles(times)


async def open_loop(url: str, x: torch.Tensor, rate: float, seconds: float) -> dict[str, Any]:
    """Return what comes of requests that arrive at random at a rate, whether or not others are answered."""
    bodies = [json.dumps({"inputs": x[i : i + 1].tolist()}) for i in range(len(x))]
    drawn = random.Random(0)
    taken: list[float] = []
    refused: list[float] = []
    other: list[int] = []

    async def one(client: aiohttp.ClientSession, k: int) -> None:
        began = time.perf_counter()
        async with client.post("/v1/respond", data=bodies[k % len(bodies)]) as answer:
            await answer.read()
        took = time.perf_counter() - began
        if answer.status == 200:
            taken.append(took)
        elif answer.status in (429, 503):
            refused.append(took)
        else:
            other.append(answer.status)

    async with connected(url) as client:
        tasks, k, end = [], 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            tasks.append(asyncio.create_task(one(client, k)))
            k += 1
            await asyncio.sleep(drawn.expovariate(rate))
        await asyncio.gather(*tasks)
    return {
        "rate": rate, "sent": len(tasks), "taken": len(taken), "refused": len(refused), "other": len(other),
        **quantiles(taken), **{f"refused_{k}": v for k, v in quantiles(refused).items()},
    }  # fmt: skip


def quantiles(times: list[float]) -> dict[str, float]:
    if len(times) < 2:
        return {}
    cuts = statistics.quantiles(times, n=100)
    return {"median_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}


async def killing(served: Served, x: torch.Tensor, requests: int, every: float) -> dict[str, Any]:
    """Return what becomes of requests while a replica is killed every so many seconds."""
    answers: dict[int, list[int]] = {}
    failed: list[str] = []
    killed, done = 0, asyncio.Event()

    async def kill() -> None:
        nonlocal killed
        while not done.is_set():
            try:
                await asyncio.wait_for(done.wait(), every)
            except TimeoutError:
                for pid in served.replicas()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1

    async with AsyncClient(served.url, timeout=120, retries=8) as client:
        todo = iter(range(requests))

        async def one() -> None:
            for k in todo:
                try:
                    found = await client.respond(x[k % len(x)][None])
                    answers.setdefault(k % len(x), []).append(found[0].label)
                except ServiceError as error:
                    failed.append(str(error))

        killer = asyncio.create_task(kill())
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(32)))
        took = time.perf_counter() - began
        done.set()
        await killer
    # An image has one label at all times but where its votes are nearly even.
    changed = sum(len(set(labels)) > 1 for labels in answers.values())
    return {
        "requests": requests, "answered": sum(map(len, answers.values())), "failed": len(failed), "killed": killed,
        "seconds": took, "images": len(answers), "images_with_two_labels": changed,
    }  # fmt: skip


async def remembering(served: Served, x: torch.Tensor, seconds: float) -> list[str]:
    """Return the ids that were acknowledged until the service was killed."""
    found: list[str] = []

    async def one(client: AsyncClient, k: int) -> None:
        while True:
            try:
                found.extend(r.id for r in await client.respond(x[k % len(x)][None]))
            except OSError:
                return
            k += 8

    async with AsyncClient(served.url, retries=0) as client:
        tasks = [asyncio.create_task(one(client, k)) for k in range(8)]
        await asyncio.sleep(seconds)
        subprocess.run(["pkill", "-KILL", "-f", "ray::ServeReplica"], check=False)
        served.process.kill()
        await asyncio.gather(*tasks)
    return found


async def nonsense(url: str, pid: int, requests: int) -> dict[str, Any]:
    """Return what malformed requests get: statuses, and by how much the front's memory grew."""
    drawn = random.Random(0)
    statuses: dict[int, int] = {}
    traces = 0
    kinds = ["application/json", "image/png", "image/jpeg", "text/plain", ""]

    def body() -> bytes:
        made = drawn.randrange(6)
        if made == 0:
            return drawn.randbytes(drawn.randrange(5000))
        if made == 1:
            return b'{"inputs": ' + b"[" * drawn.randrange(20_000)
        if made == 2:
            return json.dumps({"inputs": [[drawn.choice([None, "a", 1e999, True, {}, 7]) for _ in range(20)]]}).encode()
        if made == 3:
            return b'{"inputs": [' + b"9" * drawn.randrange(8000) + b"]}"
        if made == 4:
            return b"\x89PNG\r\n\x1a\n" + drawn.randbytes(200)
        return b'{"inputs": [' + b"0.1," * 3_000_000 + b"0]}" if drawn.random() < 0.05 else b"{}"

    before = resident(pid)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(requests):
            path = drawn.choice(["/v1/respond"] * 6 + ["/v1/feedback", "/v1/memory/rollback"])
            answer = await client.post(path, content=body(), headers={"Content-Type": drawn.choice(kinds)})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            traces += "Traceback" in answer.text
    return {
        "requests": requests, "statuses": statuses, "of_5xx": sum(n for s, n in statuses.items() if s >= 500),
        "tracebacks": traces, "grown_MiB": (resident(pid) - before) / 2**20,
    }  # fmt: skip


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    p = common.parser(__doc__)
    p.set_defaults(weights=Path("weights/mnist.safetensors"))
    p.add_argument("--defence", default="rails input generations=10")
    p.add_argument("--images", type=int, default=512)
    p.add_argument("--seconds", type=float, default=30, help="of each load")
    p.add_argument("--requests", type=int, default=20_000, help="while replicas are killed")
    p.add_argument("--every", type=float, default=20, help="seconds between two that are killed")
    p.add_argument("--malformed", type=int, default=1000)
    options = p.parse_args()
    x = data.load("mnist", "test", directory=options.data).x[: options.images]
    with tempfile.TemporaryDirectory() as place:
        folder, memory = Path(place) / "defence", Path(place) / "memory"
        fitted(folder, options.data, options.weights, options.defence)

        def load() -> list[Row]:
            inside = max(in_process(folder, options.weights, x, batch) for batch in (32, 256))
            with Served(folder, options.weights) as served:
                asyncio.run(closed_loop(served.url, x, 32, 5))
                full = asyncio.run(closed_loop(served.url, x, 32, options.seconds))
                half = asyncio.run(open_loop(served.url, x, full["rate"] / 2, options.seconds))
                more = asyncio.run(open_loop(served.url, x, full["rate"] * 4, options.seconds))
            known = {"in_process_rate": inside, "share_of_it": full["rate"] / inside, "batch_ms": 32e3 / inside}
            return [{"load": "32 clients"} | full | known, {"load": "half of that"} | half, {"load": "4 times"} | more]

        def kills() -> list[Row]:
            with Served(folder, options.weights, "--replicas", "2", "--threads", "1", "--seed", "0") as served:
                return [asyncio.run(killing(served, x, options.requests, options.every))]

        def writes() -> list[Row]:
            with Served(folder, options.weights, "--memory", str(memory)) as served:
                acknowledged = set(asyncio.run(remembering(served, x, options.seconds)))
            held = set(Memory(memory).columns("id")["id"].to_pylist())
            return [{"acknowledged": len(acknowledged), "lost": len(acknowledged - held)}]

        def malformed() -> list[Row]:
            with Served(folder, options.weights) as served:
                asyncio.run(nonsense(served.url, served.process.pid, 100))
                return [asyncio.run(nonsense(served.url, served.process.pid, options.malformed))]

        common.run(options, {"load": load, "kills": kills, "writes": writes, "malformed": malformed})


if __name__ == "__main__":
    main()
