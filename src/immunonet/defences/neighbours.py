"""What defences by nearest neighbours share: fitting, calibration and sensing by the examples they hold."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from immunonet import _check, _progress, incoming
from immunonet._estimates import told
from immunonet.defences.answers import Sense
from immunonet.defences.holding import PROBES, HoldingDefence
from immunonet.defences.repertoire import Calibration, Examples, check_classes, hold_out, saved
from immunonet.features.names import Layer
from immunonet.features.partitioned import Here, PartitionedIndex, Parts
from immunonet.features.search import (
    ExactIndex,
    Kept,
    Progress,
)
from immunonet.immune import sensing

# Inputs whose neighbours are looked for at once where nothing else is done with them.
SENSED = 256
# Settings that what is fitted depends on.
_FITTED = ("metric", "space", "vaccine", "vaccine_share")


class NeighbourDefence(HoldingDefence):
    """A trained classifier behind a vote of nearest training examples. It is fitted before anything is asked.

    The model's weights must stay as they were at `fit`: where they have changed, every call raises a ValueError. Any
    number of threads may ask at once (and read a Dataset whose examples stay there: it must bear that). Copies and
    pickles hold all of it, the model too, but copies share a source; `save` is smaller and outlives versions of Python.
    """

    calibration: Calibration
    held: Examples

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
        super().__init__(model, layers, metric=metric, bounds=bounds, space=space, memory_budget=memory_budget)
        self.false_alarm = _check.number("false_alarm", false_alarm, least=0, most=1, above=True)
        self.vaccine = None if vaccine is None else _check.number("vaccine", vaccine, least=0, above=True)
        self.vaccine_share = _check.number("vaccine_share", vaccine_share, least=0, most=1, above=True)

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
            on_progress: called with how many examples are done, and how many there are, layer by layer; None: a bar
                after two seconds, in terminals and notebooks.

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
            with _progress.shown(on_progress, "fitting") as show:
                self._remember(self._vaccinated(given), classes, feature_file, show)
            self._measure(held)
        except BaseException:
            self.feature_maps = []
            raise
        return self

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

    def _own_labels(self, x: Tensor) -> Tensor | None:
        """Return the labels `(B,)` that the model itself gives inputs `(B, *S)`, if sensing asks how usual they are."""
        return None

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


def _alike(found: Tensor, stored: Tensor) -> bool:
    """Return whether features `(n, D)` have the same lengths and pairwise distances: every affine root keeps them."""
    a, b = (torch.cat([torch.linalg.vector_norm(f, dim=1), torch.pdist(f)]) for f in (found, stored))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * b.mean().item())
