"""What a study measures: the tables of its experiments, each with images, layers and defences."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

try:
    import pydantic
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("studies need pydantic: pip install 'immunonet[cli]'", name="pydantic") from error
from pydantic import AfterValidator, Field

from immunonet import incoming
from immunonet._check import among
from immunonet._words import show
from immunonet.evaluation.stream import Asker, Asking
from immunonet.evaluation.threats import Threat
from immunonet.studies.values import (
    Attacked,
    Attacks,
    BaseName,
    Count,
    Layers,
    Names,
    Settings,
    Size,
    Some,
    Split,
    Stem,
    real,
)


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
