"""The repertoire: the labelled training examples that cells come from, their features, and their calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from immunonet import indexed
from immunonet._check import Bounds
from immunonet.features.search import Kept
from immunonet.immune import sensing


class Examples(Kept):
    """Examples `x` `(N, *S)` and labels `y` `(N,)`, in the order they were given.

    `x` is a tensor, or what reads the examples from where they lie whenever they are asked for.
    """

    x: Tensor | indexed.Indexed
    y: Tensor

    def __init__(self, x: Tensor | indexed.Indexed, y: Tensor) -> None:
        super().__init__()
        if isinstance(x, Tensor):
            self.register_buffer("x", x, persistent=False)
        else:
            self.x = x
        self.register_buffer("y", y, persistent=False)

    def __len__(self) -> int:
        return len(self.y)

    def inputs(self, which: slice | Tensor) -> Tensor:
        """Return the inputs `(n, *S)` of some examples, beside their labels' device."""
        return self.x[which].to(self.y.device)

    def parts(self, size: int) -> Iterator[Tensor]:
        """Yield the inputs of all examples, so many at a time."""
        for start in range(0, len(self.x), size):
            yield self.inputs(slice(start, start + size))

    def part(self, which: Tensor) -> Examples:
        """Return examples `which` `(n,)`; where they are read when they are asked for, none of them is read."""
        return Examples(self.x[which] if isinstance(self.x, Tensor) else self.x.part(which), self.y[which])

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept of them by name: inputs, or else their `places` in the source, and labels."""
        return {"x": self.x, "y": self.y} if isinstance(self.x, Tensor) else {"places": self.x.places, "y": self.y}

    def told(self) -> list[Tensor | str]:
        """Return what tells them from other examples: all tensors, or a digest of those that lie elsewhere."""
        return [*self.buffers(), *([] if isinstance(self.x, Tensor) else [self.x.checksum()])]


class Repertoire(Examples):
    """Training examples `x` `(N, *S)`, `cells` `(M, *S')` that joined them, and the labels `y` `(N + M,)` of both.

    An example's number is its place among both, so that those of training examples stay when cells join.
    """

    cells: Tensor

    def __init__(self, x: Tensor | indexed.Indexed, y: Tensor, cells: Tensor | None = None) -> None:
        super().__init__(x, y)
        none = torch.zeros(0, dtype=torch.float32, device=y.device)
        self.register_buffer("cells", none if cells is None else cells, persistent=False)

    def joined(self, cells: Tensor, labels: Tensor) -> Repertoire:
        """Return the same training examples with `cells` `(M, *S')`, in place of those that joined before."""
        y = self.y[: len(self.x)]
        return Repertoire(self.x, torch.cat([y, labels]), cells) if len(cells) else Repertoire(self.x, y)

    @property
    def shown(self) -> Tensor | indexed.Indexed:
        """What stands for each example in a picture `(N + M, *S)`: cells that are no inputs are left blank.

        Examples that lie elsewhere are read as they are asked for, unless cells joined them: then all of them are read.
        """
        if not len(self.cells):
            return self.x
        blank = torch.zeros(len(self.cells), *self.x.shape[1:], device=self.cells.device)
        return torch.cat([self.inputs(slice(None)), self.cells if self.cells.shape[1:] == self.x.shape[1:] else blank])


class Familiarity(Kept):
    """How far n calibration examples lie from what is known, which others are measured by.

    `strangeness` `(n,)`, sorted: their distances in each of L places, in units of `scales` `(L,)`, summed.
    """

    strangeness: Tensor
    scales: Tensor

    def __init__(self, strangeness: Tensor, scales: Tensor) -> None:
        super().__init__()
        for name, value in (("strangeness", strangeness), ("scales", scales)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of(cls, far: Tensor) -> Familiarity:
        """Take the examples' distances `(n, L)`."""
        return cls(*_measured(far))

    def distance(self, far: Tensor) -> Tensor:
        """Return distances `(B, L)` in units of each place's own, summed: `(B,)`."""
        return (far / self.scales).sum(1)

    def familiarity(self, far: Tensor) -> Tensor:
        """Return the p-values `(B,)` of distances `(B, L)` among those of the calibration examples."""
        return sensing.p_values(self.strangeness, self.distance(far))

    def threshold(self, false_alarm: float) -> float:
        """Return the largest distance that is not flagged at this share of false alarms, plus or minus infinity."""
        return sensing.tolerated(self.strangeness, false_alarm)


class Calibration(Familiarity):
    """What sensing measures antigens by, from n calibration examples, distances being to the nearest in the repertoire.

    `label_scores` `(n,)`, sorted: the nonconformity of their true labels; `own_scores` `(n,)`, sorted: that of the
    labels which the network itself gives them, or None where these do not count.
    """

    label_scores: Tensor
    own_scores: Tensor | None

    def __init__(
        self, label_scores: Tensor, strangeness: Tensor, scales: Tensor, own_scores: Tensor | None = None
    ) -> None:
        super().__init__(strangeness, scales)
        self.register_buffer("label_scores", label_scores, persistent=False)
        if own_scores is None:
            self.own_scores = None
        else:
            self.register_buffer("own_scores", own_scores, persistent=False)

    @classmethod
    def scored(cls, scores: Tensor, far: Tensor, own: Tensor | None = None) -> Calibration:
        """Take the examples' nonconformity `(n,)` and their mean distances to the nearest `(n, L)`.

        `own` `(n,)`: that of the labels which the network itself gives them, if those count.
        """
        return cls(scores.float().sort().values, *_measured(far), None if own is None else own.float().sort().values)

    def support(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the p-values `(B,)` of labels that the network itself gives, by nonconformity `(B, C)`.

        ValueError where its labels do not count.
        """
        if self.own_scores is None:
            raise ValueError("innate must be set where the model's own labels count: use with_settings(innate=0.05)")
        return sensing.p_values(self.own_scores, scores.gather(1, labels[:, None])[:, 0])

    def without_own(self) -> Calibration:
        """Return the same where the network's own labels do not count."""
        return Calibration(self.label_scores, self.strangeness, self.scales)


def saved(tensors: Mapping[str, Tensor], source: Any, *, bounds: Bounds) -> tuple[Examples, Examples]:
    """Return the training and the calibration examples of a saved defence: among its `tensors`, or in a `source`.

    ValueError where a source is missing, not asked for, or holds other examples.
    """
    y = tensors["y"]
    # Earlier versions did not keep the calibration examples.
    held_y = tensors.get("held.y", y[:0])
    if "digests" not in tensors:
        if source is not None:
            raise ValueError("source must be left out: this was saved with its examples")
        x = tensors["x"]
        return Examples(x, y[: len(x)]), Examples(tensors.get("held.x", x[:0]), held_y)
    known, places = tensors["digests"], tensors["places"]
    if source is None:
        raise ValueError(
            f"source must be given: this was fitted by keep='source' on {len(known):,} examples, which are not "
            "among what was saved. Give what fit took as x, as load(folder, model, source=dataset)"
        )
    labels = torch.empty_like(known)
    labels[places] = y[: len(places)]
    held_places = tensors.get("held.places")
    if held_places is not None:
        labels[held_places] = held_y
    origin = indexed.again(source, known, labels, bounds=bounds)
    given = Examples(indexed.Indexed(origin, places.cpu()), y[: len(places)])
    x_cal = tensors["held.x"] if held_places is None else indexed.Indexed(origin, held_places.cpu())
    return given, Examples(x_cal, held_y)


def _measured(far: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted sums of distances `(n, L)` in units of each place's mean, and these units."""
    # Places differ in scale; each counts in units of its own typical distance.
    scales = far.mean(0).clamp(min=1e-12)
    return (far / scales).sum(1).sort().values, scales


def hold_out(y: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of examples to keep and to hold out, each sorted: a random `fraction`, the same for a seed."""
    n = round(fraction * len(y))
    if not 0 < n < len(y):
        raise ValueError(
            f"calibration={fraction:g} holds out {n} of {len(y)} examples; at least 1 must be held out, and 1 kept: "
            f"give a fraction between {1 / len(y):.2g} and {1 - 1 / len(y):.2g}, or more examples"
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
