"""DkNN: deep k-nearest neighbours with conformal p-values, the baseline that RAILS is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunonet import _check, attacks
from immunonet.defences.answers import Answer
from immunonet.defences.base import Made
from immunonet.defences.neighbours import SENSED, NeighbourDefence
from immunonet.defences.repertoire import Examples
from immunonet.defences.vaccine import vaccinated
from immunonet.features.names import Layer
from immunonet.immune.consensus import decided, lots, shared, winner

# What a tuned one chooses from; of equals the fewest neighbours, then the first metric.
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 75, 200)
CHOSEN_METRICS = ("cosine", "euclidean")
# Those whose soft counts are attacked when the number is chosen.
COUNTED = (5, 20, 75, 200)


@dataclass(frozen=True)
class _Near:
    """What one layer finds near B inputs, of which its index compares `keys` `(B, D)`.

    `distances` and `labels` `(B, n)` of the nearest, one more than are counted unless there are no more; `missed`
    `(B, C)`: examples of every class exactly as near as the last of them, where it is as near as the one before.
    """

    keys: Tensor
    distances: Tensor
    labels: Tensor
    missed: Tensor


class DkNN(NeighbourDefence):
    """Deep k-nearest neighbours (Papernot & McDaniel 2018, arXiv 1803.04765) around a classifier.

    The label is the one that most of the neighbours over all layers carry. Examples that are exactly as near as the
    k-th share the places that those nearer leave, so that a label's number need not be whole. Ties go to the label
    whose neighbours have the smaller summed distance, then by lot: a hash of the least number among each label's
    examples that near. The order of labels decides nothing.

    Args:
        model: any classifier, inputs `(B, *S)` to logits `(B, C)`.
        layers: a submodule's dotted name ("block2", or "block2:4" for its output averaged over the fields of a 4 x 4
            grid), "input", a callable that maps inputs to features, or a list of these.
        neighbours: k nearest examples per layer, over all classes.
        metric: "cosine" or "euclidean" distance of features.
        bounds: valid range of inputs, `(low, high)` or one pair per channel or feature; checked on every call.
        false_alarm: share of clean inputs that may be flagged foreign, in (0, 1].
        memory_budget: bytes that the features of the repertoire may take; "auto": a quarter of the machine's
            memory. It is the machine's, so that `save` does not keep it.
        vaccine: radius in linf, > 0; attacked copies of training examples, made by PGD on the model when this is
            fitted, stand in the repertoire under their own labels. Attacked antigens look less foreign then. None:
            clean examples alone.
        vaccine_share: share of the training examples, in (0, 1], of which there is such a copy.

    Raises:
        ValueError or TypeError that names the argument.
    """

    kind, title = "dknn", "DkNN"

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        neighbours: int = 75,
        metric: Literal["cosine", "euclidean"] = "cosine",
        bounds: Any = (0.0, 1.0),
        false_alarm: float = 0.05,
        memory_budget: int | Literal["auto"] = "auto",
        vaccine: float | None = None,
        vaccine_share: float = 1.0,
    ) -> None:
        shared: dict[str, Any] = {"metric": metric, "bounds": bounds, "false_alarm": false_alarm}
        shared |= {"vaccine": vaccine, "vaccine_share": vaccine_share}
        super().__init__(model, layers, space=None, memory_budget=memory_budget, **shared)
        self.neighbours = _check.integer("neighbours", neighbours)

    @torch.no_grad()
    def answer(self, x: Any, seed: int | None = None) -> Answer:
        """Return the answer to inputs `(B, *S)`: for m of n neighbours with a label, log((m + 1) / (n + C)).

        Nothing is drawn, so that `seed` changes nothing. `shares` are m / n. Where labels tie, the one that is said is
        put first by about a millionth.
        """
        found = []
        for nearest in self._nearest(self._inputs(x)):
            labels, counts = self._label(nearest, self.neighbours)
            found.append((labels, counts, self._far(nearest)))
        labels, counts, far = (torch.cat(column) for column in zip(*found, strict=True))
        n = self.neighbours * len(self.layers)
        return Answer(
            labels,
            decided(((counts + 1) / (n + self.classes)).log(), labels),
            sense=self._sense_of(far),
            credibility=self._p_values(n - counts).amax(1),
            shares=counts / n,
        )

    @classmethod
    def candidates(
        cls, examples: int, choices: Mapping[str, Sequence[Any]] | None = None
    ) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Return for each metric the numbers of neighbours that a repertoire of so many examples has."""
        given = choices or {}
        counts = sorted(k for k in given.get("neighbours", NEIGHBOURS) if k <= examples)
        if not counts:
            raise ValueError(f"neighbours must have a choice of at most {examples}, the examples of the repertoire")
        metrics = given.get("metric", CHOSEN_METRICS)
        return [({"metric": m, "neighbours": counts[-1]}, [{"neighbours": k} for k in counts]) for m in metrics]

    def challengers(self) -> list[nn.Module]:
        """Return votes of few to many neighbours: who knows DkNN fits the attack to its number."""
        few = min(20, int(torch.bincount(self.repertoire.y, minlength=self.classes).min()))
        counts = [attacks.SoftCount(self, neighbours=k) for k in COUNTED if k <= self.neighbours]
        return [attacks.ASK(self), attacks.SoftNeighbours(self, neighbours=few), *counts]

    @classmethod
    def defaults(cls, examples: int) -> dict[str, Any]:
        """Return 75 neighbours, or as many as there are examples."""
        return {"neighbours": min(75, examples)}

    def predict_each(self, x: Any, variants: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return labels `(len(variants), B)` int64 of inputs `(B, *S)`; a variant may change `neighbours`, downwards.

        The neighbours are looked for once.
        """
        counts = [_check.integer("neighbours", variant["neighbours"], most=self.neighbours) for variant in variants]
        nearest = self._nearest(self._inputs(x))
        return torch.cat([torch.stack([self._label(part, k)[0] for k in counts]) for part in nearest], dim=1)

    def confidence(self, x: Any) -> Tensor:
        """Return 1 minus the second largest p-value `(B,)`: how little they support any other."""
        return 1 - self.p_values(x).topk(2, dim=1).values[:, 1]

    def surrogates(self) -> Mapping[str, nn.Module]:
        """Return a soft count of the neighbours that are counted, and the votes of neighbours."""
        return Made({"soft-count": lambda: attacks.SoftCount(self)} | attacks.neighbour_votes(self))

    @property
    def counted(self) -> int:
        """How many neighbours over all classes vote."""
        return self.neighbours

    def stealthy(self, surrogate: nn.Module) -> nn.Module:
        """Return a surrogate under the condition that inputs do not look foreign."""
        return attacks.Stealthy(surrogate, self)

    def sensed(self, layer: int) -> int:
        """Return how many neighbours over all classes sensing looks at: those that vote."""
        return self.neighbours

    def measured(self, layer: int, distances: Tensor) -> Tensor:
        """Return distances in the metric's own units: of cosine, one minus it."""
        return self.feature_maps[layer].measured(distances)

    def _vaccinated(self, given: Examples) -> Examples:
        return vaccinated(self, given)

    def _neighbourhood_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (nearest,) = self._nearest(x)
        return self.neighbours * len(self.layers) - self._votes(nearest, self.neighbours)[0], self._far(nearest)

    def _far(self, nearest: Sequence[_Near]) -> Tensor:
        """Return the mean distances `(B, L)` to the neighbours."""
        means = [self.measured(i, near.distances[:, : self.neighbours]).mean(1) for i, near in enumerate(nearest)]
        return torch.stack(means, dim=1)

    @torch.no_grad()
    def _nearest(self, x: Tensor) -> Iterator[list[_Near]]:
        """Yield what every layer finds near inputs `(B, *S)`, `QUERIES` of them at a time."""
        for part in x.split(SENSED):
            yield [self._near(f, layer) for layer, f in enumerate(self._described(part)[1])]

    def _near(self, keys: Tensor, layer: int) -> _Near:
        index, k = self.index(layer), self.neighbours
        distances, found = index.nearest(keys, min(k + 1, len(self.repertoire)), by_class=False)
        labels = self.repertoire.y[found]
        missed = torch.zeros(len(keys), self.classes, dtype=torch.long, device=keys.device)
        rows = (distances[:, k:] == distances[:, k - 1 : k]).nonzero()[:, 0]
        if len(rows):
            within, _ = index.within(keys[rows], distances[rows, k])
            missed[rows] = (within - self._count(labels[rows])).clamp(min=0)
        return _Near(keys, distances, labels, missed)

    @torch.no_grad()
    def _label(self, nearest: Sequence[_Near], k: int) -> tuple[Tensor, Tensor]:
        """Return labels `(B,)` by the k nearest of every layer, and how many of them each label has, `(B, C)`."""

        def settle(rows: Tensor, _: Tensor) -> tuple[Tensor]:
            drawn = [
                lots(self.index(layer).within(near.keys[rows], near.distances[rows, k - 1])[1])
                for layer, near in enumerate(nearest)
            ]
            return (torch.stack(drawn).sum(0),)

        counts, nearness = self._votes(nearest, k)
        return winner(counts / (k * len(nearest)), nearness, settle), counts

    def _votes(self, nearest: Sequence[_Near], k: int) -> tuple[Tensor, Tensor]:
        """Return each label's number among the k nearest of every layer, and minus their summed distance, `(B, C)`."""
        counts = nearest[0].distances.new_zeros(len(nearest[0].keys), self.classes)
        nearness = torch.zeros_like(counts)
        for layer, near in enumerate(nearest):
            edge = near.distances[:, k - 1 : k]
            inside, at = near.distances < edge, near.distances == edge
            nearer = self._count(near.labels, inside)
            level = self._count(near.labels, at) + near.missed * (edge == near.distances[:, -1:])
            number = shared(nearer, level, k)
            whole = level.sum(1, keepdim=True) == k - nearer.sum(1, keepdim=True)
            nearness.scatter_add_(1, near.labels, -self.measured(layer, near.distances) * (inside | (at & whole)))
            nearness -= torch.where(whole, 0, self.measured(layer, edge) * (number - nearer))
            counts += number
        return counts, nearness

    def _count(self, labels: Tensor, which: Tensor | None = None) -> Tensor:
        """Return how many of `labels` `(B, n)`, of those in `which`, are each, `(B, C)` int64."""
        ones = torch.ones_like(labels) if which is None else which.long()
        return ones.new_zeros(len(labels), self.classes).scatter_add_(1, labels, ones)

    def extra_repr(self) -> str:
        """Return layers, settings and what it is fitted on, in words."""
        return f"layers={list(self.layers)}, neighbours={self.neighbours}, metric={self.metric!r}, {self._fitted_on()}"

    def _least_per_class(self) -> int:
        return 1

    def _least_in_all(self) -> int:
        return self.neighbours

    def settings(self) -> dict[str, Any]:
        """Return all keyword arguments that the constructor took, less the machine's memory budget."""
        return super().settings() | {"neighbours": self.neighbours}
