"""A differentiable stand-in for nearest-neighbour defences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.defence import Defence
from immunonet.features import space_map

# Values of neighbours' features in one call, which are kept twice for its gradient: 1 GiB.
_KEPT_VALUES = 2**27
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

    @property
    def batch_size(self) -> int:
        """How many antigens a call should take at most, for its gradient to need about 1 GiB."""
        widest = max(self.defence.index(i).width for i in range(len(self.defence.layers)))
        return max(1, _KEPT_VALUES // (self.defence.classes * self.neighbours * widest))

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        if tuple(x.shape[1:]) != self.defence.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.defence.shape))}), got {tuple(x.shape)}")
        votes = [
            torch.logsumexp(-squares / temperature, dim=2).log_softmax(1)
            for squares, temperature in zip(self._squared_distances(x), self.temperatures, strict=True)
        ]
        return torch.stack(votes).mean(0).log_softmax(1)

    def _squared_distances(self, x: Tensor) -> list[Tensor]:
        """Return `(B, C, neighbours)` per layer."""
        cells = space_map(self.defence.model, self.defence.space)(x)
        found = []
        for i, feature_map in enumerate(self.defence.feature_maps):
            features, index = feature_map(cells), self.defence.index(i)
            if getattr(self.defence, "metric", "euclidean") == "cosine":
                features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
            with torch.no_grad():
                near = index.rows(index.nearest(features, self.neighbours)[1])
            found.append((features[:, None, None] - near).square().sum(3))
        return found

    @torch.no_grad()
    def _temperatures(self, temperature: float | str) -> list[float]:
        if temperature != "auto":
            value = _check.number("temperature", temperature, least=0, above=True)
            return [value] * len(self.defence.layers)
        x = self.defence.repertoire.x
        probes = x[:: max(1, len(x) // _PROBES)][:_PROBES]
        parts = [self._squared_distances(part) for part in probes.split(self.batch_size)]
        spreads = [torch.cat(layer).flatten(1).std(1).mean() for layer in zip(*parts, strict=True)]
        return [max(_SHARPNESS * float(spread), 1e-12) for spread in spreads]
