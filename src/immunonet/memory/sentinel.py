"""`Sentinel`: who asks about near copies of one input again and again is looking for a way around the answer."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from immunonet import _check, _store, incoming
from immunonet.memory import entries, flags
from immunonet.memory.views import View, view

# Queries that are compared at once, and sources that are told apart, the last ones.
AT_ONCE, SOURCES = 64, 10_000
# Clean inputs that the threshold is learned from, at most.
LEARNED = 20_000
# How many more than the nearest by products are measured.
SPARE = 16
# How often more false alarms than promised may come.
UNSURE = 0.05


class Watched(NamedTuple):
    """Which queries `(B,)` bool look like one of many near copies, and their scores `(B,)`: low is suspicious.

    A score is infinite before there are enough queries to compare with.
    """

    flagged: Tensor
    score: Tensor


class Sentinel:
    """A watch over all that a classifier is asked, whoever asks; it never changes an answer.

    The score of a query is its mean distance to the `neighbours` nearest of the last `window` queries, all sources
    together, since accounts are cheap (Chen, Carlini & Wagner 2019). What scores lower than a share `false_alarm` of
    clean queries is flagged. A query costs the same at any history; what is kept are `window` vectors. What to do
    about a flag is the caller's choice.

    Args:
        defence: a classifier, defended or not, that takes inputs `(B, *S)`; it is only asked where `space` is a layer.
        space: where queries are compared: "pooled" (pixels, averaged over fields of 4 x 4), "spectrum" (sizes of low
            frequencies), a layer's name, "input", or a callable on inputs.
        neighbours: how many of the nearest queries count.
        window: how many of the last queries are remembered.
        false_alarm: share of clean queries that may be flagged.
        log: a file that a line of JSON is appended to whenever some of the queries watched together are flagged: their
            time and source, how many they were and how many were flagged (`immunonet memory page --flags` shows it).
            A twin writes none.
    """

    def __init__(
        self, defence: nn.Module, space: str | View = "pooled", *,
        neighbours: int = 5, window: int = 10_000, false_alarm: float = 1e-3, log: str | Path | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(defence, nn.Module):
            raise TypeError(f"defence must be a torch.nn.Module, got {type(defence).__name__}")
        self.defence, self.space = defence, space
        self.bounds = incoming.bounds("defence.bounds", getattr(defence, "bounds", (0.0, 1.0)))
        self._view = view(getattr(defence, "model", defence), space)
        self.neighbours = _check.integer("neighbours", neighbours)
        self.window = _check.integer("window", window, least=self.neighbours)
        self.false_alarm = _check.number("false_alarm", false_alarm, least=0, most=1, above=True, below=True)
        self.log = None if log is None else Path(log)
        if self.log is not None and not (self.log.parent.is_dir() and not self.log.is_dir()):
            raise ValueError(
                f"log must be a file in a folder that is there, got {log}: make the folder, or name a file"
            )
        self.shape: tuple[int, ...] = ()
        self.threshold: float | None = None
        self._lock = threading.RLock()
        # Where the next query goes among those that are held, and how many these are.
        self._held, self._squares, self._next, self._count = torch.empty(0), torch.empty(0), 0, 0
        self.reset()

    @torch.no_grad()
    def fit(self, clean: Any) -> Self:
        """Learn the threshold from clean inputs `(N, *S)` as they come in random order, and return self.

        With a confidence of .95 no more than a share `false_alarm` of others like them are flagged where the window is
        full. ValueError where they are too few to say so, or to fill it: what is far from its neighbours among few need
        not be among many.
        """
        x = incoming.inputs("clean", clean, bounds=self.bounds, own=True)
        least = max(math.ceil(math.log(UNSURE) / math.log1p(-self.false_alarm)), self.window + 1)
        if len(x) < least:
            raise ValueError(
                f"clean must hold at least {least:,} inputs, for false_alarm={self.false_alarm:g} and "
                f"window={self.window:,}, got {len(x):,}: give more, or a shorter window or more false alarms"
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: max(LEARNED, least)]
        self.shape = tuple(x.shape[1:])
        with self._lock:
            found = self.signatures(x[order.to(x.device)])
            self.reset()
            # A ring: every one of them comes after as many others.
            self.take(found[-self.window :])
            scores = torch.cat([self._scored(part) for part in found.split(AT_ONCE)])
            self.threshold = float(scores.sort().values[promised(len(scores), self.false_alarm) - 1])
            self.reset()
        return self

    @torch.no_grad()
    def watch(self, x: Any, source: str | Sequence[str] = "unknown") -> Watched:
        """Return which of the queries `(B, *S)` of a source, or of one each, are flagged, each compared with those
        before it, and remember them.

        ValueError for inputs that are none, before anything is remembered.
        """
        return self.judge(self.signatures(x), source)

    def judge(self, signatures: Tensor, source: str | Sequence[str] = "unknown") -> Watched:
        """Return the same for queries by their `signatures` `(B, D)`."""
        sources = entries.sources_of(source, len(signatures))
        if self.threshold is None:
            raise RuntimeError("the sentinel must be fitted before it watches: sentinel.fit(clean inputs)")
        with self._lock:
            parts = [self._scored(part) for part in signatures.split(AT_ONCE)]
            score = torch.cat(parts) if parts else signatures.new_zeros(0)
            flagged = score < self.threshold
            self.queries += len(score)
            self.flags += int(flagged.sum())
            told = self._note(sources, flagged.tolist())
        if self.log is not None:
            for one, (queries, n) in told.items():
                if n:
                    flags.note(self.log, one, queries, n)
        return Watched(flagged, score)

    @torch.no_grad()
    def signatures(self, x: Any) -> Tensor:
        """Return what queries `(B, *S)` are compared by, `(B, D)` float32."""
        x = incoming.inputs("x", x, bounds=self.bounds, shape=self.shape or None)
        parts = [self._view(part).float() for part in x.split(1000)]
        found = torch.cat(parts) if parts else x.flatten(1).float()
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"space={self.space!r} gives NaN or infinite values for these queries: check the model")
        return found

    def take(self, signatures: Tensor) -> None:
        """Remember queries by their signatures `(n, D)` without judging them."""
        with self._lock:
            signatures = signatures[-self.window :]
            self._room(signatures)
            places = (self._next + torch.arange(len(signatures), device=signatures.device)) % self.window
            self._held[places], self._squares[places] = signatures, signatures.square().sum(1)
            self._next = (self._next + len(signatures)) % self.window
            self._count = min(self._count + len(signatures), self.window)

    def held(self) -> Tensor:
        """Return the signatures of the queries that are remembered, `(n, D)`, in no order."""
        return self._held[: self._count]

    def reset(self) -> None:
        """Forget all queries; the threshold stays."""
        with self._lock:
            self._next = self._count = self.queries = self.flags = 0
            self._sources: OrderedDict[str, Counter[str]] = OrderedDict()

    def stats(self) -> dict[str, Any]:
        """Return how many queries were watched and flagged, in all and per source, the most flagged first."""
        with self._lock:
            sources = sorted(self._sources.items(), key=lambda one: -one[1]["flagged"])
            return {
                "queries": self.queries, "flagged": self.flags, "held": self._count, "threshold": self.threshold,
                "sources": {name: dict(counts) for name, counts in sources},
            }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Return its settings, as JSON."""
        space = self.space if isinstance(self.space, str) else getattr(self.space, "__name__", "callable")
        return {
            "space": space, "neighbours": self.neighbours, "window": self.window, "false_alarm": self.false_alarm,
            "threshold": self.threshold,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write its settings and threshold to a file, as JSON; the queries that it remembers are not kept."""
        if self.threshold is None:
            raise RuntimeError("the sentinel must be fitted before it is saved: sentinel.fit(clean inputs)")
        if not isinstance(self.space, str):
            raise ValueError(f"space must have a name to be saved, got {self.space!r}")
        _store.write_json(path, self.settings() | {"shape": list(self.shape)})

    @classmethod
    def load(cls, path: str | Path, defence: nn.Module, *, log: str | Path | None = None) -> Self:
        """Return the sentinel that `save` wrote, over the same network; ValueError for a file that is none.

        `log` as for the constructor.
        """
        record = _store.read_json(path)
        try:
            threshold, shape = float(record.pop("threshold")), tuple(map(int, record.pop("shape")))
            found = cls(defence, log=log, **record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a sentinel ({error}): save it again") from error
        found.threshold, found.shape = threshold, shape
        return found

    def twin(self) -> Self:
        """Return a sentinel that remembers the same and goes on by itself."""
        with self._lock:
            found = type(self).__new__(type(self))
            sources = OrderedDict((name, Counter(counts)) for name, counts in self._sources.items())
            found.__setstate__(
                self.__getstate__()
                | {"_held": self._held.clone(), "_squares": self._squares.clone(), "_sources": sources, "log": None}
            )
        return found

    def __repr__(self) -> str:
        fitted = "not fitted" if self.threshold is None else f"threshold {self.threshold:.3g}"
        return (
            f"Sentinel(space={self.space!r}, neighbours={self.neighbours}, window={self.window:,}, "
            f"false_alarm={self.false_alarm:g}, {fitted}, {self.queries:,} queries, {self.flags:,} flagged)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _room(self, like: Tensor) -> None:
        if self._held.shape[1:] != like.shape[1:] or self._held.device != like.device:
            self._held, self._squares = like.new_zeros(self.window, like.shape[1]), like.new_zeros(self.window)
            self._next = self._count = 0

    def _scored(self, signatures: Tensor) -> Tensor:
        """Return the scores `(B,)` of at most `AT_ONCE` queries, each compared with the window before it; take them."""
        self._room(signatures)
        n, before, squares = len(signatures), self._count, signatures.square().sum(1)
        row = torch.arange(n, device=signatures.device)
        # What is held has an age, 0 the oldest; the i-th query pushed out those that were too many by then.
        age = (torch.arange(before, device=row.device) - self._next) % max(before, 1)
        gone = age < (before + row - self.window)[:, None]
        other = (row >= row[:, None]) | (row < (row - self.window)[:, None])
        # Products tell which are near, differences how near: products of near copies have no digits left for that.
        far = torch.cat(
            [
                (self._squares[:before] - 2 * signatures @ self._held[:before].T).masked_fill_(gone, torch.inf),
                (squares - 2 * signatures @ signatures.T).masked_fill_(other, torch.inf),
            ],
            1,
        )
        near = far.topk(min(self.neighbours + SPARE, before + n), dim=1, largest=False)
        among = near.indices >= before
        points = torch.where(
            among[:, :, None],
            signatures[(near.indices - before).clamp(min=0)],
            self._held[near.indices.clamp(max=self.window - 1)],
        )
        exact = (points - signatures[:, None]).square().sum(2).sqrt()
        exact = exact.masked_fill(near.values == torch.inf, torch.inf)
        self.take(signatures)
        if before + n < self.neighbours:
            return signatures.new_full((n,), torch.inf)
        return exact.topk(self.neighbours, dim=1, largest=False).values.mean(1)

    def _note(self, sources: Sequence[str], flags: Sequence[bool]) -> dict[str, tuple[int, int]]:
        """Count queries and flags per source, and return these of now."""
        queries, flagged = Counter(sources), Counter(itertools.compress(sources, flags))
        for source, n in queries.items():
            self._sources.setdefault(source, Counter()).update(queries=n, flagged=flagged[source])
            self._sources.move_to_end(source)
        while len(self._sources) > SOURCES:
            self._sources.popitem(last=False)
        return {source: (n, flagged[source]) for source, n in queries.items()}


def promised(n: int, share: float) -> int:
    """Return the largest m such that below the m-th lowest of n clean scores lies more than a `share` of all clean ones
    with a probability of at most `UNSURE`; 0 if there is none.

    What lies below it is beta distributed, with parameters m and n + 1 - m: it is above `share` as often as fewer than
    m of n tries of that probability succeed.
    """
    m, fewer = 0, math.exp(n * math.log1p(-share))
    term = fewer
    while fewer <= UNSURE and m < n:
        m += 1
        term *= (n - m + 1) / m * share / (1 - share)
        fewer += term
    return m
