"""The grammar of a defence: `rails fc1+fc2 generations=0 voice=.25`, `dknn input tuned`, `my.module:factory gain=2`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, cast

from torch import nn

from immunonet import _store, models
from immunonet._check import nearest
from immunonet._imports import called, imported
from immunonet.defences.base import Defence, kind_of
from immunonet.defences.wrapped import Wrapped
from immunonet.features.names import Layer, layer_parts

TUNED = "tuned"
GRAMMAR = (
    "KIND [LAYERS] [WORD] [KEY=VALUE ...], as 'rails fc1+fc2 generations=0', 'dknn input tuned', 'cnn', "
    "'my.module:factory gain=2'; one before another, which is then its model: 'control input rank=20 | rails input'"
)
_WORDS = {"none": None, "true": True, "false": False}

MANY = 10**9
"""Examples of a repertoire that is not known yet."""

Resolve = Callable[[str, nn.Module], Layer]
"""What a layer's name stands for at a network."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A defence described: its `kind` and `settings`, the `layers` that it looks at, and `words` for settings.

    `kind` is that of the registry, or `package.module:factory`, called with the network and the settings. `title`: for
    tables; None: the kind's. `called`: its name in rows; "": its kind and words. `behind`: the defence that is its
    model, None where that is the network itself.
    """

    kind: str
    layers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    called: str = ""
    behind: Spec | None = None

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read a description; ValueError names the part that is wrong, and the nearest right ones."""
        before, then, last = text.rpartition("|")
        if then:
            return replace(cls.parse(last), behind=cls.parse(before))
        kind, *rest = text.split() or [""]
        if not kind:
            raise ValueError(f"a defence must be {GRAMMAR}, got {text!r}")
        layers: tuple[str, ...] = ()
        words, settings = list[str](), dict[str, Any]()
        with _blamed(text):
            known = _words_of(kind)
            for part in rest:
                key, equals, value = part.partition("=")
                if equals and key.isidentifier():
                    if key in settings:
                        raise ValueError(f"{key} is given twice")
                    settings[key] = read(value)
                elif part in known or part == TUNED:
                    words.append(part)
                elif layers:
                    raise ValueError(
                        f"{part!r} is neither KEY=VALUE nor a word of {kind}{nearest(part, sorted(known))}; "
                        "several layers are joined by +"
                    )
                else:
                    layers = tuple(part.split("+"))
            return cls(kind=kind, layers=layers, words=tuple(words), settings=settings)

    def __post_init__(self) -> None:
        known = _words_of(self.kind)
        for word in self.words:
            if word not in known:
                raise ValueError(f"{word!r} is no word of {self.kind}{nearest(word, sorted(known))}")
        # A word that sets what another one has set, or that comes again, would be passed over.
        named = [name for word in self.words for name in known[word] or (word,)]
        if twice := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"{' and '.join(self.words)} do not go together: both set {twice[0]}")
        if self.foreign:
            if self.layers:
                raise ValueError(f"{self.kind} takes settings alone, as KEY=VALUE, got {'+'.join(self.layers)!r}")
            return
        kind = kind_of(self.kind)
        if not kind.takes_layers() and self.layers:
            raise ValueError(f"{self.kind} looks at no layers, got {'+'.join(self.layers)!r}")
        if kind.takes_layers() and not self.layers:
            object.__setattr__(self, "layers", ("input",))
        kind.check_settings(self.settings)

    @property
    def foreign(self) -> bool:
        """Whether somebody's own factory makes it."""
        return ":" in self.kind

    @property
    def tuned(self) -> bool:
        """Whether some of its settings are to be chosen on validation images."""
        return TUNED in self.words

    @property
    def untuned(self) -> Spec:
        """The same with its settings taken as they are."""
        return replace(self, words=tuple(word for word in self.words if word != TUNED))

    @property
    def name(self) -> str:
        """What it is called in rows: its kind and words, or the factory's name, unless it has one of its own."""
        if self.called:
            return self.called
        own = self.kind.rpartition(":")[2] if self.foreign else "-".join((self.kind, *self.words))
        return own if self.behind is None else f"{self.behind.name}+{own}"

    @property
    def label(self) -> str:
        """What a part of the work with it is called: its name and layers."""
        return " ".join((self.name, *(["+".join(self.layers)] if self.layers else [])))

    def __hash__(self) -> int:
        return hash((self.kind, self.layers, self.words, self.behind))

    def all_settings(self) -> dict[str, Any]:
        """Return its settings with those that its words stand for."""
        known = _words_of(self.kind)
        return {key: value for word in self.words for key, value in known[word].items()} | self.settings

    @property
    def text(self) -> str:
        """The description that `parse` reads as this one, but for how values are written."""
        settings = [f"{key}={_shown(value)}" for key, value in self.settings.items()]
        own = " ".join((self.kind, *(["+".join(self.layers)] if self.layers else []), *self.words, *settings))
        return own if self.behind is None else f"{self.behind.text} | {own}"

    def options(self) -> list[str]:
        """Return the names of the settings that its kind has; none are known of somebody's own factory."""
        return [] if self.foreign else kind_of(self.kind).options()

    def takes(self, setting: str) -> bool:
        """Return whether its kind has a setting of that name."""
        return self.foreign or setting in self.options()

    @property
    def chain(self) -> list[Spec]:
        """All descriptions, the one next to the network first, itself last."""
        return [*(self.behind.chain if self.behind else []), self]

    def told(self) -> dict[str, Any]:
        """Return all that it says, as JSON."""
        told = {"kind": self.kind, "layers": list(self.layers), "words": list(self.words), "settings": self.settings}
        return told if self.behind is None else told | {"behind": self.behind.told()}

    def changed(self, **settings: Any) -> Spec:
        """Return the same with other settings."""
        return replace(self, settings=self.settings | settings)

    def made(self, net: nn.Module, resolve: Resolve, examples: int) -> Defence:
        """Return what it describes around a network, not fitted, for a repertoire of so many examples.

        `net`: where another defence stands `behind` it, that one.

        A factory may also give a module or function, inputs `(B, *S)` to log-probabilities `(B, C)`. Errors are those
        of the kind, the layers and the settings.
        """
        with _blamed(self.text):
            if self.foreign:
                made = called("factory", self.kind, net, **self.settings)
                return made if isinstance(made, Defence) else Wrapped(net, made)
            kind = kind_of(self.kind)
            layers = [resolve(name, models.inside(net)) for name in self.layers]
            return kind.made(net, layers, kind.defaults(examples) | self.all_settings())

    def tried(self, choices: Mapping[str, Sequence[Any]] | None = None) -> Defence | None:
        """Return what it describes around a network that has whatever layers it asks for; None of a factory's.

        With every candidate, too, if it is tuned; `choices` as in `Defence.candidates`. ValueError or TypeError for
        settings that are wrong at any network, and for a factory that cannot be imported.
        """
        if self.behind is not None:
            self.behind.tried()
        if self.foreign:
            imported("defence", self.kind)
            return None
        kind, settings = kind_of(self.kind), self.all_settings()
        net = _Stand([*self.layers, *(value for value in settings.values() if isinstance(value, str))])
        fixed = {key: (value,) for key, value in self.settings.items()}
        for fit, variants in kind.candidates(MANY, {**(choices or {}), **fixed}) if self.tuned else ():
            for variant in variants:
                kind.made(net, self.layers, settings | fit | variant)
        return kind.made(net, self.layers, kind.defaults(MANY) | settings)


class _Stand(nn.Module):
    """A stand-in for a network that has submodules of these names."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = [layer_parts(name)[0] for name in names]

    def named_modules(self, *args: Any, **how: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield itself by all names."""
        yield from ((name, self) for name in ("", *self._names))


def read(text: str) -> Any:
    """Return a setting's value: none, true, false, a number or fraction, several parted by commas, or a word."""
    if "," in text:
        return tuple(read(part) for part in text.split(",") if part)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float, lambda value: float(Fraction(value))):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            return cast(Any, kind)(text)
    return text


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value)) + ("," if len(value) < 2 else "")
    words = {word for word, meant in _WORDS.items() if meant is value}
    return words.pop() if words else str(value)


def parse_all(texts: Sequence[str]) -> list[Spec]:
    """Return the descriptions, each once; those of the same name and layers are called by what they differ in."""
    every = {_store.fingerprint(spec.told()): spec for spec in map(Spec.parse, texts)}.values()
    alike = {spec.label: [other for other in every if other.label == spec.label] for spec in every}
    return [replace(spec, called=_apart(spec, alike[spec.label])) for spec in every]


def _apart(spec: Spec, alike: Sequence[Spec]) -> str:
    """Return a name that none of those `alike` has: with the settings that not all of them have."""
    name = spec.name if all(other.kind == spec.kind for other in alike) else spec.kind
    shown = {f"{key}={_shown(value)}" for other in alike for key, value in other.settings.items()}
    differing = {text for text in shown if any(text not in other.text.split() for other in alike)}
    return " ".join((name, *(text for text in spec.text.split() if text in differing)))


def _words_of(kind: str) -> dict[str, dict[str, Any]]:
    """Return the words that a kind has, and the settings that each stands for; a factory has none."""
    if ":" in kind:
        return {}
    known = kind_of(kind)
    return dict(known.words) | ({TUNED: {}} if known.candidates(1) else {})


@contextlib.contextmanager
def _blamed(text: str) -> Iterator[None]:
    """Say in an error which description it is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"defence {text!r}: {error}") from error
