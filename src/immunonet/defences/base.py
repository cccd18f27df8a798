"""The contract of a defence, and the registry of its kinds: all that commands, studies and the protocol ask of one."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from immunonet import _check, _store, incoming, models
from immunonet.defences.answers import Answer, Healed, Sense
from immunonet.features.names import Layer, as_layers, layer_names
from immunonet.response import Trace

if TYPE_CHECKING:
    from immunonet.memory.store import Memory

# The format of what `save` writes; 1 named a defence by its class, and its file of tensors after the repertoire.
FORMAT = 2
_KINDS_1 = {"RAILS": "rails", "DkNN": "dknn"}
DEFENCE_FILE = "defence.json"
# Where the defence that is another's model lies in the folder of that one.
_BEHIND = "behind"

REGISTRY: dict[str, type[Defence]] = {}
"""Every kind of defence by its name; a kind that is registered works in commands, studies, the protocol and `load`."""


class Defence(models.Asking, abc.ABC):
    """A trained classifier with something around it. A kind of its own is a subclass that is registered.

    What a subclass must have: `kind`, its name in commands, files and rows; `title`, its name in tables; and `answer`.
    If it takes more than the model and `bounds`, as keyword arguments of its constructor, `settings` must return them;
    if it is fitted, `fit`, `tensors` and `restore`. All else has a default. `randomised`: whether the answer depends
    on a seed. The model is never changed: it is asked through `immunonet.models`, in eval mode.

    Args:
        model: any classifier, inputs `(B, *S)` to logits `(B, C)`.
        bounds: valid range of inputs, `(low, high)` or one pair per channel or feature.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    randomised: bool = False
    classes: int = 0
    """Number of classes; 0 where it is not known before an answer."""
    optimizes: bool | None = None
    """Whether an answer is the outcome of a search (RobustBench's `optimization_loop`); None: not told."""
    costly: bool = False
    """Whether fitting takes so long that what was fitted is worth keeping; `fit` then takes a `checkpoint` folder."""
    words: ClassVar[Mapping[str, dict[str, Any]]] = {}
    """Bare words that a description of this kind may hold, each short for settings, such as a preset's."""

    def __init__(self, model: nn.Module, *, bounds: Any = (0.0, 1.0)) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.bounds = incoming.bounds("bounds", bounds)
        self._layers: tuple[Layer, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(filter(None, (type(self.model).__name__, self.extra_repr())))})"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that it looks at; a callable goes by its own."""
        return layer_names(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the model, and everything else, is."""
        for tensor in [*self.parameters(), *self.buffers()]:
            return tensor.device
        return torch.device("cpu")

    def fit(self, x: Any = None, y: Any = None, calibration: Any = 0.05) -> Self:
        """Learn from training examples `x` `(N, *S)`, `y` `(N,)` and return self; here there is nothing to learn.

        `calibration`: the fraction of them, or others as `(x, y)`, that what is sensed is calibrated on.
        """
        return self

    @abc.abstractmethod
    def answer(self, x: Any, seed: int | None = None) -> Answer:
        """Return the answer to inputs `x` `(B, *S)`; the same `seed` gives the same one."""

    def predict(self, x: Any, seed: int | None = None, **how: Any) -> Tensor:
        """Return labels `(B,)` int64 of inputs `(B, *S)`; `how` is handed on to `answer`."""
        with torch.no_grad():
            return self.answered(x, seed, **how).labels

    def predict_proba(self, x: Any, seed: int | None = None, **how: Any) -> Tensor:
        """Return the probability `(B, C)` float32 of each label, which sums to 1."""
        with torch.no_grad():
            return self.answered(x, seed, **how).probabilities

    def forward(self, x: Any, seed: int | None = None) -> Tensor:
        """Return finite log-probabilities `(B, C)` whose argmax is what `predict` says, ties included."""
        return self.answered(x, seed).log_probabilities

    @torch.no_grad()
    def sense(self, x: Any) -> Sense | None:
        """Return how foreign inputs `(B, *S)` look, None of a defence that senses nothing."""
        return self.answered(x).sense

    def familiarity(self, x: Any) -> Tensor:
        """Return the p-value `(B,)` of each input's distance from what is known: foreign ones have a small one."""
        return self._sensed(x).p_value

    def foreign(self, x: Any) -> Tensor:
        """Return whether `(B,)` inputs are farther from what is known than all but few calibration examples."""
        return self._sensed(x).foreign

    def credibility(self, x: Any) -> Tensor | None:
        """Return how well what is known supports the labels of inputs `(B, *S)`: `(B,)` in (0, 1], or None."""
        return self.answered(x).credibility

    def learning_curves(self, x: Any, seed: int | None = None) -> Sequence[Trace]:
        """Return how the answers to inputs `(B, *S)` evolve, a trace per layer; none of a kind whose do not."""
        return ()

    def memory_cells(self, x: Any, seed: int | None = None, *, most: int) -> tuple[Tensor, Tensor] | None:
        """Return what answers to inputs leave to learn from, `(B, M, *S)`, M at most `most`, with labels `(B, M)`."""
        return None

    def healed(self, x: Any) -> Healed | None:
        """Return what answers to inputs `(B, *S)` change on their way; None of a kind that changes nothing."""
        return None

    def attend(
        self, x: Any, *, source: str | Sequence[str] = "unknown", seed: int | None = None
    ) -> tuple[Answer, list[str] | None]:
        """Return the answer to inputs `(B, *S)` from one source or one each, and the ids by which a memory holds them,
        written by then; None of a defence without one.
        """
        return self.answered(x, seed), None

    def remember_in(self, memory: Memory) -> None:
        """Answer from a memory from now on, and keep in it what is attended to; ValueError of a kind that cannot."""
        raise ValueError(f"{self.kind} cannot have a memory: fit a rails")

    def draws(self, x: Any, seeds: Sequence[int]) -> Tensor:
        """Return labels `(R, B)` int64 of inputs `(B, *S)` under R seeds: the rows are those of `predict(x, seed)`."""
        return torch.stack([self.predict(x, seed) for seed in self._seeds(seeds)])

    def settings(self) -> dict[str, Any]:
        """Return all keyword arguments that the constructor took, as JSON; `made` reads them."""
        return {"bounds": self.bounds.pairs()}

    def setting(self, name: str) -> Any:
        """Return the value of a setting; ValueError where none holds for all of the defence."""
        _check.choice("setting", name, tuple(self.settings()))
        return self.settings()[name]

    def tensors(self) -> dict[str, Tensor]:
        """Return what was fitted, by name; `restore` takes it."""
        return {}

    def elsewhere(self) -> dict[str, Any]:
        """Return what `tensors` leaves out because it stays where it is, as JSON: for `load`, by its argument."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave; ValueError where the model is not the one it was fitted with."""

    @classmethod
    def made(cls, model: nn.Module, layers: Sequence[Layer], settings: Mapping[str, Any]) -> Self:
        """Return a defence with these settings, not fitted; it looks at `layers`, if its kind looks at any.

        ValueError for a setting that the kind does not have, naming the nearest ones.
        """
        cls.check_settings(settings)
        return cls(model, *([list(layers)] if layers else []), **settings)

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the settings."""
        return [p.name for p in _parameters(cls).values() if p.kind is p.KEYWORD_ONLY]

    @classmethod
    def takes_layers(cls) -> bool:
        """Return whether this kind looks at layers of the model."""
        return "layers" in _parameters(cls)

    @classmethod
    def can(cls, verb: str) -> bool:
        """Return whether this kind has a method, such as `fit`, of its own."""
        return getattr(cls, verb) is not getattr(Defence, verb)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the nearest, for a setting that this kind does not have."""
        known = cls.options()
        for name in settings:
            if name not in known:
                raise ValueError(f"{cls.kind} has no setting {name!r}{_check.nearest(name, known)}")

    @classmethod
    def candidates(
        cls, examples: int, choices: Mapping[str, Sequence[Any]] | None = None
    ) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Return what to choose from with so many `examples` where it is tuned: settings to fit with, and for each the
        settings that a fitted one may change. `choices`: values of a setting in place of the kind's own. Empty for a
        kind that is not tuned.
        """
        return []

    def challengers(self) -> list[nn.Module]:
        """Return the surrogates that a tuned one must withstand."""
        return list(self.surrogates().values())

    @classmethod
    def defaults(cls, examples: int) -> dict[str, Any]:
        """Return settings whose default depends on the number of `examples`."""
        return {}

    def check_examples(self, y: Tensor, classes: int) -> None:
        """Raise ValueError where examples labelled `y` `(N,)` are too few to fit this defence, for so many classes."""

    @property
    def effort(self) -> float:
        """Roughly what an answer takes, in units of one by nearest neighbours alone."""
        return 1.0

    def predict_each(self, x: Any, variants: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return labels `(len(variants), B)` int64 of inputs `(B, *S)` with some settings changed, by each variant."""
        return torch.stack([self.with_settings(**variant).predict(x) for variant in variants])

    def with_settings(self, **changes: Any) -> Self:
        """Return a twin with some settings changed, checked as by the constructor; what is fitted is shared."""
        twin = self.made(self.model, self._layers, self.settings() | changes)
        twin.adopt(self)
        return twin

    def fitted_by(self) -> dict[str, Any]:
        """Return the settings that what is fitted depends on: with others alike it may be adopted."""
        return self.settings()

    def adopt(self, other: Self) -> None:
        """Share what `other`, fitted by the same settings, was fitted to."""
        self.classes = other.classes
        self.restore(other.tensors())

    def calibrate(self, x: Tensor, y: Tensor) -> None:
        """Calibrate what is sensed on other examples `x` `(n, *S)`, `y` `(n,)`; the rest of what is fitted stays."""

    def surrogates(self) -> Mapping[str, nn.Module]:
        """Return differentiable stand-ins for attacks that know the defence, by name, the strongest first."""
        return {}

    def stealthy(self, surrogate: nn.Module) -> nn.Module | None:
        """Return a surrogate under the condition that inputs do not look foreign; None if nothing is sensed."""
        return None

    def explained(self, x: Tensor, adversarials: Tensor) -> Mapping[str, float]:
        """Return what else, by name, a row says of attacks from inputs `x` `(n, *S)` to `adversarials`."""
        return {}

    def light(self) -> Defence:
        """Return a cheaper twin for attacks that only ask; what they find is tested on the defence itself."""
        return self

    def ablations(self) -> Mapping[str, Defence]:
        """Return the defence less one of its parts each, by what is left out."""
        return {}

    def check_current(self) -> None:
        """Raise ValueError unless the defence is fitted, and its model still is the one it was fitted with."""

    def save(self, folder: str | Path) -> None:
        """Write what was fitted and the settings to `folder` (safetensors and JSON); the model stays outside.

        A defence that is the model of this one is written to a folder inside. An older save is replaced only when the
        new one is whole.
        """
        self.check_current()
        folder = Path(folder)
        if isinstance(self.model, Defence):
            self.model.save(folder / _BEHIND)
        checksum = _store.write_tensors(folder / "tensors.new", self.tensors())
        name = f"tensors-{checksum[:12]}.safetensors"
        known = (folder / name).exists()
        (folder / "tensors.new").replace(folder / name)
        record = {
            "format": FORMAT,
            "kind": self.kind,
            "layers": list(self.layers),
            "callables": [not isinstance(layer, str) for layer in self._layers],
            "settings": self.settings(),
            "classes": self.classes,
            "tensors": {"file": name, "sha256": checksum},
            "elsewhere": self.elsewhere(),
        }
        try:
            _store.write_json(folder / DEFENCE_FILE, record | {"checksum": _store.fingerprint(record)})
        except BaseException:
            if not known:
                (folder / name).unlink(missing_ok=True)
            raise
        for old in (*folder.glob("tensors-*.safetensors"), *folder.glob("repertoire-*.safetensors")):
            if old.name != name:
                old.unlink()

    @classmethod
    @torch.no_grad()
    def load(
        cls, folder: str | Path, model: nn.Module, layers: Layer | Sequence[Layer] | None = None, **how: Any
    ) -> Self:
        """Return the defence of this kind that `save` wrote, around `model` with the weights it was fitted with.

        `layers` is needed again where one of them was a callable; `how` is what `restore` takes. Raises
        FileNotFoundError or ValueError for missing, truncated, edited or foreign files, another format version or kind.
        """
        path = Path(folder) / DEFENCE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: give the folder that save or `immunonet fit` wrote")
        record = _store.read_json(path)
        found = _kind_of(path, record)
        if not issubclass(found, cls):
            raise ValueError(f"{path} holds a {found.__name__}, not a {cls.__name__}")
        if record.pop("checksum", None) != _store.fingerprint(record):
            raise ValueError(f"{path} was edited: its content does not match its checksum")
        names, callables = record["layers"], record["callables"]
        if layers is None and any(callables):
            raise ValueError(f"layers must be given again: {names[callables.index(True)]!r} was a callable")
        given = () if layers is None and not names else as_layers(names if layers is None else layers)
        if len(given) != len(names):
            raise ValueError(f"layers must be {len(names)} as saved, {names}, got {list(layer_names(given))}")
        if (path.parent / _BEHIND / DEFENCE_FILE).is_file() and not isinstance(model, Defence):
            model = load(path.parent / _BEHIND, model)
        defence = found.made(model, given, record["settings"])
        defence.classes = record["classes"]
        tensors = _store.read_tensors(path.parent / record["tensors"]["file"], checksum=record["tensors"]["sha256"])
        restore: Callable[..., None] = defence.restore
        restore({name: value.to(defence.device) for name, value in tensors.items()}, **how)
        return defence

    def answered(self, x: Any, seed: int | None = None, **how: Any) -> Answer:
        """Return the answer to inputs, checked; ValueError names what it breaks of the contract."""
        found = self.answer(x, seed, **how)
        logs, labels = found.log_probabilities, found.labels
        name = f"{type(self).__name__}.answer"
        if logs.ndim != 2 or not logs.is_floating_point() or labels.shape != logs.shape[:1]:
            raise ValueError(
                f"{name} must give labels (B,) and log-probabilities (B, C), got {tuple(labels.shape)} and "
                f"{tuple(logs.shape)} of {logs.dtype}"
            )
        plain = logs.detach()
        total = plain.double().exp().sum(1)
        near = 1e-3 if logs.dtype in (torch.float32, torch.float64) else 2e-2
        if not bool(torch.isfinite(plain).all()) or bool(((total - 1).abs() > near).any()):
            raise ValueError(
                f"{name} must give finite log-probabilities that sum to 1, got sums {total[:8].tolist()}: "
                "end with log_softmax, or use Answer.of(logits)"
            )
        if not torch.equal(labels.to(plain.device), plain.argmax(1)):
            first = int((labels.to(plain.device) != plain.argmax(1)).nonzero()[0, 0])
            raise ValueError(
                f"{name} must give labels that are the argmax of its log-probabilities, got {int(labels[first])} where "
                f"that is {int(plain[first].argmax())} (input {first})"
            )
        return found

    def _sensed(self, x: Any) -> Sense:
        if (found := self.sense(x)) is None:
            raise ValueError(f"{type(self).__name__} senses nothing: its answers have no sense")
        return found

    @staticmethod
    def _seeds(seeds: Sequence[int]) -> list[int]:
        found = [_check.integer("seeds", seed, least=0, most=2**63 - 1) for seed in seeds]
        if not found:
            raise ValueError("seeds must hold at least one seed, got none")
        return found


class Made(Mapping[str, Any]):
    """Things by name, each made when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers, self._made = dict(makers), dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Any:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def register(found: type[Defence]) -> type[Defence]:
    """Return a kind of defence after entering it in the registry; ValueError if its name is taken."""
    kind = getattr(found, "kind", None)
    if not isinstance(kind, str) or not isinstance(getattr(found, "title", None), str):
        raise TypeError(f"{found.__name__} must have a kind and a title, two strings")
    if REGISTRY.get(kind, found) is not found:
        raise ValueError(f"kind={kind!r} of {found.__name__} is taken by {REGISTRY[kind].__name__}: choose another")
    REGISTRY[kind] = found
    return found


def kind_of(name: str) -> type[Defence]:
    """Return the kind of defence of that name; ValueError names the nearest ones."""
    _check.among(name, REGISTRY, "defence")
    return REGISTRY[name]


def load(folder: str | Path, model: nn.Module, layers: Layer | Sequence[Layer] | None = None, **how: Any) -> Defence:
    """Return the defence, of whatever kind, that `save` wrote to a folder; see `Defence.load`."""
    return Defence.load(folder, model, layers, **how)


@functools.cache
def _parameters(kind: type[Defence]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _kind_of(path: Path, record: Any) -> type[Defence]:
    """Return the kind that a folder's record names; ValueError for a foreign record, another format or kind."""
    if not isinstance(record, dict) or "format" not in record or not {"kind", "defence"} & record.keys():
        raise ValueError(f"{path} does not describe a defence; give the folder that save() wrote")
    if record["format"] not in (1, FORMAT):
        raise ValueError(f"{path} has format {record['format']}; this version reads formats 1 and {FORMAT}")
    kind = record["kind"] if "kind" in record else _KINDS_1.get(record["defence"], record["defence"])
    if kind not in REGISTRY:
        raise ValueError(
            f"{path} holds a defence of kind {kind!r}{_check.nearest(str(kind), list(REGISTRY))}; register it"
        )
    return REGISTRY[kind]
