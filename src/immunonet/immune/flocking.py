"""Flocking: the K training examples of every class that are nearest to an antigen (naive B cells)."""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates beyond K that are ranked again by exact distances: the quadratic expansion of a distance
# loses digits where neighbours are nearly as far from the antigen as each other.
SLACK = 8
# What a distance squared loses in the expansion, at most, as a share of the squared norms.
LOSS = 2**-20
# Values of the candidates' features that are gathered, or distances that are taken, at once.
CHUNK_VALUES = 2**22
# Up to this many times as many keys as candidates, all are ranked.
FEW = 4
# Products of values, of every query with every key, up to which all classes are searched at once, per class: there the
# calls take longer than the distances.
AT_ONCE = 2**17
# Values that are searched group by group, and a group's.
MANY, GROUP = 2**14, 32


def nearest(queries: Tensor, keys: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distances and indices, each `(B, k)`, of the k keys nearest to each query, in order.

    `queries` `(B, D)`; `keys` `(N, D)` with N >= k; `squares` `(N,)` their squared norms.
    """
    m = min(len(keys), k + SLACK)
    if len(keys) <= FEW * m:
        return _among_all(queries, keys, k)
    rough = torch.addmm(squares, queries, keys.T, alpha=-2)
    farthest, candidates = smallest(rough, m)
    distances, index = rank(queries, keys, candidates, k)
    own = torch.linalg.vector_norm(queries, dim=1).square()
    unsure = distances[:, -1].square() > farthest[:, -1] + own - LOSS * (own + squares.max())
    if bool(unsure.any()):
        distances[unsure], index[unsure] = _among_all(queries[unsure], keys, k)
    return distances, index


def exact(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the Euclidean distances `(*, n, N)` of `queries` `(*, n, D)` to `keys` `(*, N, D)`, pair by pair.

    Every distance that decides comes from here: rounded in one way, equal keys are equally near.
    """
    return torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")


def _among_all(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    step = max(1, CHUNK_VALUES // len(keys))
    found = [exact(part, keys).topk(k, dim=1, largest=False) for part in queries.split(step)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def rank(queries: Tensor, keys: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the exact distances and indices, each `(B, k)`, of the nearest of `candidates` `(B, m)`, in order."""
    step = max(1, CHUNK_VALUES // (candidates.shape[1] * keys.shape[1]))
    pairs = zip(queries.split(step), candidates.split(step), strict=True)
    near = torch.cat([exact(q[:, None], keys[c])[:, 0] for q, c in pairs])
    distances, order = near.topk(k, dim=1, largest=False)
    return distances, candidates.gather(1, order)


def smallest(values: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the m smallest of every row of `values` `(B, N)`, in order, and their places, each `(B, m)`.

    Among many values they lie in the m groups of the smallest minima: three times as fast as a search of all.
    """
    n = values.shape[1] - values.shape[1] % GROUP
    if n < max(MANY, GROUP * m):
        return values.topk(m, dim=1, largest=False)
    groups = values[:, :n].unflatten(1, (-1, GROUP))
    chosen = groups.amin(2).topk(m, dim=1, largest=False, sorted=False).indices[..., None]
    some = groups.gather(1, chosen.expand(-1, -1, GROUP)).flatten(1)
    places = (chosen * GROUP + torch.arange(GROUP, device=values.device)).flatten(1)
    rest = torch.arange(n, values.shape[1], device=values.device).expand(len(values), -1)
    found, index = torch.cat([some, values[:, n:]], 1).topk(m, dim=1, largest=False)
    return found, torch.cat([places, rest], 1).gather(1, index)


def flock(queries: Tensor, keys: Tensor, squares: Tensor, counts: list[int], k: int) -> tuple[Tensor, Tensor]:
    """Return distances and key indices, each `(B, C, k)`, of the k nearest keys of every class.

    `keys` `(N, D)` are grouped by class, `counts` (one per class, each at least k) tell the groups' sizes.
    """
    widest = len(queries) * max(counts)
    if widest * keys.shape[1] <= AT_ONCE and widest * len(counts) <= CHUNK_VALUES:
        return _flock_at_once(queries, keys, counts, k)
    distances, indices, start = [], [], 0
    for count in counts:
        part = slice(start, start + count)
        near, index = nearest(queries, keys[part], squares[part], k)
        distances.append(near)
        indices.append(index + start)
        start += count
    return torch.stack(distances, 1), torch.stack(indices, 1)


def _flock_at_once(queries: Tensor, keys: Tensor, counts: list[int], k: int) -> tuple[Tensor, Tensor]:
    """Return what `flock` does, from all distances `(B, C, of the largest class)` at once."""
    sizes = torch.tensor(counts, device=keys.device)
    first = (sizes.cumsum(0) - sizes)[:, None]
    turn = torch.arange(max(counts), device=keys.device)
    own = exact(queries, keys)[:, (first + turn).clamp(max=len(keys) - 1)]
    near, index = own.masked_fill_(turn >= sizes[:, None], torch.inf).topk(k, dim=2, largest=False)
    return near, index + first
