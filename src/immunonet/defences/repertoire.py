"""The repertoire: the labelled training examples that cells come from, their features, and their calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from immunonet.features.search import Kept
from immunonet.immune import sensing


class Repertoire(Kept):
    """Training examples `x` `(N, *S)` and labels `y` `(N,)`, in the order they were given."""

    x: Tensor
    y: Tensor

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x, persistent=False)
        self.register_buffer("y", y, persistent=False)

    def __len__(self) -> int:
        return len(self.x)


class Calibration(Kept):
    """What sensing measures antigens by, from n calibration examples.

    `label_scores` `(n,)`, sorted: the nonconformity of their true labels. `strangeness` `(n,)`, sorted: their
    mean distances to the nearest repertoire examples, in units of `scales` `(L,)`, summed over layers.
    """

    label_scores: Tensor
    strangeness: Tensor
    scales: Tensor

    def __init__(self, label_scores: Tensor, strangeness: Tensor, scales: Tensor) -> None:
        super().__init__()
        for name, value in (("label_scores", label_scores), ("strangeness", strangeness), ("scales", scales)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of(cls, scores: Tensor, far: Tensor) -> Calibration:
        """Take the examples' nonconformity `(n,)` and their mean distances to the nearest `(n, L)`."""
        # Layers differ in scale; each counts in units of its own typical distance.
        scales = far.mean(0).clamp(min=1e-12)
        return cls(scores.float().sort().values, (far / scales).sum(1).sort().values, scales)

    def distance(self, far: Tensor) -> Tensor:
        """Return mean distances `(B, L)` in units of each layer's own, summed over layers: `(B,)`."""
        return (far / self.scales).sum(1)

    def familiarity(self, far: Tensor) -> Tensor:
        """Return the p-values `(B,)` of mean distances `(B, L)` among those of the calibration examples."""
        return sensing.p_values(self.strangeness, self.distance(far))


def hold_out(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of examples to keep and to hold out, each sorted: a random `fraction`, the same for a seed."""
    n = round(fraction * len(y))
    if not 0 < n < len(y):
        raise ValueError(
            f"calibration={fraction:g} holds out {n} of {len(y)} examples; at least 1 must be held out, and 1 kept"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return order[n:].sort().values, order[:n].sort().values


def check_classes(y: Tensor, classes: int, least: int) -> None:
    """Raise ValueError unless every class has at least `least` examples among the labels `y`."""
    counts = torch.bincount(y, minlength=classes).tolist()
    for label, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"y has no example of class {label} (those held out for calibration not counted); "
                f"each of the model's {classes} classes needs {least}"
            )
        if count < least:
            raise ValueError(
                f"neighbours={least} is more than the {count} examples of class {label} (those held out for "
                f"calibration not counted); use neighbours={max(1, min(counts))}"
            )
