"""A whole study as pydantic models, its experiments among them, and the attacks and defences that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

try:
    import pydantic
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("studies need pydantic: pip install 'immunonet[cli]'", name="pydantic") from error
from pydantic import AfterValidator, BeforeValidator, Field

from immunonet import zoo
from immunonet._check import among
from immunonet.attacks import APGD, FGSM, PGD, Attack, HopSkipJump, Square
from immunonet.defences.base import REGISTRY, kind_of
from immunonet.defences.spec import Spec
from immunonet.evaluation import lab
from immunonet.studies.entries import Comparison, Curve, Hardening, Healing, Learning, Search, Sensing, Table, Watching
from immunonet.studies.values import (
    Asked,
    Attacked,
    Attacks,
    BaseName,
    Count,
    Layers,
    Number,
    Place,
    Radii,
    Settings,
    Size,
    Some,
    Stem,
    built,
    named_in,
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
    choices: dict[str, Annotated[tuple[Any, ...], Some]] = Field(default_factory=dict)


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

    @property
    def places(self) -> list[float]:
        """Where points are measured."""
        return [i / (self.points - 1) for i in range(self.points)]


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
    remarks: dict[str, str] = Field(default_factory=dict)
    bases: Annotated[dict[str, Base], Some]
    attacks: dict[str, Settings] = Field(default_factory=dict)
    defences: dict[str, Annotated[Named, BeforeValidator(lambda v: {"spec": v} if isinstance(v, str) else v)]] = Field(
        default_factory=dict
    )
    tuning: Tuning = Field(default_factory=dict)  # type: ignore[assignment]  # validated with the rest
    main: tuple[Comparison, ...] = ()
    threats: Radii | None = None
    paths: dict[str, Join] = Field(default_factory=dict)
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
