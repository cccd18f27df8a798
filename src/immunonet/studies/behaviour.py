"""How RAILS behaves: learning curves, sensing of strangers, and hardening by memory cells."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunonet import RAILS, DkNN, _store, data
from immunonet.evaluation import statistics
from immunonet.evaluation.asking import answers
from immunonet.studies.entries import Hardening, Learning, Sensing
from immunonet.studies.experiments import neighbours
from immunonet.studies.lab import Lab
from immunonet.studies.settings import Study
from immunonet.studies.tasks import Task, chunks, key_of, rounded, show

FALSE_ALARMS = (0.01, 0.05, 0.1)
# Points of a ROC curve.
ROC_POINTS = 101


def tasks(study: Study, lab: Lab, seed: int) -> list[Task]:
    """Return every chunk of the study's learning, sensing and hardening experiments."""
    found: dict[str, Task] = {}
    for learn in study.learning:
        for eps in learn.eps:
            for part in chunks(min(learn.images, len(lab.splits[learn.split])), study.chunk):
                key = key_of(_special(study, learn, seed, eps), part)
                about = f"{learn.name} eps {show(eps)}"
                cost = 30.0 * (part.stop - part.start)
                found[key] = Task(key, about, cost, functools.partial(_learn, lab, learn, eps, seed, part))
    for sense in study.sensing:
        for source in ("clean", *sense.strangers):
            for part in chunks(_available(lab, sense, source), study.chunk):
                key = key_of(_special(study, sense, seed, source), part)
                about, cost = f"{sense.name} {source}", 5.0 * (part.stop - part.start)
                found[key] = Task(key, about, cost, functools.partial(_sense, lab, sense, source, seed, part))
    for harden in study.hardening:
        key = _special(study, harden, seed, None)
        found[key] = Task(key, harden.name, 50.0 * harden.images, functools.partial(_harden, lab, harden, seed))
    return list(found.values())


def learned(study: Study, lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return per learning experiment and eps the curves' means over antigens, with their 95 % half widths."""
    found = []
    for entry in study.learning:
        curves = []
        for eps in entry.eps:
            parts = chunks(min(entry.images, len(lab.splits[entry.split])), study.chunk)
            values = [lab.journal[key_of(_special(study, entry, seed, eps), part)] for part in parts]
            curve: dict[str, Any] = {"eps": eps}
            for name in values[0]:
                series = torch.cat([torch.tensor(value[name], dtype=torch.float64) for value in values], 1)
                n = series.shape[1]
                half = 1.96 * series.std(1) / n**0.5 if n > 1 else torch.zeros(len(series))
                curve |= {name: rounded(series.mean(1)), f"{name}_half": rounded(half), "n": n}
            curves.append(curve)
        where = lab.where(entry.split, curves[0]["n"])
        found.append(
            {"name": entry.name, "layers": list(entry.layers), "base": entry.base, "slice": where, "curves": curves}
        )
    return found


def sensed(study: Study, lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return per sensing experiment the AUC and ROC of both rules for each stranger, and false-alarm rates."""
    metrics = data.require("sklearn.metrics", "cli")
    found = []
    for entry in study.sensing:
        senses = {}
        for source in ("clean", *entry.strangers):
            parts = chunks(_available(lab, entry, source), study.chunk)
            values = [lab.journal[key_of(_special(study, entry, seed, source), part)] for part in parts]
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
                            "true_alarms": rounded(torch.from_numpy(points)),
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
                "slice": lab.where("test", len(senses["clean"][entry.defences[0]]["distance"])),
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
                "slice": lab.where("test", min(entry.images, len(lab.splits["test"]))),
                "cells": value["cells"],
                "true_labels": value["true_labels"],
                "rows": rows,
            }
        )
    return found


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
    return {name: [rounded(row) for row in torch.stack(values).mean(0)] for name, values in parts.items()}


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
            defence = lab.calibrated(neighbours(lab, entry.base, kind, [entry.layers], entry.repertoire))
        found[kind] = {rule: rounded(values) for rule, values in senses(defence, x).items()}
    return found


def senses(defence: RAILS | DkNN, x: Tensor) -> dict[str, Tensor]:
    """Return what a defence senses of inputs `(B, *S)`, each `(B,)`.

    `credibility`; `distance`, the mean distance to the nearest in units of the calibration's, summed over layers;
    `distance_p`, its conformal p-value.
    """
    sense = defence.sense(x)
    return {"credibility": defence.credibility(x), "distance": sense.distance, "distance_p": sense.p_value}


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
                rails if kind == "rails" else neighbours(lab, entry.base, kind, [entry.layers], entry.repertoire)
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
