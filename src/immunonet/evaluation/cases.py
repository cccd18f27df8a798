"""Records of several evaluations put together, and what stands in a line of a table about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from immunonet.evaluation.journal import leaves
from immunonet.immune.settings import Maturation

Case = dict[str, Any]
NAMES = {"cnn": "CNN, undefended", "dknn": "DkNN", "rails": "RAILS"}
# Settings of a worst case that say how it was reached, not what was attacked; all others tell cases apart.
_REACHED = ("attacks", "selected_on", "draws", "tuning", "device")


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
    """Return one case per evaluation of a merged record: what stands in a line of the tables, each under its own name.

    Of evaluations of the same defence with the same settings the lower worst case counts. ValueError for runs on
    others than test images, and for a run of two evaluations that its rows do not tell apart.
    """
    once: dict[str, Case] = {}
    for run in record["runs"]:
        rows = record["results"][slice(*run["rows"])]
        if rows[0]["settings"].get("split", "test") != "test":
            raise ValueError(f"results come from test images, got a run on others: {run['command']}")
        for one in run["evaluations"]:
            case = _case(one, rows)
            told = [case[key] for key in ("defence", "dataset", "eps", "norm", "n", "settings")]
            key = json.dumps(told, sort_keys=True)
            if key not in once or case["worst"]["accuracy"] < once[key]["worst"]["accuracy"]:
                once[key] = case
    found = list(once.values())
    called: dict[tuple[str, str], list[Case]] = {}
    for case in found:
        called.setdefault((where(case), title(case)), []).append(case)
    for alike in called.values():
        told = [case["settings"] | {"eps": case["eps"]} for case in alike]
        for case, own in zip(alike, told, strict=True):
            case["apart"] = differing(own, told)
    return found


def _case(one: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Case:
    """Return the case of one evaluation of a run, from the run's rows."""
    key = one["defence"], one["layers"], one["weights"]
    mine = [row for row in rows if (row["defence"], row["settings"]["layers"], row["settings"]["weights"]) == key]
    by = {row["attack"]: row for row in mine}
    if len(by) < len(mine):
        raise ValueError(f"two evaluations of one run have the same defence, layers and weights, got {key}: merge runs")
    worst = by["worst-case"]
    settings = worst["settings"]
    kinds = {attacked: attack["kind"] for attacked, attack in one["attacks"].items()}
    return {
        "defence": one["defence"],
        "layer": " and ".join(one["layers"]),
        "settings": {key: value for key, value in settings.items() if key not in _REACHED},
        "space": settings.get("space"),
        "cells": cells(settings.get("maturation", ())),
        "neighbours": settings.get("neighbours"),
        "voice": settings.get("voice", 0),
        "dataset": worst["dataset"],
        "net": settings["net"],
        "weights": one["weights"],
        "eps": worst["eps"],
        "norm": worst["norm"],
        "n": worst["n"],
        "images": _images(settings["slice"]),
        "protocol": settings["protocol"],
        "clean": by["none"],
        "paper": by["pgd"],
        "transfer": _strongest(by, kinds, "transfer"),
        "adaptive": _strongest(by, kinds, "adaptive"),
        "worst": worst,
        "evaluation": one,
        "apart": "",
    }


def _images(told: list[int] | dict[str, Any]) -> tuple[Any, ...]:
    """Return what each image is known by: its place in the file, or in the random order of a sample of so many."""
    if isinstance(told, list):
        return tuple(range(*told))
    count, whole = told["sample"]
    return tuple((whole, told["seed"], i) for i in range(count))


def title(case: Case) -> str:
    """Return what a case is called in a table: its settings as far as they matter, and what sets it apart there."""
    told = [NAMES.get(case["defence"], str(case["defence"])), case["layer"]]
    told += [f"k {case['neighbours']}" if case["neighbours"] else case["cells"]]
    told += ["cells there" if case["space"] else "", f"voice {case['voice']:g}" if case["voice"] else ""]
    return ", ".join(filter(None, (*told, case["apart"])))


def where(case: Case) -> str:
    """Return which network was attacked how, and on how many images."""
    return f"{case['dataset']}, {case['net']}, {case['norm']} {case['eps']:.3g}, {case['n']} images"


def differing(own: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """Return in which settings those called alike, `own` among them, differ, with the values of `own`; "" in none."""
    every, mine = [leaves(one) for one in alike], leaves(own)
    names = sorted({name for one in every for name in one if any(name not in o or o[name] != one[name] for o in every)})
    return ", ".join(f"{name} {mine.get(name, 'untold')}" for name in names)


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
