"""A repertoire larger than memory: RAILS on images that stay on disk, its peak memory, and the same on a part in RAM.

python benchmarks/larger.py --json results/larger.json
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common
from common import Row
from immunonet import RAILS, Maturation

CLASSES, CHANNELS, CHUNK = 10, 3, 1000
GIB = 2**30


class Net(nn.Module):
    """Bytes `(B, 3, side, side)` to 10 logits; untrained, by way of 512 features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(CHANNELS, 16, 7, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `(B, 10)` of bytes as float32."""
        logits: Tensor = self.head(self.body(x / 255))
        return logits


def images(n: int, side: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return n noisy images of ten patterns, bytes `(n, 3, side, side)`, and their labels; the same for a seed."""
    cells = np.random.default_rng(99).integers(32, 192, (CLASSES, CHANNELS, 8, 8), dtype=np.uint8)
    patterns = np.kron(cells, np.ones((-(-side // 8),) * 2, np.uint8))[..., :side, :side]
    draw = np.random.default_rng(seed)
    y = draw.integers(0, CLASSES, n)
    return patterns[y] + draw.integers(0, 64, (n, CHANNELS, side, side), dtype=np.uint8), y


def written(path: Path, n: int, side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return n images in a mapped file, and their labels."""
    if shutil.disk_usage(path.parent).free < 2 * n * CHANNELS * side**2:
        raise SystemExit(f"{path.parent} must have room for twice {n * CHANNELS * side**2:,} bytes: give another --out")
    labels = []
    with open(path, "wb") as file:
        for start in range(0, n, CHUNK):
            x, y = images(min(CHUNK, n - start), side, start)
            file.write(x.tobytes())
            labels.append(y)
    return np.memmap(path, np.uint8, "r", shape=(n, CHANNELS, side, side)), np.concatenate(labels)


def peak() -> float:
    """Return the most memory that this process has had so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def larger(options: argparse.Namespace) -> list[Row]:
    """Return what fit and some answers took on images that stay on disk; they are removed in the end."""
    options.out.mkdir(parents=True, exist_ok=True)
    settings = Maturation(population=options.population, neighbours=5, generations=options.generations)

    def defence() -> RAILS:
        return RAILS(Net().eval(), "body", maturation=settings, bounds=(0, 255), seed=options.seed)

    asked, truth = (torch.from_numpy(part) for part in images(options.images, options.side, 2**40))
    before = peak()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        x, y = written(Path(folder) / "images", options.examples, options.side)
        start = time.perf_counter()
        rails = defence().fit(x, y, calibration=options.calibration, keep="source")
        fitted = time.perf_counter()
        labels = rails.predict(asked)
        answered, most = time.perf_counter(), peak()
        part = slice(min(options.part, options.examples))
        here, there = (
            defence().fit(x[part], y[part], calibration=options.calibration, keep=keep)(asked)
            for keep in ("memory", "source")
        )
    return [
        {
            "examples": options.examples, "side": options.side, "float32_GiB": 4 * x.size / GIB,
            "on_disk_GiB": x.size / GIB, "fit_seconds": fitted - start, "answers": len(asked),
            "seconds_per_answer": (answered - fitted) / len(asked), "accuracy": float((labels == truth).float().mean()),
            "peak_GiB": most, "before_GiB": before, "part": part.stop, "same_answers": torch.equal(here, there),
        }
    ]  # fmt: skip


def main() -> None:
    """Run it."""
    p = common.parser(__doc__)
    p.add_argument("--examples", type=int, default=100_000)
    p.add_argument("--side", type=int, default=96)
    p.add_argument("--images", type=int, default=100, help="how many are answered")
    p.add_argument("--part", type=int, default=2000, help="examples that are compared with those in memory")
    p.add_argument("--population", type=int, default=200)
    p.add_argument("--generations", type=int, default=5)
    p.add_argument("--calibration", type=float, default=0.01)
    options = p.parse_args()
    common.use_threads(options.threads)
    common.run(options, {"larger": lambda: larger(options)})


if __name__ == "__main__":
    main()
