"""The operators of clonal evolution on populations `(B, C, P, *S)`, driven by given uniform numbers in [0, 1).

Random numbers `(C, P, ...)` are shared by the antigens of a batch, `(B, C, P, ...)` are each antigen's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(naive: Tensor, copies: int) -> Tensor:
    """Return clones `(B, C, K * copies, ...)` of naive cells `(B, C, K, ...)`, copies of a cell side by side."""
    return naive.repeat_interleave(copies, dim=2)


def select(distances: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Return parents, indices `(B, C, n)` into P, drawn with probability softmax(-distance / temperature).

    `distances` `(B, C, P)`; `temperature` `(B,)`, positive; `u` `(C, n)` or `(B, C, n)`.
    """
    weights = torch.softmax(-distances / temperature[:, None, None], dim=2)
    cumulative = weights.cumsum(2)
    u = u.expand(len(distances), -1, -1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, u.contiguous(), right=True).clamp(max=distances.shape[2] - 1)


def take(cells: Tensor, index: Tensor) -> Tensor:
    """Return the cells `(..., n, *S)` at `index` `(..., n)` into the last axis that `index` has of `cells`."""
    lead = index.ndim
    width = cells.shape[lead - 1]
    start = torch.arange(index.shape[:-1].numel(), device=index.device).reshape(*index.shape[:-1], 1) * width
    return cells.flatten(0, lead - 1)[index + start]


def first_parent_share(d1: Tensor, d2: Tensor, crossover: str) -> Tensor:
    """Return the probability that a pixel comes from the first parent, given the parents' distances.

    d2 / (d1 + d2) for "affinity", d1 / (d1 + d2) for "authors"; one half where both are 0.
    """
    total = d1 + d2
    return torch.where(total > 0, (d2 if crossover == "affinity" else d1) / total, 0.5)


def cross(first: Tensor, second: Tensor, share: Tensor, u: Tensor) -> Tensor:
    """Return children that take each pixel from `first` with probability `share` `(B, C, P)`, else from `second`.

    `first`, `second` `(B, C, P, *S)`; `u` `(C, P, *S)` or `(B, C, P, *S)`.
    """
    share = share.reshape(*share.shape, *(1,) * (first.ndim - 3))
    return torch.where(u < share, first, second)


def mutate(cells: Tensor, rate: Tensor, least: float, most: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """Return cells of which each pixel moved with probability `rate`, clipped to [low, high].

    The amount is uniform in [least, most] times (high - low), its sign random. `cells` `(B, C, P, *S)`;
    `rate`, `most` `(B,)`; `low`, `high` broadcast against `*S`; `u` `(C, P, *S)` or `(B, C, P, *S)`: where
    u < rate, u / rate is uniform again and gives sign and amount.
    """
    ones = (1,) * (cells.ndim - 1)
    rate, most = rate.reshape(-1, *ones), most.reshape(-1, *ones)
    signed = 2 * u / rate.clamp(min=torch.finfo(rate.dtype).tiny) - 1
    amount = torch.sign(signed) * (least + signed.abs() * (most - least)) * (high - low)
    return torch.where(u < rate, cells + amount, cells).clamp(min=low, max=high)
