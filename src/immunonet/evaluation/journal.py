"""Finished parts of a long computation, kept so that it can be continued."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from immunonet import _store


class Journal:
    """JSON lines on disk, one finished part each, by a key of all that it depends on; in memory without a path.

    A line that an interruption cut off is dropped when the file is opened again. ValueError for a file that is no
    journal.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._parts: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            _store.write_text(self.path, "".join(lines := lines[:-1]))
        try:
            self._parts = {record["key"]: record["value"] for record in map(json.loads, lines)}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} is not a journal of results ({error!r}): remove it") from error

    def __contains__(self, key: str) -> bool:
        return key in self._parts

    def __getitem__(self, key: str) -> Any:
        return self._parts[key]

    def add(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`; where there is a path it is on disk when this returns."""
        line = json.dumps({"key": key, "value": value}, allow_nan=False) + "\n"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._parts[key] = json.loads(line)["value"]
