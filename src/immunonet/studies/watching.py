"""What a sentinel stops of attacks that only ask, and how often it takes honest queries for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from immunonet import _store, models
from immunonet.evaluation import stream
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.bench import Part, Value, chunks
from immunonet.evaluation.lab import Lab, Measurement
from immunonet.evaluation.suite import light
from immunonet.memory.sentinel import Sentinel
from immunonet.studies.entries import Watching
from immunonet.studies.experiments import Run

# Images that are attacked in one part.
CHUNK = 10


def asked(run: Run, entry: Watching) -> dict[Any, list[Part]]:
    """Return the parts of an experiment: by attack, way and whether flags refuse, and those of honest queries."""
    m = Measurement(
        spec=run.study.spec(entry.defence, entry.layers, entry.settings), base=entry.base, among=(entry.layers,),
        repertoire=entry.repertoire, split=entry.split, images=entry.images,
    )  # fmt: skip
    lab, common = run.lab, (entry, m)
    watch = [entry.watch(), lab.digest("training", None), lab.weights[m.base]]
    whole = [watch, lab.key(m.spec, m.base, m.repertoire), lab.digest(entry.split, None), run.seed]

    def part(name: str, run_it: Callable[..., Value], *args: Any, key: Any, after: tuple[Part, ...] = ()) -> Part:
        about = f"{entry.name} {name}"
        return Part(key=_store.fingerprint([name, key]), run=run_it, args=(*common, *args), after=after, about=about)

    fitted = part("threshold", _fitted, key=watch)
    standing = part("standing", _standing, key=[whole, entry.images])
    found: dict[Any, list[Part]] = {"threshold": [fitted]}
    for name, method in stream.askers(entry.threat(), entry.queries).items():
        for way in entry.ways if name in entry.attacks else ():
            for assault in stream.assaults(method, entry.threat(), way, entry.queries):
                found[name, way, assault.refuses] = [
                    part(
                        f"{name} {way}", _attacked, assault, place, after=(fitted, standing),
                        key=[whole, assault.told(), place.start, place.stop],
                    )
                    for place in chunks(entry.images, CHUNK)
                ]  # fmt: skip
    return found | {"honest": [part("honest", _honest, key=[whole, entry.clean, entry.copied], after=(fitted,))]}


def told(run: Run, entry: Watching, values: Any) -> dict[str, Any]:
    """Return the rows of attacks and of honest queries."""
    rows = []
    for name in dict.fromkeys(key[0] for key in values if isinstance(key, tuple)):
        for way in entry.ways:
            marked, refused = (
                [one for value in values[name, way, refuses] for one in value["images"]] for refuses in (False, True)
            )
            rows.append({"attack": name, "way": way} | stream.told(marked, refused))
    (threshold,), (honest,) = values["threshold"], values["honest"]
    spec = run.study.spec(entry.defence, entry.layers, entry.settings)
    return {
        "title": entry.title or spec.title, "defence": spec.name, "eps": entry.eps, "norm": entry.norm,
        "queries": entry.queries, "sentinel": entry.watch() | threshold, "rows": rows,
        "false_alarms": honest["streams"],
    }  # fmt: skip


def _sentinel(lab: Lab, entry: Watching, m: Measurement, threshold: float | None) -> Sentinel:
    found = Sentinel(lab.nets[m.base], **entry.watch())
    found.threshold = threshold
    return found


def _fitted(lab: Lab, entry: Watching, m: Measurement) -> Value:
    return {"threshold": _sentinel(lab, entry, m, None).fit(lab.training.x).threshold}


def _met(lab: Lab, entry: Watching, m: Measurement, fitted: Value) -> tuple[Sentinel, Tensor]:
    """Return a sentinel whose window is full of clean queries, and their signatures."""
    found = _sentinel(lab, entry, m, fitted["threshold"])
    traffic = found.signatures(lab.training.x[: entry.window].to(lab.device))
    found.take(traffic)
    return found, traffic


def _subject(lab: Lab, m: Measurement) -> Subject:
    with torch.no_grad():
        classes = models.logits(lab.nets[m.base], lab.images(m.split, slice(0, 1))[0]).shape[1]
    return light(Subject(lab.fitted(m.spec, m.base, m.repertoire), classes=classes))


def _standing(lab: Lab, entry: Watching, m: Measurement) -> Value:
    """Return the places of the first images that are answered rightly."""
    subject, found = _subject(lab, m), []
    for start in range(0, len(lab.splits[m.split]), 100):
        x, y = lab.images(m.split, slice(start, start + 100))
        right = subject.labels(x)[0][0] == y.cpu()
        found += (right.nonzero()[:, 0] + start).tolist()
        if len(found) >= m.images:
            break
    return {"images": found[: m.images]}


def _attacked(
    lab: Lab, entry: Watching, m: Measurement, assault: stream.Assault, place: slice, fitted: Value, standing: Value
) -> Value:
    sentinel, traffic = _met(lab, entry, m, fitted)
    subject, found = _subject(lab, m), []
    for image in standing["images"][place]:
        x, y = lab.images(m.split, slice(image, image + 1))
        subject.rewind()
        found.append(stream.attacked(subject, sentinel, x, y, assault, traffic))
    return {"images": found}


def _honest(lab: Lab, entry: Watching, m: Measurement, fitted: Value) -> Value:
    sentinel, _ = _met(lab, entry, m, fitted)
    x, _ = lab.images(entry.split, slice(0, entry.clean))
    copies = stream.honest(x[: entry.copied], entry.threat().bounds)
    return {"streams": stream.alarms(sentinel, {"clean": x} | copies)}
