"""What follows from a study's measurements: targets, comparisons in pairs, and the record that the JSON file holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from immunonet import _store
from immunonet._words import apart, identity
from immunonet.defences.base import kind_of
from immunonet.evaluation.bench import Part
from immunonet.evaluation.lab import Measured, Measurement
from immunonet.evaluation.records import envelope
from immunonet.statistics import mcnemar
from immunonet.studies import behaviour, search
from immunonet.studies.experiments import Run
from immunonet.studies.model import Study, Target


def parts(run: Run, measurements: Sequence[Measurement]) -> Iterator[Part]:
    """Return all that is to be done, before any of it is; ImportError without what it takes."""
    looking = replace(run, looking=True)
    yield from search.parts(run)
    for m in measurements:
        yield from (*run.choosing(m), *run.tables.parts(looking.settled(m)))
    yield from behaviour.parts(looking)


def record(run: Run, name: str, found: Sequence[Measured], *, drawn: bool) -> dict[str, Any]:
    """Return what the JSON file of a study holds; `found`: its measurements; `drawn`: whether figures lie beside it."""
    study, bench = run.study, run.tables.bench
    bench.ahead(behaviour.parts(run))
    return envelope([m.row.to_json() for m in found]) | {
        "study": {
            "name": name, "title": study.title, "dataset": study.dataset,
            "remark": study.remarks.get(study.dataset, "").format(n=len(run.lab.splits["test"])),
            "notes": list(study.notes), "curves": [[curve.name, curve.title or curve.name] for curve in study.curves],
        },
        "pairs": pairs(found),
        "targets": targets(study, found),
        **{kind: behaviour.told(run, kind) for kind in behaviour.KINDS},
        "search": search.searched(run),
        "figures": drawn,
    }  # fmt: skip


def write_correctness(path: Path, found: Sequence[Measured], more: Mapping[str, Tensor]) -> None:
    """Write which images were right, bool `(runs, n)` as `row-<place in the results>`, and `more`, by name."""
    _store.write_tensors(path, {f"row-{i}": m.correct for i, m in enumerate(found)} | dict(more))


def pairs(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return how defences of the main table that search for their answer compare with those that vote, image by image.

    `gain`: points of accuracy, a mean over seeds. `p`: McNemar's, of the one with its first seed, of which `only_rails`
    and `only_other` count the images that one alone got right.
    """
    main = [m for m in found if m.row.settings["experiment"] == "main" and "repertoire" in m.row.settings]
    named = [((m.row.defence, m.row.settings["layers"], _place(m)), identity(m.row.settings)) for m in main]
    out = []
    for a, difference in zip(main, apart(named), strict=True):
        for b in main:
            placed = _chosen(b) or a.row.settings["layers"] == b.row.settings["layers"]
            alike = _place(a) == _place(b) and a.row.settings["repertoire"] == b.row.settings["repertoire"]
            if not _optimizes(a) or _optimizes(b) or not placed or not alike:
                continue
            n = min(a.row.n, b.row.n)
            own, other = a.correct[:, :n], b.correct[0, :n]
            wrong = 1 - float(other.float().mean())
            gain = float(own.double().mean() - other.double().mean())
            out.append({
                "base": a.measurement.base, "layers": a.row.settings["layers"], "defence": a.row.defence,
                "apart": difference, "over": b.row.defence, "over_title": b.measurement.spec.title,
                "over_layers": b.row.settings["layers"], "chosen": _chosen(b), "attack": a.row.attack, "n": n,
                "gain": 100 * gain, "errors_gone": gain / wrong if wrong else None,
                "only_rails": int((own[0] & ~other).sum()), "only_other": int((other & ~own[0]).sum()),
                "p": mcnemar(own[0], other),
            })  # fmt: skip
    return out


def targets(study: Study, found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the figure that belongs to each target of the study, and whether it was reached."""
    return [_target(target, [m for m in found if m.measurement.base == target.base]) for target in study.targets]


def _target(target: Target, found: Sequence[Measured]) -> dict[str, Any]:
    tested = [m for m in found if m.row.settings["experiment"] == "main" and m.measurement.split == "test"]
    main = [m for m in tested if m.row.attack == target.attack and m.row.n >= target.images and not _chosen(m)]
    layers = target.layers
    if target.choice is not None:
        measured = {m.measurement.spec.layers for m in main if m.row.defence == target.defence}
        scores: dict[tuple[str, ...], list[float]] = {}
        for m in found:
            here = m.row.settings["experiment"] == target.choice and m.row.defence == target.defence
            if here and m.measurement.spec.layers in measured:
                scores.setdefault(m.measurement.spec.layers, []).append(m.row.accuracy)
        layers = max(scores, key=lambda one: sum(scores[one]) / len(scores[one]), default=None)

    def look(defence: str | None) -> Measured | None:
        here = [m for m in main if m.row.defence == defence and m.measurement.spec.layers in ((), layers)]
        return max(here, key=lambda m: m.row.n, default=None)

    own, other = look(target.defence), look(target.over)
    told = target.model_dump(include={"text", "published", "least", "goal", "least_share", "goal_share"})
    told |= {"layers": list(layers or ()), "unit": "accuracy" if target.over is None else "points"}
    if own is None or (target.over is not None and other is None):
        return told | {"figure": None, "share": None, "n": 0, "status": "not measured"}
    figure, share, n = own.row.accuracy, None, own.row.n
    if other is not None:
        n = min(n, other.row.n)
        a, b = (float(m.correct[:, :n].double().mean()) for m in (own, other))
        figure, share = 100 * (a - b), (a - b) / (1 - b) if b < 1 else None

    def reached(least: float | None, part: float | None) -> bool:
        enough = least is not None and figure >= least - 1e-9
        return enough or (part is not None and share is not None and share >= part - 1e-9)

    status = "least" if reached(target.least, target.least_share) else "missed"
    status = "goal" if reached(target.goal, target.goal_share) else status
    return told | {"figure": figure, "share": share, "n": n, "status": status}


def _chosen(m: Measured) -> bool:
    """Return whether layers were chosen among several."""
    return len(m.measurement.tuning.get("candidates", ())) > 1


def _optimizes(m: Measured) -> bool:
    spec = m.measurement.spec
    return not spec.foreign and bool(kind_of(spec.kind).optimizes)


def _place(m: Measured) -> tuple[Any, ...]:
    return m.row.attack, m.measurement.base, m.measurement.split
