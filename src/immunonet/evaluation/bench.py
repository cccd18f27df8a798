"""The bench: work cut into parts, each done once, here or on a cluster, and kept by all that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from immunonet import _store
from immunonet.evaluation.journal import Journal

Value = Any
"""What a part gives: a JSON value, or tensors by name."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """A part of the work: `run(scene, *args, *values of the parts in after)` gives what is kept under `key`.

    `key` holds all that the value depends on. `run` is a function of a module, so that it can be sent elsewhere.
    `about`: what it is part of, in words; `cost`: a rough share of the work.
    """

    key: str
    run: Callable[..., Value]
    args: tuple[Any, ...] = ()
    after: tuple[Part, ...] = ()
    about: str = ""
    cost: float = 1.0


class Workers(Protocol):
    """Who does parts: `run` calls `done(part, value)` for each of them, and for those that they come after."""

    def run(self, scene: Any, parts: Sequence[Part], kept: Kept, done: Done) -> None:
        """Do parts, but none that is kept."""


Kept = Callable[[Part], Value | None]
Done = Callable[[Part, Value], None]


class Here:
    """This process does one part after the other."""

    def run(self, scene: Any, parts: Sequence[Part], kept: Kept, done: Done) -> None:
        """Do parts in their order."""
        for part in parts:
            self._value(scene, part, kept, done)

    def _value(self, scene: Any, part: Part, kept: Kept, done: Done) -> Value:
        if (value := kept(part)) is None:
            value = part.run(scene, *part.args, *(self._value(scene, before, kept, done) for before in part.after))
            done(part, value)
        return value


class Bench:
    """Does parts of the work on a `scene`, whatever their functions need, and keeps what they give.

    `folder` gets `parts.jsonl` and `tensors/`, written by this process alone; None: all is kept in memory.
    `workers`: who does them; None: this process. `advance(part)` is called for each part of `get` as it is there; for
    one that was done `ahead` then, and not when it is asked for first.
    """

    def __init__(
        self, scene: Any, folder: Path | None, *,
        workers: Workers | None = None, advance: Callable[[Part], None] = lambda part: None,
    ) -> None:  # fmt: skip
        self.scene, self.folder, self.advance = scene, folder, advance
        self.workers = workers or Here()
        self.journal = Journal(None if folder is None else folder / "parts.jsonl")
        self._tensors: dict[str, Value] = {}  # without a folder
        self._told: set[str] = set()  # what was done ahead, until it is asked for again

    def kept(self, part: Part) -> Value | None:
        """Return the value of a part if it is kept."""
        if part.key in self.journal:
            return self.journal[part.key]
        if (path := self._path(part)) is None:
            return self._tensors.get(part.key)
        return _store.read_tensors(path) if path.exists() else None

    def get(self, parts: Sequence[Part]) -> list[Value]:
        """Return the values of parts; what is not kept is done now."""
        fresh: dict[str, Value] = {}
        wanted = {part.key for part in parts}

        def kept(part: Part) -> Value | None:
            return fresh[part.key] if part.key in fresh else self.kept(part)

        def done(part: Part, value: Value) -> None:
            value = self._keep(part, value)
            if part.key in wanted:
                fresh[part.key] = value
                self.advance(part)

        for part in parts:
            if (value := self.kept(part)) is not None:
                fresh[part.key] = value
                if part.key in self._told:
                    self._told.remove(part.key)
                else:
                    self.advance(part)
        self.workers.run(self.scene, [part for part in parts if part.key not in fresh], kept, done)
        return [fresh[part.key] for part in parts]

    def ahead(self, parts: Iterable[Part]) -> None:
        """Let several workers do what will be asked for in turn; one alone does it then, and `parts` is not read."""
        if not isinstance(self.workers, Here):
            self.get(parts := list(parts))
            self._told |= {part.key for part in parts}

    def once(self, key: str, run: Callable[..., Value], *args: Any) -> Value:
        """Return the value of a single part."""
        return self.get([Part(key=key, run=run, args=args)])[0]

    def _keep(self, part: Part, value: Value) -> Value:
        """Return a value as it will be read again."""
        if not (isinstance(value, dict) and value and all(isinstance(one, Tensor) for one in value.values())):
            self.journal.add(part.key, value)
            return self.journal[part.key]
        if (path := self._path(part)) is None:
            self._tensors[part.key] = value
        else:
            _store.write_tensors(path, value)
        return value

    def _path(self, part: Part) -> Path | None:
        if self.folder is None:
            return None
        name = _store.slug(part.about) or "part"
        return self.folder / "tensors" / f"{name}-{_store.fingerprint(part.key)[:16]}.safetensors"


def chunks(n: int, size: int) -> list[slice]:
    """Return the places of n things, `size` at a time."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
