"""Square attack: random search with scores only."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from immunonet import _check
from immunonet.attacks._base import Attack, Found, Problem, Reach, generator_of
from immunonet.attacks._losses import margin
from immunonet.attacks.norms import NORMS

# Of 10,000 queries, those at which the area of the squares halves (Andriushchenko et al. 2020, section 4.1).
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """The Square attack (Andriushchenko et al. 2020), called as `attack(model, x, y)`: needs no gradient.

    It climbs the margin (the best other class above `y`; of a targeted attack, `y` above the best other) by changing
    one square at a time, and keeps a change where the margin grew: with "linf" by -`eps` or `eps` per channel, with
    "l2" and "l1" by moving size from one square to another. Squares begin with the share `p` of the image and shrink.
    Inputs `(F,)` are taken as one row of pixels.

    `queries`: calls per input after the one on `x`; with `draws` above 1 each is the mean margin over as many calls of
    a random model, and success what most of them say. With `early_stop` an input that is fooled is left alone;
    without it the margin goes on to grow, as a random defence needs. `tries`: where the model refuses to answer, as one
    behind a sentinel does, other squares are drawn, larger ones, until it answers or so many were tried (OARS, Feng et
    al. 2023). What is kept is as for `PGD`. `eps` >= 0.
    """

    eps: float = 8 / 255
    queries: int = 5000
    p: float = 0.8
    early_stop: bool = True
    draws: int = 1
    tries: int = 1
    seed: int | None = 0

    needs = "scores"
    norms = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.keep(self, _check.integer, "queries", "draws", "tries")
        _check.keep(self, _check.number, "p", least=0.0, most=1.0, above=True)
        _check.keep(self, _check.boolean, "early_stop")
        _check.keep(self, _check.seed, "seed")

    def _averages(self) -> bool:
        return self.draws > 1

    def calls(self) -> int:
        """Return how often the model is asked per input, at most: about the input itself, and at every query."""
        return (1 + self.queries * self.tries) * self.draws

    def best(self, problem: Problem) -> Found:
        """Return the points of the largest margin."""
        best = Found.nothing(problem.x, self.queries + 1)
        if not len(problem.x):
            return best
        x, generator = _as_images(problem.x), generator_of(self.seed)
        low, high = (_as_images(bound.expand(problem.x.shape[1:])[None]) for bound in (problem.low, problem.high))
        first = self._ask(problem, x)
        points, loss, hit = x.clone(), first[0].clone(), first[1].clone()
        curve, reach = [first[0]], Reach(self.tries)
        for query in range(self.queries):
            rows = (~(hit & self.early_stop)).nonzero()[:, 0]
            if not len(rows):
                break
            tried = points[rows]
            found, fooled = loss.new_full((len(rows),), -torch.inf), torch.zeros_like(hit[rows])
            for _ in range(self.tries):
                left = (found == -torch.inf).nonzero()[:, 0]
                if not len(left):
                    break
                # For all inputs, so that one which stops changes no other's numbers.
                numbers, open_ = _Numbers.drawn(x.shape, generator).of(rows[left], x), rows[left]
                side = math.sqrt(min(1.0, self._share(query) * reach.scale) * math.prod(x.shape[2:]))
                ball = _Ball(x[open_], self.eps, low, high)
                tried[left] = self._try(query, points[open_], side, ball, numbers).clamp(low, high)
                found[left], fooled[left] = self._ask(problem.part(open_), tried[left])
                reach.heard(found[left])
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

    def _try(self, query: int, points: Tensor, side: float, ball: _Ball, numbers: _Numbers) -> Tensor:
        """Return the next points to ask about, in the ball around images `(n, c, H, W)`."""
        way = _WAYS[self.norm]
        return way.changed(points, side, ball, numbers) if query else way.first(ball, numbers)

    def _share(self, query: int) -> float:
        """Return the share of the image that squares have at a query."""
        return self.p * 0.5 ** sum(query / self.queries * 10_000 > at for at in _HALVINGS)


class _Ball(NamedTuple):
    """Images `(n, c, H, W)`, how far points may be from them, and the valid range."""

    x: Tensor
    eps: float
    low: Tensor
    high: Tensor


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
    def at(cls, place: Tensor, side: int, x: Tensor, spare: int = 0) -> _Window:
        """Return squares of a side, or as large as images `x` are, at places `(n, 2)` in [0, 1).

        `spare`: how many of the last places along each axis are left out, where there are more.
        """
        inside, offsets, size = [], [], []
        for axis, length in enumerate(x.shape[2:]):
            extent = min(side, length)
            start = (place[:, axis] * max(1, length - extent + 1 - spare)).long()
            offset = torch.arange(length, device=x.device) - start[:, None]
            inside.append((offset >= 0) & (offset < extent))
            offsets.append(offset.clamp(0, extent - 1))
            size.append(extent)
        mask = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(x)
        return cls(mask, (size[0], size[1]), *offsets)

    def filled(self, pattern: Tensor) -> Tensor:
        """Return a pattern of the square's size at its place in the image, `(n, 1, H, W)`."""
        return pattern[self.rows[:, :, None], self.columns[:, None, :]][:, None] * self.mask


class _Way(abc.ABC):
    """How squares are changed in the ball of one norm."""

    @abc.abstractmethod
    def first(self, ball: _Ball, numbers: _Numbers) -> Tensor:
        """Return the points `(n, c, H, W)` to begin with."""

    @abc.abstractmethod
    def changed(self, points: Tensor, side: float, ball: _Ball, numbers: _Numbers) -> Tensor:
        """Return `points` with one square of this side, rounded, changed."""


class _Corners(_Way):
    """L-inf: every value at one end of what it may be (section 3.3)."""

    def first(self, ball: _Ball, numbers: _Numbers) -> Tensor:
        return ball.x + ball.eps * numbers.stripes

    def changed(self, points: Tensor, side: float, ball: _Ball, numbers: _Numbers) -> Tensor:
        square = _Window.at(numbers.first, max(1, round(side)), points)
        moved = points + 2 * ball.eps * numbers.signs * square.mask
        return torch.minimum(torch.maximum(moved, ball.x - ball.eps), ball.x + ball.eps)


class _Bumps(_Way):
    """L2: bumps, and what they take from another square (section 3.4)."""

    fall = 2
    """The n-th rectangle of a bump weighs 1 / n to this power."""
    spare = 0
    """Places along each axis, the last, that no square takes."""

    def first(self, ball: _Ball, numbers: _Numbers) -> Tensor:
        return self._brought(self._tiles(ball.x, numbers), ball)

    def changed(self, points: Tensor, side: float, ball: _Ball, numbers: _Numbers) -> Tensor:
        length = max(3, round(side))
        length += length % 2 == 0
        places = numbers.first, numbers.second
        square, other = (_Window.at(place, length, points, self.spare) for place in places)
        return self._brought(self._moved(points - ball.x, square, other, numbers, ball.eps), ball)

    def _brought(self, delta: Tensor, ball: _Ball) -> Tensor:
        """Return the images perturbed by `delta`, brought to the surface of the ball."""
        return ball.x + delta * (ball.eps / delta.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12))

    def _size(self, delta: Tensor) -> Tensor:
        """Return the size of every channel, `(n, c, 1, 1)`."""
        return delta.square().sum((2, 3), keepdim=True).sqrt()

    def _granted(self, delta: Tensor, both: Tensor, eps: float) -> Tensor:
        """Return the size of the square in every channel: what `both` squares have, and a share of what is left."""
        left = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0) / delta.shape[1]
        return (left + both.square().sum((2, 3), keepdim=True)).sqrt()

    def _moved(self, delta: Tensor, square: _Window, other: _Window, numbers: _Numbers, eps: float) -> Tensor:
        """Return perturbations whose size in the other square went to the first one."""
        inside = delta * square.mask
        coin = numbers.coin[:, :, None, None] < 0.5
        upright, turned = (square.filled(self.bump(*square.size, delta, turned=turned)) for turned in (False, True))
        new = torch.where(coin, upright, turned) * numbers.signs + inside / self._size(inside).clamp(min=1e-12)
        both = delta * torch.maximum(square.mask, other.mask)
        new = new / self._size(new).clamp(min=1e-12) * self._granted(delta, both, eps)
        return torch.where(square.mask.bool(), new, delta * (1 - other.mask))

    def _tiles(self, x: Tensor, numbers: _Numbers) -> Tensor:
        """Return images covered by bumps of a fifth of their height and width, with random signs."""
        height, width = (max(1, length // 5) for length in x.shape[2:])
        down, across = x.shape[2] // height, x.shape[3] // width
        signs = numbers.tiles[:, :, :down, :across]
        signs = signs.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
        out = torch.zeros_like(x)
        out[:, :, : signs.shape[2], : signs.shape[3]] = signs * self.bump(height, width, x).tile(down, across)
        return out

    def bump(self, height: int, width: int, like: Tensor, *, turned: bool = False) -> Tensor:
        """Return the pattern `(height, width)` of size 1 that one step adds: a positive and a negative half."""
        if (turned and width > 1) or height == 1:
            return self.bump(width, height, like).T if width > 1 else like.new_ones(height, width)
        halves = [self._pyramid(height // 2, width, like), -self._pyramid(height - height // 2, width, like)]
        return self._of_size_one(torch.cat(halves))

    def _pyramid(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return rectangles around the centre, one in another, of falling weight, scaled to size 1."""
        rows, columns = (torch.arange(n, device=like.device) - n // 2 for n in (height, width))
        ring = torch.maximum(rows.abs()[:, None], columns.abs()[None])
        weights = 1 / torch.arange(1, max(height, width) // 2 + 2, device=like.device).to(like) ** self.fall
        # A pixel lies in all rectangles from its own ring on.
        return self._of_size_one(weights.flip(0).cumsum(0).flip(0)[ring])

    def _of_size_one(self, pattern: Tensor) -> Tensor:
        scaled: Tensor = pattern / torch.linalg.vector_norm(pattern)
        return scaled


class _Peaks(_Bumps):
    """L1: steeper bumps, and the nearest point of ball and bounds (Croce & Hein 2021, appendix).

    As in the authors' code no square lies at the far edge: on MNIST those that do are wasted, and cost 5 points.
    """

    fall, spare = 4, 1

    def _brought(self, delta: Tensor, ball: _Ball) -> Tensor:
        x, eps, low, high = ball
        # A little less, so that rounding leaves no point outside.
        return NORMS["l1"].project(x + delta, x, eps * (1 - 1e-6), low, high)

    def _size(self, delta: Tensor) -> Tensor:
        return delta.abs().sum((2, 3), keepdim=True)

    def _granted(self, delta: Tensor, both: Tensor, eps: float) -> Tensor:
        left = (eps - delta.abs().sum((1, 2, 3), keepdim=True)).clamp(min=0)
        # As the authors' code has it, every channel takes what is left of the whole ball.
        return left + delta.shape[1] * both.abs().sum((2, 3), keepdim=True)

    def _of_size_one(self, pattern: Tensor) -> Tensor:
        return pattern / pattern.abs().sum()


_WAYS: Mapping[str, _Way] = {"linf": _Corners(), "l2": _Bumps(), "l1": _Peaks()}


def _as_images(x: Tensor) -> Tensor:
    """Return inputs `(B, *S)` as `(B, c, H, W)`: vectors are one row of pixels."""
    return x if x.ndim == 4 else x.reshape(len(x), 1, *x.shape[1:]) if x.ndim == 3 else x.flatten(1)[:, None, None]
