"""Draws: which seeds of a randomised defence choose a worst case, and which count it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Seeds on which worst cases are chosen, `choose`, and others on which they are counted, `count`.

    Both are empty for a defence without randomness, which has one run. Every candidate is looked at on the first `few`
    of either: its runs `(R, n)` are those of `seeds`, those that choose first.
    """

    choose: tuple[int, ...] = ()
    count: tuple[int, ...] = ()
    few: int = 0

    @classmethod
    def of(cls, seed: int, each: int, few: int) -> Draws:
        """Return `each` seeds that choose, from `seed` on, and as many that count."""
        first, second = range(seed, seed + each), range(seed + each, seed + 2 * each)
        return cls(choose=tuple(first), count=tuple(second), few=min(few, each))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of every candidate."""
        return self.choose[: self.few] + self.counting

    @property
    def counting(self) -> tuple[int, ...]:
        """Those of every candidate that count."""
        return self.count[: self.few]

    def chosen(self, runs: Tensor) -> Tensor:
        """Return of a candidate's runs `(R, n)` those on which it may be chosen."""
        return runs[: self.few] if self.few else runs

    def counted(self, runs: Tensor) -> Tensor:
        """Return of a candidate's runs `(R, n)` those that count."""
        return runs[self.few :]


def share(correct: Tensor) -> float:
    """Return the share of `correct`, of any shape, that is true."""
    return float(correct.double().mean())
