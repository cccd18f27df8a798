"""Records of several evaluations put together, and what stands in a line of a table about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from immunonet.immune.settings import Maturation

Case = dict[str, Any]


def merge(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the records of several runs as one: all rows under `results`, the rest of each run under `runs`.

    A run's `rows` tells which of the results are its own, by their places. A record may itself be of several runs.
    ValueError for one without evaluations.
    """
    runs: list[dict[str, Any]] = []
    first = 0
    records = [run for record in records for run in _apart(record)]
    for i, record in enumerate(records):
        if not record.get("evaluations"):
            raise ValueError(f"run {i} holds no evaluations: give files that immunonet evaluate --protocol wrote")
        rows, first = [first, first + len(record["results"])], first + len(record["results"])
        runs.append({key: value for key, value in record.items() if key != "results"} | {"rows": rows})
    return {
        "results": [row for record in records for row in record["results"]],
        "environment": records[0]["environment"],
        "command": "; ".join(record["command"] for record in records),
        "runs": runs,
    }


def _apart(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of a merged record, each as it was written; any other record as it is."""
    if "runs" not in record:
        return [record]
    return [
        {"results": record["results"][slice(*run["rows"])]} | {key: run[key] for key in run.keys() - {"rows"}}
        for run in record["runs"]
    ]


def cases(record: dict[str, Any]) -> list[Case]:
    """Return one case per evaluation of a merged record: what stands in a line of the tables, each once."""
    found: list[Case] = []
    for run in record["runs"]:
        rows = record["results"][slice(*run["rows"])]
        if rows[0]["settings"].get("split", "test") != "test":
            raise ValueError(f"results come from test images, got a run on others: {run['command']}")
        for one in run["evaluations"]:
            key = one["defence"], one["layers"], one["weights"]
            by = {row["attack"]: row for row in rows if _key(row) == key}
            clean, worst = by["none"], by["worst-case"]
            kinds = {name: attack["kind"] for name, attack in one["attacks"].items()}
            found.append(
                {
                    "defence": one["defence"],
                    "layer": " and ".join(one["layers"]),
                    "maturation": worst["settings"].get("maturation", ()),
                    "space": worst["settings"].get("space"),
                    "cells": cells(worst["settings"].get("maturation", ())),
                    "neighbours": worst["settings"].get("neighbours"),
                    "voice": worst["settings"].get("voice", 0),
                    "dataset": worst["dataset"],
                    "net": worst["settings"]["net"],
                    "eps": worst["eps"],
                    "norm": worst["norm"],
                    "n": worst["n"],
                    "protocol": worst["settings"]["protocol"],
                    "clean": clean,
                    "paper": by["pgd"],
                    "transfer": _strongest(by, kinds, "transfer"),
                    "adaptive": _strongest(by, kinds, "adaptive"),
                    "worst": worst,
                    "evaluation": one,
                }
            )
    same = ("defence", "layer", "neighbours", "maturation", "space", "voice", "dataset", "net", "eps", "norm", "n")
    once: dict[str, Case] = {}
    for case in found:
        once.setdefault(json.dumps([case[key] for key in same]), case)
    return list(once.values())


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["defence"], row["settings"]["layers"], row["settings"]["weights"]


def _strongest(by: dict[str, Case], kinds: dict[str, str], kind: str) -> Case | None:
    mine = [row for name, row in by.items() if kinds.get(name) == kind]
    return min(mine, key=lambda row: float(row["accuracy"]), default=None)


def cells(maturations: Sequence[dict[str, Any]]) -> str:
    """Return the settings of a RAILS, the same at each of its layers, as far as they are not the default; "" for none.

    Records older than the setting of a clone did nothing to it.
    """
    if not maturations:
        return ""
    first, default = maturations[0], Maturation()
    told = [f"T {first['population']}"]
    told += [f"K {first['neighbours']}"] if first["neighbours"] != default.neighbours else []
    told += [f"G {first['generations']}"] if first["generations"] != default.generations else []
    if first.get("recombination"):
        told.append("recombined")
    elif not first.get("alignment"):
        told.append("not aligned")
    return ", ".join(told)
