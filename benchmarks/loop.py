"""The published algorithm, antigen by antigen, as plain PyTorch: what immunonet's speed is measured against.

Facts from the published code, none of its lines: K 10, T 1000, G 10, temperature 18, features conv2(conv1(x))
without activation, uniform mutation of nearly every pixel within (-.15, .15), crossover that favours the
farther parent, decay .9, the fittest 5 % vote, no early stop. Every population passes through the feature map,
and the features of all training examples are held in memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Loop:
    """RAILS one antigen at a time; `seconds` holds the time spent per part."""

    @torch.no_grad()
    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        *,
        classes: int = 10,
        neighbours: int = 10,
        population: int = 1000,
        generations: int = 10,
        temperature: float = 18.0,
        rate: float = 0.985,
        reach: float = 0.15,
        decay: float = 0.9,
        bounds: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
    ) -> None:
        self.features, self.x, self.y, self.classes = features, x, y, classes
        self.neighbours, self.population, self.generations = neighbours, population, generations
        self.temperature, self.rate, self.reach, self.decay = temperature, rate, reach, decay
        self.bounds = bounds
        self.generator = torch.Generator(x.device).manual_seed(seed)
        self.seconds: dict[str, float] = defaultdict(float)
        first = features(x[:1])
        self.bank = first.new_empty(len(x), first.shape[1])
        for start in range(0, len(x), 500):
            self.bank[start : start + 500] = features(x[start : start + 500])
        self.squares = torch.cat([part.square().sum(1) for part in self.bank.split(500)])

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def affinity(self, cells: Tensor, goal: Tensor) -> Tensor:
        """Return minus the distances of cells `(n, *S)` to the antigen's features `(D,)`."""
        with self.timed("feature map"):
            found = self.features(cells)
        with self.timed("distance"):
            return -torch.linalg.vector_norm(found - goal, dim=1)

    def random(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Return uniform numbers."""
        return torch.rand(shape, generator=self.generator, device=self.x.device)

    @torch.no_grad()
    def predict(self, antigen: Tensor) -> int:
        """Return the label of one antigen `(*S)`."""
        with self.timed("feature map"):
            goal = self.features(antigen[None])[0]
        with self.timed("flocking"):
            far = self.squares - 2 * (self.bank @ goal)  # the order of the distances
            naive = [
                (self.y == c).nonzero()[:, 0][far[self.y == c].topk(self.neighbours, largest=False).indices]
                for c in range(self.classes)
            ]
        per_class = self.population // self.classes
        cells = torch.cat([self.x[index].repeat_interleave(per_class // self.neighbours, 0) for index in naive])
        labels = torch.arange(self.classes, device=self.x.device).repeat_interleave(per_class)
        rate, reach, best = self.rate, self.reach, -torch.inf
        cells = self.mutate(cells, rate, reach)
        affinity = self.affinity(cells, goal)
        for _ in range(self.generations):
            with self.timed("selection and crossover"):
                children = []
                for c in range(self.classes):
                    own, fit = cells[labels == c], affinity[labels == c]
                    p = torch.softmax(fit / self.temperature, 0)
                    first, second = torch.multinomial(p, 2 * per_class, True, generator=self.generator).chunk(2)
                    share = fit[first] / (fit[first] + fit[second])
                    mask = self.random(own.shape) < share[:, None, None, None]
                    children.append(torch.where(mask, own[first], own[second]))
                cells = torch.cat(children)
            cells = self.mutate(cells, rate, reach)
            affinity = self.affinity(cells, goal)
            if float(affinity.sum()) < best:
                rate, reach = rate * self.decay, reach * self.decay
            best = max(best, float(affinity.sum()))
        plasma = labels[affinity.topk(round(0.05 * len(cells))).indices]
        return int(torch.bincount(plasma, minlength=self.classes).argmax())

    def mutate(self, cells: Tensor, rate: float, reach: float) -> Tensor:
        """Return cells with most pixels moved by up to `reach`, within the bounds."""
        with self.timed("mutation"):
            moved = cells + (2 * self.random(cells.shape) - 1) * reach
            return torch.where(self.random(cells.shape) < rate, moved, cells).clamp(*self.bounds)
