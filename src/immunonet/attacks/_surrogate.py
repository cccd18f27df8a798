"""What all differentiable stand-ins for a nearest-neighbour defence share."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from immunonet import models
from immunonet.defence import Defence
from immunonet.features import described
from immunonet.maps import LogitsMap
from immunonet.rails import RAILS

# Repertoire examples whose neighbourhoods set the scale of "auto".
_PROBES = 100


class Surrogate(models.Asking, abc.ABC):
    """A differentiable vote at a fitted defence's own layers: log-softmax per layer, mean, log-softmax again.

    Where RAILS gives its model a voice, that is mixed in. What an attack on it finds must be tested again on the
    defence itself: `AttackResult.success` is only about the surrogate. Raises TypeError or ValueError unless `defence`
    is a fitted RAILS or DkNN.
    """

    deterministic = True

    def __init__(self, defence: Defence) -> None:
        super().__init__()
        self.defence = fitted(defence)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        check_shape(self.defence, x)
        votes = [self._vote(i, features).log_softmax(1) for i, features in enumerate(features_of(self.defence, x))]
        return with_voice(self.defence, torch.stack(votes).mean(0).log_softmax(1), x)

    @abc.abstractmethod
    def _vote(self, layer: int, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of one layer for features `(B, D)`."""


def fitted(defence: Defence) -> Defence:
    """Return `defence` if it is a fitted RAILS or DkNN; raise TypeError or ValueError otherwise."""
    if not isinstance(defence, Defence):
        raise TypeError(f"defence must be a RAILS or a DkNN, got {type(defence).__name__}")
    if not defence.feature_maps:
        raise ValueError("defence must be fitted: call defence.fit(x, y) with the training set first")
    defence.check_current()
    return defence


def check_shape(defence: Defence, x: Tensor) -> None:
    """Raise ValueError unless inputs have the shape of the defence's."""
    if tuple(x.shape[1:]) != defence.shape:
        raise ValueError(f"x must have shape (B, {', '.join(map(str, defence.shape))}), got {tuple(x.shape)}")


def features_of(defence: Defence, x: Tensor) -> list[Tensor]:
    """Return what a fitted defence compares of inputs `x` `(B, *S)`: `(B, D)` per layer, differentiable in `x`."""
    cells = cells_of(defence, x)
    found = [feature_map(cells) for feature_map in defence.feature_maps]
    if getattr(defence, "metric", "euclidean") == "cosine":
        found = [features / features.norm(dim=1, keepdim=True).clamp(min=1e-12) for features in found]
    return found


def cells_of(defence: Defence, x: Tensor) -> Tensor:
    """Return the cells `(B, *S')` of inputs `x` `(B, *S)`, differentiable in `x`."""
    return described(defence.model, defence.space, (), x)[0]


def with_voice(defence: Defence, votes: Tensor, x: Tensor) -> Tensor:
    """Return log-probabilities `votes` `(B, C)` mixed with the model's for inputs `x` `(B, *S)`, as RAILS does."""
    if not isinstance(defence, RAILS) or not defence.voice:
        return votes
    known = LogitsMap(defence.model)(x).log_softmax(1)
    return torch.logaddexp(votes + math.log1p(-defence.voice), known + math.log(defence.voice))


@torch.no_grad()
def probe_distances(defence: Defence, neighbours: Sequence[int]) -> list[Tensor]:
    """Return the distances `(n, C, k)` of up to 100 examples to the k nearest of every class, per layer with its k."""
    x = defence.repertoire.x
    probes = features_of(defence, x[:: max(1, len(x) // _PROBES)][:_PROBES])
    pairs = zip(probes, neighbours, strict=True)
    return [defence.index(layer).nearest(features, k)[0] for layer, (features, k) in enumerate(pairs)]


def fewest_examples(defence: Defence) -> int:
    """Return how many examples the smallest class of the repertoire has."""
    return int(torch.bincount(defence.repertoire.y, minlength=defence.classes).min())
