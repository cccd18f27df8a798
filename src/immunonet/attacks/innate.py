"""What knows that a RAILS lets its network answer where the neighbours agree: Gated, and Credible."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import _check, models
from immunonet.attacks._base import Model, Penalised
from immunonet.attacks._losses import log_odds
from immunonet.attacks._surrogate import fewest_examples, fitted, probe_distances
from immunonet.attacks.clones import SoftClones
from immunonet.attacks.knn import soft_count
from immunonet.immune import sensing

# Width of a soft count's edge, and the fewest examples per class that are counted, as `SoftCount`.
_WIDTH, _COUNTED = 0.1, 20


class Agreement:
    """How far the neighbours of inputs agree with the network's own label, against what a RAILS asks for.

    Per layer the K nearest that sensing looks at are counted softly (`soft_count`), for the share of each class; shares
    are averaged over layers, in proportion to K. What is asked for is the least share that `innate` still lets pass,
    less half an example, so that it lies midway to the first that does not.

    `rails`: a fitted RAILS with `innate`. Raises ValueError or TypeError that names the argument.
    """

    def __init__(self, rails: Any) -> None:
        self.defence = fitted(rails)
        if (innate := getattr(rails, "innate", None)) is None:
            raise ValueError("rails must let its network answer, got innate=None: use with_settings(innate=0.05)")
        self.counted = [rails.sensed(layer) for layer in range(len(rails.layers))]
        self.neighbours = [min(max(_COUNTED, k), fewest_examples(rails)) for k in self.counted]
        spreads = [d.square().flatten(1).std(1).mean() for d in probe_distances(rails, self.neighbours)]
        self.widths = [max(_WIDTH * float(spread), 1e-12) for spread in spreads]
        total = sum(self.counted)
        tolerated = sensing.tolerated(rails.calibration.own_scores, innate)
        share = min(max(1 - (tolerated + 0.5) / total, 1e-6), 1 - 1e-6)
        self.asked = math.log(share / (1 - share))
        self._weights = [math.log(k / total) for k in self.counted]

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the log `(B,)` of the odds of the share with `labels` `(B,)` over those asked for; above 0 they agree.

        Differentiable in inputs `x` `(B, *S)`.
        """
        shares = [
            self._shares(layer, features) + self._weights[layer]
            for layer, features in enumerate(self.defence.compared(x)[1])
        ]
        return -log_odds(torch.stack(shares).logsumexp(0), labels).to(x) - self.asked

    def _shares(self, layer: int, features: Tensor) -> Tensor:
        """Return the log of the share `(B, C)` of each class among the K nearest at a layer."""
        index, widths = self.defence.index(layer), self.widths
        counts = soft_count(index, features, self.neighbours[layer], counted=self.counted[layer], width=widths[layer])
        return counts.log_softmax(1)


class Gated(models.Asking):
    """A RAILS that lets its network answer, with a soft gate, for attacks that know it.

    log(g p + (1 - g) q): p the network's softmax, q what `surrogate` gives of the adaptive response, and g the sigmoid
    of the `Agreement` of neighbours with the network's label.

    `rails`: a fitted RAILS with `innate`. `surrogate`: maps inputs to log-probabilities; None: `SoftClones(rails)`.
    Raises ValueError or TypeError that names the argument.
    """

    randomised = False
    thorough = True

    def __init__(self, rails: Any, surrogate: Model | None = None) -> None:
        super().__init__()
        self._agreement = Agreement(rails)
        self.defence = rails
        self.surrogate = SoftClones(rails) if surrogate is None else surrogate

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities `(B, C)`, differentiable in inputs `x` `(B, *S)`; ValueError for another shape."""
        own = models.logits(self.defence.model, x).log_softmax(1)
        adaptive = models.ask(self.surrogate, x).log_softmax(1)
        opened = self._agreement(x, own.argmax(1))[:, None]
        return torch.logaddexp(own + F.logsigmoid(opened), adaptive + F.logsigmoid(-opened))


class Credible(Penalised):
    """The network of a RAILS that lets it answer, under the condition that it is let.

    Attacks on it climb the network's loss minus `penalty`, and count as successful only where the penalty is 0: it is
    `weight` times how far the `Agreement` of neighbours with the network's label lies below what is asked for.

    `rails`: a fitted RAILS with `innate`. `weight` >= 0, in units of the loss. Raises ValueError or TypeError that
    names the argument.
    """

    def __init__(self, rails: Any, *, weight: float = 10.0) -> None:
        super().__init__()
        self._agreement = Agreement(rails)
        self.defence = rails
        self.weight = _check.number("weight", weight, least=0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits `(B, C)` for inputs `x` `(B, *S)`."""
        return models.logits(self.defence.model, x)

    def penalty(self, x: Tensor) -> Tensor:
        """Return `(B,)`: `weight` times what the neighbours of inputs `x` `(B, *S)` lack in agreement; 0 if nothing."""
        labels = models.logits(self.defence.model, x).argmax(1)
        return self.weight * (-self._agreement(x, labels)).clamp(min=0)
