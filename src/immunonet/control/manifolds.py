"""Manifolds of clean states as modules: each maps states `(B, *S)` to their projections `(B, *S)`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet.control.subspaces import Basis, States, basis


class Subspace(nn.Module):
    """The affine subspace through `mean` `(D,)` along orthonormal `directions` `(D, r)`.

    `channels`: whether D are the channels of states `(B, C, H, W)`, every place of which is projected by itself.
    """

    mean: Tensor
    directions: Tensor
    linear = True
    """Whether it is an orthogonal projection, for which controls have a closed form."""

    def __init__(self, mean: Tensor, directions: Tensor, *, channels: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)

    @classmethod
    def fitted(cls, states: States, rank: float | int, *, channels: bool, seed: int) -> tuple[Subspace, Basis]:
        """Return the subspace of states `(n, *S)`, given in batches anew at every call, and what was found of it."""
        found = basis(lambda: (_rows(part, channels) for part in states()), rank, seed=seed)
        return cls(found.mean, found.directions, channels=channels), found

    def within(self, delta: Tensor) -> Tensor:
        """Return the part of differences of states `(B, *S)` that lies along the directions."""
        rows = _rows(delta, self.channels)
        directions = self.directions.to(rows)
        return self._shaped((rows @ directions) @ directions.T, delta)

    def forward(self, states: Tensor) -> Tensor:
        """Return the projections of states `(B, *S)`: the nearest points of the subspace."""
        rows = _rows(states, self.channels)
        mean, directions = self.mean.to(rows), self.directions.to(rows)
        return self._shaped(mean + ((rows - mean) @ directions) @ directions.T, states)

    def _shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        if not self.channels:
            return rows.view_as(like)
        return rows.reshape(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


def _rows(states: Tensor, channels: bool) -> Tensor:
    """Return states as rows `(n, D)`: each a row, or the channels at each of its places."""
    return states.movedim(1, -1).reshape(-1, states.shape[1]) if channels else states.flatten(1)


class Denoiser(nn.Module):
    """An autoencoder of states `(B, C, H, W)` or `(B, D)`, which adds to a state what is missing to its projection.

    Images: convolutions down to a quarter of the sides (a half where they are shorter than 8) and up again, with the
    finer states added on the way (`residual`), or through the bottleneck alone, as published. Vectors: three linear
    layers. States are measured from `mean`, in units of `scale`, the mean and standard deviation of clean ones.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int], *, width: int, residual: bool, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.residual = residual
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        if len(shape) == 3:
            self._build_for_images(shape, width)
        else:
            values = math.prod(shape)
            self.down = nn.ModuleList([nn.Sequential(nn.Flatten(), nn.Linear(values, 8 * width), nn.ELU())])
            self.up = nn.ModuleList([nn.Sequential(nn.Linear(8 * width, values), nn.Unflatten(1, tuple(shape)))])
            self.middle = nn.Sequential(nn.Linear(8 * width, 4 * width), nn.ELU(), nn.Linear(4 * width, 8 * width))

    def _build_for_images(self, shape: Sequence[int], width: int) -> None:
        channels, side = shape[0], min(shape[1:])
        steps = 2 if side >= 8 else 1
        widths = [width * 2**i for i in range(steps + 1)]
        down = [_convolutions(channels, widths[0])]
        down += [_convolutions(a, b, stride=2) for a, b in itertools.pairwise(widths)]
        self.down = nn.ModuleList(down)
        self.middle = _convolutions(widths[-1], widths[-1])
        up = [_convolutions(b, a) for a, b in itertools.pairwise(widths)][::-1]
        self.up = nn.ModuleList([*up, nn.Conv2d(widths[0], channels, 3, padding=1)])

    def forward(self, states: Tensor) -> Tensor:
        """Return the projections of states `(B, *S)`."""
        inside = (states - self.mean) / self.scale
        found, finer = inside, list[Tensor]()
        for step in self.down:
            found = step(found)
            finer.append(found)
        found = self.middle(found)
        for step in self.up[:-1]:
            finer.pop()
            found = F.interpolate(found, size=finer[-1].shape[2:], mode="nearest")
            found = step(found) + finer[-1] if self.residual else step(found)
        found = self.up[-1](found)
        projected: Tensor = self.mean + self.scale * (inside + found if self.residual else found)
        return projected


def _convolutions(a: int, b: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ELU())


def off(manifold: nn.Module, states: Tensor) -> Tensor:
    """Return what is missing from states `(B, *S)` to their projections."""
    return project(manifold, states) - states


def project(manifold: nn.Module, states: Tensor) -> Tensor:
    """Return the projections of states `(B, *S)`; ValueError where they have another shape."""
    found: Tensor = manifold(states)
    if not isinstance(found, Tensor) or found.shape != states.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"manifold must map states {tuple(states.shape)} to projections of the same shape, got {shape} from "
            f"{type(manifold).__name__}"
        )
    return found


def flat_norm(states: Tensor) -> Tensor:
    """Return the Euclidean length of each state `(B, *S)`: `(B,)`."""
    length: Tensor = torch.linalg.vector_norm(states.flatten(1).float(), dim=1)
    return length
