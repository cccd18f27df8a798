"""A study's tables as pydantic models: their keys, types and values, and the attacks and defences that they name."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

try:
    import pydantic
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("studies need pydantic: pip install 'immunonet[cli]'", name="pydantic") from error
from pydantic import AfterValidator, BeforeValidator, Field

from immunonet import incoming, zoo
from immunonet._check import among
from immunonet._words import show
from immunonet.attacks import APGD, FGSM, PGD, Attack, HopSkipJump, Square
from immunonet.defences.base import REGISTRY, kind_of
from immunonet.defences.spec import Spec
from immunonet.evaluation import lab
from immunonet.evaluation.stream import Asker, Asking
from immunonet.evaluation.threats import Threat
from immunonet.studies.values import (
    Asked,
    Attacked,
    Attacks,
    BaseName,
    Count,
    Layers,
    Names,
    Number,
    Place,
    Radii,
    Settings,
    Size,
    Some,
    Split,
    Stem,
    built,
    named_in,
    real,
    side,
    value_of,
)

METHODS: dict[str, type[Attack]] = {
    "fgsm": FGSM, "pgd": PGD, "apgd": APGD, "square": Square, "hopskipjump": HopSkipJump,
}  # fmt: skip
# What every study may call by these names, with titles; [defences] says otherwise, or adds to them.
DEFENCES = {
    "cnn": ("cnn", ""),
    "knn": ("dknn tuned metric=euclidean", "kNN, Euclidean"),
    "dknn": ("dknn", "DkNN (75, cosine)"),
    "dknn-tuned": ("dknn tuned", "DkNN tuned"),
    "rails-authors": ("rails authors", "RAILS, published code"),
    "rails-paper": ("rails paper", "RAILS, paper (reconstructed)"),
    "rails": ("rails", "RAILS"),
}


def ends(options: Range | tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the least and the most of a range, or all choices."""
    return (options.low, options.high) if isinstance(options, Range) else options


def _options(value: Any) -> Range | tuple[Any, ...]:
    if isinstance(value, dict):
        return Range.model_validate(value)
    if not isinstance(value, tuple) or len(value) < 2 or any(one in value[:i] for i, one in enumerate(value)):
        raise ValueError(f"must be a table with low and high, or a list of at least two different values, got {value}")
    return value


class Table(pydantic.BaseModel):
    """A table of a study: no key that is not known, no value of another type, nothing changed afterwards."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known(cls, table: Any) -> Any:
        for key in table if isinstance(table, dict) else ():
            among(key, cls.model_fields, "key")
        return table


class Schedule(Table):
    """Keyword arguments that `zoo.train` and `zoo.connect` have in common."""

    epochs: Count = 6
    batch_size: Count = 128
    lr: Annotated[Number, Field(gt=0)] = 1e-3
    weight_decay: Size = 0.01
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    augment: bool = False
    bfloat16: bool = False
    ema: Annotated[Number, Field(ge=0, lt=1)] | None = None


class Training(Schedule):
    """Keyword arguments of `zoo.train`."""

    patience: Count | None = None
    adversarial: Annotated[Any, BeforeValidator(lambda v: v if v is None else built(zoo.Adversarial, v))] = None


class Connecting(Schedule):
    """Keyword arguments of `zoo.connect`; radii None: those of the study's threats."""

    epochs: Count = 10
    weight_decay: Size = 0.0
    threats: Radii | None = None
    combine: Literal["max", "average", "msd", "random"] = "msd"
    iterations: Count = 10
    ramp: Annotated[int, Field(ge=0)] = 0


class Base(Table):
    """An undefended network: a name of the zoo or `package.module:factory` (default: by image size), and weights.

    Where the file of `weights` is missing, or the study runs on another dataset, it is trained with `training`, and
    the weights of `start`, the name of another base, are its first.
    """

    model: str | None = None
    weights: str | None = None
    training: Training = Training()
    start: BaseName | None = None


class Named(Table):
    """A defence: its description in the grammar of `Spec`, without layers, and what tables call it."""

    spec: str
    title: str = ""


class Tuning(Table):
    """What the settings of defences that are "tuned" are chosen on: see `evaluation.lab.Tuning`."""

    images: Count = 300
    attacks: Attacks = ("none", "pgd")
    choices: dict[str, Annotated[tuple[Any, ...], Some]] = {}


class Entry(Table):
    """What experiments have in common: how many images, and a sample of so many training examples (None: all).

    `settings` replace those of every defence whose kind has them.
    """

    layers: Any = ()
    images: Count
    repertoire: Count | None = None
    settings: Settings = {}

    def places(self) -> list[tuple[Names, ...]]:
        """Return the sets of layers that defences choose among, each place by itself; one is no choice."""
        return [(self.layers,)]

    def varied(self) -> list[tuple[Any, Settings]]:
        """Return the values of what varies, each with the settings of defences."""
        return [(None, self.settings)]


class Comparison(Entry):
    """Defences under attacks, all on the same images of a split: a part of the main table.

    `defences`: names, or descriptions without layers. `layers`: names, or lists of names for several layers at once.
    `bases`: none for all. `seeds`: runs of a randomised defence. `choose_layers`: tuned defences choose among the
    `layers`, too.
    """

    defences: Names
    layers: tuple[Layers, ...] = ()
    attacks: Attacks = ("none", "pgd")
    bases: tuple[BaseName, ...] = ()
    split: Split = "test"
    seeds: Count = 1
    choose_layers: bool = False

    def places(self) -> list[tuple[Names, ...]]:
        """Return the sets of layers that defences choose among, each place by itself; one is no choice."""
        return [self.layers] if self.choose_layers else [(one,) for one in self.layers]


class Curve(Comparison):
    """The same for `values` of "eps", "repertoire", "layers", or a setting ("none" stands for None)."""

    name: Stem
    title: str = ""
    vary: str
    values: Annotated[tuple[Any, ...], Some]

    @pydantic.field_validator("values")
    @classmethod
    def _read(cls, values: tuple[Any, ...], info: pydantic.ValidationInfo) -> tuple[Any, ...]:
        kinds: dict[Any, Any] = {"eps": Size, "repertoire": Count, "layers": Layers}
        kind: Any = kinds.get(info.data.get("vary"), Any)
        read = pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(strict=True)).validate_python
        values = tuple(map(read, values))
        if len({show(value) for value in values}) < len(values):
            raise ValueError(f"must differ as they are shown, got {list(map(show, values))}")
        return values

    def places(self) -> list[tuple[Names, ...]]:
        """Return the sets of layers that are compared, each by itself."""
        return [(one,) for one in self.values] if self.vary == "layers" else super().places()

    def varied(self) -> list[tuple[Any, Settings]]:
        """Return the values of what varies, each with the settings of defences."""
        own = self.vary not in ("eps", "repertoire", "layers")
        return [(value, self.settings | ({self.vary: value} if own else {})) for value in self.values]


class Single(Entry):
    """An experiment with a name of its own, at one base and one set of layers."""

    name: Stem
    base: BaseName
    layers: Layers


class Learning(Single):
    """Learning curves of a defence for antigens of growing foreignness: `attack` with each size of `eps`."""

    eps: Annotated[tuple[Size, ...], Some]
    attack: Attacked = "pgd"
    defence: str = "rails"
    split: Split = "test"


class Sensing(Single):
    """How well credibility and the distance rule tell test images from `strangers`.

    These are an attack's name, "noise" (every value moves by `eps`, up or down), or another dataset's name.
    """

    strangers: Names
    eps: Size = 8 / 255
    defences: Names = ("dknn", "rails")


class Hardening(Single):
    """Memory cells of the first half of an attack's images join the repertoire; all are asked about the second half.

    `cells`: the fittest memory cells of `defence` of every antigen that join, with their own labels.
    """

    images: Annotated[int, Field(ge=2)]
    attack: Attacked = "pgd"
    cells: Count = 10
    defence: str = "rails"
    defences: Names = ("dknn", "dknn-tuned", "rails")


class Healing(Single):
    """What control makes of clean images, and of those of an `attack` on the base: distances to manifolds, pictures.

    `pictures`: how many are drawn.
    """

    attack: Attacked = "pgd"
    defence: str
    pictures: Count = 6
    title: str = ""


class Watching(Single):
    """Attacks that only ask a `defence` behind a sentinel, and what that takes for attacks of honest queries.

    `images` that are right are attacked within `eps` in `norm`, by `attacks` that ask in each of `ways`, with so many
    `queries` each. `clean`: images that are asked about for false alarms, the first `copied` in near copies as well.
    `space`, `neighbours`, `window`, `false_alarm`: the sentinel's.
    """

    defence: str = "cnn"
    title: str = ""
    split: Split = "test"
    eps: Size
    norm: Literal["linf", "l2", "l1"] = "linf"
    queries: Count = 2000
    attacks: Annotated[tuple[Asker, ...], Some] = typing.get_args(Asker)
    ways: Annotated[tuple[Asking, ...], Some] = typing.get_args(Asking)
    clean: Count = 10_000
    copied: Count = 100
    space: str = "pooled"
    neighbours: Count = 3
    window: Count = 10_000
    false_alarm: Size = 1e-3

    def watch(self) -> dict[str, Any]:
        """Return the settings of the sentinel."""
        return {name: getattr(self, name) for name in ("space", "neighbours", "window", "false_alarm")}

    def threat(self) -> Threat:
        """Return what the attacks keep to."""
        return Threat(eps=self.eps, norm=self.norm, bounds=incoming.bounds("bounds", (0.0, 1.0)), seed=0)


class Range(Table):
    """The numbers from `low` to `high`, both included; `log`: drawn evenly in their logarithm, `low` above 0."""

    low: Annotated[Any, AfterValidator(real)]
    high: Annotated[Any, AfterValidator(real)]
    log: bool = False

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 with log, got {self.low:g}")
        return self

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


class Search(Single):
    """A search for settings of a defence by accuracy, the mean over `attacks`, on a sample of `images` of validation.

    `space`: for settings a list of choices ("none" stands for None), or a `Range`, of whole numbers where the setting
    is one. The first of the `trials` is the study's own defence, which must lie in the space; it and the `finalists`,
    the best other settings, are then measured on the next `confirm` images.
    """

    confirm: Count
    trials: Annotated[int, Field(ge=2)]
    finalists: Count = 3
    title: str = ""
    defence: str = "rails"
    attacks: Attacks = ("none", "pgd")
    space: Annotated[dict[str, Annotated[Any, AfterValidator(_options)]], Some]


class Join(Table):
    """A path between networks.

    `ends`: bases, or points of paths that come before it. `training`: how its bends are trained; None: it stays the
    straight line between them.
    """

    ends: Annotated[tuple[Place, ...], Field(min_length=2)]
    title: str = ""
    training: Connecting | None = None


class Profile(Table):
    """How the points of all paths are measured: `points` places from 0 to 1 on `images` of the validation split.

    Under every threat of the study by the attack that training ends with, PGD of `iterations` steps, and by APGD of
    `apgd`. The plane through both ends and the bend is drawn with `plane` points a side (0: not at all), on
    `plane_images`, under PGD of `plane_iterations`.
    """

    points: Annotated[int, Field(ge=2)] = 21
    images: Count = 500
    iterations: Count = 10
    apgd: Count = 20
    plane: Annotated[int, Field(ge=0), AfterValidator(side)] = 0
    plane_images: Count = 100
    plane_iterations: Count = 5


class Entrant(Table):
    """A network, or the ensemble of several points, and what is around it: none, or a defence with its layers.

    `defence`: a description; of an ensemble its layers are those of every member.
    """

    network: Place
    defence: str | None = None
    title: str = ""


class Contest(Table):
    """Networks and defences under a whole protocol and all threats of the study, on the same test images.

    `black_box`: how many of the images attacks that only ask are made on (None: the protocol's number). `attacks`:
    further ones, by name.
    """

    name: Stem
    title: str = ""
    images: Count
    protocol: Literal["quick", "standard", "full"] = "quick"
    black_box: Count | None = None
    attacks: tuple[Attacked, ...] = ()
    entrants: Annotated[
        tuple[Annotated[Entrant, BeforeValidator(lambda v: {"network": v} if isinstance(v, str) else v)], ...], Some
    ]


class Goal(Table):
    """What an entrant of a contest should reach in its union: accuracy, or points `over` the best of others."""

    text: str
    contest: str
    entrant: str
    over: tuple[str, ...] = ()
    published: str = ""
    least: Number | None = None
    goal: Number | None = None


class Target(Table):
    """What the study should reach: accuracy of a defence, or its gain in points `over` another at the same layers.

    At the `layers` named, or where the defence is best on the curve `choice` (its mean over attacks); only rows of at
    least `images` count. `least` and `goal` are in the unit of the figure; `least_share`, `goal_share`: the share of
    the other's errors that is gone, which will do as well.
    """

    text: str
    base: BaseName
    attack: Asked = "pgd"
    defence: str = "rails"
    over: str | None = None
    layers: Layers | None = None
    choice: Annotated[str, named_in("curve of layers", "curves")] | None = None
    images: Count = 1
    published: str = ""
    least: Number
    goal: Number | None = None
    least_share: Number | None = None
    goal_share: Number | None = None

    @pydantic.model_validator(mode="after")
    def _placed(self) -> Target:
        if (self.layers is None) == (self.choice is None):
            raise ValueError("layers or choice must be given, and not both")
        return self


class Study(Table):
    """A whole study.

    `order`: the test images of an experiment are the first in "random" order, the same in every run, or in the "file".
    `training`: networks and paths are trained on a sample of so many training images (None: all).
    `attacks`: settings by name, whose first part, up to a hyphen, is the method. `defences`: names for descriptions.
    """

    title: str
    dataset: str
    chunk: Count = 100
    order: Literal["random", "file"] = "random"
    validation: Count | None = None
    training: Count | None = None
    notes: tuple[str, ...] = ()
    remarks: dict[str, str] = {}
    bases: Annotated[dict[str, Base], Some]
    attacks: dict[str, Settings] = {}
    defences: dict[str, Annotated[Named, BeforeValidator(lambda v: {"spec": v} if isinstance(v, str) else v)]] = {}
    tuning: Tuning = {}  # type: ignore[assignment]  # validated with the rest
    main: tuple[Comparison, ...] = ()
    threats: Radii | None = None
    paths: dict[str, Join] = {}
    profile: Profile = Profile()
    contests: tuple[Contest, ...] = ()
    goals: tuple[Goal, ...] = ()
    curves: tuple[Curve, ...] = ()
    learning: tuple[Learning, ...] = ()
    sensing: tuple[Sensing, ...] = ()
    hardening: tuple[Hardening, ...] = ()
    healing: tuple[Healing, ...] = ()
    watching: tuple[Watching, ...] = ()
    search: tuple[Search, ...] = ()
    targets: tuple[Target, ...] = ()

    def attack(self, name: str, eps: float | None = None) -> Attack | None:
        """Return the attack of that name, of another size if `eps` is given (its step in proportion); None: "none"."""
        if name == "none":
            return None
        method = name.split("-")[0]
        among(method, METHODS, "method, the first part of an attack's name,")
        # Labels are those of the images: no attack of a study has a target.
        whole = built(METHODS[method], self.attacks[name], without=["targeted"])
        return whole if eps is None else whole.resized(eps)

    def spec(self, name: str, layers: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Spec:
        """Return what a name or a description stands for, with those of the settings that its kind has."""
        text, title = DEFENCES.get(name, (name, ""))
        if name in self.defences:
            text, title = self.defences[name].spec, self.defences[name].title or title
        # Of several, the last is the one that the experiment's layers and settings are for.
        kind, _, rest = text.rpartition("|")[2].strip().partition(" ")
        if ":" not in kind:
            among(kind, {*REGISTRY, *(self.defences | DEFENCES if text == name else ())}, "defence")
        spec = Spec.parse(text)
        if wrong := [part for part in rest.split() if "=" not in part and part not in spec.words]:
            raise ValueError(f"{text!r}: {wrong[0]!r} must be left out: the layers are those of the experiment")
        title = title or " ".join((kind if spec.foreign else kind_of(kind).title, *rest.split()))
        own = {key: value_of(value) for key, value in (settings or {}).items() if spec.takes(key)}
        at = tuple(layers) or spec.layers if spec.layers else ()
        return replace(spec, called=name, title=title, layers=at, settings=spec.settings | own)

    def start(self, entry: Search) -> Settings:
        """Return the study's own values of what a search varies, as its space has them."""
        made = self.spec(entry.defence, entry.layers, entry.settings).tried()
        if made is None:
            raise ValueError(f"defence must be of a kind that is registered, got {entry.defence!r}")
        return {name: "none" if (value := made.setting(name)) is None else value for name in entry.space}

    def tuned_on(self) -> lab.Tuning:
        """Return what settings are chosen on."""
        attacks = {name: self.attack(name) for name in self.tuning.attacks}
        return lab.Tuning(images=self.tuning.images, attacks=attacks, choices=self.tuning.choices)
