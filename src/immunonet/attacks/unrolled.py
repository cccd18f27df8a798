"""RAILS made differentiable: gradients through flocking, generations and the plasma cells' vote."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import _check
from immunonet.attacks._surrogate import Surrogate, maturing, probe_distances
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.features.maps import FeatureMap
from immunonet.immune import backend, operators
from immunonet.immune.maturation import mutation_range, temperatures
from immunonet.immune.settings import Maturation

# Width of the soft plasma cut. A wider one leaves the defence's own, harder cut standing.
_WIDTH = 0.1
# Values of the populations whose gradient still fits the caches: three times as fast as with ten times as many.
_CACHED = 2**21


class Unrolled(Surrogate):
    """A light RAILS whose answer is differentiable in the antigen, for attacks that know the whole defence.

    Going forward it is the immune response itself with fewer cells and generations, except for the vote. Going
    backward every step has the gradient of its expectation:

    - flocking and expansion: the naive cells and their aligned or recombined clones are constants, their distances to
      the antigen are not;
    - selection: a drawn parent moves as the mean parent under softmax(-d / tau) does (straight-through);
    - crossover: a child moves as the mixture share x first + (1 - share) x second does, and so does the share;
    - mutation: a child moves as it did before its pixels were changed and clipped;
    - plasma cut: sigmoid((q - d) / w) for each cell instead of the fittest 5 %, where q is that quantile of the
      antigen's distances, and w is `width` times the mean, over 100 repertoire examples, of the standard deviation
      of the distances to their naive cells;
    - consensus: the log of the share of each class in the sum of these weights.

    Several layers: the mean of their log-probabilities. Where the defence gives its model a voice, that is mixed in.
    Early stop, pruning, decay and `candidates` are left out.

    `rails`: a fitted RAILS, whose other settings it takes. `generations` >= 0, at most the defence's own run.
    `population`, rounded up to a multiple of classes times its K, at least two for every naive cell. `seed`: of the
    noise, which is the same at every call, in every batch, and for every antigen; `unrolled(x, seed=...)` takes
    another, so that `Eot` can average over several.
    It takes about (4 `generations` + 2) x `population` cells of memory per antigen, and their activations: give an
    attack on it the attribute `batch_size`, as many antigens as fit a processor's caches. Raises ValueError or
    TypeError that names the argument.
    """

    randomised = True

    def __init__(
        self,
        rails: NeighbourDefence,
        *,
        generations: int = 2,
        population: int = 200,
        width: float = _WIDTH,
        seed: int = 0,
    ) -> None:
        maturations = maturing(rails)
        super().__init__(rails)
        self.generations = _check.integer("generations", generations, least=0)
        self.population = _check.integer("population", population)
        self.width = _check.number("width", width, least=0, above=True)
        self.seed = _check.integer("seed", seed, least=0)
        # Two clones of every naive cell: one of them is brought near the antigen.
        self._settings = [
            dataclasses.replace(
                m,
                generations=min(generations, m.generations),
                population=max(population, 2 * rails.classes * m.neighbours),
                candidates=None,
            )
            for m in maturations
        ]
        cell = rails.members(0, torch.zeros(1, dtype=torch.long, device=rails.device)).numel()
        most = max(rails.classes * m.per_class(rails.classes) for m in self._settings)
        self.batch_size = max(1, _CACHED // (cell * most))
        near = probe_distances(rails, [m.neighbours for m in maturations])
        self._widths = [max(width * float(d.flatten(1).std(1).mean()), 1e-12) for d in near]

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        antigens, features = self.defence.compared(x)
        votes = [self._respond(layer, antigens, found, generator) for layer, found in enumerate(features)]
        return self.defence.heard(torch.stack(votes).mean(0).log_softmax(1), x)

    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        return self._respond(layer, antigens, features, torch.Generator().manual_seed(self.seed))

    def _respond(self, layer: int, antigens: Tensor, features: Tensor, generator: torch.Generator) -> Tensor:
        """Return the log of the soft consensus `(B, C)` at one layer."""
        settings, feature_map = self._settings[layer], self.defence.feature_maps[layer]
        cells, naive_distances = self._naive(layer, features)
        size = settings.per_class(self.defence.classes)
        copies = size // cells.shape[2]
        mutation = _Mutation(settings, cells, self.defence.cell_limits(), generator)
        with torch.no_grad():
            naive, goals = cells.flatten(0, 1), antigens.repeat_interleave(cells.shape[1], dim=0)
            near = backend.approach(naive, goals, settings.alignment, settings.recombination)
            cells = operators.clones(naive, near, copies).unflatten(0, cells.shape[:2])
        tau = temperatures(settings, naive_distances)
        cells = mutation(cells)
        distances = _distances(feature_map, cells, features)
        for _ in range(settings.generations):
            cells = mutation(_children(cells, distances, tau, settings, generator))
            distances = _distances(feature_map, cells, features)
        return _consensus(distances, settings, self._widths[layer])

    @torch.no_grad()
    def _naive(self, layer: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return naive cells `(B, C, K, *S)` and their distances `(B, C, K)`."""
        rails = self.defence
        distances, index = rails.index(layer).nearest(features, self._settings[layer].neighbours)
        return rails.members(layer, index), distances


class _Mutation:
    """Mutates populations `(B, C, P, *S)`; backward, cells pass as they are."""

    def __init__(self, settings: Maturation, cells: Tensor, bounds: _check.Bounds, generator: torch.Generator) -> None:
        self._bounds = bounds.tensors(cells, cells.shape[3:])
        self._rate, self._generator = settings.rates[1], generator
        self._amounts = mutation_range(settings, cells, self._bounds)

    def __call__(self, cells: Tensor) -> Tensor:
        with torch.no_grad():
            families = cells.flatten(0, 1)
            least, most = (amount.repeat_interleave(cells.shape[1]) for amount in self._amounts)
            moved = operators.mutate(
                families,
                torch.full_like(least, self._rate),
                least,
                most,
                *self._bounds,
                _uniform(cells, self._generator).flatten(0, 1),
            ).view_as(cells)
        return _straight_through(moved, cells)


def _children(
    cells: Tensor, distances: Tensor, tau: Tensor, settings: Maturation, generator: torch.Generator
) -> Tensor:
    """Return as many children of the cells `(B, C, P, *S)`, by selection and crossover."""
    size = distances.shape[2]
    near = distances.flatten(0, 1)
    with torch.no_grad():
        u = torch.rand(1, distances.shape[1], 2 * size, generator=generator, dtype=torch.float32).to(distances)
        parents = operators.select(
            near, tau.repeat_interleave(distances.shape[1]), u.expand(len(distances), -1, -1).flatten(0, 1)
        )
    weights = torch.softmax(-distances / tau[:, None, None], dim=2)
    mean = torch.einsum("bcp,bcpd->bcd", weights, cells.detach().flatten(3)).unflatten(2, cells.shape[3:])
    rows = torch.arange(len(near), device=near.device)[:, None]
    drawn: Tensor = cells.flatten(0, 1)[rows, parents].unflatten(0, cells.shape[:2])
    drawn = drawn + (mean - mean.detach())[:, :, None]
    if settings.crossover is None:
        return drawn[:, :, :size]
    first, second = drawn.chunk(2, dim=2)
    d1, d2 = near.gather(1, parents).chunk(2, dim=1)
    share = operators.first_parent_share(d1, d2, settings.crossover)
    share = share.view(*distances.shape, *(1,) * (cells.ndim - 3))
    crossed = torch.where(_uniform(cells, generator) < share, first, second)
    return _straight_through(crossed, share * first + (1 - share) * second)


def _distances(feature_map: FeatureMap, cells: Tensor, features: Tensor) -> Tensor:
    """Return feature distances `(B, C, P)` of cells to their antigens' `features` `(B, D)`."""
    found = feature_map.chunked(cells.flatten(0, 2)).unflatten(0, cells.shape[:3])
    distances: Tensor = torch.linalg.vector_norm(found - features[:, None, None], dim=3)
    return distances


def _consensus(distances: Tensor, settings: Maturation, width: float) -> Tensor:
    """Return the log of the soft share `(B, C)` of each class among the plasma cells."""
    n, _ = settings.sizes(distances.shape[1])
    flat = distances.flatten(1)
    nearest = flat.topk(min(n + 1, flat.shape[1]), dim=1, largest=False).values
    cut = nearest[:, -2:].mean(1)
    inside = F.logsigmoid((cut[:, None, None] - distances) / width)
    return inside.logsumexp(2).log_softmax(1)


def _uniform(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Return uniform numbers for a population, the same for each of its antigens."""
    return torch.rand(1, *cells.shape[1:], generator=generator, dtype=torch.float32).to(cells).expand_as(cells)


def _straight_through(value: Tensor, guide: Tensor) -> Tensor:
    """Return `value` with the gradient of `guide`."""
    return value.detach() + (guide - guide.detach())
