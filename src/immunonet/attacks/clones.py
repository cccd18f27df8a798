"""A soft vote of the cells that RAILS expands: naive cells and their clones brought near the antigen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from immunonet import _check
from immunonet.attacks._surrogate import check_shape, fitted, with_voice
from immunonet.features import space_map
from immunonet.immune import backend, operators
from immunonet.rails import RAILS

# Harder than the vote of SoftNeighbours: the response follows the nearest few of its clones.
_SHARPNESS = 0.1


class SoftClones(nn.Module):
    """A soft vote of the naive cells of RAILS and of their clones brought near the antigen, for attacks that know it.

    Per layer and class, the logit is the logsumexp of -d^2 / temperature over the K naive cells and, where the defence
    aligns or recombines clones, as many that were: the population of the expansion before it mutates. d is the
    feature distance to the antigen. Cells are found and brought near anew at every call, and are constants for the
    gradient. The temperature is `sharpness` times the standard deviation of d^2 over the antigen's cells. Log-softmax
    over classes, mean over layers, log-softmax again. Where the defence gives its model a voice, that is mixed in.

    It knows nothing of generations: `Unrolled` does, at several times the cost. What an attack on it finds must be
    tested again on the defence itself.

    `rails`: a fitted RAILS. `sharpness` > 0. Raises ValueError or TypeError that names the argument.
    """

    deterministic = True

    def __init__(self, rails: RAILS, *, sharpness: float = _SHARPNESS) -> None:
        super().__init__()
        if not isinstance(rails, RAILS):
            raise TypeError(f"rails must be a RAILS, got {type(rails).__name__}")
        fitted(rails)
        self.rails = rails
        self.sharpness = _check.number("sharpness", sharpness, least=0, above=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        check_shape(self.rails, x)
        antigens = space_map(self.rails.model, self.rails.space)(x)
        votes = [self._vote(layer, antigens) for layer in range(len(self.rails.feature_maps))]
        return with_voice(self.rails, torch.stack(votes).mean(0).log_softmax(1), x)

    def _vote(self, layer: int, antigens: Tensor) -> Tensor:
        features = self.rails.feature_maps[layer](antigens)
        known = self._expanded(layer, antigens.detach(), features.detach())
        squares = (features[:, None, None] - known).square().sum(3)
        temperature = self.sharpness * squares.detach().flatten(1).std(1).clamp(min=1e-12)
        return (-squares / temperature[:, None, None]).logsumexp(2).log_softmax(1)

    @torch.no_grad()
    def _expanded(self, layer: int, antigens: Tensor, features: Tensor) -> Tensor:
        """Return the features `(B, C, 2 K, D)` of each naive cell and of its clone."""
        rails, settings = self.rails, self.rails.maturations[layer]
        cells = rails.members(layer, rails.index(layer).nearest(features, settings.neighbours)[1])
        goals = antigens.repeat_interleave(rails.classes, dim=0)
        naive = cells.flatten(0, 1)
        near = backend.approach(naive, goals, settings.alignment, settings.recombination)
        clones = operators.clones(naive, near, 2)
        found = rails.feature_maps[layer].chunked(clones.flatten(0, 1))
        return found.view(len(antigens), rails.classes, -1, features.shape[1])
