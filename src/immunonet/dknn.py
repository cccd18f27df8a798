"""DkNN: deep k-nearest neighbours with conformal p-values, the baseline that RAILS is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.defence import Defence
from immunonet.features import Layer
from immunonet.immune import sensing
from immunonet.repertoire import Calibration

QUERIES = 256


class DkNN(Defence):
    """Deep k-nearest neighbours (Papernot & McDaniel 2018, arXiv 1803.04765) around a classifier.

    The label is the one that most of the neighbours over all layers carry; ties go to the label whose
    neighbours have the smaller summed distance.

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
        counts, nearness, _ = self._neighbourhood(self._inputs(x))
        return _most(counts, nearness)

    @torch.no_grad()
    def predict_each(self, x: Any, neighbours: Sequence[int]) -> Tensor:
        """Return labels `(len(neighbours), B)` int64 of inputs `(B, *S)` by so many nearest, at most the DkNN's own."""
        counts = [_check.integer("neighbours", k, most=self.neighbours) for k in neighbours]
        found = []
        for part in self._inputs(x).split(QUERIES):
            nearest = self._nearest(part)
            found.append(torch.stack([_most(*self._votes(nearest, k)) for k in counts]))
        return torch.cat(found, dim=1)

    def p_values(self, x: Any) -> Tensor:
        """Return the conformal p-value `(B, C)` of every label: how usual its nonconformity is on calibration data."""
        counts, _, _ = self._neighbourhood(self._inputs(x))
        return sensing.p_values(self.calibration.label_scores, self._nonconformity(counts))

    def credibility(self, x: Any) -> Tensor:
        """Return the largest p-value `(B,)`: how well the training data support the answer."""
        return self.p_values(x).amax(1)

    def confidence(self, x: Any) -> Tensor:
        """Return 1 minus the second largest p-value `(B,)`: how little they support any other."""
        return 1 - self.p_values(x).topk(2, dim=1).values[:, 1]

    def familiarity(self, x: Any) -> Tensor:
        """Return the p-value `(B,)` of each input's distance to its nearest examples: foreign ones have a small one."""
        _, _, far = self._neighbourhood(self._inputs(x))
        return self.calibration.familiarity(far)

    def forward(self, x: Any) -> Tensor:
        """Return finite log-probabilities `(B, C)`: log((m + 1) / (n + C)) for m of n neighbours with the label."""
        counts, _, _ = self._neighbourhood(self._inputs(x))
        n = self.neighbours * len(self.layers)
        return ((counts + 1) / (n + self.classes)).log()

    @torch.no_grad()
    def _neighbourhood(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each label's neighbours over all layers, minus their summed distance, and mean distances `(B, L)`."""
        parts = [self._search(part) for part in x.split(QUERIES)]
        counts, nearness, far = (torch.cat(column) for column in zip(*parts, strict=True))
        return counts, nearness, far

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = self._nearest(x)
        far = torch.stack([distances.mean(1) for distances, _ in nearest], dim=1)
        return *self._votes(nearest, self.neighbours), far

    def _nearest(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return per layer the distances and labels `(B, neighbours)` of the nearest examples, nearest first."""
        nearest = []
        for i, features in enumerate(self._described(x)[1]):
            distances, found = self.index(i).nearest(self._keys(features), self.neighbours, by_class=False)
            if self.metric == "cosine":
                # Of unit vectors, half the squared distance is one minus the cosine.
                distances = distances.square() / 2
            nearest.append((distances, self.repertoire.y[found]))
        return nearest

    def _votes(self, nearest: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
        """Return each label's number among the k nearest of every layer, and minus their summed distance, `(B, C)`."""
        counts = nearest[0][0].new_zeros(len(nearest[0][0]), self.classes)
        nearness = torch.zeros_like(counts)
        for distances, labels in nearest:
            counts.scatter_add_(1, labels[:, :k], torch.ones_like(distances[:, :k]))
            nearness.scatter_add_(1, labels[:, :k], -distances[:, :k])
        return counts, nearness

    def _nonconformity(self, counts: Tensor) -> Tensor:
        return self.neighbours * len(self.layers) - counts

    def _calibrate(self, x: Tensor, y: Tensor) -> Calibration:
        counts, _, far = self._neighbourhood(x)
        return Calibration.of(self._nonconformity(counts).gather(1, y[:, None])[:, 0], far)

    def _keys(self, features: Tensor) -> Tensor:
        if self.metric == "euclidean":
            return features
        return features.div_(torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12))

    def _least_per_class(self) -> int:
        return 1

    def _least_in_all(self) -> int:
        return self.neighbours

    def _settings(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "metric": self.metric}

    @classmethod
    def _from_settings(cls, model: nn.Module, layers: Any, settings: dict[str, Any]) -> Self:
        return cls(model, layers, **settings)


def _most(counts: Tensor, nearness: Tensor) -> Tensor:
    """Return the label `(B,)` with the most neighbours; a tie goes to the smaller summed distance."""
    tied = counts == counts.amax(1, keepdim=True)
    return nearness.masked_fill(~tied, -torch.inf).argmax(1)
