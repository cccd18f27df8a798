"""Affinity maturation: clones of the naive cells evolve under selection by affinity to the antigen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from immunonet.immune import operators
from immunonet.immune.consensus import consensus, entropy, fittest
from immunonet.immune.noise import Noise
from immunonet.immune.settings import Maturation
from immunonet.response import Cells, Trace


@dataclass(frozen=True)
class Naive:
    """Naive B cells of B antigens: `x` `(B, C, K, *S)`; `distances`, `index` `(B, C, K)`, index in the repertoire."""

    x: Tensor
    distances: Tensor
    index: Tensor


@dataclass(frozen=True)
class Matured:
    """The end of a maturation: `votes` `(B, C)`, `best` `(B, C)` the affinity of each class's fittest cell.

    `generations` `(B,)` is the last that ran. Plasma and memory cells come fittest first; none unless they are kept.
    """

    votes: Tensor
    best: Tensor
    generations: Tensor
    plasma: Cells
    memory: Cells


@dataclass
class _Antigens:
    """The antigens that still mature, b of B: every field has one row each."""

    row: Tensor
    cells: Tensor
    origin: Tensor
    distances: Tensor
    temperature: Tensor
    rate: Tensor
    most: Tensor
    least_total: Tensor
    streak: Tensor

    def at(self, mask: Tensor) -> _Antigens:
        """Return the antigens of `mask` `(b,)`."""
        return _Antigens(*(getattr(self, field.name)[mask] for field in fields(self)))


def mature(
    naive: Naive,
    distances_of: Callable[[Tensor, Tensor], Tensor],
    settings: Maturation,
    noise: Noise,
    *,
    bounds: tuple[Tensor, Tensor],
    keep_cells: bool = True,
    trace: bool = False,
) -> tuple[Matured, Trace | None]:
    """Evolve the naive cells of B antigens for up to G generations (design, section 5).

    `distances_of(cells (b, n, *S), rows (b,))` gives feature distances `(b, n)` to the antigens in these rows;
    `bounds`, low and high, broadcast against `*S`.
    """
    classes, k = naive.distances.shape[1:]
    size = settings.per_class(classes)
    n_plasma, _ = settings.sizes(classes)
    living = _expand(naive, settings, size // k)
    ended: list[tuple[Tensor, Matured]] = []
    curve = _Curve(settings.generations + 1, naive.distances) if trace else None

    for generation in range(settings.generations + 1):
        if generation > 0:
            living = _select_and_cross(living, settings, noise)
        living.cells = _mutate(living, settings, noise, bounds)
        living.distances = distances_of(living.cells.flatten(1, 2), living.row).unflatten(1, (classes, size))
        _decay(living, settings)

        labels = fittest(living.distances, n_plasma) // size
        if curve is not None:
            curve.record(generation, living, consensus(labels, classes))
        living.streak = torch.where((labels == labels[:, :1]).all(1), living.streak + 1, 0)
        done = living.streak >= (settings.early_stop or settings.generations + 2)
        if generation == settings.generations:
            done = torch.ones_like(done)
        if bool(done.any()):
            stopped = living.at(done)
            ended.append((stopped.row, _harvest(stopped, settings, generation, keep_cells)))
            if bool(done.all()):
                break
            living = living.at(~done)
    return _in_order(ended), None if curve is None else curve.trace()


def temperatures(settings: Maturation, naive_distances: Tensor) -> Tensor:
    """Return the selection temperature `(B,)` of each antigen; "auto": the spread of its naive affinities."""
    if settings.temperature == "auto":
        return naive_distances.flatten(1).std(1, correction=0).clamp(min=1e-6)
    return naive_distances.new_full((len(naive_distances),), settings.temperature)


def _expand(naive: Naive, settings: Maturation, copies: int) -> _Antigens:
    temperature = temperatures(settings, naive.distances)
    return _Antigens(
        row=torch.arange(len(temperature), device=temperature.device),
        cells=operators.expand(naive.x, copies),
        origin=operators.expand(naive.index, copies),
        distances=operators.expand(naive.distances, copies),
        temperature=temperature,
        rate=torch.full_like(temperature, settings.rates[1]),
        most=torch.full_like(temperature, settings.mutation_range[1]),
        least_total=torch.full_like(temperature, torch.inf),
        streak=torch.zeros_like(temperature, dtype=torch.long),
    )


def _select_and_cross(living: _Antigens, settings: Maturation, noise: Noise) -> _Antigens:
    classes, size = living.distances.shape[1:]
    pairs = 1 if settings.crossover is None else 2
    parents = operators.select(
        living.distances, living.temperature, noise.draw(living.row, (classes, pairs * size))
    ).split(size, dim=2)
    cells = operators.take(living.cells, parents[0])
    origin = living.origin.gather(2, parents[0])
    if settings.crossover is not None:
        d1, d2 = (living.distances.gather(2, parent) for parent in parents)
        share = operators.first_parent_share(d1, d2, settings.crossover)
        u = noise.draw(living.row, tuple(cells.shape[1:]))
        cells = operators.cross(cells, operators.take(living.cells, parents[1]), share, u)
        origin = torch.where(share >= 0.5, origin, living.origin.gather(2, parents[1]))
    return replace(living, cells=cells, origin=origin)


def _mutate(living: _Antigens, settings: Maturation, noise: Noise, bounds: tuple[Tensor, Tensor]) -> Tensor:
    if settings.rates[1] == 0 or settings.mutation_range[1] == 0:
        return living.cells
    u = noise.draw(living.row, tuple(living.cells.shape[1:]))
    return operators.mutate(living.cells, living.rate, settings.mutation_range[0], living.most, *bounds, u)


def _decay(living: _Antigens, settings: Maturation) -> None:
    """Shrink rate and range of the antigens whose population's summed affinity fell below its best."""
    total = living.distances.sum((1, 2))
    factor = torch.where(total > living.least_total, settings.decay, 1.0)
    living.rate = (living.rate * factor).clamp(min=settings.rates[0])
    living.most = (living.most * factor).clamp(min=settings.mutation_range[0])
    living.least_total = torch.minimum(living.least_total, total)


def _harvest(stopped: _Antigens, settings: Maturation, generation: int, keep_cells: bool) -> Matured:
    classes, size = stopped.distances.shape[1:]
    n_plasma, n_memory = settings.sizes(classes)
    top = fittest(stopped.distances, n_plasma + n_memory)
    kept = top if keep_cells else top[:, :0]
    cells = Cells(
        x=operators.take(stopped.cells.flatten(1, 2), kept),
        label=kept // size,
        affinity=-stopped.distances.flatten(1).gather(1, kept),
        origin=stopped.origin.flatten(1).gather(1, kept),
    )
    return Matured(
        votes=consensus(top[:, :n_plasma] // size, classes),
        best=-stopped.distances.amin(2),
        generations=torch.full_like(stopped.row, generation),
        plasma=cells.part(slice(None, n_plasma)),
        memory=cells.part(slice(n_plasma, None)),
    )


def _in_order(ended: list[tuple[Tensor, Matured]]) -> Matured:
    """Return the ends of all antigens as one, in the order of their rows."""
    order = torch.cat([rows for rows, _ in ended]).argsort()
    parts = [matured for _, matured in ended]
    return Matured(
        votes=torch.cat([part.votes for part in parts])[order],
        best=torch.cat([part.best for part in parts])[order],
        generations=torch.cat([part.generations for part in parts])[order],
        plasma=Cells.cat([part.plasma for part in parts]).rows(order),
        memory=Cells.cat([part.memory for part in parts]).rows(order),
    )


class _Curve:
    """Collects the trace; what an antigen that stopped had last is carried on."""

    def __init__(self, length: int, like: Tensor) -> None:
        batch, classes = like.shape[:2]
        self._mean, self._best, self._votes = like.new_zeros(3, length, batch, classes)

    def record(self, generation: int, living: _Antigens, votes: Tensor) -> None:
        self._mean[generation:, living.row] = -living.distances.mean(2)
        self._best[generation:, living.row] = -living.distances.amin(2)
        self._votes[generation:, living.row] = votes

    def trace(self) -> Trace:
        return Trace(self._mean, self._best, self._votes, entropy(self._votes))
