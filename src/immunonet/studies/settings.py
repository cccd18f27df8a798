"""What a study consists of, every value checked."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from immunonet import RAILS, Maturation, _check, zoo
from immunonet.attacks import FGSM, PGD
from immunonet.studies import checks

DEFENCES = ("cnn", "knn", "dknn", "dknn-tuned", "rails-authors", "rails-paper", "rails")
PRESETS: dict[str, Callable[..., Any]] = {
    "default": Maturation,
    "paper": Maturation.paper,
    "authors-mnist": lambda **overrides: Maturation.authors("mnist", **overrides),
    "authors-cifar10": lambda **overrides: Maturation.authors("cifar10", **overrides),
}
SPLITS = ("test", "validation")
TESTED = tuple(f.name for f in dataclasses.fields(Maturation))
# Settings that are counts.
WHOLE = tuple(f.name for f in dataclasses.fields(Maturation) if str(f.type).startswith("int"))

_METHODS: dict[str, Any] = {"fgsm": FGSM, "pgd": PGD}
_TRAINING = set(inspect.signature(zoo.train).parameters) - {
    "net",
    "train_images",
    "validation_images",
    "checkpoint",
    "on_progress",
}
_OPTIONS = set(inspect.signature(RAILS.__init__).parameters) - {"self", "model", "layers", "maturation", "seed"}

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
        checks.keys("training", self.training, _TRAINING)
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `zoo.train`: "8/255" as a number, `adversarial` from its table."""
        found = {key: checks.number(key, value) for key, value in self.training.items()}
        if isinstance(adversarial := found.get("adversarial"), dict):
            checks.keys("training.adversarial", adversarial, {f.name for f in dataclasses.fields(zoo.Adversarial)})
            settings = {key: checks.number(key, value) for key, value in adversarial.items()}
            found["adversarial"] = zoo.Adversarial(**settings)
        return found


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What DkNN chooses from, on the first `images` of the validation split, by mean accuracy over `attacks`."""

    images: int = 300
    attacks: tuple[str, ...] = ("none", "pgd")
    neighbours: tuple[int, ...] = (1, 3, 5, 10, 20, 50, 75, 200)
    metrics: tuple[Literal["cosine", "euclidean"], ...] = ("cosine", "euclidean")

    def __post_init__(self) -> None:
        _check.integer("images", self.images)
        checks.as_tuple(self, "attacks", lambda name, value: checks.text(name, value))
        checks.as_tuple(self, "neighbours", lambda name, value: _check.integer(name, value))
        checks.as_tuple(self, "metrics", lambda name, value: _check.choice(name, value, ("cosine", "euclidean")))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Defences under attacks, all on the same first `images` of a split: a part of the main table, or a curve.

    `layers`: names, or lists of names for defences with several layers at once. `seeds`: runs of a randomised
    defence. `repertoire`: the first so many training examples (None: all). `maturation`: settings of RAILS that
    replace those of the study's defences; `options`: those of RAILS itself, such as `space`. `hidden`: cells of RAILS
    live in the layer itself (those of "input" are images anyway). `choose_layers`: tuned DkNN alone, once, with
    `layers` to choose from. A curve has a `name`, and varies `vary`: "eps", "repertoire", "layers", or a setting of
    `Maturation`, over `values` ("none" stands for None).
    """

    images: int
    defences: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...] = ()
    attacks: tuple[str, ...] = ("none", "pgd")
    bases: tuple[str, ...] = ()
    split: str = "test"
    seeds: int = 1
    repertoire: int | None = None
    maturation: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    hidden: bool = False
    choose_layers: bool = False
    name: str = "main"
    title: str = ""
    vary: str | None = None
    values: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        _check.integer("images", self.images)
        checks.as_tuple(self, "defences", lambda name, value: _check.choice(name, value, DEFENCES))
        checks.as_tuple(self, "attacks", lambda name, value: checks.text(name, value))
        checks.as_tuple(self, "bases", lambda name, value: checks.text(name, value), empty=True)
        _check.choice("split", self.split, SPLITS)
        _check.integer("seeds", self.seeds)
        if self.repertoire is not None:
            _check.integer("repertoire", self.repertoire)
        checks.keys("maturation", self.maturation, set(TESTED))
        checks.keys("options", self.options, _OPTIONS)
        _check.boolean("choose_layers", self.choose_layers)
        if self.choose_layers and self.defences != ("dknn-tuned",):
            raise ValueError(f"defences must be ['dknn-tuned'] with choose_layers, got {list(self.defences)}")
        if self.vary is not None:
            _check.choice("vary", self.vary, ("eps", "repertoire", "layers", *TESTED))
            checks.as_tuple(self, "values", lambda name, value: _value(str(self.vary), value))
            if self.vary == "layers":
                object.__setattr__(self, "layers", self.values)
        checks.as_tuple(self, "layers", checks.layers)
        if _check.boolean("hidden", self.hidden) and ("space" in self.options or any(len(s) > 1 for s in self.layers)):
            raise ValueError(
                "hidden must be false with a space in options or several layers at once: cells live in one"
            )


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Learning curves of RAILS for antigens of growing foreignness: `attack` with each size of `eps`."""

    name: str
    layers: tuple[str, ...]
    images: int
    eps: tuple[float, ...]
    base: str
    attack: str = "pgd"
    split: str = "test"
    repertoire: int | None = None
    maturation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        _check.integer("images", self.images)
        checks.as_tuple(self, "eps", checks.size)
        _check.choice("split", self.split, SPLITS)
        checks.keys("maturation", self.maturation, set(TESTED))


@dataclass(frozen=True, kw_only=True)
class Sensing:
    """How well credibility and the distance rule tell test images from `strangers`.

    These are an attack's name, "noise" (every value moves by `eps`, up or down), or another dataset's name.
    """

    name: str
    layers: tuple[str, ...]
    images: int
    strangers: tuple[str, ...]
    base: str
    eps: float = 8 / 255
    defences: tuple[str, ...] = ("dknn", "rails")
    repertoire: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        _check.integer("images", self.images)
        checks.as_tuple(self, "strangers", lambda name, value: checks.text(name, value))
        object.__setattr__(self, "eps", checks.size("eps", self.eps))
        checks.as_tuple(
            self, "defences", lambda name, value: _check.choice(name, value, ("dknn", "dknn-tuned", "knn", "rails"))
        )


@dataclass(frozen=True, kw_only=True)
class Hardening:
    """Memory cells of the first half of an attack's images join the repertoire; all are asked about the second half.

    `cells`: the fittest memory cells of every antigen that join, with their own labels.
    """

    name: str
    layers: tuple[str, ...]
    images: int
    base: str
    attack: str = "pgd"
    cells: int = 10
    defences: tuple[str, ...] = ("dknn", "dknn-tuned", "rails")
    repertoire: int | None = None
    maturation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        _check.integer("images", self.images, least=2)
        _check.integer("cells", self.cells)
        checks.as_tuple(self, "defences", lambda name, value: _check.choice(name, value, DEFENCES))
        checks.keys("maturation", self.maturation, set(TESTED))


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `low` to `high`, both included; `log`: drawn evenly in their logarithm, `low` above 0."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            _check.number(name, value)
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if _check.boolean("log", self.log) and self.low <= 0:
            raise ValueError(f"low must be above 0 with log, got {self.low:g}")

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for settings of RAILS by accuracy, the mean over `attacks`, on the first `images` of validation.

    `space`: for settings of `Maturation` a list of choices ("none" stands for None), or a table of `Range`: whole
    numbers where the setting is one. The first of the `trials` is the study's own RAILS, which must lie in the space;
    it and the `finalists`, the best other settings, are then measured on the next `confirm` images. `layers`,
    `hidden`, `repertoire` and `maturation` are as in `Comparison`.
    """

    name: str
    base: str
    layers: tuple[str, ...]
    images: int
    confirm: int
    trials: int
    space: dict[str, Any]
    title: str = ""
    finalists: int = 3
    attacks: tuple[str, ...] = ("none", "pgd")
    hidden: bool = False
    repertoire: int | None = None
    maturation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "title"):
            checks.text(name, getattr(self, name))
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        for name in ("images", "confirm"):
            _check.integer(name, getattr(self, name))
        _check.integer("trials", self.trials, least=2)
        _check.integer("finalists", self.finalists, most=self.trials - 1)
        checks.as_tuple(self, "attacks", lambda name, value: checks.text(name, value))
        if _check.boolean("hidden", self.hidden) and len(self.layers) > 1:
            raise ValueError("hidden must be false with several layers at once: cells live in one")
        if self.repertoire is not None:
            _check.integer("repertoire", self.repertoire)
        checks.keys("maturation", self.maturation, set(TESTED))
        checks.keys("space", self.space, set(TESTED) - self.maturation.keys())
        if not self.space:
            raise ValueError("space must hold at least one setting, got none")
        object.__setattr__(self, "space", {name: _options(name, found) for name, found in self.space.items()})


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the study should reach: accuracy of a defence, or its gain in points `over` another at the same layers.

    At the layers named, or where the defence is best on the curve `choice` (its mean over attacks); only rows of at
    least `images` count. `least` and `goal` are in the unit of the figure; `least_share`, `goal_share`: the share of
    the other's errors that is gone, which will do as well.
    """

    text: str
    base: str
    attack: str = "pgd"
    defence: str = "rails"
    over: str | None = None
    layers: tuple[str, ...] | None = None
    choice: str | None = None
    images: int = 1
    published: str = ""
    least: float
    goal: float | None = None
    least_share: float | None = None
    goal_share: float | None = None

    def __post_init__(self) -> None:
        _check.choice("defence", self.defence, DEFENCES)
        if self.over is not None:
            _check.choice("over", self.over, DEFENCES)
        _check.integer("images", self.images)
        if (self.layers is None) == (self.choice is None):
            raise ValueError("layers or choice must be given, and not both")
        if self.layers is not None:
            object.__setattr__(self, "layers", checks.layers("layers", self.layers))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study. `defences` hold the settings of the kinds of RAILS: a `preset` and what replaces its values."""

    title: str
    dataset: str
    bases: dict[str, Base]
    attacks: dict[str, dict[str, Any]]
    main: tuple[Comparison, ...]
    chunk: int = 100
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
        checks.as_tuple(self, "notes", lambda name, value: checks.text(name, value), empty=True)
        if not self.bases:
            raise ValueError("bases must hold at least one network, got none")
        if not self.main:
            raise ValueError("main must hold at least one comparison, got none")
        for name in self.attacks:
            self.attack(name)
        for kind in self.defences:
            _check.choice("defences", kind, tuple(d for d in DEFENCES if d.startswith("rails")))
        object.__setattr__(self, "main", tuple(self._known("main", entry) for entry in self.main))
        object.__setattr__(self, "curves", tuple(self._known("curves", entry) for entry in self.curves))
        for place in ("learning", "sensing", "hardening", "search", "targets"):
            for entry in getattr(self, place):
                _check.choice(f"{place}: base", entry.base, tuple(self.bases))
        for name, base in self.bases.items():
            if base.start is not None:
                _check.choice(f"bases.{name}: start", base.start, [other for other in self.bases if other != name])
        for name in self.tuning.attacks:
            _check.choice("tuning.attacks", name, ("none", *self.attacks))
        places = ("curves", "learning", "sensing", "hardening", "search")
        names = [entry.name for place in places for entry in getattr(self, place)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"name must differ between experiments, got {twice[0]!r} twice")
        for target in self.targets:
            if target.choice is not None:
                _check.choice("targets: choice", target.choice, [c.name for c in self.curves if c.vary == "layers"])
        for search in self.search:
            self._check_search(search)

    def _check_search(self, entry: Search) -> None:
        for name in entry.attacks:
            _check.choice("search: attacks", name, ("none", *self.attacks))
        ends = {k: (v.low, v.high) if isinstance(v, Range) else v for k, v in entry.space.items()}
        # No rule of Maturation is about more than two settings.
        for names in (*itertools.combinations(ends, 1), *itertools.combinations(ends, 2)):
            for values in itertools.product(*(ends[name] for name in names)):
                varied = dict(zip(names, values, strict=True))
                try:
                    self.maturations("rails", entry.maturation | varied, len(entry.layers))
                except (ValueError, TypeError) as error:
                    raise type(error)(f"search: space: {error}") from error
        for name, value in self.start(entry).items():
            if value not in entry.space[name]:
                raise ValueError(f"search: space.{name} must hold {value!r}, where the search starts")

    def _known(self, place: str, entry: Comparison) -> Comparison:
        for name in entry.bases:
            _check.choice(f"{place}: bases", name, tuple(self.bases))
        for name in entry.attacks:
            _check.choice(f"{place}: attacks", name, ("none", *self.attacks))
        if (place == "curves") != (entry.vary is not None) or (entry.name == "main") != (place == "main"):
            raise ValueError(f"{place}: a curve has a name, vary and values, and a part of the main table none of them")
        entry = dataclasses.replace(entry, bases=entry.bases or tuple(self.bases))
        for kind in (kind for kind in entry.defences if kind.startswith("rails")):
            for layers in entry.layers:
                for value in entry.values if entry.vary in TESTED else (None,):
                    varied = {} if entry.vary not in TESTED else {str(entry.vary): value}
                    self.maturations(kind, entry.maturation | varied, len(layers))
        return entry

    def attack(self, name: str, eps: float | None = None) -> FGSM | PGD | None:
        """Return the attack of that name, of another size if `eps` is given (its step in proportion); None: "none".

        ValueError or TypeError for settings that it does not have.
        """
        if name == "none":
            return None
        method = _METHODS[_check.choice("attacks: the first part of a name", name.split("-")[0], tuple(_METHODS))]
        found = {k: checks.size(k, v) if k in ("eps", "step") else v for k, v in self.attacks[name].items()}
        checks.keys(f"attacks.{name}", found, {f.name for f in dataclasses.fields(method)})
        whole: FGSM | PGD = method(**found)
        if eps is None:
            return whole
        if isinstance(whole, PGD):
            return dataclasses.replace(whole, eps=eps, step=whole.step * eps / whole.eps)
        return dataclasses.replace(whole, eps=eps)

    def maturations(self, kind: str, overrides: Table, layers: int) -> list[Maturation]:
        """Return the settings of a kind of RAILS, one per layer, with `overrides`; errors name the setting."""
        found = self.defences.get(kind, {}) | dict(overrides)
        default = {"rails-paper": "paper", "rails-authors": "authors-mnist"}.get(kind, "default")
        preset = _check.choice(f"defences.{kind}: preset", found.pop("preset", default), tuple(PRESETS))
        checks.keys(f"defences.{kind}", found, set(TESTED))
        made = PRESETS[preset](**{key: None if value == "none" else value for key, value in found.items()})
        several = list(made) if isinstance(made, list) else [made] * layers
        if len(several) != layers:
            raise ValueError(f"defences.{kind}: preset {preset!r} is for {len(several)} layers, got {layers}")
        return several

    def start(self, entry: Search) -> dict[str, Any]:
        """Return the study's own values of what a search varies, as its space has them; ValueError if layers differ."""
        found = self.maturations("rails", entry.maturation, len(entry.layers))
        start = {}
        for name in entry.space:
            values = [getattr(maturation, name) for maturation in found]
            if any(value != values[0] for value in values):
                raise ValueError(f"search: space must not hold {name!r}, which differs between layers, got {values}")
            start[name] = "none" if values[0] is None else list(values[0]) if type(values[0]) is tuple else values[0]
        return start

    def identity(self) -> dict[str, Any]:
        """Return what every result depends on, as JSON: all but the experiments and the words."""
        words = {"title", "remarks", "notes", "targets", "main", "curves"}
        words |= {"learning", "sensing", "hardening", "search"}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in words}


def _value(vary: str, value: Any) -> Any:
    """Return one value of a curve."""
    if vary == "eps":
        return checks.size("values", value)
    if vary == "repertoire":
        return _check.integer("values", value)
    return checks.layers("values", value) if vary == "layers" else value


def _options(name: str, found: Any) -> Range | tuple[Any, ...]:
    """Return what a search may take for the setting `name`; errors name its table."""
    where = f"space.{name}"
    if isinstance(found, list | tuple):
        if len(found) < 2 or any(value in found[:i] for i, value in enumerate(found)):
            raise ValueError(f"{where} must be a list of at least two different values, got {found!r}")
        return tuple(found)
    if not isinstance(found, Mapping) or not {"low", "high"} <= found.keys():
        raise TypeError(f"{where} must be a list of choices, or a table with low and high, got {found!r}")
    checks.keys(where, found, {f.name for f in dataclasses.fields(Range)})
    try:
        if name in WHOLE:
            for end in ("low", "high"):
                _check.integer(end, found[end], least=0)
        return Range(**found)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error
