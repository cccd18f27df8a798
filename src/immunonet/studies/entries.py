"""The experiments and targets of a study, every value checked."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from immunonet import RAILS, Maturation, _check
from immunonet.studies import checks
from immunonet.studies.tasks import show

DEFENCES = ("cnn", "knn", "dknn", "dknn-tuned", "rails-authors", "rails-paper", "rails")
# Those that sense, and may be hardened.
SENSING = ("knn", "dknn", "dknn-tuned", "rails")
SPLITS = ("test", "validation")
TESTED = tuple(f.name for f in dataclasses.fields(Maturation))
# Settings that are counts.
WHOLE = tuple(f.name for f in dataclasses.fields(Maturation) if str(f.type).startswith("int"))

_OPTIONS = set(inspect.signature(RAILS.__init__).parameters) - {"self", "model", "layers", "maturation", "seed"}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What DkNN chooses from, on a sample of `images` of the validation split, by mean accuracy over `attacks`."""

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
    """Defences under attacks, all on the same `images` of a split: a part of the main table, or a curve.

    `layers`: names, or lists of names for defences with several layers at once. `seeds`: runs of a randomised
    defence. `repertoire`: a sample of so many training examples (None: all). `maturation`: settings of RAILS that
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
        checks.stem("name", self.name)
        checks.text("title", self.title)
        _repertoire(self)
        checks.keys("maturation", self.maturation, set(TESTED))
        _check_options(self.options)
        _check.boolean("choose_layers", self.choose_layers)
        if self.choose_layers and self.defences != ("dknn-tuned",):
            raise ValueError(f"defences must be ['dknn-tuned'] with choose_layers, got {list(self.defences)}")
        if self.vary is not None:
            _check.choice("vary", self.vary, ("eps", "repertoire", "layers", *TESTED))
            checks.as_tuple(self, "values", lambda name, value: _value(str(self.vary), value))
            if len({show(value) for value in self.values}) < len(self.values):
                raise ValueError(f"values must differ as they are shown, got {list(map(show, self.values))}")
            if self.vary == "layers":
                object.__setattr__(self, "layers", self.values)
        elif self.values:
            raise ValueError(f"values must be left out without vary, got {self.values!r}")
        of_rails = [key for key in ("maturation", "options", "hidden") if getattr(self, key)]
        of_rails += ["vary"] if self.vary in TESTED else []
        if of_rails and not any(kind.startswith("rails") for kind in self.defences):
            raise ValueError(f"{of_rails[0]} is a setting of RAILS: name one among defences, got {list(self.defences)}")
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
        checks.stem("name", self.name)
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        _check.integer("images", self.images)
        checks.as_tuple(self, "eps", checks.size)
        _check.choice("split", self.split, SPLITS)
        _repertoire(self)
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
        checks.stem("name", self.name)
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        _check.integer("images", self.images)
        checks.as_tuple(self, "strangers", lambda name, value: checks.text(name, value))
        object.__setattr__(self, "eps", checks.size("eps", self.eps))
        checks.as_tuple(self, "defences", lambda name, value: _check.choice(name, value, SENSING))
        _repertoire(self)


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
        checks.stem("name", self.name)
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        _check.integer("images", self.images, least=2)
        _check.integer("cells", self.cells)
        checks.as_tuple(self, "defences", lambda name, value: _check.choice(name, value, SENSING))
        _repertoire(self)
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
    """A search for settings of RAILS by accuracy, the mean over `attacks`, on a sample of `images` of validation.

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
        checks.stem("name", self.name)
        checks.text("title", self.title)
        object.__setattr__(self, "layers", checks.layers("layers", self.layers))
        for name in ("images", "confirm"):
            _check.integer(name, getattr(self, name))
        _check.integer("trials", self.trials, least=2)
        _check.integer("finalists", self.finalists, most=self.trials - 1)
        checks.as_tuple(self, "attacks", lambda name, value: checks.text(name, value))
        if _check.boolean("hidden", self.hidden) and len(self.layers) > 1:
            raise ValueError("hidden must be false with several layers at once: cells live in one")
        _repertoire(self)
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
        checks.text("text", self.text)
        checks.text("published", self.published)
        checks.text("choice", self.choice, optional=True)
        for name in ("least", "goal", "least_share", "goal_share"):
            if (value := getattr(self, name)) is not None:
                _check.number(name, value)
        _check.choice("defence", self.defence, DEFENCES)
        if self.over is not None:
            _check.choice("over", self.over, DEFENCES)
        _check.integer("images", self.images)
        if (self.layers is None) == (self.choice is None):
            raise ValueError("layers or choice must be given, and not both")
        if self.layers is not None:
            object.__setattr__(self, "layers", checks.layers("layers", self.layers))


def _repertoire(entry: Comparison | Learning | Sensing | Hardening | Search) -> None:
    if entry.repertoire is not None:
        _check.integer("repertoire", entry.repertoire)


def _check_options(found: Mapping[str, Any]) -> None:
    """Raise unless these are options that RAILS takes around some network; a `space` is looked for in the network."""
    checks.keys("options", found, _OPTIONS)
    checks.text("options.space", found.get("space"), optional=True)
    with checks.told("options"):
        RAILS(nn.Identity(), "input", **{key: value for key, value in found.items() if key != "space"})


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
    with checks.told(where):
        if name in WHOLE:
            for end in ("low", "high"):
                _check.integer(end, found[end], least=0)
        return Range(**found)
