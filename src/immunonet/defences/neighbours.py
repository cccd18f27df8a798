"""What defences by nearest neighbours share: feature maps, a repertoire, its search, calibration and sensing."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from immunonet import _check, incoming, indexed, models
from immunonet._estimates import told
from immunonet.defences.answers import Sense
from immunonet.defences.base import Defence
from immunonet.defences.repertoire import Calibration, Examples, Repertoire, check_classes, hold_out, saved
from immunonet.features.build import build
from immunonet.features.file import FeatureFile
from immunonet.features.grown import GrownIndex
from immunonet.features.maps import METRICS, FeatureMap
from immunonet.features.names import Layer, as_layers, check_names
from immunonet.features.partitioned import Here, PartitionedIndex, Parts
from immunonet.features.passes import described, witnessed
from immunonet.features.search import (
    ExactIndex,
    Index,
    Kept,
    Progress,
    SignatureIndex,
    auto_budget,
    batches,
)
from immunonet.features.witness import Witness
from immunonet.immune import sensing

PROBES = 8
# Inputs whose neighbours are looked for at once where nothing else is done with them.
SENSED = 256
# Settings that what is fitted depends on.
_FITTED = ("metric", "space", "vaccine", "vaccine_share")
# Cells that join a repertoire are searched beside it, up to this share of its examples; more are searched with them.
BESIDE = 0.25


class NeighbourDefence(Defence):
    """A trained classifier behind a vote of nearest training examples. It is fitted before anything is asked.

    The model's weights must stay as they were at `fit`: where they have changed, every call raises a ValueError. Any
    number of threads may ask at once (and read a Dataset whose examples stay there: it must bear that). Copies and
    pickles hold all of it, the model too, but copies share a source; `save` is smaller and outlives versions of Python.
    """

    repertoire: Repertoire
    calibration: Calibration
    held: Examples
    _witness: Witness
    _cell_range: _check.Bounds

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        metric: str,
        bounds: Any,
        space: str | None,
        false_alarm: float,
        memory_budget: int | Literal["auto"],
        vaccine: float | None,
        vaccine_share: float,
    ) -> None:
        super().__init__(model, bounds=bounds)
        if space is not None and not isinstance(space, str):
            raise TypeError(f"space must be None or a submodule's name, got {space!r}")
        self._layers = as_layers(layers)
        check_names(model, self._layers, space)
        # Registered so that .to(device) moves them with everything else.
        self._callables = nn.ModuleList(layer for layer in self._layers if isinstance(layer, nn.Module))
        self.space = space
        self.metric = _check.choice("metric", metric, tuple(METRICS))
        if isinstance(memory_budget, str) and memory_budget != "auto":
            raise TypeError(f"memory_budget must be bytes, an integer, or 'auto', got {memory_budget!r}")
        self.memory_budget = (
            auto_budget() if isinstance(memory_budget, str) else _check.integer("memory_budget", memory_budget)
        )
        self.false_alarm = _check.number("false_alarm", false_alarm, least=0, most=1, above=True)
        self.vaccine = None if vaccine is None else _check.number("vaccine", vaccine, least=0, above=True)
        self.vaccine_share = _check.number("vaccine_share", vaccine_share, least=0, most=1, above=True)
        self.shape: tuple[int, ...] = ()
        self.feature_maps: list[FeatureMap] = []
        self.indices = nn.ModuleList()
        # Those of the training examples alone, whatever joined them.
        self._sealed = self.indices

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        calibration: Any = 0.05,
        *,
        keep: Literal["auto", "memory", "source"] = "auto",
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Take the training examples as repertoire, calibrate sensing on others, and return self.

        Args:
            x: inputs `(N, *S)` within bounds (tensor, array, frame, or list of these; whole numbers where bounds are
                wider than 1), or a Dataset, a DataLoader or a list of `(x, y)` or of such dicts. All is computed with
                as float32: a feature that this would round by more than a thousandth of its standard deviation (a
                float64 column with a large offset) is a ValueError, which says to subtract the offset.
            y: labels `(N,)`, whole numbers in [0, C) where the model gives C logits.
            calibration: the fraction of the examples held out to calibrate on (the same ones each time), or others, as
                `(x_cal, y_cal)` or a Dataset or DataLoader, which the model should never have seen: p-values are valid
                only then. With fewer than 1 / false_alarm - 1 of them nothing can look foreign.
            keep: "memory": copies of all examples. "source": they stay where they are, in an array (`np.memmap` too) or
                a Dataset with a length and `__getitem__` (also of Hugging Face), and are read by their index when they
                are needed; labels, features and digests are kept. They must stay as they are: one that has changed is
                a ValueError when it is read. `save` keeps the digests alone, and `load` takes `source=`, what was given
                here as `x`. "auto": "source" where copies would take more than `memory_budget`, and more than what is
                given takes in memory, if that has an index; else "memory".
            feature_file: where features beyond `memory_budget` are kept as float16 (2 N D bytes, logged before they
                are written; ".0", ".1" and so on are added for several layers); None: computed again when needed.
            on_progress: called with how many examples are done, and how many there are, layer by layer.

        Raises:
            ValueError or TypeError, before any work is lost, for inputs out of bounds, NaN, wrong shapes or
            labels, a class with fewer examples than neighbours, or a model or layer that cannot be used.
            After a failed fit the defence is unfitted.
        """
        x, y = self._taken(x, y, keep)
        classes = self._count_classes(x)
        given = Examples(x, incoming.labels("y", y, n=len(x), classes=classes, own=True).to(self.device))
        if not _check.is_number(calibration):
            x_cal, y_cal = incoming.calibration(calibration)
            x_cal = self._kept("x_cal", x_cal, shape=tuple(x.shape[1:]))
            y_cal = incoming.labels("y_cal", y_cal, n=len(x_cal), classes=classes, own=True).to(self.device)
            held = Examples(x_cal, y_cal)
        else:
            fraction = _check.number("calibration", calibration, least=0, most=1, above=True)
            given, held = (given.part(which) for which in hold_out(given.y, fraction, seed=0))
        self.check_examples(given.y, classes)
        try:
            self._remember(self._vaccinated(given), classes, feature_file, on_progress)
            self._measure(held)
        except BaseException:
            self.feature_maps = []
            raise
        return self

    def index(self, layer: int = 0) -> Index:
        """Return the search index of one layer, by its place in `layers`: its features of the repertoire."""
        self._require_fit()
        return cast(Index, self.indices[_check.integer("layer", layer, least=0, most=len(self.indices) - 1)])

    def features(self, x: Any) -> list[Tensor]:
        """Return the features `(B, D)` of inputs `x` `(B, *S)`, one tensor per layer (reduced where affine)."""
        with torch.no_grad():
            return self._described(self._inputs(x))[1]

    def sense(self, x: Any) -> Sense:
        """Return how foreign inputs `(B, *S)` look: their mean distance to the nearest examples, each layer in units of
        its calibration mean, summed.
        """
        with torch.no_grad():
            parts = [self._neighbourhood_of(part)[1] for part in self._inputs(x).split(SENSED)]
            return self._sense_of(torch.cat(parts))

    def credibility(self, x: Any) -> Tensor:
        """Return the largest p-value `(B,)` over labels: how well the training data support the answer."""
        return self.p_values(x).amax(1)

    @torch.no_grad()
    def p_values(self, x: Any) -> Tensor:
        """Return the conformal p-value `(B, C)` of every label: how usual its nonconformity is on calibration data."""
        scores = [self._neighbourhood_of(part)[0] for part in self._inputs(x).split(SENSED)]
        return self._p_values(torch.cat(scores))

    def _p_values(self, scores: Tensor) -> Tensor:
        return sensing.p_values(self.calibration.label_scores, scores)

    def _sense_of(self, far: Tensor) -> Sense:
        """Return what mean distances `(B, L)` to the nearest examples say."""
        p_value = self.calibration.familiarity(far)
        return Sense(distance=self.calibration.distance(far), p_value=p_value, foreign=p_value.le(self.false_alarm))

    def strangeness(self, x: Tensor) -> Tensor:
        """Return the distance `(B,)` that `sense` tells, differentiable in inputs `x` `(B, *S)`."""
        parts = []
        for layer, features in enumerate(self.compared(x)[1]):
            index = self.index(layer)
            with torch.no_grad():
                _, near = index.nearest(features, self.sensed(layer), by_class=False)
            distances = torch.stack([(index.rows(i) - f).norm(dim=1) for i, f in zip(near, features, strict=True)])
            parts.append(self.measured(layer, distances).mean(1))
        return self.calibration.distance(torch.stack(parts, 1))

    @property
    def alarm(self) -> float:
        """The largest strangeness that is not flagged."""
        return self.calibration.threshold(self.false_alarm)

    def tensors(self) -> dict[str, Tensor]:
        """Return repertoire and calibration, and features of a few examples, by which another model is told."""
        probes = self.repertoire.inputs(slice(PROBES))
        heard = self._known(probes)
        x = self.repertoire.x
        return {
            **({} if isinstance(x, Tensor) else {"digests": x.origin.complete()}),
            **self.repertoire.tensors(),
            **({"cells": self.repertoire.cells} if len(self.repertoire.cells) else {}),
            **{f"held.{name}": tensor for name, tensor in self.held.tensors().items()},
            **{f"calibration.{name}": buffer for name, buffer in self.calibration.named_buffers()},
            **{f"probe.{i}": probe for i, probe in enumerate(self.features(probes))},
            **({} if heard is None else {"probe.known": heard}),
        }

    def elsewhere(self) -> dict[str, Any]:
        """Return what the source of the examples is, if they stay there: for `load(..., source=)`."""
        x = self.repertoire.x
        return {} if isinstance(x, Tensor) else {"source": x.origin.record()}

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        *,
        source: Any = None,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Take back what `tensors` gave; features are computed again, or read.

        `source`: what `fit` took as `x`, where examples stayed there. `feature_file` and `on_progress` as in `fit`: a
        file that `fit` wrote is opened, where features exceed the budget again, and nothing in it is computed.
        ValueError for a model with other weights, or a source of other examples.
        """
        given, held = saved(tensors, source, bounds=self.bounds)
        x, y = given.x, tensors["y"]
        if (classes := self._count_classes(x)) != self.classes:
            raise ValueError(f"model must give {self.classes} logits, as when this was saved, got {classes}")
        self._remember(given, classes, feature_file, on_progress)
        probes = given.inputs(slice(PROBES))
        again = "load the weights that the defence was fitted with"
        for i, (name, found) in enumerate(zip(self.layers, self.features(probes), strict=True)):
            probe = tensors[f"probe.{i}"]
            # Format 1 kept features as they are before the metric.
            if not _alike(found, probe) and not _alike(found, self.feature_maps[i].finished(probe.clone())):
                raise ValueError(f"model gives other features at layer {name!r} than when this was saved: {again}")
        heard = self._known(probes)
        if heard is not None and not torch.allclose(heard, tensors["probe.known"], atol=1e-3):
            raise ValueError(f"model, which has a voice, gives other logits than when this was saved: {again}")
        prefix = "calibration."
        kept = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.calibration = Calibration(**kept)
        self.held = held
        if len(y) > len(x):
            self._join(tensors["cells"], y[len(x) :])

    def identity(self) -> list[Any]:
        """Return all that answers depend on: kind, settings, layers, the model, and the repertoire if it is fitted."""
        fitted = [*self.repertoire.told(), *self.calibration.buffers()] if self.feature_maps else None
        return [type(self).__qualname__, self.settings(), list(self._layers), self.model, fitted]

    def settings(self) -> dict[str, Any]:
        """Return all keyword arguments that the constructor took, less the machine's memory budget."""
        own = {"false_alarm": self.false_alarm, "metric": self.metric}
        # What was kept of a defence without a vaccine stays valid.
        given = {} if self.vaccine is None else {"vaccine": self.vaccine, "vaccine_share": self.vaccine_share}
        return super().settings() | own | given

    def setting(self, name: str) -> Any:
        """Return the value of a setting; ValueError where none holds for all of the defence."""
        return getattr(self, name) if name in ("vaccine", "vaccine_share") else super().setting(name)

    @abc.abstractmethod
    def _vaccinated(self, given: Examples) -> Examples:
        """Return training examples, and those that a `vaccine` adds to them."""

    @property
    def counted(self) -> int | None:
        """How many neighbours over all classes vote; None where each class has its own."""
        return None

    @abc.abstractmethod
    def sensed(self, layer: int) -> int:
        """Return how many neighbours over all classes sensing looks at in a layer, by its place in `layers`."""

    def measured(self, layer: int, distances: Tensor) -> Tensor:
        """Return distances of the index of a layer as sensing measures them."""
        return distances

    @torch.no_grad()
    def members(self, layer: int, index: Tensor) -> Tensor:
        """Return the cells `(*, *S')` of repertoire examples `index` `(*)`, as one layer's maturation begins with them.

        Where stored features are the cells themselves, nothing is computed.
        """
        if self.space is not None and self.feature_maps[layer].keeps_cells:
            shape = self._cells(self.repertoire.inputs(slice(1))).shape[1:]
            return self.index(layer).rows(index).reshape(*index.shape, *shape)
        examples, place = index.flatten().unique(return_inverse=True)
        n = int((examples < len(self.repertoire.x)).sum())
        old, new = self.repertoire.inputs(examples[:n]), self.repertoire.cells[examples[n:] - len(self.repertoire.x)]
        cells = torch.cat([*([self._cells(old)] if n else []), *([new] if len(new) else [])])
        found: Tensor = cells[place].unflatten(0, index.shape)
        return found

    def cell_limits(self) -> _check.Bounds:
        """Return the valid range of cells: of inputs, or in another space the repertoire's range per channel."""
        return self.bounds if self.space is None else self._cell_range

    def compared(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the cells `(B, *S')` of inputs and what is compared of them, `(B, D)` per layer, differentiable in x.

        ValueError for inputs of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return self._described(x)

    def heard(self, votes: Tensor, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)` of a vote with all else that counts for inputs `x`, differentiable."""
        return votes

    @abc.abstractmethod
    def _least_per_class(self) -> int: ...

    @abc.abstractmethod
    def _least_in_all(self) -> int: ...

    @abc.abstractmethod
    def _neighbourhood_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return every label's nonconformity `(B, C)` over all layers, and the mean distances `(B, L)` to the nearest.

        For checked inputs `(B, *S)`, at most `SENSED`.
        """

    def check_examples(self, y: Tensor, classes: int) -> None:
        """Raise ValueError where a class, or all, of the labels `y` `(N,)` has fewer examples than are looked at."""
        check_classes(y, classes, self._least_per_class())
        if len(y) < self._least_in_all():
            raise ValueError(f"neighbours={self._least_in_all()} is more than the {len(y)} examples of the repertoire")

    def _measure(self, held: Examples) -> None:
        """Calibrate on held-out examples, which are kept: where the repertoire changes they are scored again."""
        n = len(held)
        said = f"calibrating on {n:,} examples", "their neighbours are looked for; a smaller calibration takes less"
        parts = told(held.parts(SENSED), math.ceil(n / SENSED), *said)
        found, own = [], []
        for part in parts:
            found.append(self._neighbourhood_of(part))
            if (labels := self._own_labels(part)) is not None:
                own.append(labels)
        scores, far = (torch.cat(column) for column in zip(*found, strict=True))
        of_own = scores.gather(1, torch.cat(own)[:, None])[:, 0] if own else None
        self.held = held
        self.calibration = Calibration.scored(scores.gather(1, held.y[:, None])[:, 0], far, of_own)

    def calibrate(self, x: Tensor, y: Tensor) -> None:
        """Calibrate what is sensed on other examples `x` `(n, *S)`, `y` `(n,)`; the repertoire stays."""
        with torch.no_grad():
            x = self._inputs(x).clone()
            y = incoming.labels("y", y, n=len(x), classes=self.classes, own=True).to(self.device)
            self._measure(Examples(x, y))

    def fitted_by(self) -> dict[str, Any]:
        """Return the settings that what is fitted depends on: with others alike it may be adopted."""
        own = {name: getattr(self, name) for name in _FITTED}
        return own | {"bounds": self.bounds.pairs()}

    def adopt(self, other: Self) -> None:
        """Share what `other` was fitted to; ValueError where these settings need another fit, or more examples."""
        self.classes = other.classes
        if other.feature_maps:
            for name in _FITTED:
                if (new := getattr(self, name)) != (old := getattr(other, name)):
                    raise ValueError(f"{name} must stay {old!r}, which this was fitted with, got {new!r}: fit another")
            self.check_examples(other.repertoire.y, other.classes)
        self.memory_budget = other.memory_budget
        for name in ("repertoire", "calibration", "held", "indices", "_sealed"):
            if name in other._modules:
                setattr(self, name, other._modules[name])
        for name in ("shape", "feature_maps", "_witness", "_cell_range"):
            if name in other.__dict__:
                setattr(self, name, other.__dict__[name])

    def _known(self, x: Tensor) -> Tensor | None:
        """Return what the model itself answers to inputs `(B, *S)`, probabilities `(B, C)`, if that counts."""
        return None

    def _own_labels(self, x: Tensor) -> Tensor | None:
        """Return the labels `(B,)` that the model itself gives inputs `(B, *S)`, if sensing asks how usual they are."""
        return None

    def _described(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the cells `(B, *S')` of antigens `(B, *S)` and their features `(B, D)` at every layer, in one pass."""
        return described(self.model, self.space, self.feature_maps, x)

    def _examined(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the same of examples, which no defence inside of this one changes on their way."""
        return described(models.inside(self.model), self.space, self.feature_maps, x)

    def _cells(self, x: Tensor) -> Tensor:
        return described(models.inside(self.model), self.space, (), x)[0]

    @torch.no_grad()
    def _testimony(self) -> list[Tensor]:
        """Return what the model, as it is now, gives for the first examples wherever that counts."""
        x = self.repertoire.inputs(slice(PROBES))
        heard = self._known(x)
        return witnessed(models.inside(self.model), self._layers, x) + ([] if heard is None else [heard])

    def _networks(self) -> list[nn.Module]:
        return [self.model, *(m for layer in self._layers if callable(layer) for m in models.networks_of(layer))]

    def _remember(
        self,
        given: Examples,
        classes: int,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        y = given.y
        probes = given.inputs(slice(0, None, max(1, len(y) // PROBES)))[:PROBES]
        inside = models.inside(self.model)
        plain = build(inside, self._layers, self.space, probes, reduced=inside is models.eager(self.model))
        self.feature_maps = [METRICS[self.metric](feature_map) for feature_map in plain]
        self.classes, self.shape = classes, tuple(given.x.shape[1:])
        self.repertoire = Repertoire(given.x, y)
        order, counts = y.argsort(stable=True), torch.bincount(y, minlength=classes).tolist()
        widths = [features.shape[1] for features in self._examined(probes[:1])[1]]
        fit = [4 * len(y) * width * len(widths) <= self.memory_budget for width in widths]
        keys = [probes.new_empty(len(y), width) if fits else None for fits, width in zip(fit, widths, strict=True)]
        if self.space is not None or any(fit):
            self._pass(order, keys, on_progress)
        indices: list[nn.Module] = []
        for i, found in enumerate(keys):
            if found is not None:
                indices.append(ExactIndex(found, order, counts))
                continue
            file = feature_file if feature_file is None or len(widths) == 1 else f"{feature_file}.{i}"
            rows = _Rows(self, i)
            source = rows if file is None else FeatureFile(file, rows, len(y), on_progress=on_progress)
            indices.append(SignatureIndex(source, order, counts, on_progress=on_progress))
        self.indices = self._sealed = nn.ModuleList(indices)
        self._witness = Witness(self._networks(), self._testimony)

    def _pass(self, order: Tensor, keys: list[Tensor | None], on_progress: Progress | None) -> None:
        """Let every training example pass through the model once: fill what indices compare, and the cells' range."""
        place, ranges, n = order.argsort(), [], len(self.repertoire.x)
        parts, why = list(batches(n)), "each passes once through the model"
        for some in told(parts, len(parts), f"describing {n:,} examples", why):
            cells, features = self._examined(self.repertoire.inputs(some))
            channels = cells.movedim(1, 0).flatten(1) if cells.ndim > 1 else cells[None]
            ranges.append((channels.amin(1), channels.amax(1)))
            for out, found in zip(keys, features, strict=True):
                if out is not None:
                    out[place[some]] = found
            if on_progress is not None:
                on_progress(some.stop, len(order))
        low, high = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        self._cell_range = _check.Bounds(tuple(low.amin(0).tolist()), tuple(high.amax(0).tolist()))

    def _join(self, cells: Tensor, labels: Tensor) -> None:
        """Let `cells` `(M, *S')` join the training examples, in place of those that joined before."""
        n, m = len(self.repertoire.x), len(cells)
        self.repertoire = self.repertoire.joined(cells, labels)
        if not m:
            self.indices = self._sealed
            return
        added = [feature_map.chunked(cells) for feature_map in self.feature_maps]
        most = 4 * len(added) * max(features.shape[1] for features in added)
        if most * m > self.memory_budget:
            raise ValueError(
                f"memory_budget={self.memory_budget:,} is too small for the features of {m:,} cells, {most * m:,} "
                "bytes: remember fewer cells of each antigen, or give more"
            )
        if m > BESIDE * n and most * (2 * n + m) <= self.memory_budget:
            self.indices = nn.ModuleList(self._whole(added))
            return
        parts = zip(self._sealed, added, strict=True)
        self.indices = nn.ModuleList(
            GrownIndex(cast(Index, sealed), n, features, labels, self.classes) for sealed, features in parts
        )

    @torch.no_grad()
    def partition(self, partitions: int, on: Callable[[Sequence[ExactIndex]], Parts] = Here) -> Self:
        """Let the search be done in so many parts from now on, with the same answers; return self.

        `on`: `features.partitioned.Here`, in this process, or `OnRay`, each in an actor of the Ray cluster that is
        connected. `save` does not keep it. ValueError before `fit`, for features that are not kept, for a repertoire
        that cells joined, and for more parts than leave each as many examples of a class as are looked for.
        """
        self.check_current()
        before = self.indices
        self.indices = nn.ModuleList(PartitionedIndex(cast(Kept, index), partitions, on) for index in before)
        try:
            self._neighbourhood_of(self.repertoire.inputs(slice(1)))
        except BaseException:
            self.indices = before
            raise
        self._sealed = self.indices
        return self

    def _whole(self, added: Sequence[Tensor]) -> list[ExactIndex]:
        """Return an index per layer of training examples and of cells, with the features `(M, D)` of these."""
        y = self.repertoire.y
        order, counts = y.argsort(stable=True), torch.bincount(y, minlength=self.classes).tolist()
        keys = [features.new_empty(len(y), features.shape[1]) for features in added]
        self._pass(order, list(keys), None)
        place = order.argsort()[len(self.repertoire.x) :]
        for out, features in zip(keys, added, strict=True):
            out[place] = features
        return [ExactIndex(out, order, counts) for out in keys]

    def _fitted_on(self) -> str:
        if not self.feature_maps:
            return "not fitted"
        joined = f", hardened by {m:,} cells" if (m := len(self.repertoire.cells)) else ""
        return f"fitted on {len(self.repertoire.x):,} examples of {self.classes} classes{joined}"

    def _require_fit(self) -> None:
        if not self.feature_maps:
            name = type(self).__name__
            raise ValueError(f"this {name} is not fitted: call {name.lower()}.fit(x, y) with the training set first")

    def check_current(self) -> None:
        """Raise ValueError unless the defence is fitted, and its model still is the one it was fitted with."""
        self._require_fit()
        if not self._witness.still(self._networks(), self._testimony):
            raise ValueError(
                "model's weights have changed since this defence was fitted (training went on, or others were loaded): "
                "its examples were described by the old ones. Call fit again, or load the old weights"
            )

    def _inputs(self, x: Any, name: str = "x") -> Tensor:
        """Return checked inputs on the defence's device."""
        self.check_current()
        checked = incoming.inputs(name, x, bounds=self.bounds, shape=self.shape).to(self.device)
        if not len(checked):
            raise ValueError(f"{name} must hold at least one input, got shape {tuple(checked.shape)}")
        return checked

    def _kept(self, name: str, x: Any, *, shape: tuple[int, ...] | None = None, fitted: bool = False) -> Tensor:
        """Return a checked copy of examples on the defence's device."""
        kept = incoming.inputs(name, x, bounds=self.bounds, shape=shape, own=True, fitted=fitted)
        if not len(kept):
            raise ValueError(f"{name} must hold at least one example, got shape {tuple(kept.shape)}")
        return kept.to(self.device)

    def _taken(self, x: Any, y: Any, keep: str) -> tuple[Tensor | indexed.Indexed, Any]:
        """Return what `fit` is given: inputs, copied or where they are, and labels that are not checked yet."""
        keep = _check.choice("keep", keep, ("auto", "memory", "source"))
        if keep == "source" or (keep == "auto" and indexed.outgrows(x, self.memory_budget)):
            return indexed.opened(x, y, bounds=self.bounds)
        x, y = incoming.examples(x, y)
        return self._kept("x", x, fitted=True), y

    def _count_classes(self, x: Tensor | indexed.Indexed) -> int:
        """Return how many classes the model tells apart, judged by its logits of a few inputs."""
        for probe in (x[:2], x[:: max(1, len(x) // PROBES)][:PROBES]):
            try:
                out = models.logits(self.model, probe)
            except Exception as error:
                raise ValueError(f"model fails on inputs of shape {tuple(probe.shape)}: {error}") from error
        models.warn_of_probabilities(out)
        return int(out.shape[1])


class _Rows:
    """What an index compares of the examples `(n,)` of a defence's repertoire at one layer, computed when asked."""

    def __init__(self, defence: NeighbourDefence, layer: int) -> None:
        self._defence, self._layer = defence, layer

    def __call__(self, examples: Tensor) -> Tensor:
        defence = self._defence
        return defence._examined(defence.repertoire.inputs(examples))[1][self._layer]


def _alike(found: Tensor, stored: Tensor) -> bool:
    """Return whether features `(n, D)` have the same lengths and pairwise distances: every affine root keeps them."""
    a, b = (torch.cat([torch.linalg.vector_norm(f, dim=1), torch.pdist(f)]) for f in (found, stored))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * b.mean().item())
