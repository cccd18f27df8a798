# ruff: noqa: E501 - prose and tables
"""Writes docs/performance.md from the JSON files of the other benchmarks; what has no figure is "not measured".

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import common
from common import Row
from immunonet import _store

NONE = "not measured"
# The affine MNIST setting: cells, generations with the expansion, values of a cell, diagonals of the band.
T, ROUNDS, VALUES, TAPS, EXAMPLES = 1000, 11, 784, 41, 20_000


def machine() -> tuple[float, float]:
    """Return the best of five rates of a matrix product, in FLOP/s, and of a copy, in bytes/s."""
    a, big = torch.rand(1024, 1024), torch.rand(2**25)
    out, target = torch.empty_like(a), torch.empty_like(big)
    product, copy = [], []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        product.append(time.perf_counter() - start)
        start = time.perf_counter()
        target.copy_(big)
        copy.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(product), 2 * big.nbytes / min(copy)


def model() -> list[Row]:
    """Return operations and bytes per antigen of every stage of the affine MNIST setting, nothing stopped or pruned."""
    cells = T * ROUNDS * VALUES
    return [
        {"stage": "flocking", "formula": "2 N d; 4 N d / B bytes", "operations": 2.0 * EXAMPLES * VALUES, "bytes": 4.0 * EXAMPLES * VALUES / 21},
        {"stage": "selection", "formula": "about 10 T (G + 1)", "operations": 10.0 * T * ROUNDS, "bytes": 16.0 * T * ROUNDS},
        {"stage": "crossover and mutation", "formula": "about 35 T (G + 1) d; 12 bytes a value", "operations": 35.0 * cells, "bytes": 12.0 * cells},
        {"stage": "distances", "formula": "3 t T (G + 1) d; 4 bytes a value", "operations": 3.0 * TAPS * cells, "bytes": 4.0 * cells},
    ]  # fmt: skip


def pick(tables: dict[str, Any], name: str, key: str, where: tuple[str, Any] | None = None) -> Any:
    """Return one figure of a table, or None if it was not measured."""
    for row in tables.get(name, {}).get("rows", ()):
        if key in row and (where is None or row.get(where[0]) == where[1]):
            return row[key]
    return None


def line(what: str, least: str, found: Any, reached: bool, command: str) -> Row:
    """Return one row of what must be reached."""
    if found is None:
        return {"line": what, "at least": least, "figure": NONE, "reached": NONE, "command": command}
    return {
        "line": what,
        "at least": least,
        "figure": common.text(found),
        "reached": "reached" if reached else "not reached",
        "command": command,
    }


def targets(tables: dict[str, Any]) -> list[Row]:
    """Return every target with its figure."""
    default, full = "defaults (early stop, pruning)", "early_stop=None, prune=None"
    signature = ("search", "SignatureIndex")
    wanted: list[tuple[str, str, tuple[str, tuple[str, Any] | None], float, bool, str]] = [
        ("affine MNIST, defaults, against the loop", "affine", ("ratio_to_loop", ("what", default)), 1000, True, "x"),
        ("affine MNIST, no early stop, no pruning", "affine", ("ratio_to_loop", ("what", full)), 300, True, "x"),
        ("block 1, defaults", "block1", ("ratio_to_loop", ("what", default)), 15, True, "x"),
        ("shortcuts: agreement on clean images", "agreement", ("agreement", ("images", "clean")), 0.995, True, ""),
        ("shortcuts: agreement on PGD images", "agreement", ("agreement", ("images", "pgd")), 0.995, True, ""),
        ("50,176-wide fit, peak memory", "wide", ("fit_peak_GiB", ("features", "recomputed")), 2, False, "GiB"),
        ("50,176-wide, recall, clean", "wide", ("recall_clean", None), 0.99, True, ""),
        ("50,176-wide, recall, PGD", "wide", ("recall_pgd", None), 0.99, True, ""),
        ("50,176-wide, recomputed", "wide", ("ms_per_antigen", ("features", "recomputed")), 150, False, "ms"),
        ("50,176-wide, feature file", "wide", ("ms_per_antigen", ("features", "feature file")), 20, False, "ms"),
        ("a million rows, batches of 256", "rows", ("ms_per_antigen", signature), 10, False, "ms"),
        ("a million rows, batch 1", "rows", ("ms_at_batch_1", signature), 100, False, "ms"),
        ("a million rows, recall, perturbed", "rows", ("recall_perturbed", signature), 0.99, True, ""),
        ("a million rows, recall, clean", "rows", ("recall_clean", signature), 0.99, True, ""),
        ("1,000 classes, T 10,000, candidates 50: s per image", "classes", ("seconds_per_image", ("candidates", "50")), float("inf"), False, "s"),
    ]  # fmt: skip
    rows = []
    for what, table, (key, where), bound, above, unit in wanted:
        found = pick(tables, table, key, where)
        least = "runs" if bound == float("inf") else f"{'at least' if above else 'below'} {bound:g} {unit}".strip()
        reached = found is not None and (found >= bound if above else found < bound)
        rows.append(line(what, least, found, reached, tables.get(table, {}).get("command", f"--only {table}")))
    rows.append(line("VGG16 setting on a GPU", "10,000 images in a minute", None, False, "none yet"))
    return rows


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    body = [[common.text(row.get(key, "")) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [keys, ["---"] * len(keys), *body])


def document(tables: dict[str, Any], rates: tuple[float, float]) -> str:
    """Return docs/performance.md."""
    flops, bandwidth = rates
    stages = [row | {"floor_ms": 1e3 * max(row["operations"] / flops, row["bytes"] / bandwidth)} for row in model()]
    floor = sum(row["floor_ms"] for row in stages)
    took = pick(tables, "affine", "seconds_per_image", ("what", "early_stop=None, prune=None"))
    distance = NONE if took is None else f"{1e3 * took:.3g} ms, {1e3 * took / floor:.3g} times the floor"
    parts = [
        "# Performance",
        "Generated by `python benchmarks/report.py` from `results/`; do not edit. Every figure names the command that printed it. "
        "A table's load average above its number of threads says that other work shared the machine: read ratios, not seconds.",
        "## What must be reached",
        table(targets(tables)),
        "## Cost model",
        "Per antigen in the affine MNIST setting (d = 784, T = 1000, G = 10, N = 20,000, a band of t = 41 diagonals), without early stop "
        f"and pruning. Measured when this file was written: {flops / 1e9:.3g} GFLOP/s in a matrix product, {bandwidth / 1e9:.3g} GB/s in a "
        "copy. A stage's floor is the larger of its operations at the one rate and its bytes at the other. Integer and "
        "elementwise work cannot reach the rate of a matrix product, so the floor is a strict one.",
        table(stages),
        f"Floor: {floor:.3g} ms per image. Measured: {distance}.",
        "On a layer that is not affine the feature map dominates: T (G + 1) forward passes of the model up to the layer.",
        "## What to set",
        "- Latency: fewer generations run where `early_stop` and `prune` are set, as they are by default; `early_stop=1` stops sooner. Prefer "
        'an affine layer or `"input"`: no forward passes.\n'
        "- Throughput: hand many antigens to one call; `shared_noise=True` shares their random numbers.\n"
        "- Memory: `memory_budget` bounds the features that are kept; beyond it a signature shortlists, and features are computed again, or "
        "read where `fit(..., feature_file=...)` names a file.\n"
        "- Many classes: `Maturation(candidates=M)` lets only the nearest M classes evolve.",
        "## Measurements",
    ]
    for name, found in tables.items():
        where = found["environment"]
        parts += [
            f"### {name}",
            f"`{found['command']}`",
            table(found["rows"]),
            f"{where['cpu']}, {where['threads']} threads, load average {where['load_average']}, torch {where['torch']}, commit "
            f"{where.get('commit', 'unknown')[:10]}; seed {found['settings']['seed']}, median of {found['settings']['repeats']}.",
        ]
    parts += [f"GPU: {NONE}."]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the document."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--results", type=Path, default=Path("results"))
    p.add_argument("--to", type=Path, default=Path("docs/performance.md"))
    options = p.parse_args()
    tables: dict[str, Any] = {}
    for name in ("engine", "flocking", "cost"):
        if (path := options.results / f"{name}.json").exists():
            tables |= _store.read_json(path)["tables"]
    _store.write_text(options.to, document(tables, machine()))
    print(options.to.read_text())


if __name__ == "__main__":
    main()
