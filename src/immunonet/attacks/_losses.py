"""What attacks climb, per input: functions of logits or log-probabilities `(B, C)` and labels `(B,)`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import models

# Keeps ratios of logits finite where they are all equal.
_TINY = 1e-12


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """Return the log of the odds against `y`, `(B,)` float64: the logsumexp of the other logits minus its own.

    The cross-entropy is its softplus: both climb in one direction. But where a network is sure, the slope of the
    cross-entropy falls below what single precision holds, on its way back through the network if not in the loss, and
    the network would look robust (Carlini & Wagner 2017); this one is the same however large the logits are.
    """
    logits = logits.double()
    label = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).logsumexp(1) - logits[label]


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
        with models.blamed(point, "the gradient of the model"):
            (found,) = torch.autograd.grad(loss, point, torch.ones_like(loss), allow_unused=True)
    if found is None:
        raise ValueError(
            "model must be differentiable in its input, but its output has no gradient: attack the network "
            "itself, or a surrogate of a defence such as attacks.SoftNeighbours(defence)"
        )
    return found
