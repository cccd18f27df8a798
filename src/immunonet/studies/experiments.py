"""The experiments of a study, cut into tasks of one chunk of images each, and what follows from their answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from immunonet import RAILS, DkNN, Maturation, _store, data
from immunonet.evaluation import statistics
from immunonet.evaluation.asking import answers, describe_attack, is_randomised
from immunonet.evaluation.journal import Journal
from immunonet.evaluation.records import Row
from immunonet.immune import sensing
from immunonet.studies.lab import Attack, Lab
from immunonet.studies.settings import TESTED, Comparison, Hardening, Learning, Sensing, Study

FALSE_ALARMS = (0.01, 0.05, 0.1)
# Points of a ROC curve that are kept.
ROC_POINTS = 101
DIGITS = 5


@dataclass(frozen=True)
class Task:
    """A chunk of an experiment: `run` returns what the journal keeps under `key`; `cost` is a rough share of work."""

    key: str
    about: str
    cost: float
    run: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One defence under one attack; `experiment` and `value` place it in a table or on a curve.

    `candidates`: the sets of layers that tuned DkNN chooses from; the others have one.
    """

    experiment: str
    vary: str | None
    value: Any
    base: str
    defence: str
    candidates: tuple[tuple[str, ...], ...]
    attack_name: str
    attack: Attack
    split: str
    images: int
    seeds: tuple[int, ...]
    repertoire: int | None
    maturations: tuple[Maturation, ...]
    options: dict[str, Any]

    def key(self) -> str:
        """Return the name that its chunks are kept under: the hash of all that the answers depend on."""
        made_of = {
            "base": self.base,
            "defence": self.defence,
            "layers": self.candidates,
            "attack": [type(self.attack).__name__, describe_attack(self.attack)],
            "split": self.split,
            "seeds": self.seeds,
            "repertoire": self.repertoire,
            "maturation": [dataclasses.asdict(m) for m in self.maturations],
            "options": self.options,
        }
        return _store.fingerprint(json.loads(json.dumps(made_of)))[:16]

    def about(self) -> str:
        """Return it in words."""
        layers = " or ".join("+".join(layers) for layers in self.candidates)
        value = f"{self.vary} {show(self.value)}" if self.vary else ""
        return " ".join(filter(None, (self.experiment, self.base, self.defence, layers, self.attack_name, value)))

    def cost(self, images: int) -> float:
        """Return a rough share of work."""
        cells = sum(m.population * (m.generations + 1) for m in self.maturations) / 1000
        return images * (1 + len(self.seeds) * cells)


@dataclass(frozen=True)
class Measured:
    """A measurement, its row, and which images `(R, n)` were right in each run."""

    measurement: Measurement
    row: Row
    correct: Tensor


def measurements(study: Study, seed: int, sizes: dict[str, int]) -> list[Measurement]:
    """Return all measurements of the main table and the curves; `sizes`: how many images a split has."""
    found: dict[str, Measurement] = {}
    for entry in (*study.main, *study.curves):
        for measurement in _expand(study, entry, seed, sizes):
            place = [entry.name, show(measurement.value), measurement.images, measurement.attack_name]
            found.setdefault(f"{measurement.key()} {place}", measurement)
    return list(found.values())


def _expand(study: Study, entry: Comparison, seed: int, sizes: dict[str, int]) -> Iterator[Measurement]:
    values = entry.values if entry.vary is not None else (None,)
    sets: Sequence[tuple[tuple[str, ...], ...]] = [(one,) for one in entry.layers]
    sets = [entry.layers] if entry.choose_layers else sets
    for base in entry.bases:
        for candidates in sets:
            for kind in entry.defences:
                rails = kind.startswith("rails")
                for value in values:
                    if entry.vary == "layers" and candidates != (value,):
                        continue
                    varied = {str(entry.vary): value} if rails and entry.vary in TESTED else {}
                    overrides = entry.maturation | varied
                    for name in entry.attacks:
                        yield Measurement(
                            experiment=entry.name,
                            vary=entry.vary,
                            value=value,
                            base=base,
                            defence=kind,
                            candidates=() if kind == "cnn" else candidates,
                            attack_name=name,
                            attack=study.attack(name, value if entry.vary == "eps" else None),
                            split=entry.split,
                            images=min(entry.images, sizes[entry.split]),
                            seeds=tuple(range(seed, seed + entry.seeds)) if rails else (),
                            repertoire=None
                            if kind == "cnn"
                            else (value if entry.vary == "repertoire" else entry.repertoire),
                            maturations=tuple(study.maturations(kind, overrides, len(candidates[0]))) if rails else (),
                            options=entry.options if rails else {},
                        )


def tasks(study: Study, lab: Lab, seed: int) -> list[Task]:
    """Return every chunk of every experiment once, in an order in which fitted defences are used again."""
    found: dict[str, Task] = {}
    for measurement in measurements(study, seed, {name: len(split) for name, split in lab.splits.items()}):
        for part in _parts(measurement.images, study.chunk):
            key = _key(measurement.key(), part)
            found.setdefault(
                key,
                Task(
                    key,
                    measurement.about(),
                    measurement.cost(part.stop - part.start),
                    functools.partial(_answer, lab, measurement, part),
                ),
            )
    for learn in study.learning:
        for eps in learn.eps:
            for part in _parts(min(learn.images, len(lab.splits[learn.split])), study.chunk):
                key = _key(_special(study, learn, seed, eps), part)
                about = f"{learn.name} eps {show(eps)}"
                cost = 30.0 * (part.stop - part.start)
                found[key] = Task(key, about, cost, functools.partial(_learn, lab, learn, eps, seed, part))
    for sense in study.sensing:
        for source in ("clean", *sense.strangers):
            for part in _parts(_available(lab, sense, source), study.chunk):
                key = _key(_special(study, sense, seed, source), part)
                about, cost = f"{sense.name} {source}", 5.0 * (part.stop - part.start)
                found[key] = Task(key, about, cost, functools.partial(_sense, lab, sense, source, seed, part))
    for harden in study.hardening:
        key = _special(study, harden, seed, None)
        found[key] = Task(key, harden.name, 50.0 * harden.images, functools.partial(_harden, lab, harden, seed))
    return list(found.values())


def measured(study: Study, lab: Lab, seed: int, models: dict[str, str]) -> list[Measured]:
    """Return the rows of all measurements, whose chunks must all be in the journal; `models`: the bases' names."""
    sizes = {name: len(split) for name, split in lab.splits.items()}
    return [_measured(study, lab, found, models[found.base]) for found in measurements(study, seed, sizes)]


def learned(study: Study, lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return per learning experiment and eps the curves' means over antigens, with their 95 % half widths."""
    found = []
    for entry in study.learning:
        curves = []
        for eps in entry.eps:
            parts = _parts(min(entry.images, len(lab.splits[entry.split])), study.chunk)
            values = [lab.journal[_key(_special(study, entry, seed, eps), part)] for part in parts]
            curve: dict[str, Any] = {"eps": eps}
            for name in values[0]:
                series = torch.cat([torch.tensor(value[name], dtype=torch.float64) for value in values], 1)
                n = series.shape[1]
                half = 1.96 * series.std(1) / n**0.5 if n > 1 else torch.zeros(len(series))
                curve |= {name: _rounded(series.mean(1)), f"{name}_half": _rounded(half), "n": n}
            curves.append(curve)
        found.append({"name": entry.name, "layers": list(entry.layers), "base": entry.base, "curves": curves})
    return found


def sensed(study: Study, lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return per sensing experiment the AUC and ROC of both rules for each stranger, and false-alarm rates."""
    metrics = data.require("sklearn.metrics", "cli")
    found = []
    for entry in study.sensing:
        senses = {}
        for source in ("clean", *entry.strangers):
            parts = _parts(_available(lab, entry, source), study.chunk)
            values = [lab.journal[_key(_special(study, entry, seed, source), part)] for part in parts]
            senses[source] = {
                kind: {
                    rule: torch.tensor([v for value in values for v in value[kind][rule]])
                    for rule in ("credibility", "distance", "distance_p")
                }
                for kind in entry.defences
            }
        rows = []
        for kind in entry.defences:
            clean = senses["clean"][kind]
            for source in entry.strangers:
                strange = senses[source][kind]
                truth = [0] * len(clean["distance"]) + [1] * len(strange["distance"])
                for rule, sign in (("credibility", -1), ("distance", 1)):
                    scores = (sign * torch.cat([clean[rule], strange[rule]])).tolist()
                    false, true, _ = metrics.roc_curve(truth, scores)
                    points = np.interp(np.linspace(0, 1, ROC_POINTS), false, true)
                    rows.append(
                        {
                            "defence": kind,
                            "stranger": source,
                            "rule": rule,
                            "auc": float(metrics.roc_auc_score(truth, scores)),
                            "n": [len(clean["distance"]), len(strange["distance"])],
                            "true_alarms": _rounded(torch.from_numpy(points)),
                        }
                    )
        alarms = [
            {
                "defence": kind,
                "rule": rule,
                "nominal": alarm,
                "measured": float((senses["clean"][kind][rule] <= alarm + 1e-9).float().mean()),
                "ci95": list(
                    statistics.wilson(
                        int((senses["clean"][kind][rule] <= alarm + 1e-9).sum()), len(senses["clean"][kind][rule])
                    )
                ),
            }
            for kind in entry.defences
            for rule in ("credibility", "distance_p")
            for alarm in FALSE_ALARMS
        ]
        found.append(
            {
                "name": entry.name,
                "layers": list(entry.layers),
                "base": entry.base,
                "rows": rows,
                "false_alarms": alarms,
            }
        )
    return found


def hardened(study: Study, lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return per hardening experiment each defence's accuracy before and after, attacked and clean, with p-values."""
    found = []
    for entry in study.hardening:
        value = lab.journal[_special(study, entry, seed, None)]
        rows = []
        for kind in entry.defences:
            for source in ("attacked", "clean"):
                before, after = (torch.tensor(value[stage][kind][source]) for stage in ("before", "after"))
                rows.append(
                    {
                        "defence": kind,
                        "images": source,
                        "n": len(before),
                        "before": float(before.float().mean()),
                        "after": float(after.float().mean()),
                        "ci95_before": list(statistics.wilson(int(before.sum()), len(before))),
                        "ci95_after": list(statistics.wilson(int(after.sum()), len(after))),
                        "p": statistics.mcnemar(before, after),
                    }
                )
        found.append(
            {
                "name": entry.name,
                "layers": list(entry.layers),
                "base": entry.base,
                "attack": entry.attack,
                "cells": value["cells"],
                "true_labels": value["true_labels"],
                "rows": rows,
            }
        )
    return found


def _answer(lab: Lab, found: Measurement, part: slice) -> dict[str, Any]:
    x = lab.adversarials(found.base, found.attack, found.split, part)
    defence = _defence(lab, found)
    labels, seconds = answers(defence, x, found.seeds if is_randomised(defence) else ())
    return {"labels": labels.tolist(), "seconds": seconds}


def _defence(lab: Lab, found: Measurement) -> nn.Module:
    if not found.candidates:
        return lab.nets[found.base]
    layers, repertoire = found.candidates[0], found.repertoire
    if found.defence.startswith("rails"):
        maturations = list(found.maturations)
        return lab.rails(found.base, layers, maturations, options=found.options, repertoire=repertoire)
    return _neighbours(lab, found.base, found.defence, found.candidates, repertoire)


def _neighbours(lab: Lab, base: str, kind: str, candidates: Sequence[tuple[str, ...]], repertoire: int | None) -> DkNN:
    """Return plain kNN (Euclidean), DkNN as published, or DkNN tuned."""
    if kind == "dknn":
        size = len(lab.examples(repertoire)[1])
        return lab.dknn(base, candidates[0], min(75, size), "cosine", repertoire=repertoire)
    chosen = _tuning(lab, base, kind, candidates, repertoire)
    return lab.dknn(base, chosen["layers"], chosen["neighbours"], chosen["metric"], repertoire=repertoire)


def _tuning(
    lab: Lab, base: str, kind: str, candidates: Sequence[tuple[str, ...]], repertoire: int | None
) -> dict[str, Any]:
    metrics = ("euclidean",) if kind == "knn" else lab.study.tuning.metrics
    return lab.tuned(base, candidates, metrics, repertoire=repertoire)


def _measured(study: Study, lab: Lab, found: Measurement, model: str) -> Measured:
    parts = _parts(found.images, study.chunk)
    values = [lab.journal[_key(found.key(), part)] for part in parts]
    _, y = lab.images(found.split, slice(0, found.images))
    correct = torch.cat([torch.tensor(value["labels"]) for value in values], 1) == y.cpu()
    settings: dict[str, Any] = {
        "model": model,
        "base": found.base,
        "weights": lab.weights(found.base),
        "split": found.split,
        "slice": [0, found.images],
        "experiment": found.experiment,
        "device": lab.device.type,
        "chunk": study.chunk,
        "layers": [],
    }
    if found.vary is not None:
        settings |= {"vary": found.vary, "value": found.value}
    if found.defence != "cnn":
        settings |= {"layers": list(found.candidates[0]), "repertoire": len(lab.examples(found.repertoire)[1])}
    if found.defence.startswith("rails"):
        settings |= {"maturation": [dataclasses.asdict(m) for m in found.maturations]} | found.options
    elif found.defence == "dknn":
        settings |= {"neighbours": min(75, settings["repertoire"]), "metric": "cosine"}
    elif found.defence in ("knn", "dknn-tuned"):
        chosen = _tuning(lab, found.base, found.defence, found.candidates, found.repertoire)
        settings |= {name: chosen[name] for name in ("layers", "neighbours", "metric")} | {"tuning": chosen}
    row = Row.of(
        correct,
        dataset=study.dataset,
        defence=found.defence,
        attack=found.attack_name,
        knows="base",
        eps=found.attack.eps if found.attack is not None else 0.0,
        norm=found.attack.norm if found.attack is not None else "linf",
        seconds_per_image=sum(value["seconds"] for value in values) / found.images,
        seeds=found.seeds,
        settings=settings | describe_attack(found.attack),
    )
    return Measured(found, row, correct)


def _learn(lab: Lab, entry: Learning, eps: float, seed: int, part: slice) -> dict[str, Any]:
    maturations = lab.study.maturations("rails", entry.maturation, len(entry.layers))
    rails = lab.rails(entry.base, entry.layers, maturations, repertoire=entry.repertoire)
    _, y = lab.images(entry.split, part)
    x = lab.adversarials(entry.base, lab.study.attack(entry.attack, eps), entry.split, part)
    traces = rails.respond(x, seed=seed, trace=True).trace
    assert traces is not None
    true = torch.nn.functional.one_hot(y, rails.classes).bool()
    parts: dict[str, list[Tensor]] = {}
    for trace in traces:
        mean = trace.affinity_mean
        parts.setdefault("affinity", []).append(mean[:, true])
        parts.setdefault("affinity_others", []).append(mean.masked_fill(true, -torch.inf).amax(2))
        parts.setdefault("true_share", []).append(trace.votes[:, true])
        parts.setdefault("entropy", []).append(trace.entropy)
    return {name: [_rounded(row) for row in torch.stack(values).mean(0)] for name, values in parts.items()}


def _sense(lab: Lab, entry: Sensing, source: str, seed: int, part: slice) -> dict[str, Any]:
    if source == "noise":
        x, _ = lab.images("test", part)
        generator = torch.Generator().manual_seed(seed + part.start)
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        x = (x + entry.eps * signs).clamp(0, 1)
    elif source in lab.study.attacks:
        x = lab.adversarials(entry.base, lab.study.attack(source), "test", part)
    else:
        x, _ = lab.images("test" if source == "clean" else source, part)
    found = {}
    for kind in entry.defences:
        defence: RAILS | DkNN
        if kind == "rails":
            maturations = lab.study.maturations("rails", {}, len(entry.layers))
            defence = lab.calibrated(lab.rails(entry.base, entry.layers, maturations, repertoire=entry.repertoire))
        else:
            defence = lab.calibrated(_neighbours(lab, entry.base, kind, [entry.layers], entry.repertoire))
        found[kind] = {rule: _rounded(values) for rule, values in senses(defence, x).items()}
    return found


def senses(defence: RAILS | DkNN, x: Tensor) -> dict[str, Tensor]:
    """Return what a defence senses of inputs `(B, *S)`, each `(B,)`.

    `credibility`; `distance`, the mean distance to the nearest in units of the calibration's, summed over layers;
    `distance_p`, its conformal p-value.
    """
    if isinstance(defence, DkNN):
        credibility = defence.credibility(x)
        far = defence._neighbourhood(x)[2]
    else:
        naive = [sensing.overall_nearest(defence.naive(x, layer)[1]) for layer in range(len(defence.layers))]
        counts = torch.stack([sensing.nonconformity(labels, defence.classes) for _, labels in naive]).sum(0)
        credibility = sensing.p_values(defence.calibration.label_scores, counts.float()).amax(1)
        far = torch.stack([near.mean(1) for near, _ in naive], dim=1)
    distance = (far / defence.calibration.scales).sum(1)
    p = sensing.p_values(defence.calibration.strangeness, distance)
    return {"credibility": credibility, "distance": distance, "distance_p": p}


def _harden(lab: Lab, entry: Hardening, seed: int) -> dict[str, Any]:
    n = min(entry.images, len(lab.splits["test"]))
    clean, y = lab.images("test", slice(0, n))
    attacked = lab.adversarials(entry.base, lab.study.attack(entry.attack), "test", slice(0, n))
    maturations = lab.study.maturations("rails", entry.maturation, len(entry.layers))
    rails = lab.rails(entry.base, entry.layers, maturations, repertoire=entry.repertoire)
    half = n // 2
    memory = rails.respond(attacked[:half], seed=seed).memory.part(slice(0, entry.cells))
    of = y[:half, None].expand_as(memory.label)
    x_all, y_all = (values.to(lab.device) for values in lab.examples(entry.repertoire))
    x_more = torch.cat([x_all, memory.x.flatten(0, 1)])
    y_more = torch.cat([y_all, memory.label.flatten()])
    few = lab.held_out[:50]
    value: dict[str, Any] = {
        "cells": memory.label.numel(),
        "true_labels": float((memory.label == of).float().mean()),
        "before": {},
        "after": {},
    }
    for kind in entry.defences:
        for stage in ("before", "after"):
            defence: RAILS | DkNN = (
                rails if kind == "rails" else _neighbours(lab, entry.base, kind, [entry.layers], entry.repertoire)
            )
            if stage == "after":
                maps = lab.maps(entry.base, entry.layers)
                defence = (
                    RAILS(lab.nets[entry.base], maps, maturation=maturations)
                    if isinstance(defence, RAILS)
                    else DkNN(lab.nets[entry.base], maps, neighbours=defence.neighbours, metric=defence.metric)
                ).fit(x_more, y_more, calibration=(few.x, few.y))
            value[stage][kind] = {
                source: (
                    answers(defence, x[half:], (seed,) if kind == "rails" else ())[0][0] == y[half:].cpu()
                ).tolist()
                for source, x in (("attacked", attacked), ("clean", clean))
            }
    return value


def show(value: Any) -> str:
    """Return a setting's value as a short text."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " + ".join(map(show, value))
    return str(value)


def missing(tasks: Sequence[Task], journal: Journal) -> list[Task]:
    """Return the tasks whose value is not kept yet."""
    return [task for task in tasks if task.key not in journal]


def _special(study: Study, entry: Learning | Sensing | Hardening, seed: int, of: Any) -> str:
    """Return the name that an experiment's chunks are kept under, for one eps or source of it."""
    overrides = getattr(entry, "maturation", {})
    made_of = [
        type(entry).__name__,
        {k: v for k, v in dataclasses.asdict(entry).items() if k not in ("images", "eps", "strangers")},
        [dataclasses.asdict(m) for m in study.maturations("rails", overrides, len(entry.layers))],
        getattr(entry, "images", None) if isinstance(entry, Hardening) else None,
        getattr(entry, "eps", None) if of == "noise" else None,
        of,
        seed,
    ]
    return f"{entry.name} {_store.fingerprint(json.loads(json.dumps(made_of)))[:16]}"


def _available(lab: Lab, entry: Sensing, source: str) -> int:
    split = source if source in lab.splits and source != "validation" else "test"
    return min(entry.images, len(lab.splits[split]))


def _parts(n: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]


def _key(name: str, part: slice) -> str:
    return f"{name} / {part.start}-{part.stop}"


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), DIGITS) for v in values]
