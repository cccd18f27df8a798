"""How defences behave: learning curves, sensing, hardening, what control changes, and what a sentinel stops."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import _store, data, models, statistics
from immunonet._words import show
from immunonet.evaluation.bench import Part, Value, chunks
from immunonet.evaluation.lab import CALIBRATION, Lab, Measurement, asked
from immunonet.studies import watching
from immunonet.studies.entries import Hardening, Healing, Learning, Sensing, Single
from immunonet.studies.experiments import Run

FALSE_ALARMS = (0.01, 0.05, 0.1)
# Points of a ROC curve.
ROC_POINTS = 101
# Decimal digits of what is kept.
DIGITS = 5
RULES = ("credibility", "distance", "distance_p")
KINDS = ("learning", "sensing", "hardening", "healing", "watching")

Values = Mapping[Any, Sequence[Value]]


def parts(run: Run) -> Iterator[Part]:
    """Return all that is to be done, but for what is chosen first."""
    for kind in KINDS:
        for entry in getattr(run.study, kind):
            for several in _ASKED[kind][0](run, entry).values():
                yield from several


def told(run: Run, kind: str) -> list[dict[str, Any]]:
    """Return what came of the experiments of a kind, one of `KINDS`.

    Learning: per eps the curves' means over antigens, with their 95 % half widths. Sensing: AUC and ROC of both rules
    for each stranger, and false-alarm rates. Hardening: accuracy before and after, attacked and clean, with p-values.
    Healing: mean distances to the manifolds before and after, clean and attacked, and a few pictures. Watching: what a
    sentinel stopped, by attack and way to ask, and its false alarms.
    """
    records = []
    for entry in getattr(run.study, kind):
        asked_of, tell = _ASKED[kind]
        values = {label: run.tables.bench.get(several) for label, several in asked_of(run, entry).items()}
        split = getattr(entry, "split", "test")
        where = run.lab.where(split, min(entry.images, len(run.lab.splits[split])))
        about = {"name": entry.name, "layers": list(entry.layers), "base": entry.base, "slice": where}
        records.append(about | tell(run, entry, values))
    return records


def _learned(run: Run, entry: Learning, values: Values) -> dict[str, Any]:
    curves = []
    for eps, several in values.items():
        curve: dict[str, Any] = {"eps": eps}
        for name in several[0]:
            series = torch.cat([torch.tensor(value[name], dtype=torch.float64) for value in several], 1)
            n = series.shape[1]
            half = 1.96 * series.std(1) / n**0.5 if n > 1 else torch.zeros(len(series))
            curve |= {name: _rounded(series.mean(1)), f"{name}_half": _rounded(half), "n": n}
        curves.append(curve)
    return {"curves": curves}


def _sensed(run: Run, entry: Sensing, values: Values) -> dict[str, Any]:
    def scores(name: str, source: str, rule: str) -> Tensor:
        return torch.tensor([score for value in values[name, source] for score in value[rule]])

    metrics = data.require("sklearn.metrics", "cli")
    rows, alarms = [], []
    for name in entry.defences:
        who = {"defence": name, "title": run.study.spec(name).title}
        for source in entry.strangers:
            for rule, sign in (("credibility", -1), ("distance", 1)):
                clean, strange = (sign * scores(name, images, rule) for images in ("clean", source))
                truth, both = [0] * len(clean) + [1] * len(strange), torch.cat([clean, strange]).tolist()
                false, true, _ = metrics.roc_curve(truth, both)
                points = np.interp(np.linspace(0, 1, ROC_POINTS), false, true)
                row = {"stranger": source, "rule": rule, "auc": float(metrics.roc_auc_score(truth, both))}
                row |= {"n": [len(clean), len(strange)], "true_alarms": _rounded(torch.from_numpy(points))}
                rows.append(who | row)
        for rule in ("credibility", "distance_p"):
            for alarm in FALSE_ALARMS:
                share, interval = _share(scores(name, "clean", rule) <= alarm + 1e-9)
                alarms.append(who | {"rule": rule, "nominal": alarm, "measured": share, "ci95": interval})
    return {"rows": rows, "false_alarms": alarms}


def _hardened(run: Run, entry: Hardening, values: Values) -> dict[str, Any]:
    (value,), rows = values[None], []
    for name in entry.defences:
        for source in ("attacked", "clean"):
            row: dict[str, Any] = {"defence": name, "title": run.study.spec(name).title, "images": source}
            stages = {stage: torch.tensor(value[stage][name][source]) for stage in ("before", "after")}
            for stage, correct in stages.items():
                row[stage], row[f"ci95_{stage}"] = _share(correct)
            rows.append(row | {"n": len(stages["before"]), "p": statistics.mcnemar(*stages.values())})
    return {"attack": entry.attack, "cells": value["cells"], "true_labels": value["true_labels"], "rows": rows}


def _healed(run: Run, entry: Healing, values: Values) -> dict[str, Any]:
    rows = []
    for source, several in values.items():
        for when in ("before", "after"):
            far = torch.cat([torch.tensor(value[when], dtype=torch.float64) for value in several])
            half = 1.96 * far.std(0) / max(1, len(far)) ** 0.5 if len(far) > 1 else torch.zeros_like(far[0])
            rows.append(
                {"images": source, "when": when, "mean": _rounded(far.mean(0)), "half": _rounded(half), "n": len(far)}
            )
    pictures = {source: several[0]["pictures"] for source, several in values.items()}
    spec = run.study.spec(entry.defence)
    return {
        "title": entry.title or spec.title, "attack": entry.attack, "rows": rows, "pictures": pictures,
    }  # fmt: skip


def _measurement(
    run: Run, entry: Single, name: str, split: str, attack: str = "none", eps: float | None = None
) -> Measurement:
    return Measurement(
        spec=run.study.spec(name, entry.layers, entry.settings), base=entry.base, among=(entry.layers,),
        attack=attack, method=run.study.attack(attack, eps), repertoire=entry.repertoire,
        split=split, images=min(entry.images, len(run.lab.splits[split])),
    )  # fmt: skip


def _part(
    run: Run, m: Measurement, part: slice, ask: Callable[..., Value], *args: Any, key: Any = (), about: str, cost: float
) -> Part:
    before = run.tables.attacked(m, part)
    images = before.key if before else run.lab.digest(m.split, part)
    key = _store.fingerprint([ask.__name__, run.lab.key(m.spec, m.base, m.repertoire), images, run.seed, key])
    cost *= part.stop - part.start
    after = (before,) if before else ()
    return Part(key=key, run=ask, args=(m, part, run.seed, *args), after=after, about=about, cost=cost)


def _learning(run: Run, entry: Learning) -> dict[Any, list[Part]]:
    found = {}
    for eps in entry.eps:
        m = _measurement(run, entry, entry.defence, entry.split, entry.attack, eps)
        about, places = f"{entry.name} eps {show(eps)}", chunks(m.images, run.tables.chunk)
        found[eps] = [_part(run, m, part, _learn, about=about, cost=30.0) for part in places]
    return found


def _sensing(run: Run, entry: Sensing) -> dict[Any, list[Part]]:
    found = {}
    for source in ("clean", *entry.strangers):
        split = source if source in run.lab.splits and source not in ("validation", "test") else "test"
        attack, noise = source if source in run.study.attacks else "none", entry.eps if source == "noise" else 0.0
        key, about = (noise, run.lab.digest("validation", None)), f"{entry.name} {source}"
        for name in entry.defences:
            m = run.settled(_measurement(run, entry, name, split, attack))
            places = chunks(m.images, run.tables.chunk)
            found[name, source] = [_part(run, m, at, _sense, noise, key=key, about=about, cost=5.0) for at in places]
    return found


def _hardening(run: Run, entry: Hardening) -> dict[Any, list[Part]]:
    m = _measurement(run, entry, entry.defence, "test", entry.attack)
    specs = {name: run.settled(_measurement(run, entry, name, "test")).spec for name in entry.defences}
    key = [entry.cells, {name: run.lab.key(spec, entry.base, entry.repertoire) for name, spec in specs.items()}]
    part = slice(0, m.images)
    return {None: [_part(run, m, part, _harden, specs, entry.cells, key=key, about=entry.name, cost=50.0)]}


def _healing(run: Run, entry: Healing) -> dict[Any, list[Part]]:
    found = {}
    for attack in ("none", entry.attack):
        m = _measurement(run, entry, entry.defence, "test", attack)
        places, about = chunks(m.images, run.tables.chunk), f"{entry.name} {attack}"
        found["clean" if attack == "none" else "attacked"] = [
            _part(run, m, part, _heal, entry.pictures, key=entry.pictures, about=about, cost=5.0) for part in places
        ]
    return found


_ASKED: dict[str, tuple[Callable[..., dict[Any, list[Part]]], Callable[..., dict[str, Any]]]] = {
    "learning": (_learning, _learned),
    "sensing": (_sensing, _sensed),
    "hardening": (_hardening, _hardened),
    "healing": (_healing, _healed),
    "watching": (watching.asked, watching.told),
}


def _learn(lab: Lab, m: Measurement, part: slice, seed: int, made: Value | None = None) -> Value:
    x, y = _inputs(lab, m, part, made)
    defence = lab.fitted(m.spec, m.base, m.repertoire)
    true = F.one_hot(y, defence.classes).bool()
    layers = [
        {
            "affinity": trace.affinity_mean[:, true],
            "affinity_others": trace.affinity_mean.masked_fill(true, -torch.inf).amax(2),
            "true_share": trace.votes[:, true],
            "entropy": trace.entropy,
        }
        for trace in defence.learning_curves(x, seed)
    ]
    return {name: [_rounded(row) for row in torch.stack([one[name] for one in layers]).mean(0)] for name in layers[0]}


def _sense(lab: Lab, m: Measurement, part: slice, seed: int, noise: float, made: Value | None = None) -> Value:
    x, _ = _inputs(lab, m, part, made)
    if noise:
        generator = torch.Generator().manual_seed(seed + part.start)
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        x = (x + noise * signs).clamp(0, 1)
    defence = lab.fitted(m.spec, m.base, m.repertoire, senses=True)
    sense, credibility = defence.sense(x), defence.credibility(x)
    if sense is None or credibility is None:
        raise ValueError(f"{m.spec.name} senses nothing: its answers must have a sense and a credibility")
    return dict(zip(RULES, map(_rounded, (credibility, sense.distance, sense.p_value)), strict=True))


def _harden(
    lab: Lab, m: Measurement, part: slice, seed: int, specs: Mapping[str, Any], cells: int, made: Value | None = None
) -> Value:
    attacked, y = _inputs(lab, m, part, made)
    half = m.images // 2
    memory = lab.fitted(m.spec, m.base, m.repertoire).memory_cells(attacked[:half], seed, most=cells)
    assert memory is not None
    x_more, y_more = (
        torch.cat([values.to(lab.device), more.flatten(0, 1)])
        for values, more in zip(lab.examples(m.repertoire), memory, strict=True)
    )
    few = lab.splits["validation"][:CALIBRATION]
    value: dict[str, Any] = {"before": {}, "after": {}, "cells": memory[1].numel()}
    value["true_labels"] = float((memory[1] == y[:half, None]).float().mean())
    for name, spec in specs.items():
        for stage in ("before", "after"):
            defence = lab.fitted(spec, m.base, m.repertoire)
            if stage == "after":
                defence = lab.made(spec, m.base, m.repertoire).fit(x_more, y_more, calibration=(few.x, few.y))
            seeds = (seed,) if defence.randomised else ()
            value[stage][name] = {
                source: (asked(defence, x[half:], seeds)[0][0] == y[half:].cpu()).tolist()
                for source, x in (("attacked", attacked), ("clean", lab.images(m.split, part)[0]))
            }
    return value


def _heal(lab: Lab, m: Measurement, part: slice, seed: int, pictures: int, made: Value | None = None) -> Value:
    x, y = _inputs(lab, m, part, made)
    defence = lab.fitted(m.spec, m.base, m.repertoire)
    found = defence.healed(x)
    assert found is not None
    bare = models.logits(lab.nets[m.base], x[:pictures]).argmax(1)
    answers = {"truth": y[:pictures], "bare": bare, "healed": defence.predict(x[:pictures])}
    shown = {"given": x[:pictures], "met": found.x[:pictures]} if part.start == 0 and x.ndim == 4 else {}
    return {
        "before": [_rounded(row) for row in found.before], "after": [_rounded(row) for row in found.after],
        "pictures": {name: _bytes(images) for name, images in shown.items()}
        | {"shape": list(x.shape[1:]), **{name: labels.tolist() for name, labels in answers.items()}},
    }  # fmt: skip


def _bytes(images: Tensor) -> str:
    """Return images in [0, 1] as bytes, base64."""
    return base64.b64encode(images.clamp(0, 1).mul(255).round().byte().cpu().numpy().tobytes()).decode()


def _inputs(lab: Lab, m: Measurement, part: slice, made: Value | None) -> tuple[Tensor, Tensor]:
    """Return some images, attacked if that was made before, and their labels."""
    x, y = lab.images(m.split, part)
    return x if made is None else made["x"].to(x), y


def _share(correct: Tensor) -> tuple[float, list[float]]:
    """Return a share with its interval."""
    return float(correct.float().mean()), list(statistics.wilson(int(correct.sum()), len(correct)))


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
