"""A study: its networks, attacks, defences and experiments, checked against each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from immunonet import Maturation, _check, zoo
from immunonet.attacks import FGSM, PGD
from immunonet.studies import checks
from immunonet.studies.entries import (
    DEFENCES,
    TESTED,
    Comparison,
    Hardening,
    Learning,
    Range,
    Search,
    Sensing,
    Target,
    Tuning,
)

PRESETS: dict[str, Callable[..., Any]] = {
    "default": Maturation,
    "paper": Maturation.paper,
    "authors-mnist": lambda **overrides: Maturation.authors("mnist", **overrides),
    "authors-cifar10": lambda **overrides: Maturation.authors("cifar10", **overrides),
}
_METHODS: dict[str, Any] = {"fgsm": FGSM, "pgd": PGD}
# The settings of `zoo.train`, checked here as there: what they are must be told before the study begins.
_TRAINING: dict[str, Callable[[str, Any], Any]] = {
    "epochs": _check.integer,
    "batch_size": _check.integer,
    "lr": lambda name, value: _check.number(name, value, least=0, above=True),
    "weight_decay": lambda name, value: _check.number(name, value, least=0),
    "seed": _check.seed,
    "patience": _check.integer,
    "augment": _check.boolean,
    "bfloat16": _check.boolean,
    "adversarial": lambda name, value: _adversarial(name, value),
}
Table = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Base:
    """An undefended network: a name of the zoo or `package.module:factory` (default: by image size), and weights.

    Where the file of `weights` is missing, or the study runs on another dataset, it is trained with `training`, the
    keyword arguments of `zoo.train`, and those of `start`, the name of another base, are its first weights.
    """

    model: str | None = None
    weights: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    start: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("model", self.model), ("weights", self.weights), ("start", self.start)):
            checks.text(name, value, optional=True)
        if self.model is not None and ":" not in self.model:
            _check.choice("model without a package", self.model, zoo.NAMES)
        checks.keys("training", self.training, set(_TRAINING))
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `zoo.train`: "8/255" as a number, `adversarial` from its table."""
        named = {key: (f"training.{key}", value) for key, value in self.training.items()}
        return {key: _TRAINING[key](name, checks.number(name, value)) for key, (name, value) in named.items()}


def _adversarial(name: str, found: Any) -> zoo.Adversarial:
    checks.keys(name, found, {f.name for f in dataclasses.fields(zoo.Adversarial)})
    with checks.told(name):
        return zoo.Adversarial(**{key: checks.number(key, value) for key, value in found.items()})


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study. `defences` hold the settings of the kinds of RAILS: a `preset` and what replaces its values.

    `order`: the test images of an experiment are the first in "random" order, the same in every run, or in the "file".
    """

    title: str
    dataset: str
    bases: dict[str, Base]
    attacks: dict[str, dict[str, Any]]
    main: tuple[Comparison, ...]
    chunk: int = 100
    order: str = "random"
    validation: int | None = None
    defences: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=Tuning)
    curves: tuple[Comparison, ...] = ()
    learning: tuple[Learning, ...] = ()
    sensing: tuple[Sensing, ...] = ()
    hardening: tuple[Hardening, ...] = ()
    search: tuple[Search, ...] = ()
    targets: tuple[Target, ...] = ()
    remarks: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("title", "dataset"):
            checks.text(name, getattr(self, name))
        _check.integer("chunk", self.chunk)
        _check.choice("order", self.order, ("random", "file"))
        if self.validation is not None:
            _check.integer("validation", self.validation)
        checks.as_tuple(self, "notes", lambda name, value: checks.text(name, value), empty=True)
        self._check_remarks()
        if not self.bases:
            raise ValueError("bases must hold at least one network, got none")
        if not self.main:
            raise ValueError("main must hold at least one comparison, got none")
        for name in self.attacks:
            if (attack := self.attack(name)) is not None and attack.eps == 0:
                raise ValueError(f"attacks.{name}: eps must be above 0, got 0")
        for kind in self.defences:
            _check.choice("defences", kind, tuple(d for d in DEFENCES if d.startswith("rails")))
            with checks.told(f"defences.{kind}"):
                self._made(kind, {})
        for place in ("main", "curves"):
            entries = tuple(self._known(place, i, entry) for i, entry in enumerate(getattr(self, place)))
            object.__setattr__(self, place, entries)
        for name in self.tuning.attacks:
            _check.choice("tuning.attacks", name, ("none", *self.attacks))
        for place in ("learning", "sensing", "hardening", "search", "targets"):
            for i, entry in enumerate(getattr(self, place)):
                with checks.told(f"{place}[{i}]"):
                    self._check_entry(entry)
        self._check_starts()
        places = ("curves", "learning", "sensing", "hardening", "search")
        names = [entry.name for place in places for entry in getattr(self, place)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"name must differ between experiments, got {twice[0]!r} twice")

    def _check_remarks(self) -> None:
        if not isinstance(self.remarks, Mapping):
            raise TypeError(f"remarks must be a table, got {self.remarks!r}")
        for name, remark in self.remarks.items():
            checks.text(f"remarks.{name}", remark)
            try:
                remark.format(n=0)
            except (LookupError, ValueError) as error:
                raise ValueError(f"remarks.{name} may hold {{n}} and no other field, got {remark!r}") from error

    def _check_starts(self) -> None:
        for name in self.bases:
            path = [name]
            while (start := self.bases[path[-1]].start) is not None:
                _check.choice(f"bases.{path[-1]}: start", start, [other for other in self.bases if other != path[-1]])
                if start in path:
                    raise ValueError(f"bases.{path[-1]}: start must not lead back, got {' from '.join([*path, start])}")
                path.append(start)

    def _check_entry(self, entry: Learning | Sensing | Hardening | Search | Target) -> None:
        _check.choice("base", entry.base, tuple(self.bases))
        if isinstance(entry, Learning | Hardening):
            _check.choice("attack", entry.attack, tuple(self.attacks))
            self.maturations("rails", entry.maturation, len(entry.layers))
        elif isinstance(entry, Target):
            _check.choice("attack", entry.attack, ("none", *self.attacks))
            if entry.choice is not None:
                _check.choice("choice", entry.choice, [c.name for c in self.curves if c.vary == "layers"])
        elif isinstance(entry, Search):
            self._check_search(entry)

    def _check_search(self, entry: Search) -> None:
        for name in entry.attacks:
            _check.choice("attacks", name, ("none", *self.attacks))
        ends = {k: (v.low, v.high) if isinstance(v, Range) else v for k, v in entry.space.items()}
        # No rule of Maturation is about more than two settings.
        for names in (*itertools.combinations(ends, 1), *itertools.combinations(ends, 2)):
            for values in itertools.product(*(ends[name] for name in names)):
                varied = dict(zip(names, values, strict=True))
                with checks.told("space"):
                    self.maturations("rails", entry.maturation | varied, len(entry.layers))
        for name, value in self.start(entry).items():
            if value not in entry.space[name]:
                raise ValueError(f"space.{name} must hold {value!r}, where the search starts")

    def _known(self, place: str, i: int, entry: Comparison) -> Comparison:
        with checks.told(f"{place}[{i}]"):
            for name in entry.bases:
                _check.choice("bases", name, tuple(self.bases))
            for name in entry.attacks:
                _check.choice("attacks", name, ("none", *self.attacks))
            if (place == "curves") != (entry.vary is not None) or (entry.name == "main") != (place == "main"):
                raise ValueError("a curve has a name, vary and values, and a part of the main table none of them")
            for kind in (kind for kind in entry.defences if kind.startswith("rails")):
                for layers in entry.layers:
                    for value in entry.values if entry.vary in TESTED else (None,):
                        varied = {} if entry.vary not in TESTED else {str(entry.vary): value}
                        with checks.told("maturation with values" if varied else "maturation"):
                            self.maturations(kind, entry.maturation | varied, len(layers))
        return dataclasses.replace(entry, bases=entry.bases or tuple(self.bases))

    def attack(self, name: str, eps: float | None = None) -> FGSM | PGD | None:
        """Return the attack of that name, of another size if `eps` is given (its step in proportion); None: "none".

        ValueError or TypeError for settings that it does not have.
        """
        if name == "none":
            return None
        method = _METHODS[_check.choice("attacks: the first part of a name", name.split("-")[0], tuple(_METHODS))]
        # Labels are those of the images: no attack of a study has a target.
        checks.keys(f"attacks.{name}", self.attacks[name], {f.name for f in dataclasses.fields(method)} - {"targeted"})
        with checks.told(f"attacks.{name}"):
            found = {k: checks.size(k, v) if k in ("eps", "step") else v for k, v in self.attacks[name].items()}
            whole: FGSM | PGD = method(**found)
        if eps is None:
            return whole
        if isinstance(whole, PGD):
            return dataclasses.replace(whole, eps=eps, step=whole.step * eps / whole.eps)
        return dataclasses.replace(whole, eps=eps)

    def maturations(self, kind: str, overrides: Table, layers: int) -> list[Maturation]:
        """Return the settings of a kind of RAILS, one per layer, with `overrides`; errors name the setting."""
        made = self._made(kind, overrides)
        several = made if isinstance(made, list) else [made] * layers
        if len(several) != layers:
            raise ValueError(f"defences.{kind}: its preset is for {len(several)} layers, got {layers}")
        return several

    def _made(self, kind: str, overrides: Table) -> Any:
        """Return what the preset of a kind of RAILS makes: settings for any layer, or a list of them."""
        found = self.defences.get(kind, {}) | dict(overrides)
        default = {"rails-paper": "paper", "rails-authors": "authors-mnist"}.get(kind, "default")
        preset = _check.choice(f"defences.{kind}: preset", found.pop("preset", default), tuple(PRESETS))
        checks.keys(f"defences.{kind}", found, set(TESTED))
        return PRESETS[preset](**{key: None if value == "none" else value for key, value in found.items()})

    def start(self, entry: Search) -> dict[str, Any]:
        """Return the study's own values of what a search varies, as its space has them; ValueError if layers differ."""
        found = self.maturations("rails", entry.maturation, len(entry.layers))
        start = {}
        for name in entry.space:
            values = [getattr(maturation, name) for maturation in found]
            if any(value != values[0] for value in values):
                raise ValueError(f"space must not hold {name!r}, which differs between layers, got {values}")
            start[name] = "none" if values[0] is None else list(values[0]) if type(values[0]) is tuple else values[0]
        return start

    def identity(self) -> dict[str, Any]:
        """Return what every result depends on, as JSON: all but the experiments and the words."""
        words = {"title", "remarks", "notes", "targets", "main", "curves"}
        words |= {"learning", "sensing", "hardening", "search"}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in words}
