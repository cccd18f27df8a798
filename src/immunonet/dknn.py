"""DkNN: deep k-nearest neighbours with conformal p-values, the baseline that RAILS is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.defence import Defence
from immunonet.features import Layer
from immunonet.immune import sensing
from immunonet.immune.consensus import decided, lots, shared, winner
from immunonet.repertoire import Calibration

QUERIES = 256


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


class DkNN(Defence):
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

    Raises:
        ValueError or TypeError that names the argument.
    """

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
    ) -> None:
        super().__init__(model, layers, bounds=bounds, space=None, false_alarm=false_alarm, memory_budget=memory_budget)
        self.neighbours = _check.integer("neighbours", neighbours)
        self.metric = _check.choice("metric", metric, ("cosine", "euclidean"))

    def predict(self, x: Any) -> Tensor:
        """Return labels `(B,)` int64 of inputs `(B, *S)`."""
        return torch.cat([self._label(nearest, self.neighbours)[0] for nearest in self._nearest(self._inputs(x))])

    def predict_each(self, x: Any, neighbours: Sequence[int]) -> Tensor:
        """Return labels `(len(neighbours), B)` int64 of inputs `(B, *S)` by so many nearest, at most the DkNN's own."""
        counts = [_check.integer("neighbours", k, most=self.neighbours) for k in neighbours]
        nearest = self._nearest(self._inputs(x))
        return torch.cat([torch.stack([self._label(part, k)[0] for k in counts]) for part in nearest], dim=1)

    def predict_proba(self, x: Any) -> Tensor:
        """Return the share `(B, C)` float32 of each label among the neighbours, which sums to 1."""
        counts, _ = self._neighbourhood(self._inputs(x))
        return counts / (self.neighbours * len(self.layers))

    def p_values(self, x: Any) -> Tensor:
        """Return the conformal p-value `(B, C)` of every label: how usual its nonconformity is on calibration data."""
        counts, _ = self._neighbourhood(self._inputs(x))
        return sensing.p_values(self.calibration.label_scores, self._nonconformity(counts))

    def credibility(self, x: Any) -> Tensor:
        """Return the largest p-value `(B,)`: how well the training data support the answer."""
        return self.p_values(x).amax(1)

    def confidence(self, x: Any) -> Tensor:
        """Return 1 minus the second largest p-value `(B,)`: how little they support any other."""
        return 1 - self.p_values(x).topk(2, dim=1).values[:, 1]

    def familiarity(self, x: Any) -> Tensor:
        """Return the p-value `(B,)` of each input's distance to its nearest examples: foreign ones have a small one."""
        _, far = self._neighbourhood(self._inputs(x))
        return self.calibration.familiarity(far)

    def forward(self, x: Any) -> Tensor:
        """Return finite log-probabilities `(B, C)`: log((m + 1) / (n + C)) for m of n neighbours with the label.

        Their argmax is what `predict` says: where labels tie, its label is put first by about a millionth.
        """
        found = [self._label(nearest, self.neighbours) for nearest in self._nearest(self._inputs(x))]
        labels, counts = (torch.cat(column) for column in zip(*found, strict=True))
        n = self.neighbours * len(self.layers)
        return decided(((counts + 1) / (n + self.classes)).log(), labels)

    def _neighbourhood(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return each label's neighbours `(B, C)` over all layers, and the mean distances `(B, L)` to them."""
        counts, far = [], []
        for nearest in self._nearest(x):
            counts.append(self._votes(nearest, self.neighbours)[0])
            means = [self._measured(near.distances[:, : self.neighbours]).mean(1) for near in nearest]
            far.append(torch.stack(means, dim=1))
        return torch.cat(counts), torch.cat(far)

    @torch.no_grad()
    def _nearest(self, x: Tensor) -> Iterator[list[_Near]]:
        """Yield what every layer finds near inputs `(B, *S)`, `QUERIES` of them at a time."""
        for part in x.split(QUERIES):
            yield [self._near(self._keys(f), layer) for layer, f in enumerate(self._described(part)[1])]

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
        for near in nearest:
            edge = near.distances[:, k - 1 : k]
            inside, at = near.distances < edge, near.distances == edge
            nearer = self._count(near.labels, inside)
            level = self._count(near.labels, at) + near.missed * (edge == near.distances[:, -1:])
            number = shared(nearer, level, k)
            whole = level.sum(1, keepdim=True) == k - nearer.sum(1, keepdim=True)
            nearness.scatter_add_(1, near.labels, -self._measured(near.distances) * (inside | (at & whole)))
            nearness -= torch.where(whole, 0, self._measured(edge) * (number - nearer))
            counts += number
        return counts, nearness

    def _count(self, labels: Tensor, which: Tensor | None = None) -> Tensor:
        """Return how many of `labels` `(B, n)`, of those in `which`, are each, `(B, C)` int64."""
        ones = torch.ones_like(labels) if which is None else which.long()
        return ones.new_zeros(len(labels), self.classes).scatter_add_(1, labels, ones)

    def _measured(self, distances: Tensor) -> Tensor:
        # Of unit vectors, half the squared distance is one minus the cosine.
        return distances.square() / 2 if self.metric == "cosine" else distances

    def _nonconformity(self, counts: Tensor) -> Tensor:
        return self.neighbours * len(self.layers) - counts

    def _calibrate(self, x: Tensor, y: Tensor) -> Calibration:
        counts, far = self._neighbourhood(x)
        return Calibration.of(self._nonconformity(counts).gather(1, y[:, None])[:, 0], far)

    def _keys(self, features: Tensor) -> Tensor:
        if self.metric == "euclidean":
            return features
        return features.div_(torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12))

    def extra_repr(self) -> str:
        """Return layers, settings and what it is fitted on, in words."""
        return f"layers={list(self.layers)}, neighbours={self.neighbours}, metric={self.metric!r}, {self._fitted_on()}"

    def _least_per_class(self) -> int:
        return 1

    def _least_in_all(self) -> int:
        return self.neighbours

    def _settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "metric": self.metric}

    @classmethod
    def _from_settings(cls, model: nn.Module, layers: Any, settings: dict[str, Any]) -> Self:
        return cls(model, layers, **settings)
