"""What a replica does: batches to results."""

from __future__ import annotations

import gc
import math
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from immunonet import incoming
from immunonet.defences.answers import Answer
from immunonet.defences.base import Defence
from immunonet.memory.store import Memory
from immunonet.service.batching import Inputs, Result


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A defence as it was saved: itself, the `shape` of an input, the names of `classes`, and how images are read."""

    defence: Defence
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    reading: dict[str, Any] = field(default_factory=dict)

    def name(self, label: int) -> str:
        """Return the name of a label; a network may know more classes than have names."""
        return self.classes[label] if label < len(self.classes) else str(label)


Load = Callable[[Path], Loaded]
"""Reads the defence in a folder; it goes to other processes, and so must be a function that they can import."""


class Answering:
    """Answers batches by a defence, which may be changed for another while they are answered.

    `memory`: what it answers from and remembers in, if anything.
    """

    def __init__(self, load: Load, *, batch: int, seed: int | None = None, memory: Memory | None = None) -> None:
        self._load, self._batch, self._seed, self._memory = load, batch, seed, memory
        self._loaded: Loaded | None = None
        # One batch at a time has all threads, and the memory's writes are in the order of its answers.
        self._lock = threading.Lock()

    def read(self, folder: str | Path) -> None:
        """Take the defence of a folder from now on; what is compiled or loaded late is so before it is asked."""
        loaded = self._load(Path(folder))
        low, high = loaded.defence.bounds.tensors(torch.zeros(1), loaded.shape)
        with torch.no_grad():
            for n in (self._batch, 1):
                drawn = torch.rand(n, *loaded.shape, generator=torch.Generator().manual_seed(0))
                loaded.defence.answered((low + (high - low) * drawn).to(loaded.defence.device), 0)
        if self._memory is not None:
            loaded.defence.remember_in(self._memory)
        self._loaded = loaded

    def answer(self, x: Inputs, sources: Sequence[str]) -> list[Result]:
        """Return a result for each of the inputs `x` `(B, *S)`, which are checked again; see `results`."""
        with self._lock, torch.no_grad():
            loaded = self._loaded
            assert loaded is not None
            given = incoming.tensor("inputs", np.array(x)).to(loaded.defence.device)
            answer, ids = loaded.defence.attend(given, source=list(sources), seed=self._seed)
            return results(answer, ids, loaded)


def settle() -> None:
    """Leave all that is loaded out of every later search for garbage, which otherwise stops a process for .3 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def results(answer: Answer, ids: Sequence[str] | None, loaded: Loaded) -> list[Result]:
    """Return an answer to B inputs as B results in JSON; what a kind of defence does not tell is None.

    Ids are those of a memory's entries, or new ones without a memory, which nothing is kept under.
    """
    n = len(answer.labels)
    none: list[Any] = [None] * n
    labels, votes = answer.labels.tolist(), answer.probabilities.tolist()
    columns = {
        "id": [uuid.uuid4().hex for _ in range(n)] if ids is None else list(ids),
        "label": labels,
        "class": [loaded.name(label) for label in labels],
        "votes": [[_short(share) for share in row] for row in votes],
        "credibility": none if answer.credibility is None else [_short(p) for p in answer.credibility.tolist()],
        "foreign": none if answer.sense is None else answer.sense.foreign.tolist(),
        "innate": none if answer.innate is None else answer.innate.tolist(),
        "recalled": none if answer.recalled is None else answer.recalled.tolist(),
        "suspicious": none,
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _short(value: float) -> float:
    """Return a share to six places; what is no number stops here, since JSON has none."""
    if not math.isfinite(value):
        raise ValueError(f"the defence gave {value}")
    return round(value, 6)
