# ruff: noqa: E501 - prose and tables
"""Writes docs/performance.md from the JSON files of the other benchmarks; what has no figure is "not measured".

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
from common import Row
from immunonet import _store

NONE = "not measured"
# The MNIST settings: cells, generations with the expansion, values of a cell, diagonals of the affine map's band, examples,
# antigens that mature at once.
T, ROUNDS, VALUES, TAPS, EXAMPLES, BATCH = 1000, 11, 784, 41, 20_000, 21
DEFAULT, SHORT, FULL = "default, no generation", "early stop, pruning", "early_stop=None, prune=None"
SAME = f"{SHORT}, no alignment"


def affine() -> list[Row]:
    """Return operations and bytes per antigen of every stage of the affine MNIST setting, nothing stopped or pruned."""
    cells = T * ROUNDS * VALUES
    return [
        {"stage": "flocking", "formula": "2 N d; 4 N d / B bytes", "operations": 2.0 * EXAMPLES * VALUES, "bytes": 4.0 * EXAMPLES * VALUES / BATCH},
        {"stage": "selection", "formula": "about 10 T (G + 1); 16 bytes a cell", "operations": 10.0 * T * ROUNDS, "bytes": 16.0 * T * ROUNDS},
        {"stage": "crossover and mutation", "formula": "about 35 T (G + 1) d; 12 bytes a value", "operations": 35.0 * cells, "bytes": 12.0 * cells},
        {"stage": "feature map and distances", "formula": "3 t T (G + 1) d; 4 bytes a value", "operations": 3.0 * TAPS * cells, "bytes": 4.0 * cells},
    ]  # fmt: skip


def block1() -> list[Row]:
    """Return the same for block 1: two convolutions of every cell (64 channels, 9 taps), whose outputs stay in the cache."""
    width, per_cell = 64 * VALUES // 4, 2.0 * 9 * (64 + 64 * 64) * VALUES
    flock = {"operations": 2.0 * EXAMPLES * width, "bytes": 4.0 * EXAMPLES * width / BATCH}
    mapped = {"operations": T * ROUNDS * per_cell, "bytes": 4.0 * T * ROUNDS * VALUES}
    first, *middle, last = affine()
    return [first | flock, *middle, last | {"formula": "18 (64 + 64 64) d T (G + 1)"} | mapped]


def floors(tables: dict[str, Any], layer: str, model: list[Row]) -> list[Row]:
    """Return the model's stages with the floor that the machine's rates imply, and what was measured."""
    flops, copied = (pick(tables, "rates", key) for key in ("matrix_product_FLOPS", "copy_bytes_per_second"))
    profiled = [
        row for row in tables.get("profile", {}).get("rows", ()) if row["layer"] == layer and row["settings"] == FULL
    ]
    rows = []
    for row in model:
        floor = None if flops is None else 1e3 * max(row["operations"] / flops, row["bytes"] / copied)
        found = 1e3 * profiled[0]["seconds_per_image"] * profiled[0][row["stage"]] if profiled else None
        far = None if floor is None or found is None else found / floor
        rows.append(row | {"floor_ms": floor, "measured_ms": found, "measured_over_floor": far})
    return rows


def pick(tables: dict[str, Any], name: str, key: str, where: tuple[str, Any] | None = None) -> Any:
    """Return one figure of a table, or None if it was not measured."""
    for row in tables.get(name, {}).get("rows", ()):
        if key in row and (where is None or row.get(where[0]) == where[1]):
            return row[key]
    return None


def line(what: str, least: str, figure: Any, verdict: str, command: str) -> Row:
    """Return one row of what must be reached."""
    shown = NONE if figure is None else common.text(figure)
    return {"line": what, "at least": least, "figure": shown, "reached": verdict, "command": f"`{command}`"}


def targets(tables: dict[str, Any]) -> list[Row]:
    """Return every target with its figure."""
    loop, rows = ("what", "the loop"), ("search", "immunonet")
    wanted: list[tuple[str, str, tuple[str, tuple[str, Any] | None], float | None, bool, str]] = [
        ("affine MNIST, ten generations, no alignment (the loop aligns nothing), against the loop", "affine", ("ratio_to_loop", ("what", SAME)), 1000, True, "x"),
        ("affine MNIST, ten generations, alignment included", "affine", ("ratio_to_loop", ("what", SHORT)), None, True, "x"),
        ("affine MNIST, by default, without generations: s per image", "affine", ("seconds_per_image", ("what", DEFAULT)), None, False, ""),
        ("affine MNIST, ten generations, no early stop, no pruning", "affine", ("ratio_to_loop", ("what", FULL)), 300, True, "x"),
        ("the loop's share of time in the feature map", "affine", ("share_in_feature_map", loop), 0.8, True, ""),
        ("block 1, ten generations, against the loop", "block1", ("ratio_to_loop", ("what", SHORT)), 15, True, "x"),
        ("block 1, ten generations, no early stop, no pruning", "block1", ("ratio_to_loop", ("what", FULL)), None, True, ""),
        ("early_stop=2, prune=.1, ten generations: equal labels, 500 clean and 500 PGD images", "agreement", ("agreement", ("settings", "early_stop=2, prune=.1")), 0.995, True, ""),
        ("two seeds, no shortcut: equal labels", "agreement", ("agreement", ("settings", "the reference, another seed")), None, True, ""),
        ("50,176-wide fit of 60,000: peak memory", "wide", ("fit_peak_GiB", ("features", "recomputed")), 2, False, "GiB"),
        ("50,176-wide: recall of 10 per class, clean", "wide", ("recall_clean", None), 0.99, True, ""),
        ("50,176-wide: recall of 10 per class, PGD", "wide", ("recall_pgd", None), 0.99, True, ""),
        ("50,176-wide, batch 256, recomputed: per antigen", "wide", ("ms_per_antigen", ("features", "recomputed")), 150, False, "ms"),
        ("50,176-wide, batch 256, feature file: per antigen", "wide", ("ms_per_antigen", ("features", "feature file")), 20, False, "ms"),
        ("a million rows, batch 256: per antigen", "rows", ("ms_per_antigen", rows), 10, False, "ms"),
        ("a million rows, batch 1", "rows", ("ms_at_batch_1", rows), 100, False, "ms"),
        ("a million rows: recall, perturbed", "rows", ("recall_perturbed", rows), 0.99, True, ""),
        ("a million rows: recall, clean", "rows", ("recall_clean", rows), 0.99, True, ""),
        ("1,000 classes, T 10,000: s per image", "classes", ("seconds_per_image", ("candidates", "None")), None, False, ""),
        ("1,000 classes, T 10,000, candidates=50: s per image", "classes", ("seconds_per_image", ("candidates", "50")), None, False, ""),
    ]  # fmt: skip
    found = []
    for what, name, (key, where), bound, above, unit in wanted:
        figure = pick(tables, name, key, where)
        least = "-" if bound is None else f"{'at least' if above else 'below'} {bound:g} {unit}".strip()
        reached = figure is not None and bound is not None and (figure >= bound if above else figure < bound)
        verdict = NONE if figure is None else "-" if bound is None else "reached" if reached else "not reached"
        command = tables.get(name, {}).get("command", f"--only {name}")
        found.append(line(what, least, figure, verdict, command))
    return [*found, line("VGG16 setting on a GPU: 10,000 images", "a minute", None, NONE, "python benchmarks/gpu.py")]


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    body = [[NONE if row.get(key, "") is None else common.text(row.get(key, "")) for key in keys] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [keys, ["---"] * len(keys), *body])


def document(tables: dict[str, Any]) -> str:
    """Return docs/performance.md."""
    parts = [
        "# Performance",
        "Generated by `python benchmarks/report.py` from `results/`; do not edit. Every figure names the command that printed it; "
        "`$IMMUNONET_DATA` was set. A table's load average above its number of threads says that other work shared the "
        "machine: read ratios, which were measured side by side, not seconds.",
        "## What must be reached",
        table(targets(tables)),
        "## Cost model",
        "Per antigen, MNIST, without early stop and pruning: cells of d = 784 values, T = 1000, G = 10, N = 20,000 examples, B = 21 antigens at "
        "once. A stage's floor is the larger of its operations at the rate of a matrix product and its bytes at the rate of a copy (table "
        "`rates` below); elementwise and integer work reaches neither.",
        "Affine layer (a band of t = 41 diagonals):",
        table(floors(tables, "affine", affine())),
        "Block 1 (conv, ReLU, conv, ReLU, pool), by direct convolution; selection, crossover and mutation as above:",
        table(floors(tables, "pool1", block1())),
        "What grows how: table `growth` below. Early stop and pruning shorten all stages but flocking.",
        "## What to set",
        "- **Latency.** By default there are no generations; where there are, `early_stop` and `prune` cut them short, and table `agreement` tells what "
        "they change and cost. An affine layer or "
        '`"input"` needs no forward passes. On any other layer T (G + 1) forward passes dominate: a smaller '
        "`population` costs in proportion.\n"
        "- **Throughput.** Hand many antigens to one call: table `latency`. `shared_noise=True` shares their random numbers.\n"
        "- **Memory.** `memory_budget` bounds the features that are kept and the populations of a batch. Beyond it signatures shortlist, and features are "
        "computed again, or read where `fit(..., feature_file=...)` names a file: table `wide`.\n"
        "- **Millions of rows.** Nothing to set: in memory signatures screen where few directions hold the features, and the answer stays exact.\n"
        "- **Many classes.** Of more than 100 only the nearest have cells, population / (2 neighbours) or `Maturation(candidates=M)`: table "
        "`classes`. What many examples and classes take: [scaling.md](scaling.md).",
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
    parts += [f"GPU: {NONE} (`python benchmarks/gpu.py --data DIR --json results/gpu.json` where there is one)."]
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
    _store.write_text(options.to, document(tables))
    print(options.to)


if __name__ == "__main__":
    main()
