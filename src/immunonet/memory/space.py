"""The space that signatures lie in: principal directions of a model's features, and a calibrated radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from immunonet.features.search import Signatures

# Values of a signature: one direction fewer, and the length of what the directions leave out.
WIDTH = 64
# Examples that directions are learned from, others that the radius is calibrated on, and those they are compared with.
LEARNED, HELD, OTHERS = 1024, 1024, 10_000
# The share of clean inputs that lie within the radius of a different image.
CONFUSED = 0.01

Features = Callable[[Tensor], list[Tensor]]
"""The features, `(n, D)` per layer, of the examples `(n,)` of a repertoire."""


@dataclass(frozen=True)
class Space:
    """Signatures of one model's features, which are those of several layers side by side, in units of `scales` `(L,)`.

    `mean` `(D,)`, `directions` `(D, p)`, those of the largest variance first; `spread` `(p + 1,)`, the standard
    deviation of signatures; `radius`: nearer than this, two antigens count as one; `probes` `(n, p + 1)`, signatures of
    fixed inputs, by which another model is told, as by `fingerprint`; `classes`, and the `shape` of antigens and the
    `cell_shape` of cells.
    """

    mean: Tensor
    directions: Tensor
    scales: Tensor
    spread: Tensor
    probes: Tensor
    radius: float
    fingerprint: str
    classes: int
    shape: tuple[int, ...]
    cell_shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """How many values a signature has."""
        return self.directions.shape[1] + 1

    def sign(self, features: Sequence[Tensor]) -> Tensor:
        """Return the signatures `(n, p + 1)` of features, `(n, D)` per layer."""
        signs = Signatures(self.mean, self.directions).to(features[0].device)
        return signs.sign(joined(features, self.scales))

    def check(self, fingerprint: str, probes: Sequence[Tensor], where: str) -> None:
        """Raise ValueError where these are not the fingerprint and the probes' features of its own model."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"memory {where} is another model's (or of other layers): fingerprint {self.fingerprint[:12]}, this "
                f"one's is {fingerprint[:12]}. Load the weights it was made with, or use another memory"
            )
        if sum(part.shape[1] for part in probes) == len(self.mean):
            found = self.sign(probes).cpu()
            if torch.allclose(found, self.probes, rtol=1e-3, atol=1e-3 * float(self.probes.abs().max())):
                return
        raise ValueError(
            f"memory {where} was made with the same weights, but features come out differently here (another version "
            "of torch, or another machine): use another memory"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        names = ("mean", "directions", "scales", "spread", "probes")
        return {name: getattr(self, name) for name in names}

    def record(self) -> dict[str, Any]:
        """Return all else, as JSON."""
        names = ("radius", "fingerprint", "classes", "shape", "cell_shape")
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in names}

    @classmethod
    def made(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> Self:
        """Return what `tensors` and `record` gave."""
        known: dict[str, Any] = {**tensors, **record}
        shapes = {name: tuple(known[name]) for name in ("shape", "cell_shape")}
        return cls(**(known | shapes))


def learned(features: Features, examples: int, scales: Tensor, probes: Sequence[Tensor], **known: Any) -> Space:
    """Return the space of a repertoire of so many examples, whose features are asked for.

    Directions are those of a random sample. The radius: of clean examples that directions were not learned from, at
    most a share `CONFUSED` is nearer than it to any other of up to `OTHERS` examples.
    """
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(0)).to(scales.device)
    sample = order[: min(LEARNED, math.ceil(examples / 2))]
    values = joined(features(sample), scales)
    found = Signatures.of(values.clone(), min(WIDTH - 1, values.shape[1], len(sample) - 1) or 1)
    assert found is not None  # None only where a share is asked for
    found.directions = found.directions.flip(1)
    own = found.sign(values)
    rest = torch.cat([found.sign(joined(features(part), scales)) for part in order[len(sample) : OTHERS].split(500)])
    return Space(
        mean=found.mean.cpu(),
        directions=found.directions.cpu(),
        scales=scales.cpu(),
        spread=own.std(0).cpu(),
        probes=found.sign(joined(probes, scales)).cpu(),
        radius=radius_of(nearest_other(rest, torch.cat([rest, own]), HELD)),
        **known,
    )


def nearest_other(held: Tensor, everything: Tensor, most: int) -> Tensor:
    """Return the distance of the first `most` of `held` to the nearest in `everything`, which begins with `held`."""
    n = min(most, len(held))
    found = []
    for part in torch.arange(n).split(128):
        distances = torch.cdist(held[part], everything, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(part)), part] = torch.inf
        found.append(distances.amin(1))
    return torch.cat(found)


def radius_of(distances: Tensor, confused: float = CONFUSED) -> float:
    """Return the largest radius such that at most a share of distances `(n,)` is smaller."""
    return float(distances.sort().values[math.floor(confused * len(distances))])


def joined(features: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Return features, `(n, D)` per layer, side by side, each layer in units of its scale."""
    return torch.cat([part / scale.to(part.device) for part, scale in zip(features, scales, strict=True)], 1)
