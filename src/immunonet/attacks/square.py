"""Square attack: random search with scores only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from immunonet import _check
from immunonet.attacks._base import Attack, Found, Problem, generator_of
from immunonet.attacks._losses import margin

# Of 10,000 queries, those at which the area of the squares halves (Andriushchenko et al. 2020, section 4.1).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """The Square attack (Andriushchenko et al. 2020), called as `attack(model, x, y)`: needs no gradient.

    It climbs the margin (the best other class above `y`; of a targeted attack, `y` above the best other) by changing
    one square at a time, and keeps a change where the margin grew: with "linf" by -`eps` or `eps` per channel, with
    "l2" by moving size from one square to another. Squares begin with the share `p` of the image and shrink. Inputs
    `(F,)` are taken as one row of pixels.

    `queries`: calls per input after the one on `x`; with `draws` above 1 each is the mean margin over as many calls of
    a random model, and success what most of them say. With `early_stop` an input that is fooled is left alone;
    without it the margin goes on to grow, as a random defence needs. What is kept is as for `PGD`. `eps` >= 0.
    """

    eps: float = 8 / 255
    queries: int = 5000
    p: float = 0.8
    early_stop: bool = True
    draws: int = 1
    seed: int | None = 0

    needs = "scores"
    norms = ("linf", "l2")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.integer, "queries", "draws")
        _check.keep(self, _check.number, "p", least=0.0, most=1.0, above=True)
        _check.keep(self, _check.boolean, "early_stop")
        _check.keep(self, _check.seed, "seed")

    def _averages(self) -> bool:
        return self.draws > 1

    def calls(self) -> int:
        """Return how often the model is asked per input, at most: about the input itself, and at every query."""
        return (1 + self.queries) * self.draws

    def best(self, problem: Problem) -> Found:
        """Return the points of the largest margin."""
        best = Found.nothing(problem.x, self.queries + 1)
        if not len(problem.x):
            return best
        x, generator = _as_images(problem.x), generator_of(self.seed)
        low, high = (_as_images(bound.expand(problem.x.shape[1:])[None]) for bound in (problem.low, problem.high))
        first = self._ask(problem, x)
        points, loss, hit = x.clone(), first[0].clone(), first[1].clone()
        curve = [first[0]]
        for query in range(self.queries):
            # For all inputs, so that one which stops changes no other's numbers.
            numbers = _Numbers.drawn(x.shape, generator)
            rows = (~(hit & self.early_stop)).nonzero()[:, 0]
            if not len(rows):
                break
            tried = self._try(query, x[rows], points[rows], numbers.of(rows, x)).clamp(low, high)
            found, fooled = self._ask(problem.part(rows), tried)
            # The first try is where the search begins, better or not.
            better = (found > loss[rows]) | (query == 0)
            kept = rows[better]
            points[kept], loss[kept], hit[kept] = tried[better], found[better], fooled[better]
            curve.append(loss.clone())
        losses = torch.stack(curve + curve[-1:] * (self.queries + 1 - len(curve)))
        best.keep(Found(problem.x, first[1], first[0], losses))
        best.keep(Found(points.view_as(problem.x), hit, loss, losses))
        return best

    def _ask(self, problem: Problem, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean margin `(B,)` over the draws, and whether most of them are as wanted."""
        x, sign = images.view(-1, *problem.x.shape[1:]), -1 if self.targeted else 1
        asked = [
            self._judge_all(problem.model, x, problem.y, lambda logits, y: sign * margin(logits, y))
            for _ in range(self.draws)
        ]
        loss, hits = (torch.stack(part).double().mean(0) for part in zip(*asked, strict=True))
        return loss, hits > 0.5

    def _try(self, query: int, x: Tensor, points: Tensor, numbers: _Numbers) -> Tensor:
        """Return the next points to ask about, in the ball around images `x` `(n, c, H, W)`."""
        height, width = x.shape[2:]
        if self.norm == "linf":
            if query == 0:
                return x + self.eps * numbers.stripes
            side = max(1, round(math.sqrt(self._share(query) * height * width)))
            square = _Window.at(numbers.first, side, x)
            moved = points + 2 * self.eps * numbers.signs * square.mask
            return torch.minimum(torch.maximum(moved, x - self.eps), x + self.eps)
        if query == 0:
            return _scaled(x, _tiles(x, numbers), self.eps)
        side = max(3, round(math.sqrt(self._share(query) * height * width)))
        side += side % 2 == 0
        square, other = _Window.at(numbers.first, side, x), _Window.at(numbers.second, side, x)
        return _scaled(x, _l2_move(points - x, square, other, numbers, self.eps), self.eps)

    def _share(self, query: int) -> float:
        """Return the share of the image that squares have at a query."""
        return self.p * 0.5 ** sum(query / self.queries * 10_000 > at for at in _HALVINGS)


class _Numbers(NamedTuple):
    """Random numbers of a step: places of two squares `(n, 2)` in [0, 1), signs and stripes, and a coin `(n, 1)`."""

    first: Tensor
    second: Tensor
    signs: Tensor
    stripes: Tensor
    tiles: Tensor
    coin: Tensor

    @classmethod
    def drawn(cls, shape: torch.Size, generator: torch.Generator) -> _Numbers:
        n, channels, _, width = shape

        def signs(*size: int) -> Tensor:
            return torch.rand(n, channels, *size, generator=generator, dtype=torch.float32).sub(0.5).sign()

        first, second = torch.rand(2, n, 2, generator=generator, dtype=torch.float32)
        return cls(
            first,
            second,
            signs(1, 1),
            signs(1, width),
            signs(*shape[2:]),
            torch.rand(n, 1, generator=generator, dtype=torch.float32),
        )

    def of(self, rows: Tensor, like: Tensor) -> _Numbers:
        return _Numbers(*(part[rows.to(part.device)].to(like) for part in self))


class _Window(NamedTuple):
    """One square per image: its `mask` `(n, 1, H, W)`, its height and width, and where pixels lie in it."""

    mask: Tensor
    size: tuple[int, int]
    rows: Tensor
    columns: Tensor

    @classmethod
    def at(cls, place: Tensor, side: int, x: Tensor) -> _Window:
        """Return squares of a side, or as large as images `x` are, at places `(n, 2)` in [0, 1)."""
        inside, offsets, size = [], [], []
        for axis, length in enumerate(x.shape[2:]):
            extent = min(side, length)
            start = (place[:, axis] * (length - extent + 1)).long()
            offset = torch.arange(length, device=x.device) - start[:, None]
            inside.append((offset >= 0) & (offset < extent))
            offsets.append(offset.clamp(0, extent - 1))
            size.append(extent)
        mask = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(x)
        return cls(mask, (size[0], size[1]), *offsets)

    def filled(self, pattern: Tensor) -> Tensor:
        """Return a pattern of the square's size at its place in the image, `(n, 1, H, W)`."""
        return pattern[self.rows[:, :, None], self.columns[:, None, :]][:, None] * self.mask


def _l2_move(delta: Tensor, square: _Window, other: _Window, numbers: _Numbers, eps: float) -> Tensor:
    """Return perturbations whose size in the other square went to the first one (section 3.4)."""
    inside = delta * square.mask
    coin = numbers.coin[:, :, None, None] < 0.5
    bump = torch.where(coin, square.filled(_bump(*square.size, delta)), square.filled(_bump(*square.size, delta, True)))
    new = bump * numbers.signs + inside / _norm(inside)
    both = delta * torch.maximum(square.mask, other.mask)
    left = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0) / delta.shape[1]
    new = new / _norm(new) * (left + both.square().sum((2, 3), keepdim=True)).sqrt()
    return torch.where(square.mask.bool(), new, delta * (1 - other.mask))


def _tiles(x: Tensor, numbers: _Numbers) -> Tensor:
    """Return images covered by bumps of a fifth of their height and width, with random signs."""
    height, width = (max(1, length // 5) for length in x.shape[2:])
    down, across = x.shape[2] // height, x.shape[3] // width
    signs = numbers.tiles[:, :, :down, :across]
    signs = signs.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    out = torch.zeros_like(x)
    out[:, :, : signs.shape[2], : signs.shape[3]] = signs * _bump(height, width, x).tile(down, across)
    return out


def _bump(height: int, width: int, like: Tensor, turned: bool = False) -> Tensor:
    """Return the pattern `(height, width)` of size 1 that one L2 step adds: a positive and a negative half."""
    if (turned and width > 1) or height == 1:
        return _bump(width, height, like).T if width > 1 else like.new_ones(height, width)
    halves = [_pyramid(height // 2, width, like), -_pyramid(height - height // 2, width, like)]
    return _of_size_one(torch.cat(halves))


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    """Return rectangles around the centre, one in another, the n-th of weight 1 / n^2, scaled to size 1."""
    rows, columns = (torch.arange(n, device=like.device) - n // 2 for n in (height, width))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    weights = 1 / torch.arange(1, max(height, width) // 2 + 2, device=like.device).to(like).square()
    # A pixel lies in all rectangles from its own ring on.
    return _of_size_one(weights.flip(0).cumsum(0).flip(0)[ring])


def _of_size_one(pattern: Tensor) -> Tensor:
    scaled: Tensor = pattern / torch.linalg.vector_norm(pattern)
    return scaled


def _norm(delta: Tensor) -> Tensor:
    """Return the size of every channel, `(n, c, 1, 1)`, never 0."""
    return delta.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-12)


def _scaled(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    return x + delta * (eps / delta.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12))


def _as_images(x: Tensor) -> Tensor:
    """Return inputs `(B, *S)` as `(B, c, H, W)`: vectors are one row of pixels."""
    return x if x.ndim == 4 else x.reshape(len(x), 1, *x.shape[1:]) if x.ndim == 3 else x.flatten(1)[:, None, None]
