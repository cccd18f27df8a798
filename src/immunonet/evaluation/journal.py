"""Finished parts of a long computation, kept so that it can be continued."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from immunonet import _store


class Journal:
    """JSON lines on disk: the settings first, then one finished part each, by key.

    A line that an interruption cut off is dropped when the file is opened again. Raises ValueError for a file
    that is no journal, and for one made with other settings, naming those that differ.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._parts: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))
        if not self.path.exists():
            _store.write_text(self.path, json.dumps({"settings": settings}) + "\n")
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            _store.write_text(self.path, "".join(lines := lines[:-1]))
        try:
            found = json.loads(lines[0])["settings"]
            self._parts = {record["key"]: record["value"] for record in map(json.loads, lines[1:])}
        except (IndexError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} is not a journal of results ({error!r}): remove it") from error
        self._same("", found, settings)

    def __contains__(self, key: str) -> bool:
        return key in self._parts

    def __getitem__(self, key: str) -> Any:
        return self._parts[key]

    def items(self) -> list[tuple[str, Any]]:
        """Return the finished parts: keys and values, in the order they were added."""
        return list(self._parts.items())

    def agree(self, name: str, settings: dict[str, Any]) -> None:
        """Keep settings of a part of the work, or raise ValueError if others are kept under that name."""
        settings = json.loads(json.dumps(settings))
        if name in self:
            self._same(f"{name} ", self[name], settings)
        else:
            self.add(name, settings)

    def add(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`; it is on disk when this returns."""
        line = json.dumps({"key": key, "value": value}, allow_nan=False) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._parts[key] = json.loads(line)["value"]

    def _same(self, name: str, found: dict[str, Any], settings: dict[str, Any]) -> None:
        old, new = leaves(found), leaves(settings)
        if differing := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            changes = "; ".join(f"{name}{key} was {old.get(key)}, now {new.get(key)}" for key in differing)
            raise ValueError(
                f"{self.path.parent} holds results of other settings ({changes}): give another folder, or remove it"
            )


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Return what nested objects and lists hold, by dotted names."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, part in items for k, v in leaves(part, f"{name}.{key}" if name else str(key)).items()}
