"""Searches for settings of RAILS on validation images, and what the best of them are worth on further ones."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from immunonet import _store, data
from immunonet.defences.repertoire import check_classes
from immunonet.evaluation import statistics
from immunonet.evaluation.asking import answers, describe_attack
from immunonet.studies.entries import WHOLE, Range, Search
from immunonet.studies.experiments import hidden_space
from immunonet.studies.lab import Lab
from immunonet.studies.settings import Study
from immunonet.studies.tasks import Task, chunks

Settings = dict[str, Any]
# Which images were right, `(n,)` bool per attack.
Correct = dict[str, Tensor]


def tasks(study: Study, lab: Lab, seed: int) -> list[Task]:
    """Return one task per search; it keeps each trial in the journal as well, and continues from them.

    ValueError if a class of the repertoire has too few examples for the space.
    """
    found = []
    for entry in study.search:
        (start,) = study.maturations("rails", entry.maturation, len(entry.layers))[:1]
        options = entry.space.get("neighbours", (start.neighbours,))
        most = int(options.high) if isinstance(options, Range) else max(options)
        check_classes(lab.examples(entry.repertoire)[1], len(lab.training.classes), most)
        asked = entry.trials * entry.images + (1 + entry.finalists) * entry.confirm
        cost = asked * len(entry.attacks) * (1 + start.population * (start.generations + 1) / 1000)
        found.append(Task(_key(study, entry, seed), entry.name, cost, functools.partial(_search, lab, entry, seed)))
    return found


def searched(study: Study, lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return per search its trials, and the start and finalists on the confirm images.

    `right`: images per attack; `score`: their share, the mean over attacks; `gain`, `p`: points of accuracy over the
    start on the same images, and McNemar's test.
    """
    found = []
    for entry in study.search:
        value = lab.journal[_key(study, entry, seed)]
        trials, (seen, confirm) = value["trials"], _parts(lab, entry)
        start = {attack: torch.tensor(right) for attack, right in value["finalists"][0]["correct"].items()}
        finalists = []
        for finalist in value["finalists"]:
            attacks = {}
            for attack, right in finalist["correct"].items():
                correct = torch.tensor(right)
                attacks[attack] = {
                    "accuracy": float(correct.float().mean()),
                    "ci95": list(statistics.wilson(int(correct.sum()), len(correct))),
                    "gain": 100 * int(correct.sum() - start[attack].sum()) / len(correct),
                    "p": statistics.mcnemar(correct, start[attack]),
                }
            finalists.append(trials[finalist["trial"]] | {"trial": finalist["trial"], "confirm": attacks})
        found.append(
            {
                "name": entry.name,
                "title": entry.title or entry.name,
                "base": entry.base,
                "layers": list(entry.layers),
                "hidden": entry.hidden,
                "attacks": list(entry.attacks),
                "space": dataclasses.asdict(entry)["space"],
                "sampler": value["sampler"],
                "seed": seed,
                "order": "random",
                "images": [seen.start, seen.stop],
                "confirm": [confirm.start, confirm.stop],
                "trials": trials,
                "finalists": finalists,
            }
        )
    return found


def propose(
    space: Mapping[str, Range | tuple[Any, ...]], told: Sequence[tuple[Settings, float]], seed: int
) -> Settings:
    """Return the settings to try after those `told` with their scores, by TPE (Bergstra et al. 2011).

    It depends on its arguments alone. ImportError says which extra brings optuna.
    """
    optuna = data.require("optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = optuna.distributions
    distributions = {
        # By place: optuna's choices may be no lists.
        name: kinds.CategoricalDistribution(range(len(options)))
        if isinstance(options, tuple)
        else (kinds.IntDistribution if name in WHOLE else kinds.FloatDistribution)(**dataclasses.asdict(options))
        for name, options in space.items()
    }
    # A seed for every trial, so that a search that continues draws what one that never stopped would have drawn.
    own = int(_store.fingerprint([seed, len(told)])[:8], 16)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=own))
    for settings, score in told:
        params = {k: v.index(settings[k]) if isinstance(v, tuple) else settings[k] for k, v in space.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    found = study.ask(distributions).params
    return {name: _setting(options, found[name]) for name, options in space.items()}


def _setting(options: Range | tuple[Any, ...], value: Any) -> Any:
    """Return a choice by its place, or a number with the three digits that the report shows."""
    if isinstance(options, tuple):
        return options[value]
    if isinstance(value, int):
        return value
    return min(max(float(f"{value:.3g}"), options.low), options.high)


def _search(lab: Lab, entry: Search, seed: int) -> dict[str, Any]:
    key, (seen, confirm) = _key(lab.study, entry, seed, whole=False), _parts(lab, entry)

    def kept(name: str, make: Callable[[], Any]) -> Any:
        if name not in lab.journal:
            lab.journal.add(name, make())
        return lab.journal[name]

    def trial() -> dict[str, Any]:
        told = [(found["settings"], found["score"]) for found in trials]
        settings = propose(entry.space, told, seed) if told else lab.study.start(entry)
        right = {name: int(correct.sum()) for name, correct in _correct(lab, entry, settings, seen, seed).items()}
        score = sum(right.values()) / len(right) / (seen.stop - seen.start)
        return {"settings": settings, "right": right, "score": score}

    def finalist() -> dict[str, list[bool]]:
        found = _correct(lab, entry, trials[number]["settings"], confirm, seed)
        return {name: correct.tolist() for name, correct in found.items()}

    trials: list[dict[str, Any]] = []
    for number in range(entry.trials):
        trials.append(kept(f"{key} / trial {number}", trial))
    finalists = []
    for number in (0, *_best(trials)[: entry.finalists]):
        finalists.append({"trial": number, "correct": kept(f"{key} / confirm {number}", finalist)})
    version = data.require("optuna", "search").__version__
    return {"trials": trials, "finalists": finalists, "sampler": f"TPE of optuna {version}"}


def _best(trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the places of the trials that are the first with their settings, the start left out, the best first."""
    settings = [trial["settings"] for trial in trials]
    new = [i for i in range(1, len(trials)) if settings[i] not in settings[:i]]
    return sorted(new, key=lambda i: -float(trials[i]["score"]))


def _correct(lab: Lab, entry: Search, settings: Settings, images: slice, seed: int) -> Correct:
    layers = entry.layers
    maturations = lab.study.maturations("rails", entry.maturation | settings, len(layers))
    options = hidden_space(layers) if entry.hidden else {}
    rails = lab.rails(entry.base, layers, maturations, options=options, repertoire=entry.repertoire)
    found: dict[str, list[Tensor]] = {name: [] for name in entry.attacks}
    for part in chunks(images.stop - images.start, lab.study.chunk):
        part = slice(images.start + part.start, images.start + part.stop)
        _, y = lab.images("validation", part)
        for name, parts in found.items():
            x = lab.adversarials(entry.base, lab.study.attack(name), "validation", part)
            parts.append(answers(rails, x, (seed,))[0][0] == y.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _parts(lab: Lab, entry: Search) -> tuple[slice, slice]:
    """Return the images of the trials and those that confirm; of a small split, the same shares."""
    n, whole = len(lab.held_out), entry.images + entry.confirm
    seen = max(1, min(entry.images, n * entry.images // whole))
    return slice(0, seen), slice(seen, min(n, whole))


def _key(study: Study, entry: Search, seed: int, *, whole: bool = True) -> str:
    """Return the name that a search is kept under; not `whole`: its trials, which more trials would continue."""
    without = {"title"} if whole else {"title", "trials", "finalists"}
    made_of = [
        {k: v for k, v in dataclasses.asdict(entry).items() if k not in without},
        [dataclasses.asdict(m) for m in study.maturations("rails", entry.maturation, len(entry.layers))],
        [describe_attack(study.attack(name)) for name in entry.attacks],
        seed,
    ]
    return f"search {entry.name} {_store.fingerprint(json.loads(json.dumps(made_of)))[:16]}"
