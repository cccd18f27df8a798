"""RAILS: a classifier that answers through an adaptive immune response."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.defence import Defence
from immunonet.features import Layer
from immunonet.immune import sensing
from immunonet.immune.consensus import winner
from immunonet.immune.maturation import Matured, Naive, flocked, mature
from immunonet.immune.noise import Noise, derive, identities
from immunonet.immune.operators import Family
from immunonet.immune.settings import Maturation
from immunonet.maps import FeatureMap, LogitsMap
from immunonet.repertoire import Calibration
from immunonet.response import Cells, ImmuneResponse, Trace
from immunonet.search import Progress

# Values of the populations that mature at once: enough antigens to share a generation's random numbers.
BATCH_VALUES = 2**24


@dataclass(frozen=True)
class _Antigens:
    """A batch of antigens before maturation: all of the response to them that no random number enters.

    Their `cells` `(B, *S')`, the `bounds` of cells, per layer their `features` `(B, D)` and naive cells, what the model
    itself says, `known` `(B, C)`, if it has a voice, and what tells their noise apart, if they do not share it.
    """

    cells: Tensor
    bounds: tuple[Tensor, Tensor]
    features: list[Tensor]
    naive: list[Naive]
    known: Tensor | None
    names: list[str] | None


class RAILS(Defence):
    """Robust Adversarial Immune-inspired Learning System (Wang et al., arXiv 2107.02842) around a classifier.

    Args:
        model: any classifier, inputs `(B, *S)` to logits `(B, C)`.
        layers: where affinity is measured: a submodule's dotted name ("block2", or "block2:4" for its output averaged
            over the fields of a 4 x 4 grid), "input", a callable that maps inputs to features, or a list of these,
            over which votes are averaged.
        maturation: one `Maturation`, or one per layer; None: the defaults.
        space: None if cells are inputs, or the name of the layer whose outputs they are; it may be the layer itself.
        bounds: valid range of inputs, `(low, high)` or one pair per channel or feature; checked on every call.
        cell_bounds: the same for cells; None: `bounds`, or in another space the repertoire's range per channel.
        false_alarm: share of clean inputs that may be flagged foreign, in (0, 1].
        memory_budget: bytes that the features of the repertoire, and a batch of populations, may take; "auto": a
            quarter of the machine's memory. It is the machine's, so that `save` does not keep it.
        shared_noise: whether the antigens of a call share random numbers (faster); False: each has its own.
        seed: of every response without one; None: fresh randomness each time.
        voice: weight of the model's own softmax in the consensus, in [0, 1); the plasma cells' shares have the rest.
            What a network that is robust by itself knows is then not lost. Near 1 the answer is only the model's; at
            0 it is not asked.

    Raises:
        ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        maturation: Maturation | Sequence[Maturation] | None = None,
        space: str | None = None,
        bounds: Any = (0.0, 1.0),
        cell_bounds: Any = None,
        false_alarm: float = 0.05,
        memory_budget: int | Literal["auto"] = "auto",
        shared_noise: bool = True,
        seed: int | None = None,
        voice: float = 0.0,
    ) -> None:
        super().__init__(
            model, layers, bounds=bounds, space=space, false_alarm=false_alarm, memory_budget=memory_budget
        )
        self.maturations = _per_layer(maturation, len(self._layers))
        self.cell_bounds = None if cell_bounds is None else _check.Bounds.of("cell_bounds", cell_bounds)
        self.shared_noise = _check.boolean("shared_noise", shared_noise)
        self.seed = _check.seed("seed", seed)
        self.voice = _check.number("voice", voice, least=0, most=1, below=True)

    def respond(
        self, x: Any, seed: int | None = None, batch_size: int | None = None, trace: bool = False
    ) -> ImmuneResponse:
        """Return the immune response to antigens `x` `(B, *S)` within bounds.

        `seed` overrides the instance's; `batch_size` antigens mature at once (None: as many as suit the
        caches); `trace` also returns the learning curve of every layer. All cells of the response are kept,
        (0.25 T)|S| floats per antigen: `predict` is lighter.
        """
        parts = list(self._answers(x, seed, batch_size, keep_cells=True, trace=trace))
        return _join(parts)

    def predict(self, x: Any, seed: int | None = None, batch_size: int | None = None) -> Tensor:
        """Return labels `(B,)` int64 of inputs `(B, *S)`."""
        return torch.cat([part.labels for part in self._answers(x, seed, batch_size)])

    def predict_proba(self, x: Any, seed: int | None = None, batch_size: int | None = None) -> Tensor:
        """Return the consensus `(B, C)` float32, which sums to 1."""
        return torch.cat([part.votes for part in self._answers(x, seed, batch_size)])

    @torch.no_grad()
    def draws(self, x: Any, seeds: Sequence[int], batch_size: int | None = None) -> Tensor:
        """Return labels `(R, B)` int64 of inputs `(B, *S)` under R seeds: the rows are those of `predict(x, seed)`.

        What does not depend on a seed is done once for all of them: flocking, and bringing clones near.
        """
        seeds = [_check.integer("seeds", seed, least=0, most=2**63 - 1) for seed in seeds]
        if not seeds:
            raise ValueError("seeds must hold at least one seed, got none")
        return torch.cat(
            [
                torch.stack([self._mature(antigens, seed).labels for seed in seeds])
                for antigens in self._flocked(x, batch_size)
            ],
            dim=1,
        )

    def forward(self, x: Any, seed: int | None = None) -> Tensor:
        """Return finite log-probabilities `(B, C)`: log((n v + 1) / (n + C)) for n plasma cells and votes v."""
        votes = self.predict_proba(x, seed)
        n = sum(settings.sizes(self.classes)[0] for settings in self.maturations)
        return ((n * votes + 1) / (n + self.classes)).log()

    @torch.no_grad()
    def naive(self, x: Any, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Return the naive B cells of `x` `(B, *S)` at one layer: repertoire indices and distances, `(B, C, K)`."""
        index = self.index(layer)
        features = self.features(x)[layer]
        distances, found = index.nearest(features, self.maturations[layer].neighbours)
        return found, distances

    @torch.no_grad()
    def members(self, layer: int, index: Tensor) -> Tensor:
        """Return the cells `(*, *S')` of repertoire examples `index` `(*)`, as one layer's maturation begins with them.

        Where the layer is itself the space, its stored features are the cells, and nothing is computed.
        """
        if self.space is not None and self._layers[layer] == self.space:
            shape = self._cells(self.repertoire.x[:1]).shape[1:]
            return self.index(layer).rows(index).reshape(*index.shape, *shape)
        examples, place = index.flatten().unique(return_inverse=True)
        cells: Tensor = self._cells(self.repertoire.x[examples])[place].unflatten(0, index.shape)
        return cells

    @torch.no_grad()
    def familiarity(self, x: Any) -> Tensor:
        """Return the p-value `(B,)` of each input's distance to its nearest examples: foreign ones have a small one."""
        found = []
        for part in self._inputs(x).split(256):
            flocks = [self._flock(features, i) for i, features in enumerate(self._described(part)[1])]
            found.append(self.calibration.familiarity(self._neighbourhood(flocks)[1]))
        return torch.cat(found)

    def _flock(self, features: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.index(layer).nearest(features, self.maturations[layer].neighbours)

    @torch.no_grad()
    def _answers(
        self, x: Any, seed: int | None, batch_size: int | None, keep_cells: bool = False, trace: bool = False
    ) -> Iterator[ImmuneResponse]:
        seed = _check.seed("seed", seed)
        seed = self.seed if seed is None else seed
        seed = secrets.randbits(63) if seed is None else seed
        for antigens in self._flocked(x, batch_size):
            yield self._mature(antigens, seed, keep_cells, trace)

    def _batch_size(self, x: Tensor) -> int:
        values = self._population_values(x)
        return max(1, min(BATCH_VALUES, self.memory_budget // 4) // values)

    def _population_values(self, x: Tensor) -> int:
        population = max(m.per_class(self.classes) for m in self.maturations) * self.classes
        return self._cells(x[:1]).numel() * population

    def _flocked(self, x: Any, batch_size: int | None) -> Iterator[_Antigens]:
        """Yield inputs `(B, *S)` in batches that mature at once, with their naive cells."""
        x = self._inputs(x)
        size = self._batch_size(x) if batch_size is None else _check.integer("batch_size", batch_size)
        names = None if self.shared_noise else identities(x)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            cells, features = self._described(x[part])
            bounds = self._cell_bounds().tensors(cells, cells.shape[1:])
            naive = []
            for i, settings in enumerate(self.maturations):
                distances, index = self._flock(features[i], i)
                naive.append(flocked(self.members(i, index), distances, index, cells, settings, bounds))
            known = self._known(x[part])
            yield _Antigens(cells, bounds, features, naive, known, None if names is None else names[part])

    def _mature(self, antigens: _Antigens, seed: int, keep_cells: bool = False, trace: bool = False) -> ImmuneResponse:
        cells, names = antigens.cells, antigens.names
        ends: list[Matured] = []
        traces: list[Trace] = []
        for i, (feature_map, settings) in enumerate(zip(self.feature_maps, self.maturations, strict=True)):
            seeds = [derive(seed, i)] if names is None else [derive(seed, i, name) for name in names]
            matured, curve = mature(
                antigens.naive[i],
                functools.partial(_to_antigens, feature_map, cells, antigens.features[i]),
                settings,
                Noise(seeds, antigens=len(cells)),
                bounds=antigens.bounds,
                keep_cells=keep_cells,
                trace=trace,
            )
            ends.append(matured)
            if curve is not None:
                traces.append(curve)
        votes = torch.stack([matured.votes for matured in ends]).mean(0)
        if antigens.known is not None:
            votes = (1 - self.voice) * votes + self.voice * antigens.known
        flocks = [(naive.distances, naive.index) for naive in antigens.naive]
        credibility, foreign = self._sense(flocks)
        return ImmuneResponse(
            labels=winner(votes, _fitness(ends, flocks)),
            votes=votes,
            credibility=credibility,
            foreign=foreign,
            generations=torch.stack([matured.generations for matured in ends]).amax(0),
            plasma=Cells.cat([matured.plasma for matured in ends], dim=1),
            memory=Cells.cat([matured.memory for matured in ends], dim=1),
            trace=tuple(traces) if trace else None,
        )

    @torch.no_grad()
    def _known(self, x: Tensor) -> Tensor | None:
        """Return what the model itself says of antigens `x` `(B, *S)`: its softmax `(B, C)`, if it has a voice."""
        return LogitsMap(self.model).chunked(x).softmax(1) if self.voice else None

    def _neighbourhood(self, flocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return nonconformity `(B, C)` summed over layers, and the mean distance to the K nearest `(B, L)`."""
        overall = [sensing.overall_nearest(distances) for distances, _ in flocks]
        counts = torch.stack([sensing.nonconformity(labels, self.classes) for _, labels in overall]).sum(0)
        return counts, torch.stack([near.mean(1) for near, _ in overall], dim=1)

    def _sense(self, flocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        counts, far = self._neighbourhood(flocks)
        credibility = sensing.p_values(self.calibration.label_scores, counts.float()).amax(1)
        return credibility, self.calibration.familiarity(far).le(self.false_alarm)

    def _calibrate(self, x: Tensor, y: Tensor) -> Calibration:
        counts, far = [], []
        for part, labels in zip(x.split(256), y.split(256), strict=True):
            flocks = [self._flock(features, i) for i, features in enumerate(self._described(part)[1])]
            nonconformity, distance = self._neighbourhood(flocks)
            counts.append(nonconformity.gather(1, labels[:, None])[:, 0])
            far.append(distance)
        return Calibration.of(torch.cat(counts), torch.cat(far))

    def _cell_bounds(self) -> _check.Bounds:
        return self.cell_bounds or (self.bounds if self.space is None else self._cell_range)

    def _remember(
        self,
        x: Tensor,
        y: Tensor,
        classes: int,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        cells = self._cells(x[:1])
        if self.space is None or self.cell_bounds is not None:
            self._cell_bounds().tensors(cells, cells.shape[1:], name="cell_bounds")
        self.classes = classes
        if 4 * (values := self._population_values(x)) > self.memory_budget:
            raise ValueError(
                f"memory_budget={self.memory_budget:,} is too small for one antigen: "
                f"its population takes {4 * values:,} bytes"
            )
        super()._remember(x, y, classes, feature_file, on_progress)

    def _keys(self, features: Tensor) -> Tensor:
        return features

    def _least_per_class(self) -> int:
        return max(m.neighbours for m in self.maturations)

    def _least_in_all(self) -> int:
        return 1

    def _settings(self) -> dict[str, Any]:
        return {
            "maturation": [dataclasses.asdict(m) for m in self.maturations],
            "space": self.space,
            "cell_bounds": None if self.cell_bounds is None else self.cell_bounds.pairs(),
            "shared_noise": self.shared_noise,
            "seed": self.seed,
            "voice": self.voice,
        }

    @classmethod
    def _from_settings(cls, model: nn.Module, layers: Any, settings: dict[str, Any]) -> Self:
        maturation = [m if isinstance(m, Maturation) else Maturation(**m) for m in settings["maturation"]]
        return cls(model, layers, **settings | {"maturation": maturation})


def _to_antigens(feature_map: FeatureMap, antigens: Tensor, features: Tensor, cells: Tensor, family: Family) -> Tensor:
    return feature_map.distances(cells, family, antigens, features)


def _per_layer(maturation: Any, layers: int) -> tuple[Maturation, ...]:
    if maturation is None or isinstance(maturation, Maturation):
        return (maturation or Maturation(),) * layers
    if not isinstance(maturation, Sequence) or not all(isinstance(m, Maturation) for m in maturation):
        raise TypeError(f"maturation must be a Maturation or a list with one per layer, got {maturation!r}")
    if len(maturation) != layers:
        raise ValueError(f"maturation must be one, or one per layer ({layers}), got {len(maturation)}")
    return tuple(maturation)


def _fitness(ends: list[Matured], flocks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `(B, C)`, each class's best affinity in units of its layer's naive distances, summed over layers."""
    parts = [
        end.best / distances.flatten(1).mean(1, keepdim=True).clamp(min=1e-12)
        for end, (distances, _) in zip(ends, flocks, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _join(parts: list[ImmuneResponse]) -> ImmuneResponse:
    """Return the responses to consecutive batches as one."""
    first = parts[0]
    return ImmuneResponse(
        labels=torch.cat([part.labels for part in parts]),
        votes=torch.cat([part.votes for part in parts]),
        credibility=torch.cat([part.credibility for part in parts]),
        foreign=torch.cat([part.foreign for part in parts]),
        generations=torch.cat([part.generations for part in parts]),
        plasma=Cells.cat([part.plasma for part in parts]),
        memory=Cells.cat([part.memory for part in parts]),
        trace=first.trace and tuple(Trace.cat(layer) for layer in zip(*(p.trace or () for p in parts), strict=True)),
    )
