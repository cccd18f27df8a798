"""Checks of what a study's TOML file holds; errors name the setting."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from immunonet import _check


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """Name the table `where` in every ValueError and TypeError that is raised inside."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def size(name: str, value: Any) -> float:
    """Return a number or a fraction such as "8/255", at least 0."""
    return _check.number(name, _check.fraction(name, value), least=0)


def number(name: str, value: Any) -> Any:
    """Return a fraction such as "8/255" as a number, and any other value as it is."""
    return _check.fraction(name, value) if isinstance(value, str) and "/" in value else value


def keys(where: str, found: Any, known: set[str]) -> None:
    """Raise TypeError unless `found` is a table, ValueError if it has a key that is not `known`."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{where} must be a table, got {found!r}")
    if unknown := sorted(found.keys() - known):
        raise ValueError(f"{where} has no setting {unknown[0]!r}; it may have {', '.join(sorted(known))}")


def text(name: str, value: object, *, optional: bool = False) -> object:
    """Return a string; TypeError for anything else, but None where it is optional."""
    if not isinstance(value, str) and not (optional and value is None):
        raise TypeError(f"{name} must be a string, got {value!r}")
    return value


def stem(name: str, value: object) -> None:
    """Raise unless `value` is a string that may be a part of a file's name."""
    if not re.fullmatch(r"[^/\\\0]+", str(text(name, value))):
        raise ValueError(f"{name} must be the name of a file's part, not empty and without slashes, got {value!r}")


def as_tuple(of: Any, name: str, check: Callable[[str, Any], Any], *, empty: bool = False) -> None:
    """Replace a list in a field by a tuple of checked values; raise unless it is a list, not empty."""
    values = getattr(of, name)
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name} must be a list, got {values!r}")
    if not values and not empty:
        raise ValueError(f"{name} must not be empty")
    object.__setattr__(of, name, tuple(check(name, value) for value in values))


def layers(name: str, value: Any) -> tuple[str, ...]:
    """Return one layer's name, or several, as a tuple."""
    several: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not several or not all(isinstance(layer, str) for layer in several):
        raise TypeError(f"{name} must be a name, or a list of names, got {value!r}")
    return tuple(several)
