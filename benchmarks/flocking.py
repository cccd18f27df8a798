"""Flocking where features are too many to hold or to search one by one.

python benchmarks/flocking.py --data DIR --json results/flocking.json
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common
from common import Row
from immunonet import RAILS
from immunonet.features.search import ExactIndex

K = 10


class Relu2(nn.Module):
    """The MNIST network up to its second ReLU: 64 x 28 x 28 = 50,176 values."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(net.conv1, nn.ReLU(), net.conv2, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def memory(what: str) -> int:
    """Return the resident memory of this process in bytes (Linux): "VmRSS", at most "VmHWM", of files "RssFile"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {what}")


def forget_peak() -> None:
    """Let "VmHWM" start again from now."""
    Path("/proc/self/clear_refs").write_text("5")


def recall(found: Tensor, exact: Tensor) -> Tensor:
    """Return the share of found distances `(B, C, K)` that are no farther than the exact K-th, `(B,)`."""
    return (found <= exact[..., -1:] * (1 + 1e-4)).float().flatten(1).mean(1)


def wide(options: argparse.Namespace) -> list[Row]:
    """Return figures of a 50,176-wide layer, each way in a fresh process, whose peak memory is its own."""
    rows = []
    for way in ("recomputed", "feature file"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(_wide, (options, way)))
    return rows


def _wide(options: argparse.Namespace, way: str) -> Row:
    common.use_threads(options.threads)
    setting = common.mnist(options, options.examples, 500)
    rails = RAILS(setting.net, Relu2(setting.net), memory_budget=options.memory_budget, seed=options.seed)
    file = None if way == "recomputed" else options.out / "features.f16"
    forget_peak()
    before, mapped, start = memory("VmRSS"), memory("RssFile"), time.perf_counter()
    try:
        rails.fit(setting.x, setting.y, (setting.clean[440:], setting.labels[440:]), feature_file=file)
        fit, peak, mapped = time.perf_counter() - start, memory("VmHWM") - before, memory("RssFile") - mapped
        half = options.queries // 2
        x = torch.cat([setting.clean[: options.batch // 2], setting.attacked[: options.batch // 2]])
        index = rails.index()
        taken, _ = common.seconds(lambda: rails.naive(x), options.repeats)
        alone = [common.seconds(lambda i=i: rails.naive(x[i : i + 1]), 1)[0] for i in range(min(5, len(x)))]
        row: Row = {
            "features": way,
            "examples": len(setting.x),
            "index": type(index).__name__,
            "fit_seconds": fit,
            "fit_peak_GiB": peak / 2**30,
            "of_it_pages_of_the_file_GiB": max(0, mapped) / 2**30 if file else 0.0,
            "ms_per_antigen": 1e3 * taken / len(x),
            "batch": len(x),
            "ms_at_batch_1": 1e3 * statistics.median(alone),
        }
        if file is not None:
            queries = torch.cat([setting.clean[:half], setting.attacked[:half]])
            _, found = rails.naive(queries)
            exact = _exact(rails, queries)
            clean, attacked = recall(found, exact).chunk(2)
            row |= {"queries": len(queries), "recall_clean": clean.mean().item(), "recall_pgd": attacked.mean().item()}
        return row
    finally:
        for path in options.out.glob("features.f16*"):
            path.unlink()


@torch.no_grad()
def _exact(rails: RAILS, queries: Tensor) -> Tensor:
    """Return the distances `(B, C, K)` of the nearest of every class, all features passing by once."""
    goals = rails.features(queries)[0]
    # Centred, a distance has all the digits that recall looks at.
    centre = goals.mean(0)
    goals = goals - centre
    far = torch.empty(len(queries), len(rails.repertoire.x))
    for part in torch.arange(far.shape[1]).split(250):
        rows = rails.index().rows(part).sub_(centre)
        squares = goals.square().sum(1, keepdim=True) + rows.square().sum(1)
        far[:, part] = (squares - 2 * goals @ rows.T).clamp(min=0).sqrt()
    y = rails.repertoire.y
    return torch.stack([far[:, y == c].topk(K, dim=1, largest=False).values for c in range(rails.classes)], 1)


def mixture(n: int, width: int, classes: int, draw: int, *, rank: int = 8, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return n rows of a fixed mixture: each class a mean and a subspace of its own, plus noise; and their classes."""
    shape = torch.Generator().manual_seed(1)
    means = torch.randn(classes, width, generator=shape)
    spans = torch.randn(classes, rank, width, generator=shape)
    generator = torch.Generator().manual_seed(draw)
    y = torch.arange(n) % classes
    x = torch.randn(n, width, generator=generator).mul_(noise)
    latent = torch.randn(n, rank, generator=generator)
    for c in range(classes):
        x[c::classes] += means[c] + latent[c::classes] @ spans[c]
    return x, y


def rows(options: argparse.Namespace) -> list[Row]:
    """Return figures of many narrow rows, for the library with and without signatures, scikit-learn and FAISS."""
    x, y = mixture(options.rows, options.width, 10, 0)
    queries, _ = mixture(options.batch, options.width, 10, 2)
    # Half of the queries are perturbed by half of their distance to a point of another class.
    half = len(queries) // 2
    queries[:half] += 0.5 * (queries[:half].roll(1, 0) - queries[:half])
    order, counts = y.argsort(stable=True), torch.bincount(y).tolist()
    grouped = x[order]
    del x
    groups = [part.numpy() for part in grouped.split(counts)]
    peers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        # It keeps its own centred copy.
        "immunonet": lambda: _library(ExactIndex(grouped.clone(), order, counts)),
        "immunonet, no signatures": lambda: _library(_bare(ExactIndex(grouped.clone(), order, counts))),
        "scikit-learn brute": lambda: _scikit(groups),
        "FAISS IndexFlatL2": lambda: _faiss(groups),
    }
    exact = _scikit(groups)(queries)
    found = []
    for name, make in peers.items():
        try:
            start = time.perf_counter()
            search = make()
        except ImportError:
            found.append({"search": f"{name} (not installed)"})
            continue
        build = time.perf_counter() - start
        taken, distances = common.seconds(lambda search=search: search(queries), options.repeats)
        alone = [
            common.seconds(lambda i=i, search=search: search(queries[i : i + 1]), 1)[0]
            for i in range(min(10, len(queries)))
        ]
        hits = recall(distances, exact)
        found.append(
            {
                "search": name,
                "rows": len(grouped),
                "width": grouped.shape[1],
                "build_seconds": build,
                "ms_per_antigen": 1e3 * taken / len(queries),
                "batch": len(queries),
                "ms_at_batch_1": 1e3 * statistics.median(alone),
                "recall_perturbed": hits[:half].mean().item(),
                "recall_clean": hits[half:].mean().item(),
            }
        )
    return found


def _library(index: ExactIndex) -> Callable[[Tensor], Tensor]:
    return lambda q: index.nearest(q, K)[0]


def _bare(index: ExactIndex) -> ExactIndex:
    index.signatures = None
    return index


def _scikit(groups: list[Any]) -> Callable[[Tensor], Tensor]:
    neighbours = importlib.import_module("sklearn.neighbors").NearestNeighbors
    fitted = [neighbours(n_neighbors=K, algorithm="brute", n_jobs=-1).fit(group) for group in groups]
    return lambda q: torch.stack([torch.from_numpy(f.kneighbors(q.numpy())[0]) for f in fitted], 1)


def _faiss(groups: list[Any]) -> Callable[[Tensor], Tensor]:
    faiss = importlib.import_module("faiss")
    fitted = [faiss.IndexFlatL2(group.shape[1]) for group in groups]
    for index, group in zip(fitted, groups, strict=True):
        index.add(group)
    return lambda q: torch.stack(
        [torch.from_numpy(index.search(q.numpy(), K)[0]).clamp(min=0).sqrt() for index in fitted], 1
    )


def main() -> None:
    """Run the parts that are asked for."""
    p = common.parser(__doc__)
    p.add_argument("--examples", type=int, default=60_000, help="of MNIST, on the wide layer")
    p.add_argument("--queries", type=int, default=64, help="queries whose recall is measured, half of them attacked")
    p.add_argument("--rows", type=int, default=1_000_000)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--memory-budget", type=int, default=2**30, help="bytes beyond which features are not kept")
    options = p.parse_args()
    common.use_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    common.run(options, {"rows": lambda: rows(options), "wide": lambda: wide(options)})


if __name__ == "__main__":
    main()
