"""Affinity maturation: clones of the naive cells evolve under selection by affinity to the antigen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from immunonet.immune import backend, operators
from immunonet.immune.consensus import consensus, cut, entropy, lots
from immunonet.immune.noise import Noise
from immunonet.immune.operators import Family, Mutation
from immunonet.immune.settings import Maturation
from immunonet.response import Cells, Trace, onto


@dataclass(frozen=True)
class Naive:
    """Naive B cells of B antigens: `x` `(B, C, K, *S)`; `distances`, `index` `(B, C, K)`, index in the repertoire.

    `near` `(B, C, K, *S)`: the same cells brought near the antigen, as half of their clones will be.
    """

    x: Tensor
    near: Tensor
    distances: Tensor
    index: Tensor


@dataclass(frozen=True)
class Matured:
    """The end of a maturation: `votes` `(B, C)`, `best` `(B, C)` the affinity of each class's fittest cell.

    `generations` `(B,)` is the last that ran. Plasma and memory cells come fittest first; none unless they are kept.
    Of cells exactly as near as the last plasma cell some are among them and some are not; all share in the votes.
    """

    votes: Tensor
    best: Tensor
    generations: Tensor
    plasma: Cells
    memory: Cells

    def among(self, labels: Tensor, naive_distances: Tensor) -> Matured:
        """Return the same of the classes `labels` `(B, M)` among all C: others have no votes and their naive cells.

        `naive_distances` `(B, C, K)`.
        """
        nearest = -naive_distances.amin(2)
        return dataclasses.replace(
            self,
            votes=onto(torch.zeros_like(nearest), labels, self.votes),
            best=onto(nearest, labels, self.best),
            plasma=self.plasma.named(labels),
            memory=self.memory.named(labels),
        )


@dataclass
class _Population:
    """The cells of B antigens `(B, C, P, *S)`, their origins and distances `(B, C, P)`; families change in place."""

    cells: Tensor
    origin: Tensor
    distances: Tensor


def flocked(
    x: Tensor, distances: Tensor, index: Tensor, antigens: Tensor, settings: Maturation, bounds: tuple[Tensor, Tensor]
) -> Naive:
    """Return the naive cells `x`, within `bounds`, of antigens `(B, *S)`, and bring near the antigen those that evolve.

    No random number enters: what comes out serves every maturation of the same antigens.
    """
    x = x.clamp(*bounds)
    classes, k = distances.shape[1:]
    images = x.ndim == 6
    if settings.per_class(classes) == k or not (
        settings.recombination is not None or (settings.alignment > 0 and images)
    ):
        return Naive(x, x, distances, index)
    near = x.clone()
    # The tangents of naive cells take six times their memory.
    few = max(1, operators.CHUNK_VALUES // x[0, 0].numel())
    for some in zip(
        *(part.split(few) for part in _candidates(distances, settings).nonzero(as_tuple=True)), strict=True
    ):
        near[some] = backend.approach(x[some], antigens[some[0]], settings.alignment, settings.recombination)
    return Naive(x, near, distances, index)


def mature(
    naive: Naive,
    distances_of: Callable[[Tensor, Family], Tensor],
    settings: Maturation,
    noise: Noise,
    *,
    bounds: tuple[Tensor, Tensor],
    keep_cells: bool = True,
    trace: bool = False,
) -> tuple[Matured, Trace | None]:
    """Evolve the naive cells of B antigens for up to G generations, by the formulas of ARCHITECTURE.md.

    `distances_of(cells (B, C, P, *S), family)` gives the feature distances `(F, P)` of some families to their
    antigens. `bounds`, low and high, broadcast against `*S`. Families whose antigen has its answer, and those
    that are pruned, stop evolving and keep their last cells and distances.
    """
    classes, k = naive.distances.shape[1:]
    size = settings.per_class(classes)
    n_plasma, _ = settings.sizes(classes)
    population = _Population(
        operators.clones(naive.x.flatten(0, 1), naive.near.flatten(0, 1), size // k).unflatten(0, (-1, classes)),
        *(part.repeat_interleave(size // k, dim=2) for part in (naive.index, naive.distances)),
    )
    temperature = temperatures(settings, naive.distances)
    least, most = mutation_range(settings, naive.x, bounds)
    mutation = Mutation(
        rate=torch.full_like(temperature, settings.rates[1]),
        least=least,
        most=most,
        low=bounds[0].expand(naive.x.shape[3:]),
        high=bounds[1].expand(naive.x.shape[3:]),
    )
    nearest_yet = torch.full_like(temperature, torch.inf)
    streak = torch.zeros_like(temperature, dtype=torch.long)
    generations = torch.full_like(streak, settings.generations)
    evolving = _candidates(naive.distances, settings)
    curve = _Curve(settings.generations + 1, naive.distances) if trace else None

    for generation in range(settings.generations + 1):
        antigen, label = evolving.nonzero(as_tuple=True)
        family = (antigen, label)
        if generation == 0:
            parents, share = _clones(population, family)
        else:
            u = noise.draw(generation, "select", family, 2 * size)
            parents, share = _parents(population.distances[family], temperature[family[0]], u, settings)
        _breed(population, family, parents, share, mutation, noise, generation)
        population.distances[family] = distances_of(population.cells, family)

        rows = evolving.any(1).nonzero()[:, 0]
        distances = population.distances[rows]
        _decay(mutation, nearest_yet, rows, distances.sum((1, 2)), settings)
        edge, fittest = cut(distances, n_plasma), distances.amin(2)
        if curve is not None:
            curve.record(generation, rows, distances, consensus(distances, n_plasma))
        if settings.prune is not None:
            evolving[rows] &= fittest <= edge * (1 + settings.prune)
        if settings.early_stop is not None:
            streak[rows] = torch.where((fittest <= edge).sum(1) == 1, streak[rows] + 1, 0)
            evolving[rows[streak[rows] >= settings.early_stop]] = False
        ended = rows[~evolving[rows].any(1)]
        generations[ended] = generation
        if len(ended) == len(rows):
            break
    return _harvest(population, generations, settings, keep_cells), None if curve is None else curve.trace()


def temperatures(settings: Maturation, naive_distances: Tensor) -> Tensor:
    """Return the selection temperature `(B,)` of each antigen; "auto": the spread of its naive affinities."""
    if settings.temperature == "auto":
        return naive_distances.flatten(1).std(1, correction=0).clamp(min=1e-6)
    return naive_distances.new_full((len(naive_distances),), settings.temperature)


def mutation_range(settings: Maturation, naive: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the least and most amount `(B,)` of a mutation, in widths of the bounds; `naive` `(B, C, K, *S)`.

    "auto": a quarter and three quarters of the root mean square, over values, of the standard deviation over an
    antigen's naive cells.
    """
    if settings.mutation_range == "auto":
        width = (bounds[1] - bounds[0]).clamp(min=1e-12)
        spread = (naive.flatten(1, 2).var(1, correction=0) / width**2).flatten(1).mean(1).sqrt()
        return 0.25 * spread, 0.75 * spread
    least, most = settings.mutation_range
    return naive.new_full((len(naive),), least), naive.new_full((len(naive),), most)


def _candidates(naive_distances: Tensor, settings: Maturation) -> Tensor:
    """Return whether each class `(B, C)` is one of the nearest few, or as near as the last; their cells evolve."""
    classes = naive_distances.shape[1]
    nearest = naive_distances.amin(2)
    return nearest <= cut(nearest[..., None], settings.evolving(classes))


def populated(naive_distances: Tensor, index: Tensor, settings: Maturation) -> Tensor:
    """Return the classes `(B, M)` that have cells, in order: all C, or the M with the nearest naive cells.

    `naive_distances`, `index` `(B, C, K)`, nearest first. Of classes exactly as near as the last of M, the lot of their
    nearest example decides.
    """
    drawn = lots(index[..., 0]).argsort(dim=1)
    order = naive_distances[..., 0].gather(1, drawn).argsort(dim=1, stable=True)
    return drawn.gather(1, order[:, : settings.populated(naive_distances.shape[1])]).sort(dim=1).values


def _clones(population: _Population, family: Family) -> tuple[Tensor, Tensor]:
    """Return every cell as its own parents: generation 0 mutates the clones of the naive cells."""
    size = population.distances.shape[2]
    own = torch.arange(size, device=family[0].device).repeat(len(family[0]), 2)
    return own, population.distances.new_ones(len(family[0]), size)


def _parents(distances: Tensor, temperature: Tensor, u: Tensor, settings: Maturation) -> tuple[Tensor, Tensor]:
    """Return pairs of selected parents `(F, 2 P)` and the share `(F, P)` of pixels that the first one gives."""
    parents = operators.select(distances, temperature, u)
    if settings.crossover is None:
        return parents, torch.ones_like(distances)
    first, second = distances.gather(1, parents).chunk(2, dim=1)
    return parents, operators.first_parent_share(first, second, settings.crossover)


def _breed(
    population: _Population,
    family: Family,
    parents: Tensor,
    share: Tensor,
    mutation: Mutation,
    noise: Noise,
    generation: int,
) -> None:
    """Replace families by their offspring; a child's origin is that of the parent that gives more pixels."""
    device = share.device
    keys = [noise.keys(generation, use, device) for use in ("cross", "mutate")]
    step = backend.offspring_for(population.cells)
    step(population.cells, family, parents, share, keys[0], keys[1], mutation)
    first, second = population.origin[family].gather(1, parents).chunk(2, dim=1)
    population.origin[family] = torch.where(share >= 0.5, first, second)


def _decay(mutation: Mutation, nearest_yet: Tensor, rows: Tensor, total: Tensor, settings: Maturation) -> None:
    """Shrink rate and range of antigens whose population's summed affinity fell below its best so far."""
    factor = torch.where(total > nearest_yet[rows], settings.decay, 1.0).to(total.dtype)
    mutation.rate[rows] = (mutation.rate[rows] * factor).clamp(min=settings.rates[0])
    mutation.most[rows] = torch.maximum(mutation.most[rows] * factor, mutation.least[rows])
    nearest_yet[rows] = torch.minimum(nearest_yet[rows], total)


def _harvest(population: _Population, generations: Tensor, settings: Maturation, keep_cells: bool) -> Matured:
    classes, size = population.distances.shape[1:]
    n_plasma, n_memory = settings.sizes(classes)
    kept = n_plasma + n_memory if keep_cells else 0
    near, top = population.distances.flatten(1).topk(kept, dim=1, largest=False)
    rows = torch.arange(len(top), device=top.device)[:, None]
    cells = Cells(
        x=population.cells.flatten(1, 2)[rows, top],
        label=top // size,
        affinity=-near,
        origin=population.origin.flatten(1).gather(1, top),
    )
    return Matured(
        votes=consensus(population.distances, n_plasma),
        best=-population.distances.amin(2),
        generations=generations,
        plasma=cells.part(slice(None, n_plasma)),
        memory=cells.part(slice(n_plasma, None)),
    )


class _Curve:
    """Collects the trace; what an antigen that stopped had last is carried on."""

    def __init__(self, length: int, like: Tensor) -> None:
        batch, classes = like.shape[:2]
        self._mean, self._best, self._votes = like.new_zeros(3, length, batch, classes)

    def record(self, generation: int, rows: Tensor, distances: Tensor, votes: Tensor) -> None:
        self._mean[generation:, rows] = -distances.mean(2)
        self._best[generation:, rows] = -distances.amin(2)
        self._votes[generation:, rows] = votes

    def trace(self) -> Trace:
        return Trace(self._mean, self._best, self._votes, entropy(self._votes))
