"""RAILS: a classifier that answers through an adaptive immune response."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from immunonet import _check, attacks, incoming
from immunonet.defences.answers import Answer
from immunonet.defences.base import Made
from immunonet.defences.maturing import MaturingDefence
from immunonet.defences.neighbours import SENSED
from immunonet.defences.repertoire import Examples
from immunonet.defences.vaccine import vaccinated
from immunonet.features.maps import LogitsMap
from immunonet.features.names import Layer
from immunonet.features.search import Progress
from immunonet.features.witness import Witness
from immunonet.immune.consensus import decided
from immunonet.immune.settings import Maturation, per_layer, preset
from immunonet.immune.spared import among
from immunonet.memory.entries import sources_of
from immunonet.memory.store import Memory
from immunonet.response import ImmuneResponse, Trace


class RAILS(MaturingDefence):
    """Robust Adversarial Immune-inspired Learning System (Wang et al., arXiv 2107.02842) around a classifier.

    Args:
        model: any classifier, inputs `(B, *S)` to logits `(B, C)`.
        layers: where affinity is measured: a submodule's dotted name ("block2", or "block2:4" for its output averaged
            over the fields of a 4 x 4 grid), "input", a callable that maps inputs to features, or a list of these,
            over which votes are averaged.
        maturation: one `Maturation`, or one per layer; None: the defaults.
        space: None if cells are inputs, or the name of the layer whose outputs they are; it may be the layer itself.
        bounds: valid range of inputs, `(low, high)` or one pair per channel or feature; checked on every call.
        metric: "euclidean" or "cosine" distance of features, wherever affinity is measured.
        cell_bounds: the same for cells; None: `bounds`, or in another space the repertoire's range per channel.
        false_alarm: share of clean inputs that may be flagged foreign, in (0, 1].
        memory_budget: bytes that the features of the repertoire, and a batch of populations, may take; "auto": a
            quarter of the machine's memory. It is the machine's, so that `save` does not keep it.
        shared_noise: whether the antigens of a call share random numbers (faster); False: each has its own.
        seed: of every response without one; None: fresh randomness each time.
        memory: a `Memory`, or its folder, that antigens near one of its trusted entries are answered from; None: none.
            Nothing is written to it but by `memory.remember`. It is the machine's, so that `save` does not keep it.
        voice: weight of the model's own softmax in the consensus, in [0, 1); the plasma cells' shares have the rest.
            What a network that is robust by itself knows is then not lost. Near 1 the answer is only the model's; at
            0 it is not asked.
        innate: p-value in (0, 1) above which the model's own label is the answer, so that nothing evolves: how usual
            it is among the model's labels of calibration examples that so many of the nearest examples carry another.
            With fewer than 1 / innate - 1 of these the model answers everything. None: all antigens get an adaptive
            response.
        vaccine: radius in linf, > 0; attacked copies of training examples, made by PGD on the model when this is
            fitted, stand in the repertoire under their own labels. Attacked antigens look less foreign then. None:
            clean examples alone.
        vaccine_share: share of the training examples, in (0, 1], of which there is such a copy.

    Raises:
        ValueError or TypeError that names the argument.
    """

    kind, title = "rails", "RAILS"
    randomised = True
    optimizes = True
    words: ClassVar[Mapping[str, dict[str, Any]]] = {
        "paper": {"preset": "paper"},
        "authors": {"preset": "authors-mnist"},
        "authors-cifar10": {"preset": "authors-cifar10"},
    }

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        maturation: Maturation | Sequence[Maturation] | None = None,
        space: str | None = None,
        bounds: Any = (0.0, 1.0),
        cell_bounds: Any = None,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        false_alarm: float = 0.05,
        memory_budget: int | Literal["auto"] = "auto",
        shared_noise: bool = True,
        seed: int | None = None,
        voice: float = 0.0,
        memory: Memory | str | Path | None = None,
        innate: float | None = None,
        vaccine: float | None = None,
        vaccine_share: float = 1.0,
    ) -> None:
        shared: dict[str, Any] = {"metric": metric, "bounds": bounds, "false_alarm": false_alarm}
        shared |= {"vaccine": vaccine, "vaccine_share": vaccine_share}
        super().__init__(model, layers, space=space, memory_budget=memory_budget, **shared)
        self.maturations = per_layer(maturation, len(self._layers))
        self.cell_bounds = None if cell_bounds is None else incoming.bounds("cell_bounds", cell_bounds)
        self.shared_noise = _check.boolean("shared_noise", shared_noise)
        self.seed = _check.seed("seed", seed)
        self.voice = _check.number("voice", voice, least=0, most=1, below=True)
        between = functools.partial(_check.number, least=0, most=1, above=True, below=True)
        self.innate = None if innate is None else between("innate", innate)
        self._have(memory)
        self._told = False

    def respond(
        self,
        x: Any,
        seed: int | None = None,
        batch_size: int | None = None,
        trace: bool = False,
        source: str | Sequence[str] | None = None,
    ) -> ImmuneResponse:
        """Return the immune response to antigens `x` `(B, *S)` within bounds.

        `seed` overrides the instance's; `batch_size` antigens mature at once (None: as many as suit the
        caches); `trace` also returns the learning curve of every layer, so that no answer spares the response;
        `source`: who asks, one name or one per antigen, under which a memory remembers the response. All cells of the
        response are kept, (0.25 T)|S| floats per antigen: `predict` is lighter.
        """
        antigens = self._inputs(x)
        said = None if source is None else tuple(sources_of(source, len(antigens)))
        found = ImmuneResponse.cat(
            [found for found, _ in self._answers(x, seed, batch_size, keep_cells=True, trace=trace)]
        )
        return dataclasses.replace(found, antigens=antigens.clone(), source=said)

    def explain(self, x: Any, seed: int | None = None, *, names: Sequence[str] | None = None) -> list[str]:
        """Return in words what answers each of the antigens `(B, *S)`, and why; `names`: one per class."""
        response = self.respond(x, seed)
        return [response.explain(i, names=names) for i in range(len(response.labels))]

    def learning_curves(self, x: Any, seed: int | None = None) -> tuple[Trace, ...]:
        """Return the learning curve of every layer for antigens `x` `(B, *S)`."""
        return self.respond(x, seed, trace=True).trace or ()

    def memory_cells(self, x: Any, seed: int | None = None, *, most: int) -> tuple[Tensor, Tensor]:
        """Return the fittest memory cells of antigens `(B, *S)`, which must be inputs, and their labels `(B, M)`."""
        if self.space is not None:
            raise ValueError(f"space must be None where memory cells are learned from, got {self.space!r}")
        found = self._answers(x, seed, None, keep_cells=True, whole=True)
        memory = ImmuneResponse.cat([response for response, _ in found]).memory
        return memory.x[:, :most], memory.label[:, :most]

    def answer(self, x: Any, seed: int | None = None, batch_size: int | None = None) -> Answer:
        """Return the answer to inputs `(B, *S)`: for n plasma cells and votes v, log((n v + 1) / (n + C)).

        `shares` are v, the consensus. Where votes tie, the label that is said is put first by about a millionth.
        `seed` and `batch_size` as in `respond`. An innate answer is the model's own softmax, and its logarithm.
        """
        return self._answered(list(self._answers(x, seed, batch_size)))[0]

    @torch.no_grad()
    def attend(
        self, x: Any, *, source: str | Sequence[str] = "unknown", seed: int | None = None
    ) -> tuple[Answer, list[str] | None]:
        """Return the answer to antigens `(B, *S)`, and the ids of their entries in the memory, if there is one."""
        if self.memory is None:
            return super().attend(x, source=source, seed=seed)
        x = incoming.tensor("x", x)
        answer, response = self._answered(list(self._answers(x, seed, None, keep_cells=self.memory.keep == "cells")))
        return answer, self.memory.remember(response, x, source=source)

    def _answered(self, found: Sequence[tuple[ImmuneResponse, Tensor]]) -> tuple[Answer, ImmuneResponse]:
        """Return the answer that the responses to batches, with distances `(B, L)`, come to, and all of them as one."""
        joined, far = ImmuneResponse.cat([response for response, _ in found]), torch.cat([far for _, far in found])
        n = sum(settings.sizes(self.classes)[0] for settings in self.maturations)
        own = joined.votes.clamp(min=torch.finfo(joined.votes.dtype).tiny).log()
        logs = torch.where(joined.innate[:, None], own, ((n * joined.votes + 1) / (n + self.classes)).log())
        known = Answer(
            joined.labels, decided(logs, joined.labels), self._sense_of(far), joined.credibility, joined.votes,
            recalled=None if self.memory is None else joined.recalled,
            innate=None if self.innate is None else joined.innate,
        )  # fmt: skip
        return known, joined

    @torch.no_grad()
    def draws(self, x: Any, seeds: Sequence[int], batch_size: int | None = None) -> Tensor:
        """Return labels `(R, B)` int64 of inputs `(B, *S)` under R seeds: the rows are those of `predict(x, seed)`.

        What does not depend on a seed is done once for all of them: flocking, and bringing clones near.
        """
        if type(self).answer is not RAILS.answer or type(self).predict is not RAILS.predict:
            return super().draws(x, seeds)
        seeds = self._seeds(seeds)
        x, spared, _ = self._met(x)
        labels = torch.cat(
            [
                torch.stack([self._mature(antigens, seed)[0].labels for seed in seeds])
                for antigens in self._flocked(x, batch_size)
            ],
            dim=1,
        )
        return labels if spared is None else among(spared.labels.expand(len(seeds), -1).T, labels.T, spared.hit).T

    @torch.no_grad()
    def support(self, x: Any) -> Tensor:
        """Return the p-value `(B,)` of the label that the model itself gives inputs `(B, *S)`, where `innate` is set.

        Above `innate` that label is the answer. ValueError without it.
        """
        x = self._inputs(x)
        scores = torch.cat([self._neighbourhood_of(part)[0] for part in x.split(SENSED)])
        return self.calibration.support(scores, LogitsMap(self.model).chunked(x).argmax(1))

    @torch.no_grad()
    def naive(self, x: Any, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Return the naive B cells of `x` `(B, *S)` at one layer: repertoire indices and distances, `(B, C, K)`."""
        index = self.index(layer)
        features = self.features(x)[layer]
        distances, found = index.nearest(features, self.maturations[layer].neighbours)
        return found, distances

    def surrogates(self) -> Mapping[str, nn.Module]:
        """Return the response unrolled, a vote of clones brought near the antigen, and the votes of neighbours.

        With `innate`, also that vote behind the gate, and the model where its label is credible.
        """
        own: dict[str, Callable[[], nn.Module]] = {
            "unrolled": lambda: attacks.Unrolled(self),
            "soft-clones": lambda: attacks.SoftClones(self),
        }
        if self.innate is not None:
            own |= {"gated": lambda: attacks.Gated(self), "credible": lambda: attacks.Credible(self)}
        return Made(own | attacks.neighbour_votes(self))

    def light(self) -> RAILS:
        """Return a twin with at most 200 cells and 3 generations."""
        return self.with_settings(
            maturation=[
                dataclasses.replace(m, population=min(m.population, 200), generations=min(m.generations, 3))
                for m in self.maturations
            ]
        )

    def ablations(self) -> Mapping[str, RAILS]:
        """Return RAILS without mutation and, where cells evolve, without crossover, selection, or any generation."""
        changes: dict[str, dict[str, Any]] = {"mutation": {"mutation_rate": 0.0}}
        if any(m.generations for m in self.maturations):
            changes |= {
                "crossover": {"crossover": None},
                "selection": {"temperature": 1e9},  # every cell is as likely a parent as any other
                "generations": {"generations": 0},
            }
        return {
            part: self.with_settings(maturation=[dataclasses.replace(m, **change) for m in self.maturations])
            for part, change in changes.items()
        }

    def stealthy(self, surrogate: nn.Module) -> nn.Module:
        """Return a surrogate under the condition that inputs do not look foreign."""
        return attacks.Stealthy(surrogate, self)

    def sensed(self, layer: int) -> int:
        """Return K, how many neighbours over all classes sensing looks at in a layer."""
        return self.maturations[layer].neighbours

    def heard(self, votes: Tensor, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)` mixed with the model's own for inputs `x` `(B, *S)`, if it has a voice."""
        if not self.voice:
            return votes
        known = LogitsMap(self.model)(x).log_softmax(1)
        return torch.logaddexp(votes + math.log1p(-self.voice), known + math.log(self.voice))

    @torch.no_grad()
    def _own_labels(self, x: Tensor) -> Tensor | None:
        return None if self.innate is None else LogitsMap(self.model).chunked(x).argmax(1)

    def adopt(self, other: Self) -> None:
        """Share what `other` was fitted to, and score the model's own labels of its calibration examples if they count.

        ValueError as for other kinds, and where these examples were not kept.
        """
        super().adopt(other)
        if not self.feature_maps:
            return
        if bool(self.voice or self.innate) != bool(other.voice or other.innate):
            other.check_current()
            self._witness = Witness(self._networks(), self._testimony)
        known = self.calibration.own_scores is not None
        if known and self.innate is None:
            self.calibration = self.calibration.without_own()
        elif not known and self.innate is not None:
            self._check_held()
            with torch.no_grad():
                self._measure(self.held)

    def _vaccinated(self, given: Examples) -> Examples:
        return vaccinated(self, given)

    def cell_limits(self) -> _check.Bounds:
        """Return the valid range of cells."""
        return self.cell_bounds or super().cell_limits()

    def _remember(
        self,
        given: Examples,
        classes: int,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        first = given.inputs(slice(1))
        cells = self._cells(first)
        if self.space is None or self.cell_bounds is not None:
            self.cell_limits().tensors(cells, cells.shape[1:], name="cell_bounds")
        self.classes, self._space, self._told = classes, None, False
        if 4 * (values := self._population_values(first)) > self.memory_budget:
            raise ValueError(
                f"memory_budget={self.memory_budget:,} is too small for one antigen: "
                f"its population takes {4 * values:,} bytes"
            )
        super()._remember(given, classes, feature_file, on_progress)

    def extra_repr(self) -> str:
        """Return layers, settings that differ from their defaults, and what it is fitted on, in words."""
        own = [maturation.changes() for maturation in self.maturations]
        parts = [
            f"layers={list(self.layers)}",
            "maturation=" + (own[0] if len(set(own)) == 1 else f"[{', '.join(own)}]"),
            *([f"space={self.space!r}"] if self.space is not None else []),
            *([f"metric={self.metric!r}"] if self.metric != "euclidean" else []),
            *([f"voice={self.voice:g}"] if self.voice else []),
            *([f"innate={self.innate:g}"] if self.innate is not None else []),
            *([f"vaccine={self.vaccine:.3g}"] if self.vaccine is not None else []),
            *([f"memory={self.memory.where!r}"] if self.memory is not None else []),
            f"seed={self.seed}",
            self._fitted_on(),
        ]
        return ", ".join(parts)

    def _least_per_class(self) -> int:
        return max(m.neighbours for m in self.maturations)

    def _least_in_all(self) -> int:
        return 1

    def settings(self) -> dict[str, Any]:
        """Return all keyword arguments that the constructor took, less the machine's memory budget."""
        return super().settings() | {
            "maturation": [dataclasses.asdict(m) for m in self.maturations],
            "space": self.space,
            "cell_bounds": None if self.cell_bounds is None else self.cell_bounds.pairs(),
            "shared_noise": self.shared_noise,
            "seed": self.seed,
            "voice": self.voice,
            # What was kept of a RAILS without it stays valid.
            **({} if self.innate is None else {"innate": self.innate}),
        }

    def setting(self, name: str) -> Any:
        """Return the value of a setting, one of `Maturation` among them; ValueError if it differs between layers."""
        if name == "innate":
            return self.innate
        if not hasattr(self.maturations[0], name):
            return super().setting(name)
        first, *others = values = [getattr(maturation, name) for maturation in self.maturations]
        if any(other != first for other in others):
            raise ValueError(f"{name} differs between layers, got {values}")
        return first

    @property
    def effort(self) -> float:
        """Roughly what an answer takes: its cells in all generations, by the thousand."""
        return 1 + sum(m.population * (m.generations + 1) for m in self.maturations) / 1000

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the settings: the constructor's, those of `Maturation`, its preset, and `hidden`."""
        matured = [field.name for field in dataclasses.fields(Maturation)]
        return [*dict.fromkeys([*super().options(), *matured]), "preset", "hidden"]

    @classmethod
    def made(cls, model: nn.Module, layers: Sequence[Layer], settings: Mapping[str, Any]) -> Self:
        """Return a RAILS with these settings, not fitted.

        Those of `Maturation`, on top of its `preset`, may stand beside those of the constructor, or be given as
        `maturation`; `hidden`: cells live in the one layer itself (those of "input" are images anyway).
        """
        cls.check_settings(settings)
        own = dict(settings)
        names = {field.name for field in dataclasses.fields(Maturation)} | {"preset"}
        # A number is the share of memory cells, all else where they are remembered.
        names -= {"memory"} if "memory" in own and not _check.is_number(own["memory"]) else set()
        matured = {name: own.pop(name) for name in names & own.keys()}
        if matured and "maturation" in own:
            raise ValueError(f"maturation must not be given beside its own settings ({', '.join(sorted(matured))})")
        if matured:
            own["maturation"] = preset(matured.pop("preset", "default"), **matured)
        elif own.get("maturation") is not None:
            given = own["maturation"]
            several = given if isinstance(given, list | tuple) else [given] * len(layers)
            # What is neither is refused by the constructor.
            own["maturation"] = [Maturation(**m) if isinstance(m, Mapping) else m for m in several]
        if _check.boolean("hidden", own.pop("hidden", False)):
            own |= _hidden(layers, own)
        return cls(model, list(layers), **own)


def _hidden(layers: Sequence[Layer], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the space of a RAILS whose cells live in its one layer."""
    if settings.get("space") is not None or len(layers) != 1 or not isinstance(layers[0], str):
        raise ValueError("hidden needs one layer, the name of a submodule, and no space of its own: cells live in it")
    return {} if layers[0] == "input" else {"space": layers[0]}
