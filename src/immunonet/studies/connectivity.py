"""Paths between networks: their points under every threat, and which of them are taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check, _store, models, statistics
from immunonet.attacks import APGD, PGD, Attack
from immunonet.defences.path import ModePath
from immunonet.defences.spec import Spec
from immunonet.evaluation.bench import Part, Value, chunks
from immunonet.evaluation.lab import Lab, Measurement
from immunonet.evaluation.threats import UNION
from immunonet.studies.experiments import Run
from immunonet.studies.landscape import Plane
from immunonet.studies.values import BEST

# Union accuracy that a place may lack of the best to be as good: the rule of the group's own follow-up.
_AS_GOOD = 0.02

Make = Callable[[str, list[nn.Module]], ModePath]
"""What gives a path of the study, its bends trained, between networks."""


@dataclass(frozen=True)
class Joined:
    """The paths of a study at work, by name; their points are networks of the run's lab."""

    run: Run
    paths: dict[str, ModePath]

    @property
    def places(self) -> list[float]:
        """Where points are measured."""
        return self.run.study.profile.places

    def measurements(self, name: str) -> dict[tuple[str, str], list[Measurement]]:
        """Return what is measured of a path, by attack and norm: one measurement for every place."""
        study, lab = self.run.study, self.run.lab
        images = min(study.profile.images, len(lab.splits["validation"]))
        found: dict[tuple[str, str], list[Measurement]] = {}
        for (attack, norm), method in attacks(self.run).items():
            found[attack, norm] = [
                Measurement(
                    spec=Spec(kind="cnn"), base=self.point(name, (t,)), attack=attack, method=method,
                    split="validation", images=images, told={"model": self.model_of(name)},
                    place=f"{name} {attack} {norm}".strip(),
                )
                for t in self.places
            ]  # fmt: skip
        return found

    def right(self, name: str) -> dict[tuple[str, str], Tensor]:
        """Return by attack and norm which images are right at every place, `(places, n)` bool, and under their union.

        The union counts a point's images that are right under all threats, by one attack.
        """
        measure = self.run.tables.measure
        found = {
            key: torch.stack([one.correct[0] for one in measure(several)])
            for key, several in self.measurements(name).items()
        }
        for attack in dict.fromkeys(attack for attack, norm in found if norm):
            found[attack, UNION] = torch.stack([one for key, one in found.items() if key[0] == attack]).all(0)
        return found

    def best(self, name: str) -> float:
        """Return the place of a path with the highest union on validation, under both attacks; the middle of equals."""
        scores = list(zip(*self._scores(name), strict=True))
        top = [i for i, score in enumerate(scores) if score == max(scores)]
        return self.places[top[len(top) // 2]]

    def segment(self, name: str, count: int) -> tuple[float, ...]:
        """Return so many places, evenly over the longest stretch of a path whose union is as good as the best."""
        union, _ = self._scores(name)
        good = [i for i, score in enumerate(union) if score >= max(union) - _AS_GOOD]
        # Of neighbours the distance from their place in the list is the same.
        runs = [[i for _, i in run] for _, run in itertools.groupby(enumerate(good), key=lambda one: one[1] - one[0])]
        longest = max(runs, key=lambda run: (len(run), max(union[i] for i in run)))
        first, last = self.places[longest[0]], self.places[longest[-1]]
        if len(longest) < count:  # its neighbours join
            wide = min(0.5, (count - 1) / 2 / (len(self.places) - 1))
            middle = min(max((first + last) / 2, wide), 1 - wide)
            first, last = middle - wide, middle + wide
        return tuple(round(first + (last - first) * i / (count - 1), 6) for i in range(count))

    def _scores(self, name: str) -> tuple[list[float], list[float]]:
        """Return per place the share right under all, and the least share under one threat."""
        attacked = {key: one for key, one in self.right(name).items() if key[1] not in ("", UNION)}
        norms = dict.fromkeys(norm for _, norm in attacked)
        each = [torch.stack([one for key, one in attacked.items() if key[1] == norm]).all(0) for norm in norms]
        least = torch.stack([one.double().mean(1) for one in each]).amin(0)
        return torch.stack(each).all(0).double().mean(1).tolist(), least.tolist()

    def model_of(self, name: str) -> str:
        """Return the name of the network that a base is, or that the ends of a path are."""
        while name in self.paths:
            name = self.run.study.paths[name].ends[0].partition("@")[0]
        return self.run.models[name]

    def point(self, name: str, places: Sequence[float]) -> str:
        """Return the name, in the lab, of the network at some places of a path, an ensemble of several."""
        called = f"{name}@{'+'.join(f'{t:g}' for t in places)}"
        if called not in self.run.lab.nets:
            path = self.paths[name]
            self.run.lab.add(called, path.at(places[0]) if len(places) == 1 else path.ensemble(places))
        return called

    def network(self, place: str) -> tuple[str, tuple[float, ...]]:
        """Return the name, in the lab, of what a study calls a network, and its places on a path."""
        name, at, where = place.partition("@")
        if not at:
            return name, ()
        if where == BEST:
            places: tuple[float, ...] = (self.best(name),)
        elif where.startswith(BEST):
            places = self.segment(name, int(where.removeprefix(BEST)))
        else:
            places = tuple(_check.fraction("t", t) for t in where.split("+"))
        return self.point(name, places), places


def joined(run: Run, make: Make) -> Joined:
    """Return a study's paths, trained one after the other: the ends of one may be the best points of those before."""
    found = Joined(run, {})
    for name, join in run.study.paths.items():
        found.paths[name] = make(name, [run.lab.nets[found.network(end)[0]] for end in join.ends])
    return found


def attacks(run: Run) -> dict[tuple[str, str], Attack | None]:
    """Return what points are measured by, by attack and norm; none is of no norm."""
    study, found = run.study, dict[tuple[str, str], Attack | None]()
    found["none", ""] = None
    for norm, eps in (study.threats or {}).items():
        found["pgd", norm] = PGD(norm=norm, eps=eps, step=eps / 4, iterations=study.profile.iterations)
    for norm, eps in (study.threats or {}).items():
        found["apgd", norm] = APGD(norm=norm, eps=eps, iterations=study.profile.apgd)
    return found


def parts(found: Joined) -> Iterator[Part]:
    """Return all that is to be done on the paths but for what is chosen first."""
    for name in found.paths:
        for several in found.measurements(name).values():
            for m in several:
                yield from found.run.tables.parts(m)
        yield from _losses(found, name)
        if (plane := _plane(found, name)) is not None:
            yield from plane.parts(found.run.lab, f"{name} plane")


def told(found: Joined) -> list[dict[str, Any]]:
    """Return what came of the paths: per place accuracies with intervals, losses, and which places are taken.

    `barrier`: how far the loss, clean and under each threat, rises above the straight line between those of the ends.
    `plane`: losses under the worst of the threats around both ends and the bend, of a path that is trained.
    """
    records, bench, study = [], found.run.tables.bench, found.run.study
    for name, join in study.paths.items():
        right = found.right(name)
        lost, plane = bench.get(_losses(found, name)), _plane(found, name)
        around = (
            None if plane is None else plane.told(bench.get(plane.parts(found.run.lab, f"{name} plane")), found.places)
        )
        losses = {norm: [value[norm] for value in lost] for norm in ("", *(study.threats or {}))}
        records.append({
            "name": name, "title": join.title or name, "ends": list(join.ends), "t": found.places,
            "n": next(iter(right.values())).shape[1], "curve": found.paths[name].curve,
            "training": join.training and join.training.model_dump(mode="json"),
            "accuracy": [
                {
                    "attack": attack, "norm": norm, "accuracy": one.double().mean(1).tolist(),
                    "ci95": [list(statistics.interval(at[None])) for at in one],
                }
                for (attack, norm), one in right.items()
            ],
            "best": found.best(name), "best3": list(found.segment(name, 3)),
            "loss": losses, "barrier": {norm: _barrier(found.places, values) for norm, values in losses.items()},
            "plane": around,
        })  # fmt: skip
    return records


def _barrier(places: Sequence[float], values: Sequence[float]) -> float:
    straight = [values[0] + t * (values[-1] - values[0]) for t in places]
    return max(a - b for a, b in zip(values, straight, strict=True))


def _losses(found: Joined, name: str) -> list[Part]:
    """Return what gives, for every place, the mean loss on clean images and under each threat."""
    tables, several, out = found.run.tables, found.measurements(name), []
    for i in range(len(found.places)):
        clean = several["none", ""][i]
        under = [one[i] for (attack, _), one in several.items() if attack == "pgd"]
        places = chunks(clean.images, tables.chunk)
        made = tuple(part for m in under for at in places if (part := tables.attacked(m, at)) is not None)
        key = ["loss", tables.lab.key(clean.spec, clean.base), [one.key for one in made]]
        norms = tuple(m.method.norm for m in under if m.method is not None)
        out.append(Part(
            key=_store.fingerprint(key), run=_lost, args=(clean, norms, len(places)), after=made,
            about=f"{name} loss", cost=float(clean.images),
        ))  # fmt: skip
    return out


@torch.no_grad()
def _lost(lab: Lab, m: Measurement, norms: Sequence[str], count: int, *made: Value) -> Value:
    """Return the mean cross-entropy by norm, "" for clean images."""
    x, y = lab.images(m.split, slice(0, m.images))
    several = {"": x}
    for i, norm in enumerate(norms):
        several[norm] = torch.cat([one["x"].to(x) for one in made[i * count : (i + 1) * count]])
    return {norm: float(F.cross_entropy(models.logits(lab.nets[m.base], one), y)) for norm, one in several.items()}


def _plane(found: Joined, name: str) -> Plane | None:
    """Return the plane that is drawn of a path; None of one that is not trained, or spans none."""
    study, profile = found.run.study, found.run.study.profile
    if not profile.plane or study.paths[name].training is None:
        return None
    methods = tuple(
        PGD(norm=norm, eps=eps, step=eps / 4, iterations=profile.plane_iterations)
        for norm, eps in (study.threats or {}).items()
    )
    images = min(profile.plane_images, len(found.run.lab.splits["validation"]))
    plane = Plane(found.paths[name], profile.plane, methods, images)
    return plane if plane.exists else None
