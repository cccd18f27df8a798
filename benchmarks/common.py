"""What the benchmarks share: options, data, PGD images, timing, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from immunonet import _store, data, zoo
from immunonet.attacks import PGD
from immunonet.evaluation.records import environment, public

Row = dict[str, Any]


class Setting(NamedTuple):
    """The network, the repertoire, and test images, half of them clean and half attacked."""

    net: zoo.MnistNet
    x: Tensor
    y: Tensor
    clean: Tensor
    attacked: Tensor
    labels: Tensor


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of every benchmark."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, default=os.environ.get("IMMUNONET_DATA"), help="folder of Parquet files")
    p.add_argument("--weights", type=Path, default=Path("weights/mnist.safetensors"))
    p.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for what is kept between runs")
    p.add_argument("--json", type=Path, help="write the results to this file")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="*", help="run only these parts")
    return p


def mnist(options: argparse.Namespace, examples: int, n: int) -> Setting:
    """Return MNIST: the first training examples, and the first `n` test images clean and under PGD on the network.

    PGD as in the published experiments: eps 60/255, step 20/255, 20 iterations, no random start.
    """
    net = cast(zoo.MnistNet, zoo.build("mnist"))
    zoo.load_weights(net, options.weights)
    train = data.load("mnist", "train", directory=options.data)
    test = data.load("mnist", "test", directory=options.data)
    clean, labels = test.x[:n], test.y[:n]
    cached = options.out / f"pgd-{n}-{_store.digest([*net.parameters(), clean])[:12]}.safetensors"
    if not cached.exists():
        attack = PGD(eps=60 / 255, step=20 / 255, iterations=20, random_start=False)
        _store.write_tensors(cached, {"x": attack(net, clean, labels).adversarials})
    return Setting(net, train.x[:examples], train.y[:examples], clean, load_file(cached)["x"], labels)


def use_threads(n: int) -> None:
    """Let torch and, if it is installed, numba run on n threads."""
    torch.set_num_threads(n)
    with contextlib.suppress(ImportError):
        importlib.import_module("numba").set_num_threads(n)


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the median time of several runs, and what the last one gave."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table, one column per key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([text(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def text(value: Any) -> str:
    """Return a value for a table: numbers to four digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def run(options: argparse.Namespace, jobs: dict[str, Callable[[], list[Row]]]) -> None:
    """Run the jobs that are asked for, show their tables, and keep each in the JSON file as it ends.

    Tables of other jobs stay in the file, with the environment and the command that they were made by.
    """
    if unknown := set(options.only or ()) - set(jobs):
        raise SystemExit(f"--only must be some of {', '.join(jobs)}, got {', '.join(unknown)}")
    known = options.json is not None and options.json.exists()
    tables = _store.read_json(options.json)["tables"] if known else {}
    for name in options.only or jobs:
        rows = jobs[name]()
        show(name, rows)
        if options.json is not None:
            settings = {k: v for k, v in vars(options).items() if k not in ("data", "out", "json", "only", "weights")}
            tables[name] = {
                "rows": rows,
                "settings": settings,
                "environment": environment() | {"load_average": round(os.getloadavg()[1], 2)},
                "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(public, sys.argv[1:])]),
            }
            _store.write_json(options.json, {"tables": tables})
