"""What evaluations found, as one document: `python -m immunonet.report.robustness RUN.json ... --json F --doc F`.

The runs are files that `immunonet evaluate --protocol` wrote. Every figure of the document is read from them; its
words stand in `templates/robustness.md.j2`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from immunonet import _store
from immunonet._words import apart
from immunonet.immune.settings import Maturation
from immunonet.report import pages, tables
from immunonet.report.figures import accuracy_points, rejection_curves, save
from immunonet.statistics import mcnemar

Record = dict[str, Any]
Case = dict[str, Any]
# Where the figures lie, beside the document.
FIGURES = "figures/robustness"
# Settings of a worst case that say how it was reached, not what was attacked; all others tell cases apart.
_REACHED = ("attacks", "selected_on", "draws", "tuning", "device")
# Two defences are told apart below this p-value.
_LEVEL = 0.05


def merge(records: Sequence[Record]) -> Record:
    """Return the records of several runs as one: all rows under `results`, the rest of each run under `runs`.

    A run's `rows` tells which of the results are its own, by their places. A record may itself be of several runs.
    ValueError for one without evaluations.
    """
    runs: list[Record] = []
    results: list[Record] = []
    for run in (run for record in records for run in _runs(record)):
        if not run.get("evaluations"):
            raise ValueError(f"run {len(runs)} holds no evaluations: give files of immunonet evaluate --protocol")
        rows = [len(results), len(results) + len(run["results"])]
        runs.append({key: value for key, value in run.items() if key != "results"} | {"rows": rows})
        results += run["results"]
    command = "; ".join(run["command"] for run in runs)
    return {"results": results, "environment": runs[0]["environment"], "command": command, "runs": runs}


def _runs(record: Record) -> list[Record]:
    """Return the runs of a merged record, each as it was written; any other record as it is."""
    return [
        {"results": record["results"][slice(*run["rows"])]} | {key: run[key] for key in run.keys() - {"rows"}}
        for run in record.get("runs", ())
    ] or [record]


def cases(record: Record) -> list[Case]:
    """Return one case per evaluation of a merged record: what stands in a line of the tables, each under its own name.

    An evaluation under several threats gives one case for each of them, and one for their union. Of evaluations of the
    same defence with the same settings the lower worst case counts. ValueError for runs on others than test images, and
    for a run of two evaluations that its rows do not tell apart.
    """
    once: dict[str, Case] = {}
    for run in _runs(record):
        rows = run["results"]
        if rows[0]["settings"].get("split", "test") != "test":
            raise ValueError(f"results come from test images, got a run on others: {run['command']}")
        for case in itertools.chain.from_iterable(_told(evaluation, rows) for evaluation in run["evaluations"]):
            key = json.dumps([case[key] for key in ("kind", "network", "n", "settings")], sort_keys=True)
            if key not in once or case["worst"]["accuracy"] < once[key]["worst"]["accuracy"]:
                once[key] = case
    every = list(once.values())
    named = [((case["where"], case["title"]), case["settings"] | {"eps": case["worst"]["eps"]}) for case in every]
    for case, difference in zip(every, apart(named), strict=True):
        case["title"] = ", ".join(filter(None, (case["title"], difference)))
    return every


def _told(evaluation: Record, rows: Sequence[Record]) -> list[Case]:
    """Return the cases of an evaluation of a run, from the run's rows; those of one threat of several are `partial`."""
    *parts, whole = _views(evaluation, rows)
    return [*(_case(*part) | {"partial": True} for part in parts), _case(*whole)]


def _views(evaluation: Record, rows: Sequence[Record]) -> list[tuple[Record, dict[str, Record]]]:
    """Return an evaluation of a run and its own rows by attack, from the run's rows.

    One under several threats is told as one for each, then one for their union, whose row of an attack is the lowest.
    """
    key = evaluation["defence"], evaluation["layers"], evaluation["weights"]
    own = [row for row in rows if (row["defence"], row["settings"]["layers"], row["settings"]["weights"]) == key]
    if len({(row["attack"], row["norm"]) for row in own}) < len(own):
        raise ValueError(f"two evaluations of one run have the same defence, layers and weights, got {key}: merge runs")
    norms = [threat["norm"] for threat in evaluation.get("threat_model", {}).get("threats", ())]
    if len(norms) < 2:
        return [(evaluation, {row["attack"]: row for row in own})]
    views = [(_under(evaluation, norm), _by_attack(own, norm)) for norm in norms]
    # What belongs to one threat stands in its own case.
    checks = [one for one in evaluation["checks"] if one["name"].partition(": ")[0] not in norms]
    attacks = {name: attack for view, _ in views for name, attack in view["attacks"].items()}
    told = [image | {"attack": _named(image)} for image in evaluation["per_example"]]
    lowest = {row["attack"]: row for row in sorted(own, key=lambda row: -float(row["accuracy"]))}
    named = {name: row | {"attack": _named(row)} for name, row in lowest.items() if row["norm"] in norms}
    worst = {"worst-case": next(row for row in own if row["attack"] == "worst-case" and row["norm"] not in norms)}
    return [
        *views,
        (evaluation | {"checks": checks, "attacks": attacks, "per_example": told}, lowest | named | worst),
    ]


def _named(found: Record) -> str:
    """Return the name of an attack, of a row or of what broke an image, with its norm."""
    name = str(found["attack"])
    return name if name == "none" else f"{found['norm']} {name}"


def _under(evaluation: Record, norm: str) -> Record:
    """Return what an evaluation under several threats says of one, as if there were no other."""
    named = {name: attack for name, attack in evaluation["attacks"].items() if name.split()[0] in (norm, "none")}
    attacks = {name.removeprefix(f"{norm} "): attack for name, attack in named.items()}
    checks = [one for one in evaluation["checks"] if one["name"].startswith(f"{norm}: ")]
    told = [image | image["threats"][norm] for image in evaluation["per_example"]]
    only = {"attacks": attacks, "checks": checks, "flags": [], "per_example": told, "ablations": []}
    return {**evaluation, **only, **evaluation["by_threat"][norm]}


def _by_attack(rows: Sequence[Record], norm: str) -> dict[str, Record]:
    """Return the rows of one threat, and of the clean images, by attack."""
    return {row["attack"]: row for row in rows if row["norm"] == norm or row["attack"] == "none"}


def _case(evaluation: Record, by: dict[str, Record]) -> Case:
    """Return the case of an evaluation and its rows by attack."""
    kind, layers, weights = evaluation["defence"], evaluation["layers"], evaluation["weights"]
    worst, attacks = by["worst-case"], evaluation["attacks"]
    settings = worst["settings"]

    def strongest(role: str) -> Record | None:
        rows = [row for name, row in by.items() if name in attacks and attacks[name]["kind"] == role]
        return min(rows, key=lambda row: float(row["accuracy"]), default=None)

    parts: dict[str, Record] = {}
    for row in evaluation["ablations"]:
        parts.setdefault(row["defence"].removeprefix(f"{kind} "), {})[row["attack"]] = row
    neighbours, voice = settings.get("neighbours"), settings.get("voice", 0)
    own = cells(settings.get("maturation", ()))
    # What is told of its cells need not be told by the words that set them.
    called = " ".join(word for word in kind.split() if "=" not in word) if own else kind
    name = [tables.title(called), " and ".join(layers), f"k {neighbours}" if neighbours else own]
    name += ["cells there" if settings.get("space") else "", f"voice {voice:g}" if voice else ""]
    name += [f"innate {settings['innate']:g}" if settings.get("innate") else "", tables.vaccine(settings)]
    net, aims = settings["net"], tuple(settings.get("threats", {worst["norm"]: worst["eps"]}).items())
    within = " or ".join(f"{norm} {eps:.3g}" for norm, eps in aims)
    broken = Counter(image["attack"] for image in evaluation["per_example"] if image["worst"] <= 0.5)
    return {
        "kind": kind,
        "title": ", ".join(filter(None, name)),
        "where": ", ".join((*dict.fromkeys((worst["dataset"], net)), within, f"{worst['n']} images")),
        "layers": layers,
        "partial": False,
        "bare": tables.bare(kind),
        "evolves": "maturation" in settings,
        "settings": {key: value for key, value in settings.items() if key not in _REACHED},
        "network": (worst["dataset"], net, weights, aims),
        "n": worst["n"],
        # Of those that were asked for, the ones that were attacked: a plan in so many minutes may leave some out.
        "images": tuple(_images(settings["slice"])[one["image"]] for one in evaluation["per_example"]),
        "protocol": settings["protocol"],
        "clean": by["none"],
        "paper": by["pgd"],
        "transfer": strongest("transfer"),
        "adaptive": strongest("adaptive"),
        "worst": worst,
        "parts": parts and parts | {"whole": {"none": by["none"], "worst-case": worst}},
        "broken": [f"{'already wrong' if name == 'none' else name} {n}" for name, n in broken.most_common()],
        "levels": evaluation.get("abstention", ()),  # records from before abstention was measured lack it
        "evaluation": evaluation,
    }


def _images(places: list[int] | dict[str, Any]) -> tuple[Any, ...]:
    """Return what each image is known by: its place in the file, or in the random order of a sample of so many."""
    if isinstance(places, list):
        return tuple(range(*places))
    count, whole = places["sample"]
    return tuple((whole, places["seed"], i) for i in range(count))


def cells(maturations: Sequence[dict[str, Any]]) -> str:
    """Return the cells and generations of a RAILS, the same at each of its layers, and what else is not the default.

    Records older than the setting of a clone did nothing to it.
    """
    if not maturations:
        return ""
    first = maturations[0]
    told = [f"T {first['population']}"]
    told += [f"K {first['neighbours']}"] if first["neighbours"] != Maturation().neighbours else []
    told += [f"G {first['generations']}"]
    told += ["recombined"] if first.get("recombination") else [] if first.get("alignment") else ["not aligned"]
    return ", ".join(told)


class Pair(NamedTuple):
    """A case compared with the `other` on the same `n` images.

    On how many of them each one `alone` is right in its worst case, by the majority of its draws; McNemar's `p`; and
    the share that the other `keeps` of them.
    """

    other: Case
    n: int
    alone: int
    other_alone: int
    p: float
    keeps: float

    @property
    def word(self) -> str:
        """What the first one is, compared with the other."""
        return "alike" if self.p >= _LEVEL else "better" if self.alone > self.other_alone else "worse"


def compare(case: Case, other: Case) -> Pair | None:
    """Return two worst cases on the images that both have; None without any.

    ValueError where the labels of these images differ.
    """
    own, peers = (dict(zip(one["images"], one["evaluation"]["per_example"], strict=True)) for one in (case, other))
    both = [(own[image], peers[image]) for image in own if image in peers]
    if not both:
        return None
    if any(one["label"] != peer["label"] for one, peer in both):
        raise ValueError(
            f"{case['title']} and {other['title']} ({case['where']}) must have been attacked on the same images, "
            "got other labels: give runs on the same data"
        )
    right, also = (torch.tensor([pair[i]["worst"] > 0.5 for pair in both]) for i in (0, 1))
    alone, other_alone = int((right & ~also).sum()), int((also & ~right).sum())
    return Pair(
        other, len(both), alone, other_alone, mcnemar(right, also), sum(peer["worst"] for _, peer in both) / len(both)
    )


def groups(every: Sequence[Case]) -> list[list[Case]]:
    """Return the cases that compare: the same network, attacker, images and protocol."""
    grouped: dict[tuple[Any, ...], list[Case]] = {}
    for case in every:
        grouped.setdefault((case["network"], case["images"], case["protocol"]), []).append(case)
    return list(grouped.values())


def bare(case: Case, every: Sequence[Case]) -> Case | None:
    """Return the network of a defence, undefended against the same attacker; None where no run had it.

    Of several the one by the same protocol, then the one with the most images in common.
    """

    def fit(net: Case) -> tuple[bool, int]:
        return net["protocol"] == case["protocol"], len(set(net["images"]) & set(case["images"]))

    return max((net for net in every if net["bare"] and net["network"] == case["network"]), key=fit, default=None)


def _compared(case: Case, group: Sequence[Case], every: Sequence[Case]) -> Case:
    """Return a case with its bare network, and its pairs: with that, then with the other defences of its group."""
    net = bare(case, every)
    others = [net, *(peer for peer in group if peer is not case and not peer["bare"])]
    pairs = [pair for other in others if other is not None and (pair := compare(case, other)) is not None]
    return case | {"net": net, "pairs": pairs}


class Verdict(NamedTuple):
    """What a group of cases comes to.

    The `best` defence in the worst case; its `pairs`, with the bare network and, of a RAILS, with the best that is
    none, else with the best RAILS; the `first` of several, named, on clean images, by transfer and in the worst case.
    """

    best: Case
    pairs: list[Pair]
    first: list[str]


def verdict(group: Sequence[Case], every: Sequence[Case]) -> Verdict | None:
    """Return what cases that compare come to; None without a defence among them."""
    defended = sorted((case for case in group if not case["bare"]), key=lambda case: -case["worst"]["accuracy"])
    if not defended:
        return None
    best = defended[0]
    other = next((case for case in defended if case["evolves"] != best["evolves"]), None)
    pairs = [pair for peer in (bare(best, every), other) if peer is not None and (pair := compare(best, peer))]
    first = []
    for key in ("clean", "transfer", "worst") if len(group) > 1 else ():
        most = max((case for case in group if case[key]), key=lambda case: float(case[key]["accuracy"]), default=None)
        keeps = most and most[key]["accuracy"]
        first.append("" if most is None else f"{most['title']}: {keeps:.3f}" if keeps else "none keeps an image")
    return Verdict(best, pairs, first)


def verdicts(grouped: Sequence[Sequence[Case]], every: Sequence[Case]) -> list[Verdict]:
    """Return what the groups come to: one verdict per network and attacker, of its group with the most images."""
    most: dict[tuple[Any, ...], Verdict] = {}
    found = filter(None, (verdict(group, every) for group in grouped))
    for one in sorted(found, key=lambda one: int(one.best["n"]), reverse=True):
        most.setdefault(one.best["network"], one)
    return [most[network] for network in dict.fromkeys(group[0]["network"] for group in grouped) if network in most]


def document(record: Record, source: str) -> str:
    """Return `docs/robustness.md` as text, from a merged record that stands in the file `source`."""
    every = cases(record)
    whole = [case for case in every if not case["partial"]]
    grouped = groups(whole)
    choices = record.get("choices", ())
    text = pages.template("robustness.md.j2").render(
        source=source,
        figures=FIGURES,
        cases=every,
        whole=whole,
        groups=grouped,
        parts=groups([case for case in every if case["partial"]]),
        verdicts=verdicts(grouped, every),
        rails=[_compared(case, group, every) for group in grouped for case in group if case["evolves"]],
        choices=choices,
        notes=record.get("notes", ()),
        tried=dict.fromkeys(cells for choice in choices for cells in _tried(choice)),
        protocols=[_limits(name, every) for name in dict.fromkeys(case["protocol"] for case in every)],
        runs=record["runs"],
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def figures(record: Record) -> dict[str, Figure]:
    """Return the document's figures by name."""
    shown = {"clean": "clean", "PGD on the network": "paper", "worst case, knows the defence": "worst"}
    points: dict[str, Record] = {}
    curves: dict[str, Record] = {}
    for case in itertools.chain.from_iterable(groups([case for case in cases(record) if not case["partial"]])):
        points.setdefault(case["where"], {})[case["title"]] = {how: case[key] for how, key in shown.items()}
        if case["levels"]:
            curves.setdefault(case["where"], {})[case["title"]] = case["levels"]
    return {"accuracy": accuracy_points(points)} | ({"abstention": rejection_curves(curves)} if curves else {})


def _tried(record: Record) -> list[tuple[str, ...]]:
    """Return the lines of what was tried on validation images, from the record of those trials."""
    lines: list[tuple[str, ...]] = []
    for row in record["results"]:
        settings = row["settings"]
        maturations, layers = settings.get("maturation", ()), settings["layers"]
        if "protocol" not in settings or row["attack"] in ("none", "pgd", "worst-case"):
            name = ", ".join(filter(None, (tables.title(row["defence"]), cells(maturations))))
            voice = f"{settings['voice']:g}" if "voice" in settings else ""
            metric = settings.get("metric", "")
            about = (settings["net"], name, " and ".join(layers), metric, voice, row["attack"], row["knows"])
            lines.append((*about, str(row["n"]), tables.share(row, 2)))
    return lines


def _limits(protocol: str, every: Sequence[Case]) -> dict[str, Any]:
    """Return how far a protocol went in its cases."""
    own = [case for case in every if case["protocol"] == protocol]
    attacks = [item for case in own for item in case["evaluation"]["attacks"].items() if item[0] != "none"]
    roles = {role for name, attack in attacks for role in pages.roles(name, attack)}

    def most(method: str, count: str = "calls") -> int:
        same = (attack["attack"] | attack for _, attack in attacks if attack["attack"]["method"] == method)
        return max((attack[count] for attack in same), default=0)

    def span(values: Sequence[int]) -> str:
        return " to ".join(f"{end:,}" for end in dict.fromkeys((min(values), max(values))))

    return {
        "name": protocol,
        "networks": dict.fromkeys(", ".join(case["network"][:2]) for case in own),
        "images": span([case["n"] for case in own]),
        "asked": span([attack["n"] for _, attack in attacks if attack["kind"] == "black box"]),
        "steps": most("APGD", "iterations"),
        "calls": {method: most(method) for method in ("Square", "HopSkipJump", "Noise")},
        "missing": [role for role in ("targeted", "eot") if role not in roles],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge runs, write the record and the document."""
    parser = argparse.ArgumentParser(prog="python -m immunonet.report.robustness", description=__doc__)
    told = "files of immunonet evaluate --protocol; none: --json is read"
    parser.add_argument("runs", nargs="*", type=Path, help=told)
    told = "files of immunonet evaluate --split validation: what settings were chosen by"
    parser.add_argument("--choices", nargs="*", type=Path, default=[], help=told)
    parser.add_argument("--note", action="append", default=[], help="what a reader of the table must know of its data")
    parser.add_argument("--json", type=Path, default=Path("results/robustness.json"))
    parser.add_argument("--doc", type=Path, default=Path("docs/robustness.md"))
    given = parser.parse_args(arguments)
    if given.runs:
        choices = [_store.read_json(path) for path in given.choices]
        merged = merge([_store.read_json(path) for path in given.runs])
        _store.write_json(given.json, merged | {"choices": choices, "notes": given.note})
    record = _store.read_json(given.json)
    _store.write_text(given.doc, document(record, given.json.as_posix()))
    save(figures(record), (given.doc.parent / FIGURES).parent, Path(FIGURES).name)


if __name__ == "__main__":
    main()
