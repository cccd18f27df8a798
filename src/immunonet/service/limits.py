"""What a service takes at once, and how long it lets it take."""

from __future__ import annotations

from dataclasses import dataclass

from immunonet import _check


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is taken at once: more is refused before it costs anything.

    `body`: bytes of a request; `pixels` of an image, as its header tells; `batch`: inputs that are answered at once,
    and the most of one request; `queue`: inputs that wait for it, None: as many; `seconds` that an answer may take.
    """

    body: int = 8 * 2**20
    pixels: int = 2**24
    batch: int = 32
    queue: int | None = None
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("body", "pixels", "batch"):
            _check.integer(name, getattr(self, name))
        _check.keep(self, _check.integer, "queue", least=self.batch, optional=True)
        _check.number("seconds", self.seconds, least=0, above=True)

    @property
    def room(self) -> int:
        """How many inputs may wait."""
        return self.batch if self.queue is None else self.queue
