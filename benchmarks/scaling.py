"""What a repertoire takes as examples and classes grow: measured up to what fits here, a simple model beyond.

python benchmarks/scaling.py --threads 1 --json results/scaling.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import common
from common import Row
from immunonet import RAILS, Maturation
from immunonet.features.search import ExactIndex

NEIGHBOURS = 10
# Bytes an example takes beside its features: their square, float32; its label, number, two places and digest, int64.
BESIDE = 4 + 5 * 8
GIB = 2**30


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of several runs, after one: others may share the machine."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def clustered(n: int, classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Return n random points `(n, width)` about a centre per class, in [0, 1], and their labels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    x = torch.randn(n, width, generator=generator).mul_(0.05)
    x += torch.rand(classes, width, generator=generator)[y]
    return x.clamp_(0, 1), y


def searches(options: argparse.Namespace) -> list[Row]:
    """Return the time of an exact search per antigen, by examples and classes."""
    rows: list[Row] = []
    for n, classes in itertools.product(options.examples, options.classes):
        if n < 2 * NEIGHBOURS * classes:
            continue
        x, y = clustered(n, classes, options.width)
        queries = x[torch.linspace(0, n - 1, options.batch).long()] + 0.01
        order = y.argsort(stable=True)
        counts = torch.bincount(y, minlength=classes).tolist()
        index = ExactIndex(x[order], order, counts)
        taken = seconds(lambda index=index, queries=queries: index.nearest(queries, NEIGHBOURS), options.repeats)  # type: ignore[misc]
        rows.append(
            {"examples": n, "classes": classes, "features": options.width, "ms_per_antigen": 1e3 * taken / len(queries)}
        )
    return rows


def answers(options: argparse.Namespace) -> list[Row]:
    """Return the time of a whole answer by classes, cells being inputs and affinity in a layer of a small network."""
    rows: list[Row] = []
    for classes in options.classes:
        n = max(2 * NEIGHBOURS * classes, 2000)
        if n > max(options.examples):
            continue
        x, y = clustered(n, classes, options.width)
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(options.width, options.width), nn.ReLU(), nn.Linear(options.width, classes)
        ).eval()
        settings = Maturation(generations=10, early_stop=None, prune=None)
        held = (x[:20], y[:20])
        rails = RAILS(net, "1", maturation=settings, seed=0).fit(x, y, calibration=held)
        asked = x[torch.linspace(0, n - 1, 4).long()]
        row = {"examples": n, "classes": classes, "with_cells": settings.populated(classes)}
        taken = seconds(lambda rails=rails, asked=asked: rails.predict(asked), options.repeats)  # type: ignore[misc]
        rows.append(row | {"cells": settings.total(classes), "ms_per_answer": 1e3 * taken / len(asked)})
    return rows


def fitted(rows: list[Row]) -> tuple[float, float]:
    """Return milliseconds per million values that are compared, and per class, by least squares of relative errors."""
    values = torch.tensor([[r["examples"] * r["features"] / 1e6, r["classes"]] for r in rows], dtype=torch.float64)
    taken = torch.tensor([r["ms_per_antigen"] for r in rows], dtype=torch.float64)
    both = torch.linalg.lstsq(values / taken[:, None], torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0]
    if bool((both < 0).any()):
        both = torch.tensor([float((taken / values[:, 0]).median()), 0.0])
    return float(both[0]), float(both[1])


def model(options: argparse.Namespace, known: list[Row]) -> list[Row]:
    """Return memory, time and cost per antigen by the decade, by the model of what is known, and what was measured."""
    a, b = fitted(known)
    measured = {(row["examples"], row["classes"]): row["ms_per_antigen"] for row in known}
    rows: list[Row] = []
    for n, classes in itertools.product([10**e for e in range(5, 10)], [10**e for e in range(1, 6)]):
        if n < 2 * NEIGHBOURS * classes:
            continue
        taken = a * n * options.width / 1e6 + b * classes
        memory = n * (4 * options.width + BESIDE) / GIB
        found = measured.get((n, classes))
        rows.append(
            {
                "examples": n, "classes": classes, "features_GiB": memory,
                "machines_of_64_GiB": max(1, -(-memory // 48)), "search_ms": taken,
                "measured_ms": "" if found is None else found,
                "dollars_per_1000": taken * options.price / 3600,
            }
        )  # fmt: skip
    return rows


def nodes(options: argparse.Namespace) -> list[Row]:
    """Return how often answers with parts on two machines of a cluster, one of which then dies, are those of one part.

    Both machines are this one: two nodes of Ray, each with processes of its own.
    """
    import ray
    from ray.cluster_utils import Cluster

    from immunonet.features.partitioned import OnRay

    n = min(options.examples)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(options.width, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x, y = clustered(n, 10, options.width)
    rails = RAILS(net, "input", maturation=Maturation(population=100, generations=2), seed=0).fit(x, y)
    antigens = (x[torch.linspace(0, n - 1, options.batch).long()] + 0.05).clamp(0, 1)

    def row(what: str) -> Row:
        start = time.perf_counter()
        found = rails.respond(antigens)
        taken = time.perf_counter() - start
        same = torch.equal(found.labels, one.labels), torch.equal(found.votes, one.votes)
        return {"what": what, "images": len(antigens), "seconds": taken, "same_labels": same[0], "same_votes": same[1]}

    one = rails.respond(antigens)
    rows = [row("one part")]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    try:
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        rails.partition(2, on=OnRay)
        rows += [row("two machines, the first answer"), row("two machines")]
        cluster.remove_node(second, allow_graceful=False)
        rows += [row("one of them was killed"), row("the one that is left")]
    finally:
        ray.shutdown()
        cluster.shutdown()
    return rows


def main() -> None:
    """Run the parts that are asked for."""
    p = common.parser(__doc__)
    p.add_argument("--examples", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    p.add_argument("--classes", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    p.add_argument("--width", type=int, default=128, help="features of an example")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--price", type=float, default=0.05, help="of an hour of one core")
    options = p.parse_args()
    common.use_threads(options.threads)
    known = functools.cache(lambda: searches(options))
    common.run(options, {
        "searches": known,
        "answers": lambda: answers(options),
        "model": lambda: model(options, known()),
        "nodes": lambda: nodes(options),
    })  # fmt: skip


if __name__ == "__main__":
    main()
