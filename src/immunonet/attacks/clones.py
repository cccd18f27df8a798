"""A soft vote of the cells that RAILS expands: naive cells and their clones brought near the antigen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from immunonet import _check
from immunonet.attacks._surrogate import Surrogate, maturing
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.immune import backend

# Generations make the response follow the nearest few of its clones; without them it is a softer vote.
_EVOLVED, _CLONES = 0.1, 0.3


class SoftClones(Surrogate):
    """A soft vote of the naive cells of RAILS and of their clones brought near the antigen, for attacks that know it.

    Per layer and class, the logit is the logsumexp of -d^2 / temperature over the K naive cells and, where the defence
    aligns or recombines clones, as many that were so moved: the population of the expansion before it mutates. d is the
    feature distance to the antigen. Cells are found and brought near anew at every call, and are constants for the
    gradient. The temperature is `sharpness` times the standard deviation of d^2 over the antigen's cells. Log-softmax
    over classes, mean over layers, log-softmax again. Where the defence gives its model a voice, that is mixed in.

    It knows nothing of generations: `Unrolled` does, at several times the cost. What an attack on it finds must be
    tested again on the defence itself.

    `rails`: a fitted RAILS. `sharpness` > 0, or "auto": 0.1 at layers where cells evolve, 0.3 at those without
    generations. Raises ValueError or TypeError that names the argument.
    """

    thorough = True

    def __init__(self, rails: NeighbourDefence, *, sharpness: float | Literal["auto"] = "auto") -> None:
        self.maturations = maturing(rails)
        super().__init__(rails)
        if sharpness == "auto":
            self.sharpness = [_EVOLVED if settings.generations else _CLONES for settings in self.maturations]
        else:
            self.sharpness = [_check.number("sharpness", sharpness, least=0, above=True)] * len(self.maturations)

    def softened(self, factor: float) -> SoftClones:
        """Return the same vote with its sharpness, one per layer, times `factor` > 0."""
        other = SoftClones(self.defence)
        other.sharpness = [factor * sharpness for sharpness in self.sharpness]
        return other

    def _vote(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        known = self._expanded(layer, antigens.detach(), features.detach())
        squares = (features[:, None, None] - known).square().sum(3)
        temperature = self.sharpness[layer] * squares.detach().flatten(1).std(1).clamp(min=1e-12)
        return (-squares / temperature[:, None, None]).logsumexp(2)

    @torch.no_grad()
    def _expanded(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        """Return the features `(B, C, n, D)` of the naive cells and of their clones, if those were brought near."""
        rails, settings, index = self.defence, self.maturations[layer], self.defence.index(layer)
        found = index.nearest(features, settings.neighbours)[1]
        naive = index.rows(found)
        cells = rails.members(layer, found).flatten(0, 1)
        goals = antigens.repeat_interleave(rails.classes, dim=0)
        near = backend.approach(cells, goals, settings.alignment, settings.recombination)
        if near is cells:
            return naive
        return torch.cat([naive, rails.feature_maps[layer].chunked(near.flatten(0, 1)).view_as(naive)], dim=2)
