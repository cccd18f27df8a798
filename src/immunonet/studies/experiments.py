"""The experiments of a study, cut into tasks of one chunk of images each, and what follows from their answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import DkNN, Maturation, _store
from immunonet.evaluation.asking import answers, describe_attack, is_randomised
from immunonet.evaluation.records import Row
from immunonet.studies.entries import TESTED, Comparison
from immunonet.studies.lab import Attack, Lab
from immunonet.studies.settings import Study
from immunonet.studies.tasks import Task, chunks, key_of, show


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
                            options=_options(entry, candidates) if rails else {},
                        )


def _options(entry: Comparison, candidates: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    return entry.options | (hidden_space(candidates[0]) if entry.hidden else {})


def hidden_space(layers: Sequence[str]) -> dict[str, Any]:
    """Return the options of a RAILS whose cells live in its one layer: those of "input" are images anyway."""
    (space,) = layers
    return {} if space == "input" else {"space": space}


def tasks(study: Study, lab: Lab, seed: int) -> list[Task]:
    """Return every chunk of every measurement once, in an order in which fitted defences are used again."""
    found: dict[str, Task] = {}
    for measurement in measurements(study, seed, {name: len(split) for name, split in lab.splits.items()}):
        for part in chunks(measurement.images, study.chunk):
            key = key_of(measurement.key(), part)
            found.setdefault(
                key,
                Task(
                    key,
                    measurement.about(),
                    measurement.cost(part.stop - part.start),
                    functools.partial(_answer, lab, measurement, part),
                ),
            )
    return list(found.values())


def measured(study: Study, lab: Lab, seed: int, models: dict[str, str]) -> list[Measured]:
    """Return the rows of all measurements, whose chunks must all be in the journal; `models`: the bases' names."""
    sizes = {name: len(split) for name, split in lab.splits.items()}
    return [_measured(study, lab, found, models[found.base]) for found in measurements(study, seed, sizes)]


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
    return neighbours(lab, found.base, found.defence, found.candidates, repertoire)


def neighbours(lab: Lab, base: str, kind: str, candidates: Sequence[tuple[str, ...]], repertoire: int | None) -> DkNN:
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
    parts = chunks(found.images, study.chunk)
    values = [lab.journal[key_of(found.key(), part)] for part in parts]
    _, y = lab.images(found.split, slice(0, found.images))
    correct = torch.cat([torch.tensor(value["labels"]) for value in values], 1) == y.cpu()
    settings: dict[str, Any] = {
        "model": model,
        "base": found.base,
        "weights": lab.weights(found.base),
        "split": found.split,
        "slice": lab.where(found.split, found.images),
        "experiment": found.experiment,
        "device": lab.device.type,
        "chunk": study.chunk,
        "layers": [],
    }
    if found.vary is not None:
        settings |= {"vary": found.vary, "value": found.value}
    if found.defence != "cnn":
        size, whole = len(lab.examples(found.repertoire)[1]), len(lab.training)
        settings |= {"layers": list(found.candidates[0]), "repertoire": size}
        if size < whole:
            settings["repertoire_slice"] = {"sample": [size, whole], "seed": 0}
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
