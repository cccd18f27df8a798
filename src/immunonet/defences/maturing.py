"""A batch of antigens on its way from inputs to the response: what spares it, naive cells, maturation, votes."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunonet import _check
from immunonet._estimates import of_many, tell
from immunonet.defences.neighbours import SENSED
from immunonet.defences.remembering import RememberingDefence
from immunonet.features.maps import FeatureMap, LogitsMap
from immunonet.immune import sensing
from immunonet.immune.consensus import lots, winner
from immunonet.immune.maturation import Matured, Naive, flocked, mature, populated
from immunonet.immune.noise import Noise, derive, identities
from immunonet.immune.operators import Family
from immunonet.immune.settings import Maturation
from immunonet.immune.spared import Spared, imprinted, joined, traced
from immunonet.memory.recall import Recalled
from immunonet.response import Cells, ImmuneResponse, Imprint, Trace

# Values of the populations that mature at once: enough antigens to share a generation's random numbers.
BATCH_VALUES = 2**24


@dataclass(frozen=True)
class _Antigens:
    """A batch of antigens before maturation: all of the response to them that no random number enters.

    Their `cells` `(B, *S')`, the `bounds` of cells, per layer their `features` `(B, D)`, their `flocks`, distances and
    examples `(B, C, K)`, and the naive cells of the `M` classes that have cells, `labels` `(B, M)`, or None for all.
    What the model itself says, `known` `(B, C)`, if it has a voice; what tells their noise apart, if they do not
    share it.

    With a memory, `signatures` of all, and those `recalled`, which are not among the B that mature.
    """

    cells: Tensor
    bounds: tuple[Tensor, Tensor]
    features: list[Tensor]
    flocks: list[tuple[Tensor, Tensor]]
    naive: list[Naive]
    labels: list[Tensor | None]
    known: Tensor | None
    names: list[str] | None
    signatures: Tensor | None = None
    recalled: Recalled | None = None


class MaturingDefence(RememberingDefence):
    """A defence by nearest neighbours that are the naive cells of populations, which mature and vote."""

    maturations: tuple[Maturation, ...]
    voice: float
    innate: float | None
    seed: int | None
    shared_noise: bool
    _told: bool

    def _flock(self, features: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.index(layer).nearest(features, self.maturations[layer].neighbours)

    @torch.no_grad()
    def _answers(
        self,
        x: Any,
        seed: int | None,
        batch_size: int | None,
        *,
        keep_cells: bool = False,
        trace: bool = False,
        whole: bool = False,
    ) -> Iterator[tuple[ImmuneResponse, Tensor]]:
        """Yield the responses to batches of antigens, and the mean distances `(B, L)` to their nearest examples.

        `whole`: nothing spares a response, as with `trace`.
        """
        seed = _check.seed("seed", seed)
        seed = self.seed if seed is None else seed
        seed = secrets.randbits(63) if seed is None else seed
        whole = whole or trace
        x, spared, signatures = (self._inputs(x), None, None) if whole else self._met(x)
        batches = self._flocked(x, batch_size, recalling=not whole)
        found = (self._mature(antigens, seed, keep_cells, trace) for antigens in batches)
        if spared is None:
            yield from found
            return
        responses, far = zip(*found, strict=True)
        response = ImmuneResponse.cat(responses)
        found_all, every = joined(spared, response, torch.cat(far))
        if signatures is not None:
            assert response.imprint is not None
            found_all = dataclasses.replace(found_all, imprint=imprinted(spared, signatures, every, response.imprint))
        yield found_all, every

    def _met(self, x: Any) -> tuple[Tensor, Spared | None, Tensor | None]:
        """Return those inputs `(B, *S)` that need an adaptive response, what spares it to others, and all signatures.

        What memory knows is left to it, for a confirmed label says more than the model's.
        """
        x = self._inputs(x)
        if self.innate is None:
            return x, None, None
        logits = LogitsMap(self.model).chunked(x)
        found, signed = [], []
        for part in x.split(SENSED):
            features = self._described(part)[1]
            found.append(self._neighbourhood([self._flock(one, i) for i, one in enumerate(features)]))
            if (signatures := self.signatures(features)) is not None:
                signed.append(signatures)
        scores, far = (torch.cat(column) for column in zip(*found, strict=True))
        labels = logits.argmax(1)
        hit = self.calibration.support(scores, labels) > self.innate
        if self.memory is not None:
            hit &= ~self.memory.recall(torch.cat(signed)).hit
        spared = Spared(
            hit=hit,
            labels=labels[hit],
            votes=logits[hit].softmax(1),
            credibility=self._p_values(scores[hit]).amax(1),
            foreign=self._sense_of(far[hit]).foreign,
            far=far[hit],
        )
        return x[~hit], spared, torch.cat(signed) if signed else None

    def _batch_size(self, x: Tensor) -> int:
        values = self._population_values(x)
        return max(1, min(BATCH_VALUES, self.memory_budget // 4) // values)

    def _population_values(self, x: Tensor) -> int:
        population = max(m.total(self.classes) for m in self.maturations)
        return self._cells(x[:1]).numel() * population

    def _flocked(self, x: Tensor, batch_size: int | None, recalling: bool = True) -> Iterator[_Antigens]:
        """Yield inputs `(B, *S)` in batches that mature at once, less what is `recalling`, with their naive cells."""
        if not len(x):
            yield self._nothing()
            return
        self._tell(x)
        size = self._batch_size(x) if batch_size is None else _check.integer("batch_size", batch_size)
        names = None if self.shared_noise else identities(x)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            antigens, own = x[part], None if names is None else names[part]
            cells, features = self._described(antigens)
            bounds = self.cell_limits().tensors(cells, cells.shape[1:])
            signatures = self.signatures(features)
            recalled = None
            if self.memory is not None and signatures is not None and recalling:
                recalled = self.memory.recall(signatures)
            if recalled is not None and recalled.ids:
                new = ~recalled.hit
                antigens, cells, features = antigens[new], cells[new], [one[new] for one in features]
                own = None if own is None else [name for name, one in zip(own, new.tolist(), strict=True) if one]
            flocks = [self._flock(features[i], i) for i in range(len(self.maturations))] if len(cells) else []
            labels = [self._populated(i, *flock) for i, flock in enumerate(flocks)]
            naive = []
            for i, (settings, some) in enumerate(zip(self.maturations, labels, strict=True) if flocks else ()):
                distances, index = (found if some is None else _of_classes(found, some) for found in flocks[i])
                naive.append(flocked(self.members(i, index), distances, index, cells, settings, bounds))
            known = self._known(antigens) if self.voice else None
            yield _Antigens(cells, bounds, features, flocks, naive, labels, known, own, signatures, recalled)

    def _nothing(self) -> _Antigens:
        """Return a batch of no antigens."""
        cells, features = self._described(self.repertoire.inputs(slice(0, 1)))
        signatures = self.signatures(features)
        none = None if signatures is None else signatures[:0]
        return _Antigens(cells[:0], (cells, cells), [], [], [], [], None, None, none)

    def _tell(self, x: Tensor) -> None:
        """Say once, before the first answers, what those to inputs `(B, *S)` take, if that is long."""
        known, self._told = self._told, True
        if known:
            return
        passes = [settings.total(self.classes) * (settings.generations + 1) for settings in self.maturations]
        seconds = sum(self._timed(x[:1], layer, n * len(x)) for layer, n in enumerate(passes))
        cells = "inputs" if self.space is None else f"outputs of {self.space!r}"
        why = f"cells are {cells}, and {sum(passes):,} of them an antigen pass on to {' and '.join(self.layers)}"
        advice = "; cells in a hidden layer (space=) have a shorter way, fewer cells or generations take less"
        tell(seconds, f"answering {len(x):,} antigens, unless they stop early,", why + advice)

    def _timed(self, x: Tensor, layer: int, passes: int) -> float:
        """Return the seconds of so many cells' passes up to a layer, from a few copies of the input `x` `(1, *S)`."""
        feature_map = self.feature_maps[layer]
        if feature_map.keeps_cells:
            return 0.0
        cell, features = self._described(x)
        family = (torch.zeros(1, dtype=torch.long, device=cell.device),) * 2

        def work(rows: int) -> Tensor:
            cells = cell.expand(rows, *cell.shape[1:]).contiguous()[None, None]
            return feature_map.distances(cells, family, cell, features[layer])

        return of_many(work, passes, most=feature_map.rows)

    def _populated(self, layer: int, distances: Tensor, index: Tensor) -> Tensor | None:
        """Return the classes `(B, M)` that have cells at a layer, of flocks `(B, C, K)`; None: all of them."""
        settings = self.maturations[layer]
        few = settings.populated(self.classes) < self.classes
        return populated(distances, index, settings) if few else None

    def _mature(
        self, antigens: _Antigens, seed: int, keep_cells: bool = False, trace: bool = False
    ) -> tuple[ImmuneResponse, Tensor]:
        """Return the response to a batch, and the mean distances `(B, L)` of its antigens to their nearest examples."""
        some = len(antigens.cells)
        met = self._evolved(antigens, seed, keep_cells, trace) if some else self._none(antigens, keep_cells)
        return met if antigens.signatures is None else self._imprinted(antigens, *met)

    def _evolved(self, antigens: _Antigens, seed: int, keep_cells: bool, trace: bool) -> tuple[ImmuneResponse, Tensor]:
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
            if (labels := antigens.labels[i]) is not None:
                distances = antigens.flocks[i][0]
                matured = matured.among(labels, distances)
                curve = None if curve is None else curve.among(labels, distances)
            ends.append(matured)
            if curve is not None:
                traces.append(curve)
        votes = torch.stack([matured.votes for matured in ends]).mean(0)
        if antigens.known is not None:
            votes = (1 - self.voice) * votes + self.voice * antigens.known
        flocks = antigens.flocks
        scores, far = self._neighbourhood(flocks)
        response = ImmuneResponse(
            labels=winner(votes, _fitness(ends, flocks), functools.partial(self._settle, antigens)),
            votes=votes,
            credibility=self._p_values(scores).amax(1),
            foreign=self._sense_of(far).foreign,
            innate=torch.zeros(len(votes), dtype=torch.bool, device=votes.device),
            recalled=torch.zeros(len(votes), dtype=torch.bool, device=votes.device),
            generations=torch.stack([matured.generations for matured in ends]).amax(0),
            plasma=Cells.cat([matured.plasma for matured in ends], dim=1),
            memory=Cells.cat([matured.memory for matured in ends], dim=1),
            trace=tuple(traces) if trace else None,
        )
        return response, far

    def _none(self, antigens: _Antigens, keep_cells: bool) -> tuple[ImmuneResponse, Tensor]:
        """Return the response to no antigen, in the shape of those to some."""
        made, whole = antigens.cells, torch.zeros(0, dtype=torch.long, device=antigens.cells.device)
        sizes = zip(*(settings.sizes(self.classes) for settings in self.maturations), strict=True)
        plasma, memory = (
            Cells(made.new_zeros(0, n, *made.shape[1:]), whole.reshape(0, n), made.new_zeros(0, n), whole.reshape(0, n))
            for n in (sum(size) if keep_cells else 0 for size in sizes)
        )
        response = ImmuneResponse(
            labels=whole, votes=made.new_zeros(0, self.classes), credibility=made.new_zeros(0), foreign=whole.bool(),
            innate=whole.bool(), recalled=whole.bool(), generations=whole, plasma=plasma, memory=memory,
        )  # fmt: skip
        return response, made.new_zeros(0, len(self.maturations))

    def _imprinted(self, antigens: _Antigens, met: ImmuneResponse, far: Tensor) -> tuple[ImmuneResponse, Tensor]:
        """Return the response with what memory answers among it, and all that memory keeps."""
        signatures, known = antigens.signatures, antigens.recalled
        assert signatures is not None
        assert self._space is not None
        entries: tuple[str | None, ...] = (None,) * len(signatures)
        if known is not None and known.ids:
            entries = traced(known.ids, known.hit)
            met, far = joined(known, met, far)
        return dataclasses.replace(met, imprint=Imprint(signatures, far, entries, self._space.fingerprint)), far

    def _settle(self, antigens: _Antigens, rows: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many examples are at least as near as the nearest naive cells of classes `among`, and lots."""
        counts = drawn = torch.zeros_like(among, dtype=torch.long)
        for layer, (distances, _) in enumerate(antigens.flocks):
            nearest = distances[rows].amin(2).masked_fill(~among, -torch.inf)
            inside, first = self.index(layer).within(antigens.features[layer][rows], nearest.amax(1))
            counts, drawn = counts + inside, drawn + lots(first)
        return counts, drawn

    @torch.no_grad()
    def _known(self, x: Tensor) -> Tensor | None:
        """Return what the model itself says of antigens `x` `(B, *S)`: its softmax `(B, C)`, if that counts."""
        return LogitsMap(self.model).chunked(x).softmax(1) if self.voice or self.innate is not None else None

    def _neighbourhood(self, flocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return nonconformity `(B, C)` summed over layers, and the mean distance to the K nearest `(B, L)`."""
        counts = torch.stack([sensing.nonconformity(distances) for distances, _ in flocks]).sum(0)
        return counts, torch.stack([sensing.remoteness(distances) for distances, _ in flocks], dim=1)

    def _neighbourhood_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._neighbourhood([self._flock(features, i) for i, features in enumerate(self._described(x)[1])])


def _of_classes(flocks: Tensor, labels: Tensor) -> Tensor:
    """Return of flocks `(B, C, K)` those of classes `labels` `(B, M)`, `(B, M, K)`."""
    return flocks.gather(1, labels[..., None].expand(-1, -1, flocks.shape[2]))


def _to_antigens(feature_map: FeatureMap, antigens: Tensor, features: Tensor, cells: Tensor, family: Family) -> Tensor:
    return feature_map.distances(cells, family, antigens, features)


def _fitness(ends: list[Matured], flocks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `(B, C)`, each class's best affinity in units of its layer's naive distances, summed over layers."""
    parts = [
        end.best / distances.flatten(1).mean(1, keepdim=True).clamp(min=1e-12)
        for end, (distances, _) in zip(ends, flocks, strict=True)
    ]
    return torch.stack(parts).sum(0)
