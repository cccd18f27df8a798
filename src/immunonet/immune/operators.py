"""The operators of clonal evolution on families: the P cells of one class for one antigen, `(F, P, *S)`.

Each is a pure function of uniform numbers in [0, 1); `offspring` puts them together on a whole population.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet.immune.noise import uniform

# Values of the families that breed at once: their random numbers take several times their own memory.
CHUNK_VALUES = 2**22

Family = tuple[Tensor, Tensor]
"""The antigens `(F,)` and labels `(F,)` of some families of a population `(B, C, P, *S)`."""
Align = Callable[[Tensor, Tensor, float], Tensor]
"""What does as `register` does."""


@dataclass
class Mutation:
    """Share `rate` of pixels that move, by `least` to `most` (each `(B,)`) times `high - low`, within [low, high].

    `low`, `high` have a cell's shape `(*S)`.
    """

    rate: Tensor
    least: Tensor
    most: Tensor
    low: Tensor
    high: Tensor


def clones(cells: Tensor, near: Tensor, copies: int) -> Tensor:
    """Return clones `(F, K * copies, *S)` of naive cells `(F, K, *S)`, half of each as it is in `near` `(F, K, *S)`.

    Every `copies` cells in a row are clones of one, first those of the cell itself, which has the odd one.
    """
    found = cells.new_empty(*cells.shape[:2], copies, *cells.shape[2:])
    kept = copies - copies // 2
    found[:, :, :kept], found[:, :, kept:] = cells[:, :, None], near[:, :, None]
    return found.flatten(1, 2)


def recombine(cells: Tensor, antigens: Tensor, ridge: float) -> Tensor:
    """Return families of cells `(F, K, *S)`, each cell moved towards its antigen `(F, *S)` along their differences.

    The local hyperplane of Vincent and Bengio (2001): the least squared distance to the antigen plus `ridge`, in mean
    squared lengths of the differences from the family's mean, times the squared weights of those differences.
    """
    with torch.autocast(cells.device.type, enabled=False):
        flat = cells.flatten(2)
        spread = flat - flat.mean(1, keepdim=True)
        gram = spread @ spread.mT
        # Cells that are all the same have no differences, and stay.
        gram.diagonal(dim1=1, dim2=2).add_(ridge * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None])
        weights: Tensor = torch.linalg.solve(gram, spread @ (antigens.flatten(1)[:, None] - flat).mT)
        return (flat + weights.mT @ spread).view(cells.shape)


def register(images: Tensor, goals: Tensor, reach: float, steps: int = 2) -> Tensor:
    """Return images `(n, c, h, w)`, each resampled under the affine map that brings it nearest to its goal.

    Gauss-Newton on the squared difference to `goals` `(n, c, h, w)`, from the identity (Lucas and Kanade 1981; one
    step is the one-sided tangent distance of Simard et al. 1993). No number of a map moves the border by more
    than `reach` times the image's side. Outside an image its border is repeated.
    """
    size = list(images.shape)
    with torch.autocast(images.device.type, enabled=False):
        identity = torch.eye(2, 3, device=images.device, dtype=images.dtype)
        x, y = F.affine_grid(identity[None], [1, 1, *size[2:]], align_corners=False)[0].unbind(2)
        place = torch.stack([x, y, torch.ones_like(x)])
        maps = images.new_zeros(len(images), 6)
        moved = images
        for _ in range(steps):
            tangents = (_slopes(moved)[:, :, None] * place[:, None]).flatten(3).flatten(1, 2)
            gram = tangents @ tangents.mT
            # A little of the curvature keeps the step finite where an image has no edges.
            ridge = 1e-2 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
            gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
            slope = tangents @ (goals - moved).flatten(1)[:, :, None]
            maps = (maps + torch.linalg.solve(gram, slope)[:, :, 0]).clamp(min=-2 * reach, max=2 * reach)
            grid = F.affine_grid(identity + maps.view(-1, 2, 3), size, align_corners=False)
            moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved


def _slopes(images: Tensor) -> Tensor:
    """Return how images `(n, c, h, w)` change along x and y `(n, 2, c, h, w)`, in units of half their side."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * (width / 4)
    along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * (height / 4)
    return torch.stack([along_x, along_y], dim=1)


def approach(cells: Tensor, antigens: Tensor, reach: float, ridge: float | None, align: Align = register) -> Tensor:
    """Return families of naive cells `(F, K, *S)`, each cell brought near its antigen `(F, *S)`.

    Images `(c, h, w)` are aligned, unless `reach` is 0, by `align`; then cells are recombined, unless `ridge` is None,
    see `recombine`.
    """
    if reach > 0 and cells.ndim == 5:
        goals = antigens[:, None].expand_as(cells)
        cells = align(cells.flatten(0, 1), goals.flatten(0, 1), reach).unflatten(0, cells.shape[:2])
    return cells if ridge is None else recombine(cells, antigens, ridge)


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


def mutate(cells: Tensor, rate: Tensor, least: Tensor, most: Tensor, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """Return cells of which each pixel moved with probability `rate`, clipped to [low, high].

    The amount is uniform in [least, most] times (high - low), its sign random. `cells`, `u` `(F, P, *S)`;
    `rate`, `least`, `most` `(F,)`; `low`, `high` broadcast against `*S`. Where u < rate, u / rate is uniform again
    and gives sign and amount.
    """
    rate, least, most = (_spread(part, cells) for part in (rate, least, most))
    signed = 2 * u * (1 / rate.clamp(min=1e-30)) - 1
    amount = torch.where(signed >= 0, 1.0, -1.0).to(u.dtype) * (least + signed.abs() * (most - least)) * (high - low)
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
        mutation.least[antigen],
        mutation.most[antigen],
        mutation.low,
        mutation.high,
        uniform(mutate_keys[antigen], start, values).reshape(old.shape),
    )


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` with trailing axes of one, to broadcast against `like`."""
    return values.reshape(*values.shape, *(1,) * (like.ndim - values.ndim))


FUSED: dict[str, tuple[Callable[..., object], ...]] = {
    "offspring": (offspring, _offspring, cross, mutate, _spread, uniform),
    "register": (register, _slopes),
}
"""The operators with a twin in `fused`, each with the functions whose formulas the twin repeats."""
