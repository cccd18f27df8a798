"""Searches for settings of a defence on validation images, and what the best of them are worth on further ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from immunonet import _store, data, statistics
from immunonet.defences.spec import Spec
from immunonet.evaluation.bench import Part, Value
from immunonet.evaluation.lab import Lab, Measurement
from immunonet.studies.entries import Range, Search, ends
from immunonet.studies.experiments import Run
from immunonet.studies.values import Settings, value_of

Space = Mapping[str, Range | tuple[Any, ...]]


def parts(run: Run) -> Iterator[Part]:
    """Return a part per search, which holds its end; what it is made of is kept as well.

    ValueError if there are too few examples for the space, ImportError without what proposes settings.
    """
    for entry in run.study.search:
        spec = _spec(run, entry)
        known = [
            run.lab.known(spec.changed(**{name: value_of(value)}), entry.base, entry.repertoire)
            for name, options in entry.space.items()
            for value in ends(options)
        ]
        images = [run.lab.digest("validation", part) for part in _images(run, entry)]
        attacks = [attack and attack.describe() for attack in map(run.study.attack, entry.attacks)]
        told = entry.model_dump(mode="json", exclude={"title"})
        asked = entry.trials * entry.images + (1 + entry.finalists) * entry.confirm
        made_of = ["search", told, spec.text, known[0].key, attacks, images, run.tables.chunk, run.seed]
        cost = asked * len(attacks) * known[0].effort
        part = Part(key=_store.fingerprint(made_of), run=_ended, about=entry.name, cost=cost)
        if run.tables.bench.kept(part) is None:  # told now, not after the hours that other parts take
            data.require("optuna", "search")
        yield part


def searched(run: Run) -> list[dict[str, Any]]:
    """Return per search its trials, and the start and finalists on the confirm images.

    `right`: images per attack; `score`: their share, the mean over attacks; `gain`, `p`: points of accuracy over the
    start on the same images, and McNemar's test.
    """
    records = []
    for entry, part in zip(run.study.search, parts(run), strict=True):
        bench, (seen, confirm) = run.tables.bench, _images(run, entry)
        (value,) = bench.get([replace(part, args=(bench.kept(part) or _search(run, entry),))])
        told = entry.model_dump(mode="json", include={"name", "base", "layers", "attacks", "space"})
        told |= {"title": entry.title or entry.name, "hidden": bool(entry.settings.get("hidden")), "seed": run.seed}
        images = {"order": "random", "images": [seen.start, seen.stop], "confirm": [confirm.start, confirm.stop]}
        records.append(told | images | value)
    return records


def propose(space: Space, told: Sequence[tuple[Settings, float]], seed: int) -> Settings:
    """Return the settings to try after those `told` with their scores, by TPE (Bergstra et al. 2011).

    Whole numbers where those of the first are. It depends on its arguments alone. ImportError says which extra brings
    optuna.
    """
    optuna = data.require("optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds, distributions = optuna.distributions, {}
    for name, options in space.items():
        if isinstance(options, Range):
            whole = isinstance(told[0][0][name], int)
            kind = kinds.IntDistribution if whole else kinds.FloatDistribution
            distributions[name] = kind(options.low, options.high, log=options.log)
        else:  # by place: optuna's choices may be no lists
            distributions[name] = kinds.CategoricalDistribution(range(len(options)))
    # A seed for every trial, so that a search that continues draws what one that never stopped would have drawn.
    own = int(_store.fingerprint([seed, len(told)])[:8], 16)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=own))
    for settings, score in told:
        params = {k: settings[k] if isinstance(v, Range) else v.index(settings[k]) for k, v in space.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    found = study.ask(distributions).params
    return {name: _setting(options, found[name]) for name, options in space.items()}


def _setting(options: Range | tuple[Any, ...], value: Any) -> Any:
    """Return a choice by its place, or a number with the three digits that the report shows."""
    if isinstance(options, tuple):
        return options[value]
    return value if isinstance(value, int) else min(max(float(f"{value:.3g}"), options.low), options.high)


def _search(run: Run, entry: Search) -> Value:
    seen, confirm = _images(run, entry)
    trials: list[dict[str, Any]] = []
    for number in range(entry.trials):
        told = [(trial["settings"], trial["score"]) for trial in trials]
        settings = propose(entry.space, told, run.seed) if told else run.study.start(entry)
        correct = _correct(run, entry, settings, seen, f"trial {number}")
        right = {name: int(one.sum()) for name, one in correct.items()}
        score = sum(right.values()) / len(right) / (seen.stop - seen.start)
        trials.append({"settings": settings, "right": right, "score": score})
    finalists: list[dict[str, Any]] = []
    start: dict[str, Tensor] = {}
    for number in (0, *_best(trials)[: entry.finalists]):
        correct = _correct(run, entry, trials[number]["settings"], confirm, f"confirm {number}")
        start = start or correct
        confirmed = {
            name: {
                "accuracy": float(one.float().mean()),
                "ci95": list(statistics.wilson(int(one.sum()), len(one))),
                "gain": 100 * int(one.sum() - start[name].sum()) / len(one),
                "p": statistics.mcnemar(one, start[name]),
            }
            for name, one in correct.items()
        }
        finalists.append(trials[number] | {"trial": number, "confirm": confirmed})
    sampler = f"TPE of optuna {data.require('optuna', 'search').__version__}"
    return {"trials": trials, "finalists": finalists, "sampler": sampler}


def _best(trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the places of the trials that are the first with their settings, the start left out, the best first."""
    settings = [trial["settings"] for trial in trials]
    new = [i for i in range(1, len(trials)) if settings[i] not in settings[:i]]
    return sorted(new, key=lambda i: -float(trials[i]["score"]))


def _correct(run: Run, entry: Search, settings: Settings, images: slice, place: str) -> dict[str, Tensor]:
    """Return which images were right, `(n,)` bool per attack."""
    spec = _spec(run, entry).changed(**{name: value_of(value) for name, value in settings.items()})
    m = Measurement(
        spec=spec, base=entry.base, repertoire=entry.repertoire, split="validation", first=images.start,
        images=images.stop - images.start, told={"model": run.models[entry.base]}, place=f"{entry.name} {place}",
        seeds=(run.seed,) if run.lab.known(spec, entry.base, entry.repertoire).randomised else (),
    )  # fmt: skip
    under = [replace(m, attack=name, method=run.study.attack(name)) for name in entry.attacks]
    return {one.measurement.attack: one.correct[0] for one in run.tables.measure(under)}


def _spec(run: Run, entry: Search) -> Spec:
    return run.study.spec(entry.defence, entry.layers, entry.settings)


def _images(run: Run, entry: Search) -> tuple[slice, slice]:
    """Return the images of the trials and those that confirm; of a small split, the same shares."""
    n, whole = len(run.lab.splits["validation"]), entry.images + entry.confirm
    seen = max(1, min(entry.images, n * entry.images // whole))
    return slice(0, seen), slice(seen, min(n, whole))


def _ended(lab: Lab, value: Value) -> Value:
    return value
