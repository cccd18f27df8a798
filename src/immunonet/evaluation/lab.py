"""The lab: images, networks and fitted defences, on which tables of measurements are made part by part."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _store, models
from immunonet._identity import identity
from immunonet.attacks._base import Attack
from immunonet.data import Images, sample
from immunonet.defences.base import DEFENCE_FILE, Defence, kind_of
from immunonet.defences.spec import Resolve, Spec
from immunonet.evaluation.asking import describe, told_of
from immunonet.evaluation.bench import Bench, Part, Value, chunks
from immunonet.evaluation.draws import share
from immunonet.evaluation.records import VERSION, Row

# Fitted defences that are kept: more would not fit in memory where layers are wide.
KEPT = 2
# Images that a fit calibrates on where only labels are asked for.
CALIBRATION = 50


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One defence under one attack, on `images` of a split from the one numbered `first` on.

    `base`: the network's name. `attack`: the attack's name, and `method` its settings (None: images as they are, and
    the row says `norm`); `through`: the surrogate of the defence that it is made on, "" for the base; `softer`: factor
    on its temperature. `seeds`: runs of a randomised defence. `repertoire`: a sample of so many training examples
    (None: all). `tuning`: how the settings of `spec` were chosen; `among`: the sets of layers to choose from, where
    they are. `told`: more settings for the row. `place`: what it is, in words; "": base, defence and attack.
    """

    spec: Spec
    base: str
    attack: str = "none"
    method: Attack | None = None
    norm: str = "linf"
    through: str = ""
    softer: float = 1.0
    split: str = "test"
    images: int = 1
    first: int = 0
    seeds: tuple[int, ...] = ()
    repertoire: int | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    among: tuple[tuple[str, ...], ...] = ()
    told: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def about(self) -> str:
        """What it is, in words."""
        return self.place or " ".join(filter(None, (self.base, self.spec.label, self.attack)))


@dataclass(frozen=True)
class Measured:
    """A measurement, its row, which images `(R, n)` were right in each run, and which `(n,)` looked foreign."""

    measurement: Measurement
    row: Row
    correct: Tensor
    foreign: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What settings are chosen on: the first `images` of the validation split, by accuracy over `attacks` on the base.

    `choices`: for settings, values in place of those that the kind itself tries. `knowing`: an image counts only if it
    is right under all attacks, those that know the defence among them, in every norm of `attacks`; else the mean over
    attacks counts.
    """

    images: int = 300
    attacks: Mapping[str, Attack | None] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    knowing: bool = False


@dataclass(frozen=True)
class Told:
    """What is known of a defence that is not fitted: `key`, as JSON all that its answers depend on but for the images
    and the seeds, whether it is `randomised`, whether it `learns` from examples, and roughly what an answer takes.
    """

    key: list[Any]
    randomised: bool
    learns: bool
    effort: float


class Lab:
    """The data, networks and defences of an evaluation or study on one machine: the scene of its bench.

    `nets`: the bases by name, on the device that everything runs on; `splits`: images by name, "training" the
    repertoire, "validation" those that calibrate and tune. `resolve(name, net)`: what a layer's name stands for.
    `told`: settings of every row; `where(split, n)`: what a row says of which images the first n are.
    `senses`: whether defences are asked what looks foreign, so that they must be calibrated on all of "validation".
    Set `folder` to keep there, by all that they depend on, defences that take long to fit.
    """

    folder: Path | None = None

    def __init__(
        self, nets: dict[str, nn.Module], splits: dict[str, Images], *,
        resolve: Resolve, told: dict[str, Any], where: Callable[[str, int], Any], senses: bool = False,
    ) -> None:  # fmt: skip
        self.nets, self.splits, self.training = nets, splits, splits["training"]
        self.resolve, self.told, self.where, self.senses = resolve, told, where, senses
        self.device = next(next(iter(nets.values())).parameters()).device
        self.revision = 0
        self.weights: dict[str, str] = {}
        self._nets: dict[str, str] = {}
        for name, net in nets.items():
            self.add(name, net)
        # By what they were fitted to, and then by all that they depend on.
        self._fitted: dict[str, dict[str, Defence]] = {}
        self._digests: dict[Any, str] = {}
        self._told: dict[Any, Told] = {}

    def add(self, name: str, net: nn.Module) -> None:
        """Take in another base under a name of its own; workers get the lab anew."""
        self.revision += 1
        self.nets[name], self.weights[name] = net, _store.digest(net.state_dict().values())
        self._nets[name] = identity(net)

    def images(self, split: str, part: slice) -> tuple[Tensor, Tensor]:
        """Return some images and labels of a split, on the device."""
        some = self.splits[split][part]
        return some.x.to(self.device), some.y.to(self.device)

    def examples(self, repertoire: int | None) -> tuple[Tensor, Tensor]:
        """Return a fixed random sample of so many training examples, in their original order (None: all)."""
        chosen = self._chosen(repertoire)
        return self.training.x[chosen], self.training.y[chosen]

    def size(self, repertoire: int | None) -> int:
        """Return how many training examples there are of so many wanted (None: all)."""
        return len(self.training) if repertoire is None else min(repertoire, len(self.training))

    def _chosen(self, repertoire: int | None) -> slice | Tensor:
        return slice(None) if repertoire is None else sample(len(self.training), repertoire).sort().values

    def made(self, spec: Spec, base: str, repertoire: int | None = None) -> Defence:
        """Return a defence as it is described, not fitted."""
        net = self.nets[base] if spec.behind is None else self.made(spec.behind, base, repertoire)
        return spec.made(net, self.resolve, self.size(repertoire))

    def _around(self, spec: Spec, base: str, repertoire: int | None) -> Defence:
        """Return the same around a fitted defence, where one stands behind it."""
        if spec.behind is None:
            return self.made(spec, base, repertoire)
        return spec.made(self.fitted(spec.behind, base, repertoire), self.resolve, self.size(repertoire))

    def fitted(self, spec: Spec, base: str, repertoire: int | None = None, *, senses: bool | None = None) -> Defence:
        """Return a fitted defence; what was fitted alike is used again, with other settings."""
        senses, new = self.senses if senses is None else senses, self._around(spec, base, repertoire)
        own: list[Any] = [spec.kind, spec.settings] if spec.foreign else []  # of which the defence may not tell all
        own += [] if spec.behind is None else [spec.behind.told()]
        alike = _store.fingerprint([base, identity(type(new), new._layers), new.fitted_by(), repertoire, own])
        same = _store.fingerprint(self.known(spec, base, repertoire, senses=senses).key)
        known = self._fitted.pop(alike, {})  # the last used is the last to go
        if same not in known:
            if known:
                new.adopt(next(iter(known.values())))
            else:
                few = self.splits["validation"][:CALIBRATION]
                while len(self._fitted) >= KEPT:
                    del self._fitted[next(iter(self._fitted))]
                new = self._fit(new, spec, same, repertoire, (few.x, few.y))
            known[same] = new
            if senses:
                new.calibrate(*self.images("validation", slice(None)))
        if new.can("fit"):
            self._fitted[alike] = known
        return known[same]

    def _fit(self, new: Defence, spec: Spec, key: str, repertoire: int | None, few: tuple[Tensor, Tensor]) -> Defence:
        """Return a defence after fitting it; one that takes long is kept, in the middle and at the end."""
        if self.folder is None or not new.costly:
            return new.fit(*self.examples(repertoire), calibration=few)
        place = self.folder / f"{spec.kind}-{key[:16]}"
        if (place / DEFENCE_FILE).is_file():
            return type(new).load(place, new.model, new._layers)
        fit: Callable[..., Defence] = new.fit
        fit(*self.examples(repertoire), calibration=few, checkpoint=place).save(place)
        return new

    def known(self, spec: Spec, base: str, repertoire: int | None = None, *, senses: bool | None = None) -> Told:
        """Return what is known of a defence before it is fitted.

        ValueError or TypeError for settings, layers or numbers of examples that its kind cannot do with.
        """
        senses = self.senses if senses is None else senses
        if (place := (spec, base, repertoire, senses)) not in self._told:
            made = self.made(spec, base, repertoire)
            made.check_examples(self.training.y[self._chosen(repertoire)], len(self.training.classes))
            fitted = [self.digest("training", None), self.digest("validation", None) if senses else "", repertoire]
            key = [self._nets[base], identity(type(made), made), fitted, VERSION]
            self._told[place] = Told(key, made.randomised, made.can("fit"), made.effort)
        return self._told[place]

    def key(self, spec: Spec, base: str, repertoire: int | None = None) -> list[Any]:
        """Return, as JSON, all that the answers of a defence depend on, but for the images and the seeds."""
        return self.known(spec, base, repertoire).key

    def digest(self, split: str, part: slice | None) -> str:
        """Return the sha256 of some images and labels of a split, or of all."""
        key = (split, None if part is None else (part.start, part.stop))
        if key not in self._digests:
            images = self.splits[split][part or slice(None)]
            self._digests[key] = _store.digest([images.x, images.y])
        return self._digests[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fitted": {}}


class Tables:
    """Measures defences on a bench whose scene is a lab: `measure` and `settled` are all that tables are made of."""

    def __init__(self, bench: Bench, chunk: int) -> None:
        self.bench, self.chunk = bench, chunk
        self.lab: Lab = bench.scene

    def attacked(self, m: Measurement, part: slice) -> Part | None:
        """Return what makes the adversarial examples of a part of the images; None where they are not attacked."""
        if m.method is None:
            return None
        lab = self.lab
        whose = lab.key(m.spec, m.base, m.repertoire) if m.through else lab.key(Spec(kind="cnn"), m.base)[:1]
        key = [whose, VERSION, m.through, m.softer, m.method.describe(), lab.digest(m.split, part)]
        cost = float(m.method.calls() * (part.stop - part.start))
        return Part(key=_store.fingerprint(key), run=_attacked, args=(m, part), about=m.attack, cost=cost)

    def parts(self, m: Measurement) -> list[Part]:
        """Return what asks a defence about its images, chunk by chunk."""
        known, found = self.lab.known(m.spec, m.base, m.repertoire), []
        for chunk in chunks(m.images, self.chunk):
            part = slice(m.first + chunk.start, m.first + chunk.stop)
            made = self.attacked(m, part)
            key = [known.key, made.key if made else self.lab.digest(m.split, part), list(m.seeds)]
            after, cost = (made,) if made else (), known.effort * (part.stop - part.start) * max(1, len(m.seeds))
            asked = Part(
                key=_store.fingerprint(key), run=_answered, args=(m, part), after=after, about=m.about, cost=cost
            )
            found.append(asked)
        return found

    def measure(self, measurements: Sequence[Measurement]) -> list[Measured]:
        """Return what was measured; all parts that are not kept are done first."""
        parts = [self.parts(m) for m in measurements]
        values = iter(self.bench.get([part for own in parts for part in own]))
        return [self._measured(m, [next(values) for _ in own]) for m, own in zip(measurements, parts, strict=True)]

    def choosing(self, m: Measurement, tuning: Tuning) -> list[Part]:
        """Return what must be done before a measurement is settled."""
        return [part for *_, part in self._choices(m, tuning)] if m.spec.tuned and not m.tuning else []

    def settled(self, m: Measurement, tuning: Tuning) -> Measurement:
        """Return a measurement whose defence, if it is tuned, has the settings, and layers, that do best on validation.

        And how they were chosen. The first of the sets of layers wins a tie, then what needs less.
        """
        if not m.spec.tuned or m.tuning:
            return m
        n, choices = min(tuning.images, len(self.lab.splits["validation"])), self._choices(m, tuning)
        values = self.bench.get([part for *_, part in choices])
        options = [
            # What a candidate needs: the sum of its numbers.
            (score, -i, -sum(v for v in own.values() if isinstance(v, int | float)), own, layers)
            for (i, layers, settings, _), scores in zip(choices, values, strict=True)
            for score, own in zip(scores, settings, strict=True)
        ]
        score, _, _, own, best = max(options, key=lambda option: option[:3])
        how = own | {
            "layers": list(best), "accuracy": score, "images": n, "knowing": tuning.knowing,
            "slice": self.lab.where("validation", n), "candidates": [list(one) for one in m.among or [m.spec.layers]],
        }  # fmt: skip
        return dataclasses.replace(m, spec=dataclasses.replace(m.spec, layers=best).changed(**own), tuning=how)

    def _choices(self, m: Measurement, tuning: Tuning) -> list[tuple[int, tuple[str, ...], list[dict[str, Any]], Part]]:
        """Return at each of the layers, by their place, candidates that are fitted at once, and what scores them."""
        lab, n, found = self.lab, min(tuning.images, len(self.lab.splits["validation"])), []
        choices = dict(tuning.choices) | {key: [value] for key, value in m.spec.settings.items()}
        part, clean = slice(0, n), "none" in tuning.attacks
        attacks = {name: method for name, method in tuning.attacks.items() if method is not None}
        # Those that know the defence climb as the first attack of every norm does.
        knowing = tuple({method.norm: method for method in reversed(attacks.values()) if tuning.knowing}.values())[::-1]
        described = [one.describe() for one in knowing] if knowing else [None]
        plain = Measurement(spec=m.spec, base=m.base, split="validation", images=n, repertoire=m.repertoire)
        for i, one in enumerate(m.among or [m.spec.layers]):
            here = dataclasses.replace(m.spec, layers=one)
            for fit, variants in kind_of(here.kind).candidates(lab.size(m.repertoire), choices):
                asked = dataclasses.replace(plain, spec=here.changed(**fit))
                named = [dataclasses.replace(asked, attack=name, method=method) for name, method in attacks.items()]
                made = tuple(attacked for one in named if (attacked := self.attacked(one, part)) is not None)
                told = [lab.key(asked.spec, m.base, m.repertoire), [before.key for before in made], variants, clean]
                key = ["tuning", *told, lab.digest("validation", part), *described]
                score = Part(
                    key=_store.fingerprint(key), run=_scored, args=(asked, variants, knowing, clean), after=made,
                    about=f"tuning {m.base} {here.label}", cost=float(n * len(variants)),
                )  # fmt: skip
                found.append((i, one, [fit | variant for variant in variants], score))
        return found

    def _measured(self, m: Measurement, values: Sequence[Value]) -> Measured:
        lab, made = self.lab, self.lab.made(m.spec, m.base, m.repertoire)
        y = lab.splits[m.split].y[m.first : m.first + m.images]
        correct = torch.cat([torch.tensor(value["labels"]) for value in values], 1) == y.cpu()
        sensed = values[0]["foreign"] is not None
        foreign = torch.tensor([flag for value in values for flag in value["foreign"]]) if sensed else None
        settings = lab.told | {
            "base": m.base, "weights": lab.weights[m.base], "split": m.split, "slice": lab.where(m.split, m.images),
            "chunk": self.chunk, **describe(made), "layers": list(m.spec.layers), **m.told,
            **({"tuning": m.tuning} if m.tuning else {}),
            **({"attack": m.method.describe()} if m.method else {}),
            **({"surrogate": values[0]["surrogate"]} if m.through else {}),
        }  # fmt: skip
        if made.can("fit"):
            settings["repertoire"] = size = lab.size(m.repertoire)
            if size < (whole := len(lab.training)):
                settings["repertoire_slice"] = {"sample": [size, whole], "seed": 0}
        row = Row.of(
            correct, dataset=lab.told["dataset"], defence=m.spec.name, attack=m.attack,
            knows="defence" if m.through else "base",
            eps=0.0 if m.method is None else m.method.eps, norm=m.norm if m.method is None else m.method.norm,
            seconds_per_image=sum(value["seconds"] for value in values) / m.images,
            seeds=m.seeds if made.randomised else (), foreign=None if foreign is None else share(foreign),
            settings=settings,
        )  # fmt: skip
        return Measured(m, row, correct, foreign)


def _attacked(lab: Lab, m: Measurement, part: slice) -> Value:
    """Return adversarial examples of a part of the images, made on a base, or through a surrogate of a defence."""
    x, y = lab.images(m.split, part)
    assert m.method is not None
    return {"x": m.method(_surrogate(lab, m) if m.through else lab.nets[m.base], x, y).adversarials}


def _surrogate(lab: Lab, m: Measurement) -> nn.Module:
    surrogates = lab.fitted(m.spec, m.base, m.repertoire).surrogates()
    if m.through not in surrogates:
        known = ", ".join(surrogates) or "none"
        raise ValueError(f"{m.spec.name} has no surrogate {m.through!r} to attack it through; it has {known}")
    surrogate: Any = surrogates[m.through]
    softened: nn.Module = surrogate if m.softer == 1 else surrogate.softened(m.softer)
    return softened


def _answered(lab: Lab, m: Measurement, part: slice, *made: Value) -> Value:
    """Return a defence's labels, whether inputs look foreign, and the seconds of the first run."""
    x, _ = lab.images(m.split, part)
    x = made[0]["x"].to(x) if made else x
    defence = lab.fitted(m.spec, m.base, m.repertoire)
    labels, seconds = asked(defence, x, m.seeds if defence.randomised else ())
    sense = defence.sense(x) if lab.senses else None
    foreign = None if sense is None else sense.foreign.tolist()
    surrogate = told_of(_surrogate(lab, m)) if m.through else None
    return {"labels": labels.tolist(), "seconds": seconds, "foreign": foreign, "surrogate": surrogate}


def _scored(lab: Lab, m: Measurement, variants: Any, knowing: Sequence[Attack], clean: bool, *made: Value) -> Value:
    """Return the accuracy of every variant of a fitted defence on the images of a measurement."""
    x, y = lab.images(m.split, slice(0, m.images))
    defence = lab.fitted(m.spec, m.base, m.repertoire)
    versions = [*([x] if clean else []), *(value["x"].to(x) for value in made)]
    versions += [attack(target, x, y).adversarials for attack in knowing for target in defence.challengers()]
    right = torch.stack([defence.predict_each(version, variants) == y for version in versions])
    share = (right.all(0) if knowing else right.float().mean(0)).float().mean(1)
    return share.tolist()


@torch.no_grad()
def asked(defence: Defence, x: Tensor, seeds: Sequence[int] = ()) -> tuple[Tensor, float]:
    """Return labels `(R, B)` on the CPU, one run per seed or one in all, and the seconds of the first run.

    An error that the defence raises is raised: here an input without an answer is no wrong answer.
    """
    with models.evaluating(defence):
        begun = time.perf_counter()
        first = defence.predict(x, seeds[0]) if seeds else defence.predict(x)
        seconds = time.perf_counter() - begun
        further = list(defence.draws(x, seeds[1:])) if seeds[1:] else []
    return torch.stack([first, *further]).cpu(), seconds
