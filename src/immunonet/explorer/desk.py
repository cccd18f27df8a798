"""What the page asks for: antigens, stories and watches, from what a visitor set. Nothing of a visitor is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from immunonet import _check, data, incoming
from immunonet.defences.base import Defence
from immunonet.evaluation.stream import askers, assaults
from immunonet.evaluation.threats import Threat
from immunonet.explorer import antigens
from immunonet.explorer.story import Assailed, Story, assailed, plain, reply, told
from immunonet.explorer.watching import Seen, asking
from immunonet.memory.sentinel import Sentinel
from immunonet.report.images import require_images

TEST, DRAWING, FILE = "a test image", "your drawing", "a picture of yours"
NETWORK = "the network alone"
# The largest attack, as a share of a pixel's range; steps of PGD; queries of who only asks; honest ones before them.
STRENGTH, STEPS, QUERIES, HONEST = 0.5, 40, (50, 500), 30


class Source(NamedTuple):
    """Where a visitor's antigen comes from: `kind`, and what each of them needs."""

    kind: str
    place: int | float | None
    drawing: str | None
    file: bytes | None
    swap: bool


class Given(NamedTuple):
    """An antigen `(1, *S)`, and its class where it is known."""

    x: Tensor
    truth: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Desk:
    """A defence of the network `base`, with what visitors may do to it; all settings are checked.

    `images`: test images, or None; `names`: one per class, none: those of the images, or else numbers; `sentinel`,
    fitted, or None; `shape` of an antigen, where neither images nor defence tell it; `seconds` that an attack may take;
    `seed` of attacks and answers.

    ValueError or TypeError names the argument; antigens must be grey or colour images.
    """

    defence: Defence
    base: nn.Module
    images: data.Images | None = None
    names: Sequence[str] = ()
    sentinel: Sentinel | None = None
    shape: Sequence[int] | None = None
    seconds: float = 20.0
    seed: int = 0
    antigen: tuple[int, ...] = field(init=False)
    """The shape of an antigen."""
    _stand_ins: Mapping[str, nn.Module] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_kinds()
        self.defence.check_current()
        _check.keep(self, _check.number, "seconds", least=0, above=True)
        _check.keep(self, _check.integer, "seed", least=0, most=2**63 - 1)
        told: Any = self.shape or getattr(self.defence, "shape", ())
        shape = tuple(told if self.images is None else self.images.x.shape[1:])
        require_images("antigens of the explorer", shape)
        object.__setattr__(self, "antigen", shape)
        classes = len(plain(self.base, self._inputs(torch.zeros(1, *shape))).shares)
        known = self.names or (self.images.classes if self.images is not None and self.images.named else None)
        object.__setattr__(self, "names", _check.class_names(known, classes))
        object.__setattr__(self, "_stand_ins", self.defence.surrogates())

    def _check_kinds(self) -> None:
        kinds: dict[str, tuple[type, bool]] = {
            "defence": (Defence, False), "base": (nn.Module, False), "images": (data.Images, True),
            "sentinel": (Sentinel, True),
        }  # fmt: skip
        for name, (kind, optional) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (optional and value is None):
                wanted = f"a {kind.__name__}{' or None' if optional else ''}"
                raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        if self.images is not None and not len(self.images):
            raise ValueError("images must hold at least one image, got none: give None where there are none")
        if self.sentinel is not None and self.sentinel.threshold is None:
            raise ValueError("sentinel must be fitted: sentinel.fit(clean inputs)")

    @property
    def bounds(self) -> _check.Bounds:
        """The valid range of antigens."""
        return self.defence.bounds

    @property
    def span(self) -> float:
        """The range of a pixel, that of the narrowest channel."""
        return min(high - low for low, high in self.bounds.pairs())

    @property
    def sources(self) -> list[str]:
        """Where antigens may come from."""
        return [*([TEST] if self.images is not None else []), DRAWING, FILE]

    @property
    def knowledge(self) -> list[tuple[str, str]]:
        """What an attacker may know, in words and by name."""
        return [(NETWORK, NETWORK), *((f"the defence, by its stand-in {name}", name) for name in self._stand_ins)]

    @property
    def askers(self) -> list[str]:
        """The attacks that only ask."""
        return sorted(askers(self._threat(0.1), QUERIES[0]))

    def given(self, source: Source) -> Given:
        """Return the antigen that a visitor means; ValueError in plain words where there is none."""
        if _check.choice("the antigen's source", source.kind, self.sources) == DRAWING:
            return Given(self._inputs(antigens.drawn(source.drawing, self.antigen, bounds=self.bounds)), None)
        if source.kind == FILE:
            if not source.file:
                raise ValueError("there is no picture yet: choose a file first")
            found = antigens.read(source.file, self.antigen, bounds=self.bounds, swap=bool(source.swap))
            return Given(self._inputs(found), None)
        assert self.images is not None
        place = _check.integer("the test image", int(source.place or 0), least=0, most=len(self.images) - 1)
        return Given(self._inputs(self.images.x[place : place + 1]), int(self.images.y[place]))

    def story(self, source: Source, knows: str, strength: float) -> Story:
        """Return what happens to the antigen under an attack of this `strength`, 0: none, by who `knows` so much."""
        given, eps = self.given(source), self._eps(strength)
        attack: Assailed | None = None
        if eps:
            _check.choice("what the attacker knows", knows, [name for _, name in self.knowledge])
            target = self.base if knows == NETWORK else self._stand_ins[knows]
            words = next(words for words, name in self.knowledge if name == knows)
            label = self._label(given, knows == NETWORK)
            attack = assailed(
                target, given.x, label, knows=words, eps=eps, bounds=self.bounds, steps=STEPS, seconds=self.seconds,
                seed=self.seed,
            )  # fmt: skip
        return told(self.defence, self.base, given.x, truth=given.truth, attack=attack, seed=self.seed)

    def watch(self, source: Source, method: str, strength: float, queries: int, refuses: bool) -> Iterator[Seen]:
        """Yield what the sentinel sees of an attack that only asks about the antigen."""
        if self.sentinel is None:
            raise ValueError("there is no sentinel here")
        given, eps = self.given(source), self._eps(strength)
        if not eps:
            raise ValueError("the strength must be above 0, or the attacker may change nothing")
        queries = _check.integer("queries", int(queries), least=QUERIES[0], most=QUERIES[1])
        threat = self._threat(eps)
        _check.choice("the attack", method, self.askers)
        marked, refused = assaults(askers(threat, queries)[method], threat, "plain", queries)
        return asking(
            self.defence, self.sentinel, given.x, self._label(given, False), assault=refused if refuses else marked,
            honest=self._honest(given), seconds=self.seconds,
        )  # fmt: skip

    def _label(self, given: Given, network: bool) -> int:
        """Return the label that an attack leads away from: what is true, or else what is answered now."""
        if given.truth is not None:
            return given.truth
        return (plain(self.base, given.x) if network else reply(self.defence, given.x, self.seed)).label

    def _honest(self, given: Given) -> Tensor:
        if self.images is None:
            return given.x[:0]
        return self._inputs(self.images.x[data.sample(len(self.images), min(HONEST, len(self.images)))])

    def _eps(self, strength: float) -> float:
        return self.span * _check.number("the strength", strength, least=0, most=STRENGTH)

    def _threat(self, eps: float) -> Threat:
        return Threat(eps=eps, norm="linf", bounds=self.bounds, seed=self.seed)

    def _inputs(self, x: Any) -> Tensor:
        low, high = self.bounds.tensors(x, x.shape[1:])
        return incoming.inputs("the antigen", x.clamp(low, high), bounds=self.bounds).to(self.defence.device)
