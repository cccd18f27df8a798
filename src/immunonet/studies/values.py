"""What values of a study's keys may be: numbers, names, places on paths, radii; and how they are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

try:
    import pydantic
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("studies need pydantic: pip install 'immunonet[cli]'", name="pydantic") from error
from pydantic import AfterValidator, BeforeValidator, Field

from immunonet import _check
from immunonet._check import among
from immunonet.defences.spec import read
from immunonet.paths import curves
from immunonet.zoo.adversarial import radii

T = TypeVar("T")
# What stands for the place of a path that does best on validation.
BEST = "best"


def built(make: Callable[..., T], table: Any, *, without: Sequence[str] = ()) -> T:
    """Return what a dataclass makes of a table, in which "8/255" is a number."""
    if not isinstance(table, Mapping):
        raise ValueError(f"must be a table, got {table!r}")
    for key in table:
        among(key, [f.name for f in dataclasses.fields(make) if f.name not in without], "key")  # type: ignore[arg-type]
    try:
        return make(**{key: _numbers(value) for key, value in table.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


def value_of(value: Any) -> Any:
    """Return a setting of a defence: text is read as in its description."""
    return read(value) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    return _check.fraction("it", value) if isinstance(value, str) and "/" in value else value


def _numbers(value: Any) -> Any:
    return {key: _number(one) for key, one in value.items()} if isinstance(value, dict) else _number(value)


def _radii(value: Any) -> dict[str, float]:
    try:
        return radii("it", _numbers(value), above=True)
    except TypeError as error:
        raise ValueError(str(error)) from error


def real(value: Any) -> Any:
    """Return a finite number; ValueError for anything else."""
    if not _check.is_number(value) or not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value!r}")
    return value


def _place(value: str) -> str:
    name, at, where = value.partition("@")
    if at and not where.startswith(BEST):
        for t in where.split("+"):
            curves.place(_check.fraction("t", t))
    elif at and where != BEST and not (where.removeprefix(BEST).isdecimal() and int(where.removeprefix(BEST)) > 1):
        raise ValueError(f"must be {name}@{BEST}, {name}@{BEST}3 or {name}@0.5, got {value!r}")
    return value


def side(value: int) -> int:
    """Return how many points a plane has along a side, 0 or at least 2; ValueError for 1."""
    if value == 1:
        raise ValueError("must be 0, for no plane, or at least 2 points a side, got 1")
    return value


def named_in(what: str, *tables: str) -> AfterValidator:
    """Return what checks that a name is in one of the study's tables, which the context of validation names."""

    def check(name: str, info: pydantic.ValidationInfo) -> str:
        among(name, [one for table in tables for one in (info.context or {}).get(table, ())], what)
        return name

    return AfterValidator(check)


Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Size = Annotated[Number, Field(ge=0)]
# The name of an experiment is part of a file's.
Stem = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Some = Field(min_length=1)
Names = Annotated[tuple[str, ...], Some]
Layers = Annotated[Names, BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
BaseName = Annotated[str, named_in("base", "bases")]
Attacked = Annotated[str, named_in("attack", "attacks")]
Asked = Annotated[str, named_in("attack", "attacks", "clean")]
Attacks = Annotated[tuple[Asked, ...], Some]
Split = Literal["test", "validation"]
Settings = dict[str, Any]
Radii = Annotated[dict[str, Any], BeforeValidator(lambda value: _radii(value))]
# A network of a study: a base, or points of a path: `srmc@0.3`, `srmc@best`, `srmc@0.2+0.5`, `srmc@best3`.
Place = Annotated[str, AfterValidator(lambda value: _place(value))]
