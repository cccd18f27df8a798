"""Contests: networks, points of paths and defences under all threats, in pairs, and what they should reach."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from immunonet import statistics
from immunonet.defences.base import Defence
from immunonet.defences.spec import Spec
from immunonet.defences.undefended import Undefended
from immunonet.evaluation import protocol
from immunonet.evaluation.outcome import Evaluation
from immunonet.evaluation.threats import UNION
from immunonet.studies.connectivity import Joined
from immunonet.studies.model import Contest, Entrant, Goal, Study


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
