"""Chooses between the torch operators, which run anywhere, and the fused numba loops for the CPU."""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Protocol, cast

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
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)
    try:
        from immunonet.immune import fused
    except (ImportError, RuntimeError):  # not installed, or no folder where numba may keep what it compiled
        return None
    return fused


def _one_thread() -> None:
    # The parent's threads are not in the child, and GNU OpenMP, which most builds of torch use, would wait for them.
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logging.getLogger("immunonet").info(
            "torch and the fused loops use one thread in this forked process, because OpenMP does not survive a fork: "
            "start workers with the method 'spawn' to give them several"
        )


def fused_for(cells: Tensor) -> ModuleType | None:
    """Return the fused loops if they are installed and can run on `cells`."""
    return _numba() if cells.device.type == "cpu" and cells.dtype == torch.float32 else None


def offspring_for(cells: Tensor) -> Offspring:
    """Return the fastest `offspring` for a population."""
    return cast(Offspring, _home("offspring", cells).offspring)


def register_for(images: Tensor) -> Align:
    """Return the fastest `register` for images."""
    return cast(Align, _home("register", images).register)


def _home(name: str, cells: Tensor) -> ModuleType:
    """Return the module whose operator runs: not `fused` where a function that its twin repeats was replaced."""
    fused = fused_for(cells)
    replaced = any(getattr(operators, part.__name__) is not part for part in operators.FUSED[name])
    return operators if fused is None or replaced else fused


def approach(cells: Tensor, antigens: Tensor, reach: float, ridge: float | None) -> Tensor:
    """Do what `operators.approach` does, with the fastest `register`."""
    return operators.approach(cells, antigens, reach, ridge, register_for(cells))
