"""Studies as TOML files, strictly read: a key that is unknown, missing or wrong is named with its table."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

from immunonet.studies import checks
from immunonet.studies.entries import Comparison, Hardening, Learning, Search, Sensing, Target, Tuning
from immunonet.studies.settings import Base, Study

NAMES = ("mnist", "cifar10", "svhn")

T = TypeVar("T")


def load(source: str | Path) -> Study:
    """Return the study of that name, one of `NAMES`, or in a TOML file.

    FileNotFoundError or ValueError names the file; ValueError or TypeError names the table, and the key that is
    unknown, missing or wrong.
    """
    text: str
    if str(source) in NAMES:
        path = Path(f"{source}.toml")
        text = (resources.files("immunonet.studies") / path.name).read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no study: give {', '.join(NAMES)}, or a TOML file that exists")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not TOML ({error})") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML ({error})") from error
    with checks.told(str(path)):
        return _study(table)


def _study(table: dict[str, Any]) -> Study:
    parts: dict[str, Any] = dict(table)
    if "bases" in table:
        parts["bases"] = {name: _read(Base, f"bases.{name}", found) for name, found in _table("bases", table["bases"])}
    if "tuning" in table:
        parts["tuning"] = _read(Tuning, "tuning", table["tuning"])
    for key in ("attacks", "defences"):
        for name, found in _table(key, table.get(key, {})):
            _table(f"{key}.{name}", found)
    kinds: dict[str, type[Any]] = {
        "main": Comparison,
        "curves": Comparison,
        "learning": Learning,
        "sensing": Sensing,
        "hardening": Hardening,
        "search": Search,
        "targets": Target,
    }
    for key in kinds.keys() & table.keys():
        if not isinstance(table[key], list):
            raise TypeError(f"{key} must be an array of tables ([[{key}]]), got {table[key]!r}")
        parts[key] = tuple(_read(kinds[key], f"{key}[{i}]", found) for i, found in enumerate(table[key]))
    return _read(Study, "the study", parts)


def _read(kind: Callable[..., T], where: str, found: Any) -> T:
    """Return `kind(**found)`; errors name the table `where` and the key."""
    if not isinstance(found, dict):
        raise TypeError(f"{where} must be a table, got {found!r}")
    fields = dataclasses.fields(cast(Any, kind))
    checks.keys(where, found, {f.name for f in fields})
    required = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [f.name for f in required if f.name not in found]:
        raise ValueError(f"{where} needs {', '.join(missing)}")
    with checks.told(where):
        return kind(**found)


def _table(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a table, got {value!r}")
    return list(value.items())
