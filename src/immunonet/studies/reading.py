"""Studies read from TOML files: whatever is wrong in one is told by its file, table and key, before anything runs."""

from __future__ import annotations

import contextlib
import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic

from immunonet import zoo
from immunonet._check import among
from immunonet.defences.base import REGISTRY, kind_of
from immunonet.defences.spec import MANY, TUNED, Spec
from immunonet.studies import entries
from immunonet.studies.entries import Range
from immunonet.studies.model import Study
from immunonet.studies.values import value_of

NAMES = (
    "mnist",
    "cifar10",
    "svhn",
    "connectivity",
    "connectivity-cifar10",
    "connectivity-together",
    "connectivity-together-cifar10",
    "connectivity-rails",
    "control",
    "control-cifar10",
    "memory",
    "memory-cifar10",
)
# What the defences of an experiment must have of their own, where most kinds have nothing to do.
_NEEDS: dict[tuple[type[Any], str], str] = {
    (entries.Learning, "defence"): "learning_curves",
    (entries.Hardening, "defence"): "memory_cells",
    (entries.Hardening, "defences"): "fit",
    (entries.Sensing, "defences"): "fit",
    (entries.Healing, "defence"): "healed",
}


class Wrong(ValueError):
    """What is wrong at a place, given as keys and numbers."""

    def __init__(self, message: str, *path: Any) -> None:
        super().__init__(message)
        self.path = path


@contextlib.contextmanager
def at(*path: Any) -> Iterator[None]:
    """Name the place in every ValueError and TypeError that is raised inside."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise Wrong(str(error), *path, *getattr(error, "path", ())) from error


def load(source: str | Path) -> Study:
    """Return the study of that name, one of `NAMES`, or in a TOML file.

    FileNotFoundError or ValueError names the file, and the table and key that is unknown, missing or wrong.
    """
    path = Path(f"{source}.toml" if str(source) in NAMES else source)
    file = resources.files("immunonet.studies") / path.name if str(source) in NAMES else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no study: give {', '.join(NAMES)}, or a TOML file that exists")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not TOML ({error})") from error
    try:
        return study_of(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def study_of(table: dict[str, Any]) -> Study:
    """Return the study of a TOML table; ValueError names the table and key that is wrong."""
    known: dict[str, Any] = {key: tuple(table[key]) for key in ("bases", "attacks") if isinstance(table.get(key), dict)}
    curves = table["curves"] if isinstance(table.get("curves"), list) else []
    curves = [curve for curve in curves if isinstance(curve, dict) and curve.get("vary") == "layers"]
    known |= {"curves": [str(curve.get("name")) for curve in curves], "clean": ("none",)}
    try:
        study = Study.model_validate(_tuples(table), context=known)
        _check(study)
    except pydantic.ValidationError as error:
        raise ValueError(_told(error)) from error
    except Wrong as error:
        raise ValueError(f"{_shown(error.path)}: {error}") from error
    return study


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _told(error: pydantic.ValidationError) -> str:
    """Return what is wrong first, on one line."""
    path: list[Any] = []
    cause: Any = error
    while isinstance(cause, pydantic.ValidationError):  # one may be the cause of another
        first = cause.errors()[0]
        path += first["loc"]
        cause = first.get("ctx", {}).get("error")
    got = "" if first["type"] == "missing" else f", got {first['input']!r}"
    message = re.sub(r"[Dd]ictionary( or instance of \w+)?", "table", first["msg"])
    message = re.sub(r"[Tt]uple", "list", message) + got
    return f"{_shown(path)}: {cause or message}".removeprefix(": ")


def _shown(path: Sequence[Any]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def _check(study: Study) -> None:
    """Raise Wrong for what can only be told by several tables together, or by a kind of defence or attack."""
    for name in study.attacks:
        with at("attacks", name):
            if not getattr(study.attack(name), "eps", None):
                raise ValueError("eps must be above 0, got 0")
    for name in study.defences:
        with at("defences", name, "spec"):
            study.spec(name)
    for name, remark in study.remarks.items():
        try:
            remark.format(n=0)
        except (LookupError, ValueError) as error:
            raise Wrong(f"may hold {{n}} and no other field, got {remark!r}", "remarks", name) from error
    for name, base in study.bases.items():
        with at("bases", name):
            if base.model is not None and ":" not in base.model:
                among(base.model, zoo.NAMES, "model")
            path = [name]
            while start := study.bases[path[-1]].start:
                path.append(start)
                if start in path[:-1]:
                    raise Wrong(f"must not lead back, got {' from '.join(path)}", "start")
    kinds = [kind for kind in REGISTRY.values() if kind.candidates(MANY)]
    for key, values in study.tuning.choices.items():
        with at("tuning", "choices"):
            among(
                key, {one for kind in kinds for fit, some in kind.candidates(MANY) for one in fit | some[0]}, "choice"
            )
        with at("tuning", "choices", key):
            for kind in kinds:
                Spec(kind=kind.kind, words=(TUNED,)).tried({key: values})
    if not study.main and not study.paths and not study.contests:
        raise Wrong("must hold at least one experiment where there are no paths and contests", "main")
    _check_paths(study)
    names: set[Any] = {"main"}
    for place in ("main", "curves", "learning", "sensing", "hardening", "healing", "watching", "search", "targets"):
        for i, entry in enumerate(getattr(study, place)):
            with at(place, i):
                _check_defences(study, entry)
                if (own := getattr(entry, "name", None)) in names:
                    raise Wrong(f"must differ between experiments, got {own!r} twice", "name")
                names |= {own} - {None}


def _check_paths(study: Study) -> None:
    """Raise Wrong unless the networks that paths, contests and goals name are there, and there are threats for them."""
    if (study.paths or study.contests) and study.threats is None:
        raise Wrong("must be given where there are paths or contests, as {linf = 0.3, l1 = 10}", "threats")
    known = list(study.bases)
    for name, join in study.paths.items():
        with at("paths", name):
            if name in study.bases or "@" in name:
                raise ValueError("must be no base's name and hold no @")
            for i, end in enumerate(join.ends):
                with at("ends", i):
                    _check_place(end, known, study)
        known.append(name)
    entrants: dict[str, list[str]] = {}
    for i, contest in enumerate(study.contests):
        for j, entrant in enumerate(contest.entrants):
            with at("contests", i, "entrants", j):
                with at("network"):
                    _check_place(entrant.network, known, study)
                if entrant.defence is not None:
                    with at("defence"):
                        Spec.parse(entrant.defence).tried()
                entrants.setdefault(contest.name, []).append(" ".join(filter(None, (entrant.network, entrant.defence))))
    for i, goal in enumerate(study.goals):
        with at("goals", i):
            with at("contest"):
                among(goal.contest, entrants, "contest")
            for key, names in (("entrant", (goal.entrant,)), ("over", goal.over)):
                with at(key):
                    for name in names:
                        among(name, entrants[goal.contest], "entrant")


def _check_place(place: str, known: Sequence[str], study: Study) -> None:
    name, on, _ = place.partition("@")
    among(name, known, "base, or path above,")
    if bool(on) != (name in study.paths):
        raise ValueError(f"must be a base, or a path with a place on it, such as path@best, got {place!r}")


def _check_defences(study: Study, entry: Any) -> None:
    """Raise Wrong unless the defences of an experiment or target are there, and can do with its settings."""
    specs: dict[str, Spec] = {}
    for key in ("defence", "over", "defences"):
        with at(key):
            for name in [value] if isinstance(value := getattr(entry, key, None) or (), str) else value:
                spec = specs[name] = study.spec(name)
                verb = _NEEDS.get((type(entry), key), "answer")
                if not spec.foreign and not kind_of(spec.kind).can(verb):
                    raise ValueError(f"{name!r} has no {verb.replace('_', ' ')}")
                if getattr(entry, "choose_layers", False) and not spec.tuned:
                    raise ValueError(f"must be tuned with choose_layers, got {name!r}")
    if not isinstance(entry, entries.Entry):
        return
    own = {option for spec in specs.values() for option in spec.options()}
    every = any(spec.foreign for spec in specs.values())
    with at("settings"):
        for key in () if every else entry.settings:
            among(key, own, f"setting of {' and '.join(specs)}")
    if isinstance(entry, entries.Curve) and not every:
        with at("vary"):
            among(entry.vary, {"eps", "repertoire", "layers", *own}, "value to vary")
    layers = [one for candidates in entry.places() for one in candidates] or [()]
    if layers == [()] and any(spec.layers for spec in specs.values()):
        raise Wrong("must name at least one", "layers")
    for name, one in itertools.product(specs, layers):
        with at("defences"):
            study.spec(name, one).tried(study.tuning.choices)
        for value, settings in entry.varied():
            with at("settings" if value is None else "values"):
                study.spec(name, one, settings).tried(study.tuning.choices)
    if isinstance(entry, entries.Search):
        _check_search(study, entry)


def _check_search(study: Study, entry: entries.Search) -> None:
    if entry.finalists >= entry.trials:
        raise Wrong(f"must be fewer than the {entry.trials} trials, got {entry.finalists}", "finalists")
    spec = study.spec(entry.defence, entry.layers, entry.settings)
    with at("space"):
        for name in entry.space:
            among(name, set(spec.options()) - entry.settings.keys(), "setting to search")
        start = study.start(entry)
    # No rule of a kind is about more than two settings.
    for names in itertools.chain(*(itertools.combinations(entry.space, n) for n in (1, 2))):
        for values in itertools.product(*(entries.ends(entry.space[name]) for name in names)):
            with at("space", names[0]):
                spec.changed(**dict(zip(names, map(value_of, values), strict=True))).tried()
    for name, value in start.items():
        options = entry.space[name]
        with at("space", name):
            if value not in options:
                raise ValueError(f"must hold {value!r}, where the search starts")
            if isinstance(options, Range) and isinstance(value, int) and not isinstance(options.high, int):
                raise ValueError(f"must be a range of whole numbers, got {options.high}")
