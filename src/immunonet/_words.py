"""Settings in words: a value as a short text, what nested settings hold, and what tells those of one name apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Settings of a study's row that say how it was measured.
_MEASURED = ("attack", "chunk", "device", "experiment", "slice", "tuning")


def show(value: Any) -> str:
    """Return a setting's value as a short text."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " + ".join(map(show, value))
    return str(value)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return what nested objects and lists hold, by dotted names."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in leaves(part, f"{name}.{key}" if name else str(key)).items()}


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a study's row that say which defence was asked on which data."""
    return {key: value for key, value in settings.items() if key not in _MEASURED}


def apart(named: Sequence[tuple[Any, Mapping[str, Any]]]) -> list[str]:
    """Return for each `(name, settings)` its values of the settings in which those of its name differ; "" for none."""
    known = [(name, leaves(dict(settings))) for name, settings in named]
    texts = []
    for name, own in known:
        alike = [other for called, other in known if called == name]
        keys = {key for one in alike for key in one if any(key not in o or o[key] != one[key] for o in alike)}
        texts.append(", ".join(f"{key} {own.get(key, 'untold')}" for key in sorted(keys)))
    return texts
