"""What all differentiable stand-ins for a nearest-neighbour defence share."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from immunonet import models
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.immune.settings import Maturation

# Repertoire examples whose neighbourhoods set the scale of "auto".
_PROBES = 100


class Surrogate(models.Asking, abc.ABC):
    """A differentiable vote at a fitted defence's own layers: log-softmax per layer, mean, log-softmax again.

    Whatever the defence compares and hears besides is taken from it. What an attack on it finds must be tested again on
    the defence itself: `AttackResult.success` is only about the surrogate. Raises TypeError or ValueError unless
    `defence` is a fitted defence by nearest neighbours. `thorough`: whether it is worth every attack that a protocol
    has; of one that has `softened(factor)`, the same vote as many times as soft is attacked, too.
    """

    randomised = False
    thorough = False

    def __init__(self, defence: NeighbourDefence) -> None:
        super().__init__()
        self.defence = fitted(defence)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        antigens, features = self.defence.compared(x)
        votes = [self._vote(layer, antigens, found).log_softmax(1) for layer, found in enumerate(features)]
        return self.defence.heard(torch.stack(votes).mean(0).log_softmax(1), x)

    @abc.abstractmethod
    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of one layer for antigens `(B, *S')` with features `(B, D)`."""


def fitted(defence: Any) -> NeighbourDefence:
    """Return `defence` if it is fitted and by nearest neighbours; raise TypeError or ValueError otherwise."""
    if not isinstance(defence, NeighbourDefence):
        raise TypeError(f"defence must be a RAILS or a DkNN, got {type(defence).__name__}")
    if not defence.feature_maps:
        raise ValueError("defence must be fitted: call defence.fit(x, y) with the training set first")
    defence.check_current()
    return defence


def maturing(rails: Any) -> tuple[Maturation, ...]:
    """Return the settings of a defence whose cells mature, one per layer; TypeError for any other."""
    found = getattr(rails, "maturations", None)
    if found is None or not isinstance(rails, NeighbourDefence):
        raise TypeError(f"rails must be a RAILS, got {type(rails).__name__}")
    return tuple(found)


@torch.no_grad()
def probe_distances(defence: NeighbourDefence, neighbours: Sequence[int]) -> list[Tensor]:
    """Return the distances `(n, C, k)` of up to 100 examples to the k nearest of every class, per layer with its k."""
    repertoire = defence.repertoire
    some = repertoire.inputs(slice(0, None, max(1, len(repertoire.x) // _PROBES)))[:_PROBES]
    probes = defence.compared(some)[1]
    pairs = zip(probes, neighbours, strict=True)
    return [defence.index(layer).nearest(features, k)[0] for layer, (features, k) in enumerate(pairs)]


def fewest_examples(defence: NeighbourDefence) -> int:
    """Return how many examples the smallest class of the repertoire has."""
    return int(torch.bincount(defence.repertoire.y, minlength=defence.classes).min())
