"""Flocking: the K training examples of every class that are nearest to an antigen (naive B cells)."""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates beyond K that are ranked again by exact distances: the quadratic expansion of a distance
# loses digits where neighbours are nearly as far from the antigen as each other.
SLACK = 8
# Values of the candidates' features that are gathered at once.
CHUNK_VALUES = 2**22


def nearest(queries: Tensor, keys: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distances and indices, each `(B, k)`, of the k keys nearest to each query, in order.

    `queries` `(B, D)`; `keys` `(N, D)` with N >= k; `squares` `(N,)` their squared norms.
    """
    m = min(len(keys), k + SLACK)
    rough = torch.addmm(squares, queries, keys.T, alpha=-2)
    candidates = rough.topk(m, dim=1, largest=False).indices
    step = max(1, CHUNK_VALUES // (m * keys.shape[1]))
    pairs = zip(queries.split(step), candidates.split(step), strict=True)
    exact = torch.cat([(keys[c] - q[:, None]).norm(dim=2) for q, c in pairs])
    distances, order = exact.topk(k, dim=1, largest=False)
    return distances, candidates.gather(1, order)


def flock(queries: Tensor, keys: Tensor, squares: Tensor, counts: list[int], k: int) -> tuple[Tensor, Tensor]:
    """Return distances and key indices, each `(B, C, k)`, of the k nearest keys of every class.

    `keys` `(N, D)` are grouped by class, `counts` (one per class, each at least k) tell the groups' sizes.
    """
    distances, indices, start = [], [], 0
    for count in counts:
        part = slice(start, start + count)
        near, index = nearest(queries, keys[part], squares[part], k)
        distances.append(near)
        indices.append(index + start)
        start += count
    return torch.stack(distances, 1), torch.stack(indices, 1)
