"""Paths between networks: their points under every threat, which of them are taken, and contests between networks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check, _store, models, statistics
from immunonet._identity import identity
from immunonet.attacks import APGD, PGD, Attack
from immunonet.defences.base import Defence, Undefended
from immunonet.defences.path import ModePath
from immunonet.defences.spec import Spec
from immunonet.evaluation import protocol
from immunonet.evaluation.bench import Part, Value, chunks
from immunonet.evaluation.lab import Lab, Measurement
from immunonet.evaluation.outcome import Evaluation
from immunonet.evaluation.records import VERSION
from immunonet.evaluation.threats import UNION
from immunonet.studies.experiments import Run
from immunonet.studies.model import BEST, Contest, Entrant, Goal, Study

# Union accuracy that a place may lack of the best to be as good: the rule of the group's own follow-up.
_AS_GOOD = 0.02
# How far the plane reaches beyond ends and bend, as a share of the distance between the ends.
_MARGIN = 0.2

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
        n = self.run.study.profile.points
        return [i / (n - 1) for i in range(n)]

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
        yield from _rows(found, name)


def told(found: Joined) -> list[dict[str, Any]]:
    """Return what came of the paths: per place accuracies with intervals, losses, and which places are taken.

    `barrier`: how far the loss, clean and under each threat, rises above the straight line between those of the ends.
    `plane`: losses under the worst of the threats around both ends and the bend, of a path that is trained.
    """
    records, bench, study = [], found.run.tables.bench, found.run.study
    for name, join in study.paths.items():
        right = found.right(name)
        lost = bench.get(_losses(found, name))
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
            "plane": _plane(found, name),
        })  # fmt: skip
    return records


def _barrier(places: Sequence[float], values: Sequence[float]) -> float:
    straight = [values[0] + t * (values[-1] - values[0]) for t in places]
    return max(a - b for a, b in zip(values, straight, strict=True))


# Losses.


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


# The plane through both ends and the bend.


def _rows(found: Joined, name: str) -> list[Part]:
    """Return what gives the losses of a plane, row by row; nothing of a path that is not trained, or has more bends."""
    study, path, lab = found.run.study, found.paths[name], found.run.lab
    side = study.profile.plane
    first, last = (_flat(end) for end in (path.corners[0], path.corners[-1]))
    if not side or study.paths[name].training is None or len(path.bends) != 1 or torch.equal(first, last):
        return []
    grid, out = _grid(path, side), []
    methods = tuple(
        PGD(norm=norm, eps=eps, step=eps / 4, iterations=study.profile.plane_iterations)
        for norm, eps in (study.threats or {}).items()
    )
    images = min(study.profile.plane_images, len(lab.splits["validation"]))
    settings, seen = (
        [method.describe() for method in methods],
        "" if path.images is None else _store.digest([path.images]),
    )
    about: list[Any] = [_store.digest(part.state_dict().values()) for part in (path, *path.ends)]
    about += [VERSION, identity(path.ends[0]), seen, settings, lab.digest("validation", slice(0, images))]
    for y in grid[1]:
        key = ["plane", about, grid[0], y]
        out.append(Part(
            key=_store.fingerprint(key), run=_around, args=(path, grid[0], y, methods, images), about=f"{name} plane",
            cost=float(images * side * 10),
        ))  # fmt: skip
    return out


def _plane(found: Joined, name: str) -> dict[str, Any] | None:
    """Return the losses around a path with their coordinates, in units of the distance between its ends.

    The ends lie at (0, 0) and (1, 0).
    """
    if not (rows := _rows(found, name)):
        return None
    path = found.paths[name]
    grid = _grid(path, found.run.study.profile.plane)
    curve = [list(_coordinates(path, path.weights(t))) for t in found.places]
    values = found.run.tables.bench.get(rows)
    return {
        "x": grid[0],
        "y": grid[1],
        "loss": values,
        "bend": list(_coordinates(path, path.corners[1])),
        "curve": curve,
    }


def _grid(path: ModePath, side: int) -> tuple[list[float], list[float]]:
    x, y = _coordinates(path, path.corners[1])
    spans = []
    for values in ((0.0, 1.0, x), (0.0, y)):
        low, high = min(values) - _MARGIN, max(values) + _MARGIN
        spans.append([round(low + (high - low) * i / (side - 1), 6) for i in range(side)])
    return spans[0], spans[1]


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in weights.values()])


def _axes(path: ModePath) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first end, and two directions of the length between the ends, at a right angle."""
    first, last = (_flat(dict(end.named_parameters())) for end in path.ends)
    across = last - first
    off = _flat(path.corners[1]) - first
    off = off - across * (off @ across) / (across @ across)
    size = off.norm()
    return first, across, off * (across.norm() / size) if size > 0 else off


def _coordinates(path: ModePath, weights: dict[str, Tensor]) -> tuple[float, float]:
    first, across, off = _axes(path)
    from_first, scale = _flat(weights) - first, across @ across
    return float(from_first @ across / scale), float(from_first @ off / scale)


def _around(lab: Lab, path: ModePath, row: Sequence[float], y: float, methods: Sequence[Attack], n: int) -> Value:
    """Return the mean loss under the worst threat of every image at a row of the plane."""
    first, across, off = _axes(path)
    inputs, labels = lab.images("validation", slice(0, n))
    found = []
    for x in row:
        flat, net, at = first + x * across + y * off, path.at(0.0), 0
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(flat[at : at + parameter.numel()].view_as(parameter))
                at += parameter.numel()
        path.settle(net)
        points = [method(net, inputs, labels).adversarials for method in methods]
        with torch.no_grad():
            each = [F.cross_entropy(models.logits(net, point), labels, reduction="none") for point in points]
        found.append(float(torch.stack(each).amax(0).mean()))
    return found


# Contests.


@dataclass(frozen=True)
class Contested:
    """An entrant's evaluation: what it is called, where its network is on a path, and which images `(n,)` are right.

    `right`: the share of runs in which an image is right under all threats.
    """

    name: str
    entrant: Entrant
    places: tuple[float, ...]
    evaluation: Evaluation
    right: Tensor


def contested(found: Joined, contest: Contest, say: Callable[[str], None]) -> list[Contested]:
    """Return a contest's evaluations on the same images of the test split; what is finished is kept."""
    run, out = found.run, []
    lab, bench = run.lab, run.tables.bench
    n = min(contest.images, len(lab.splits["test"]))
    x, y = lab.images("test", slice(0, n))
    for entrant in contest.entrants:
        base, places = found.network(entrant.network)
        net, defence, layers = lab.nets[base], *_around_it(found, entrant, base)
        # An ensemble by itself is a defence of the network at its middle.
        under = net
        if defence is net:
            under = lab.nets[found.point(entrant.network.partition("@")[0], (places[len(places) // 2],))]
        told = lab.told | {
            "base": base, "weights": lab.weights[base], "split": "test", "slice": lab.where("test", n),
            "layers": layers, "experiment": contest.name, "network": entrant.network, "t": list(places),
            "model": found.model_of(entrant.network.partition("@")[0]),
        }  # fmt: skip
        more = [method for name in contest.attacks if (method := run.study.attack(name)) is not None]
        evaluation = protocol.evaluate(
            defence, x, y, base=under, threats=run.study.threats, protocol=contest.protocol,
            black_box=contest.black_box, attacks=more,
            dataset=lab.told["dataset"], name=defence.kind, base_name="cnn", settings=told, folder=bench.folder,
            workers=bench.workers, seed=run.seed, on_progress=functools.partial(_say, say, called(entrant)),
        )  # fmt: skip
        right = torch.tensor([image["worst"] for image in evaluation.record["per_example"]], dtype=torch.float64)
        out.append(Contested(called(entrant), entrant, places, evaluation, right))
    return out


def _say(say: Callable[[str], None], name: str, text: str) -> None:
    say(f"{name}: {text}")


def called(entrant: Entrant) -> str:
    """Return what an entrant is called: its network, and what is around it."""
    return " ".join(filter(None, (entrant.network, entrant.defence)))


def _around_it(found: Joined, entrant: Entrant, base: str) -> tuple[Defence, list[str]]:
    """Return what is evaluated, and the layers that it looks at: of an ensemble those of every member."""
    lab = found.run.lab
    net: Any = lab.nets[base]
    if entrant.defence is None:
        return (net if isinstance(net, Defence) else Undefended(net)), []
    spec = Spec.parse(entrant.defence)
    members = len(getattr(net, "members", ()))
    layers = spec.layers
    if members:
        layers = tuple(f"members.{i}.{layer}" for i in range(members) for layer in spec.layers)
    return lab.fitted(replace(spec, layers=layers), base), list(layers)


def of_contest(contest: Contest, several: Sequence[Contested]) -> dict[str, Any]:
    """Return what the record holds of a contest: every entrant's accuracies, and comparisons in pairs."""
    return {
        "name": contest.name, "title": contest.title or contest.name, "protocol": contest.protocol,
        "entrants": [_entered(one) for one in several],
        "pairs": [_pair(a, b) for a, b in itertools.combinations(several, 2)],
    }  # fmt: skip


def _entered(one: Contested) -> dict[str, Any]:
    evaluation = one.evaluation
    # An undefended network's rows are there twice, once as its own base.
    named = {(row.norm, row.attack): row for row in evaluation.rows if row.defence == evaluation.verdict.defence}
    own = list(named.values())
    clean = next(row for row in own if row.attack == "none")
    return {
        "name": one.name, "title": one.entrant.title or one.name, "t": list(one.places), "n": evaluation.verdict.n,
        "clean": [clean.accuracy, *clean.ci95],
        "worst": {norm: [row.accuracy, *row.ci95] for norm, row in evaluation.verdicts.items()},
        "transfer": {
            norm: min((row.accuracy for row in own if row.norm == norm and row.knows == "base" and row.attack != "none"
                       and row.n == clean.n), default=None)
            for norm in evaluation.verdicts if norm != UNION
        },
        "attacks": [[row.norm, row.attack, row.n, row.accuracy] for row in own],
        "checks": [[check.name, check.detail] for check in evaluation.checks if not check.passed],
        "flags": [[flag.name, flag.detail] for flag in evaluation.flags if flag.raised and flag.serious],
        "seconds_per_image": evaluation.verdict.seconds_per_image,
    }  # fmt: skip


def _pair(a: Contested, b: Contested) -> dict[str, Any]:
    """Return how two entrants compare on the images of their union, in most runs each."""
    n = min(len(a.right), len(b.right))
    left, right = a.right[:n] > 0.5, b.right[:n] > 0.5
    p = statistics.mcnemar(left, right)
    return {
        "a": a.name, "b": b.name, "n": n, "gain": 100 * float(a.right[:n].mean() - b.right[:n].mean()),
        "only_a": int((left & ~right).sum()), "only_b": int((right & ~left).sum()), "p": p,
    }  # fmt: skip


def complete(
    record: dict[str, Any], study: Study, paths: list[dict[str, Any]], contests: Mapping[Contest, Sequence[Contested]]
) -> None:
    """Add to a study's record the rows of its contests, their comparisons, goals, and what came of its paths."""
    told_of = [of_contest(contest, several) for contest, several in contests.items()]
    for one in itertools.chain(*contests.values()):
        own = [
            row for row in one.evaluation.rows if (row.attack, row.defence) == ("none", one.evaluation.verdict.defence)
        ]
        record["results"] += [row.to_json() for row in (*own[-1:], *one.evaluation.verdicts.values())]
    record["targets"] += reached(study.goals, told_of)
    record |= {"paths": paths, "contests": told_of, "threats": study.threats}


def reached(goals: Sequence[Goal], contests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figure that belongs to each goal, and whether it was reached, as `outcomes.targets` does."""
    return [_reached(goal, contests) for goal in goals]


def _reached(goal: Goal, contests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entrants = {
        one["name"]: one for contest in contests if contest["name"] == goal.contest for one in contest["entrants"]
    }
    own, others = entrants[goal.entrant], [entrants[name] for name in goal.over]
    figure = own["worst"][UNION][0]
    if others:
        figure = 100 * (figure - max(other["worst"][UNION][0] for other in others))
    status = "least" if goal.least is not None and figure >= goal.least - 1e-9 else "missed"
    status = "goal" if goal.goal is not None and figure >= goal.goal - 1e-9 else status
    return goal.model_dump(include={"text", "published", "least", "goal"}) | {
        "least_share": None, "goal_share": None, "layers": [], "unit": "points" if others else "accuracy",
        "figure": figure, "share": None, "n": own["n"], "status": status,
    }  # fmt: skip
