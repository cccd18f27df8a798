"""A differentiable stand-in for nearest-neighbour defences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.defence import Defence
from immunonet.features import space_map

# Repertoire examples whose neighbourhoods set the scale of "auto".
_PROBES = 100
# A softer vote leaves the defence's own, harder one standing; a harder one gives gradients of few neighbours.
_SHARPNESS = 0.3


class SoftNeighbours(nn.Module):
    """A soft vote of the nearest repertoire examples at a defence's own layers, for attacks that know it.

    Per layer and class c, the logit is the logsumexp of -d^2 / temperature over the `neighbours` examples of c
    nearest to the antigen (found anew at every call, without gradient); d is the distance that the defence
    measures: Euclidean for RAILS, of unit vectors for DkNN with cosine (d^2 / 2 = 1 - cosine). Log-softmax
    over classes, mean over layers, log-softmax again. After Sitawarin & Wagner (2019, 2020).

    It is the first word on a defence, not the last: the vote knows nothing of maturation (no unrolled
    generations), nor of a defence's own number of neighbours. What an attack on it finds must be tested again
    on the defence itself: `AttackResult.success` is only about this surrogate.

    `defence`: a fitted RAILS or DkNN. `neighbours` per class, at most the examples of the smallest class; None:
    20, or as many as that class has. `temperature` > 0, or "auto": per layer 0.3 times the mean, over 100
    repertoire examples, of the standard deviation of d^2 over their C x neighbours nearest. Raises ValueError or
    TypeError that names the argument.
    """

    def __init__(
        self, defence: Defence, *, neighbours: int | None = None, temperature: float | Literal["auto"] = "auto"
    ) -> None:
        super().__init__()
        if not isinstance(defence, Defence):
            raise TypeError(f"defence must be a RAILS or a DkNN, got {type(defence).__name__}")
        if not defence.feature_maps:
            raise ValueError("defence must be fitted: call defence.fit(x, y) with the training set first")
        self.defence = defence
        fewest = int(torch.bincount(defence.repertoire.y, minlength=defence.classes).min())
        neighbours = min(20, fewest) if neighbours is None else neighbours
        self.neighbours = _check.integer("neighbours", neighbours, most=fewest)
        self.temperatures = self._temperatures(temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        if tuple(x.shape[1:]) != self.defence.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.defence.shape))}), got {tuple(x.shape)}")
        votes = [self._vote(i, features).log_softmax(1) for i, features in enumerate(self._features(x))]
        return torch.stack(votes).mean(0).log_softmax(1)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Return what the defence compares, `(B, D)` per layer."""
        cells = space_map(self.defence.model, self.defence.space)(x)
        found = [feature_map(cells) for feature_map in self.defence.feature_maps]
        if getattr(self.defence, "metric", "euclidean") == "cosine":
            found = [features / features.norm(dim=1, keepdim=True).clamp(min=1e-12) for features in found]
        return found

    def _vote(self, layer: int, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of one layer."""
        index, temperature = self.defence.index(layer), self.temperatures[layer]
        with torch.no_grad():
            distances, near = index.nearest(features, self.neighbours)
            closeness = -distances.square() / temperature
            weights = closeness.softmax(2)
            # One antigen at a time: the features of its neighbours together may be large.
            means = torch.stack([(w[:, :, None] * index.rows(i)).sum(1) for w, i in zip(weights, near, strict=True)])
        # The logsumexp climbs like the closeness of its weighted mean neighbour: that term, which adds nothing to the
        # value, carries the gradient.
        slope = -(features[:, None] - means).square().sum(2) / temperature
        return closeness.logsumexp(2) + slope - slope.detach()

    @torch.no_grad()
    def _temperatures(self, temperature: float | str) -> list[float]:
        if temperature != "auto":
            value = _check.number("temperature", temperature, least=0, above=True)
            return [value] * len(self.defence.layers)
        x = self.defence.repertoire.x
        spreads = []
        for layer, features in enumerate(self._features(x[:: max(1, len(x) // _PROBES)][:_PROBES])):
            distances, _ = self.defence.index(layer).nearest(features, self.neighbours)
            spreads.append(float(distances.square().flatten(1).std(1).mean()))
        return [max(_SHARPNESS * spread, 1e-12) for spread in spreads]
