"""The operators of clonal evolution on families: the P cells of one class for one antigen, `(F, P, *S)`.

Each is a pure function of uniform numbers in [0, 1); `offspring` puts them together on a whole population.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet.immune.noise import uniform

# Values of the families that breed at once: their random numbers take several times their own memory.
CHUNK_VALUES = 2**22

Family = tuple[Tensor, Tensor]
"""The antigens `(F,)` and labels `(F,)` of some families of a population `(B, C, P, *S)`."""


@dataclass
class Mutation:
    """Share `rate` `(B,)` of pixels that move, by `least` to `most` `(B,)` times `high - low`, within [low, high].

    `low`, `high` have a cell's shape `(*S)`.
    """

    rate: Tensor
    least: float
    most: Tensor
    low: Tensor
    high: Tensor


def deform(cells: Tensor, copies: int, reach: float, u: Tensor) -> Tensor:
    """Return images `(P, F, c, h, w)` resampled under P affine maps, each the same for its F images; border repeated.

    Each of the six numbers of a map differs from the identity's by a uniform amount, at most what moves the
    border by `reach` times the image's side. Of every `copies` images in a row the first stays as it is.
    `u` `(P, 6)`.
    """
    change = ((2 * u - 1) * 2 * reach).view(-1, 2, 3)
    change[::copies] = 0
    # Images under one map are channels of one image, whose places are worked out once.
    images = cells.flatten(1, 2)
    with torch.autocast(cells.device.type, enabled=False):
        maps = torch.eye(2, 3, device=u.device) + change
        grid = F.affine_grid(maps, list(images.shape), align_corners=False).to(cells.dtype)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False).view_as(cells)


def select(distances: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Return parents, indices `(F, n)` into P, drawn with probability softmax(-distance / temperature).

    `distances` `(F, P)`; `temperature` `(F,)`, positive; `u` `(F, n)`.
    """
    cumulative = torch.softmax(-distances / temperature[:, None], dim=1).cumsum(1)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return drawn.clamp(max=distances.shape[1] - 1)


def first_parent_share(d1: Tensor, d2: Tensor, crossover: str) -> Tensor:
    """Return the probability that a pixel comes from the first parent, given the parents' distances.

    d2 / (d1 + d2) for "affinity", d1 / (d1 + d2) for "authors"; one half where both are 0.
    """
    total = d1 + d2
    # Never 0 / 0: its gradient would be NaN even where its value is not taken.
    ratio = (d2 if crossover == "affinity" else d1) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, ratio, 0.5)


def cross(first: Tensor, second: Tensor, share: Tensor, u: Tensor) -> Tensor:
    """Return children that take each pixel from `first` with probability `share` `(F, P)`, else from `second`.

    `first`, `second`, `u`: `(F, P, *S)`.
    """
    return torch.where(u < _spread(share, first), first, second)


def mutate(cells: Tensor, rate: Tensor, least: float, most: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """Return cells of which each pixel moved with probability `rate`, clipped to [low, high].

    The amount is uniform in [least, most] times (high - low), its sign random. `cells`, `u` `(F, P, *S)`;
    `rate`, `most` `(F,)`; `low`, `high` broadcast against `*S`. Where u < rate, u / rate is uniform again
    and gives sign and amount.
    """
    rate, most = _spread(rate, cells), _spread(most, cells)
    signed = 2 * u * (1 / rate.clamp(min=1e-30)) - 1
    amount = torch.where(signed >= 0, 1.0, -1.0) * (least + signed.abs() * (most - least)) * (high - low)
    return torch.where(u < rate, cells + amount, cells).clamp(min=low, max=high)


def offspring(
    cells: Tensor,
    family: Family,
    parents: Tensor,
    share: Tensor,
    cross_keys: Tensor,
    mutate_keys: Tensor,
    mutation: Mutation,
) -> None:
    """Replace, in place, the families of a population `cells` `(B, C, P, *S)` by their mutated offspring.

    `parents` `(F, 2 P)`: first parents, then second; `share` `(F, P)` of the first; keys `(B, 2)`.
    """
    values = cells[0, 0].numel()
    step = max(1, CHUNK_VALUES // values)
    parts = zip(*(part.split(step) for part in (*family, parents, share)), strict=True)
    for antigen, label, chosen, of_first in parts:
        _offspring(cells, (antigen, label), chosen, of_first, cross_keys, mutate_keys, mutation)


def _offspring(
    cells: Tensor,
    family: Family,
    parents: Tensor,
    share: Tensor,
    cross_keys: Tensor,
    mutate_keys: Tensor,
    mutation: Mutation,
) -> None:
    antigen, label = family
    size, values = cells.shape[2], cells[0, 0].numel()
    start = label * values
    rows = torch.arange(len(label), device=label.device)[:, None]
    old = cells[family]
    first, second = old[rows, parents[:, :size]], old[rows, parents[:, size:]]
    children = cross(first, second, share, uniform(cross_keys[antigen], start, values).reshape(old.shape))
    cells[family] = mutate(
        children,
        mutation.rate[antigen],
        mutation.least,
        mutation.most[antigen],
        mutation.low,
        mutation.high,
        uniform(mutate_keys[antigen], start, values).reshape(old.shape),
    )


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` with trailing axes of one, to broadcast against `like`."""
    return values.reshape(*values.shape, *(1,) * (like.ndim - values.ndim))
