"""What a defence says of inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sense:
    """How foreign B inputs look: `distance` from what is known, its conformal `p_value`, and whether `foreign`.

    Each `(B,)`; `distance` >= 0 in the defence's own units, `p_value` in (0, 1], `foreign` bool.
    """

    distance: Tensor
    p_value: Tensor
    foreign: Tensor


@dataclass(frozen=True)
class Answer:
    """What a defence says of B inputs: `labels` `(B,)` int64, and log-probabilities `(B, C)` whose argmax they are.

    `sense`: how foreign the inputs look, or None. `credibility` `(B,)` in (0, 1]: how well what is known supports the
    labels, or None. `shares` `(B, C)`: what `predict_proba` gives where that is not the exponential; sums to 1.
    `recalled`, `innate` `(B,)` bool: answered from memory, by the network alone; None where there is no such thing.
    """

    labels: Tensor
    log_probabilities: Tensor
    sense: Sense | None = None
    credibility: Tensor | None = None
    shares: Tensor | None = None
    recalled: Tensor | None = None
    innate: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor) -> Answer:
        """Return the answer that logits `(B, C)` give, differentiable in them."""
        found = logits.log_softmax(1)
        return cls(found.argmax(1), found)

    @property
    def probabilities(self) -> Tensor:
        """The probability `(B, C)` of each label."""
        return self.log_probabilities.exp() if self.shares is None else self.shares


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What an answer changes on its way: the inputs `x` `(B, *S)` that the network meets, and how far states lie off.

    `before`, `after` `(B, T)`: the distance of each layer's state to clean ones, in the layer's own units, of the bare
    network and under control.
    """

    x: Tensor
    before: Tensor
    after: Tensor
