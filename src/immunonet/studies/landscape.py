"""The loss in the plane through both ends and the bend of a path, and the parts of the work that measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from immunonet import _store, models
from immunonet._identity import identity
from immunonet.attacks import Attack
from immunonet.defences.path import ModePath
from immunonet.evaluation.bench import Part, Value
from immunonet.evaluation.lab import Lab
from immunonet.evaluation.records import VERSION

# How far the plane reaches beyond ends and bend, as a share of the distance between the ends.
_MARGIN = 0.2


@dataclass(frozen=True)
class Plane:
    """The plane of a path with one bend, in units of the distance between its ends: these lie at (0, 0) and (1, 0).

    Losses are measured at `side` places along either axis, on the first `images` of validation, under the worst of the
    attacks `methods` for every image.
    """

    path: ModePath
    side: int
    methods: tuple[Attack, ...]
    images: int

    @property
    def exists(self) -> bool:
        """Whether one bend and two different ends span a plane."""
        first, *_, last = map(_flat, self.path.corners)
        return len(self.path.bends) == 1 and not torch.equal(first, last)

    def parts(self, lab: Lab, about: str) -> list[Part]:
        """Return what gives the losses, row by row."""
        path = self.path
        xs, ys = self.grid()
        known: list[Any] = [_store.digest(part.state_dict().values()) for part in (path, *path.ends)]
        known += [VERSION, identity(path.ends[0]), "" if path.images is None else _store.digest([path.images])]
        known += [[method.describe() for method in self.methods], lab.digest("validation", slice(0, self.images))]
        return [
            Part(
                key=_store.fingerprint(["plane", known, xs, y]), run=_row, args=(self, xs, y), about=about,
                cost=float(10 * self.images * self.side),
            )
            for y in ys
        ]  # fmt: skip

    def told(self, losses: Sequence[Value], places: Sequence[float]) -> dict[str, Any]:
        """Return the losses with their coordinates, those of the bend, and of the path's points at `places`."""
        xs, ys = self.grid()
        curve = [list(self.coordinates(self.path.weights(t))) for t in places]
        return {"x": xs, "y": ys, "loss": list(losses), "bend": list(self._bend), "curve": curve}

    def grid(self) -> tuple[list[float], list[float]]:
        """Return the coordinates along either axis: ends and bend, and a margin around them."""
        x, y = self._bend
        spans = []
        for values in ((0.0, 1.0, x), (0.0, y)):
            low, high = min(values) - _MARGIN, max(values) + _MARGIN
            spans.append([round(low + (high - low) * i / (self.side - 1), 6) for i in range(self.side)])
        return spans[0], spans[1]

    @property
    def _bend(self) -> tuple[float, float]:
        return self.coordinates(self.path.corners[1])

    def coordinates(self, weights: dict[str, Tensor]) -> tuple[float, float]:
        """Return where weights of the path, by name, lie in the plane."""
        first, across, off = self.axes()
        from_first, scale = _flat(weights) - first, across @ across
        return float(from_first @ across / scale), float(from_first @ off / scale)

    def axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first end, and two directions at a right angle, as long as the ends are apart."""
        first, bend, last = map(_flat, self.path.corners)
        across, off = last - first, bend - first
        off = off - across * (off @ across) / (across @ across)
        size = off.norm()
        return first, across, off * (across.norm() / size) if size > 0 else off


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in weights.values()])


def _row(lab: Lab, plane: Plane, xs: Sequence[float], y: float) -> Value:
    """Return the mean losses of a row of the plane."""
    path, (first, across, off) = plane.path, plane.axes()
    inputs, labels = lab.images("validation", slice(0, plane.images))
    found = []
    for x in xs:
        flat, net, at = first + x * across + y * off, path.at(0.0), 0
        with torch.no_grad():
            for name in path.names:
                parameter = net.get_parameter(name)
                parameter.copy_(flat[at : at + parameter.numel()].view_as(parameter))
                at += parameter.numel()
        path.settle(net)
        points = [method(net, inputs, labels).adversarials for method in plane.methods]
        with torch.no_grad():
            each = [F.cross_entropy(models.logits(net, point), labels, reduction="none") for point in points]
        found.append(float(torch.stack(each).amax(0).mean()))
    return found
