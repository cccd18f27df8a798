"""What attacks climb, per input: functions of logits or log-probabilities `(B, C)` and labels `(B,)`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Keeps ratios of logits finite where they are all equal.
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy `(B,)` float64, in a form that stays exact where the network is sure.

    Single precision would round a loss below 1e-7 to zero, and the gradient with it: a network that is sure
    enough would look robust (Carlini & Wagner 2017).
    """
    logits = logits.double()
    label = F.one_hot(y, logits.shape[1]).bool()
    return F.softplus(logits.masked_fill(label, -torch.inf).logsumexp(1) - logits[label])


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return how far the best other class is above `y`: positive where `y` is not the answer."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits[own]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio (Croce & Hein 2020, eq. 6), at most 1; C of 3 or more.

    The margin in units of the gap between the first and the third logit: shifts and scales do not change it.
    """
    ranked = logits.topk(3, dim=1).values
    return margin(logits, y) / (ranked[:, 0] - ranked[:, 2] + _TINY)


def targeted_dlr(logits: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Return the ratio that leads from `y` to the class `wanted` (Croce & Hein 2020, eq. 7); C of 4 or more."""
    ranked = logits.topk(4, dim=1).values
    gap = logits.gather(1, wanted[:, None]) - logits.gather(1, y[:, None])
    return gap[:, 0] / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + _TINY)


def gradient(loss: Tensor, point: Tensor) -> Tensor:
    """Return d(sum of loss)/d(point); ValueError if the model cut the graph."""
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss, point, torch.ones_like(loss), allow_unused=True)
    if found is None:
        raise ValueError(
            "model must be differentiable in its input, but its output has no gradient: attack the network "
            "itself, or a surrogate of a defence such as attacks.SoftNeighbours(defence)"
        )
    return found
