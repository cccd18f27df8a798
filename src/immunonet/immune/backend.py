"""Chooses between the torch operators, which run anywhere, and the fused numba loops for the CPU."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from immunonet.immune import operators
from immunonet.immune.operators import Align, Family, Mutation


class Offspring(Protocol):
    """The signature of `operators.offspring`."""

    def __call__(
        self,
        cells: Tensor,
        family: Family,
        parents: Tensor,
        share: Tensor,
        cross_keys: Tensor,
        mutate_keys: Tensor,
        mutation: Mutation,
    ) -> None:
        """Replace families in place."""


@functools.cache
def _numba() -> ModuleType | None:
    try:
        from immunonet.immune import fused
    except (ImportError, RuntimeError):  # not installed, or no folder where numba may keep what it compiled
        return None
    return fused


def fused_for(cells: Tensor) -> ModuleType | None:
    """Return the fused loops if they are installed and can run on `cells`."""
    return _numba() if cells.device.type == "cpu" and cells.dtype == torch.float32 else None


def offspring_for(cells: Tensor) -> Offspring:
    """Return the fastest `offspring` for a population."""
    fused = fused_for(cells)
    return operators.offspring if fused is None else fused.offspring


def register_for(images: Tensor) -> Align:
    """Return the fastest `register` for images."""
    fused = fused_for(images)
    return operators.register if fused is None else fused.register


def approach(cells: Tensor, antigens: Tensor, reach: float, ridge: float | None) -> Tensor:
    """Do what `operators.approach` does, with the fastest `register`."""
    return operators.approach(cells, antigens, reach, ridge, register_for(cells))
