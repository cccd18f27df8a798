"""What an answer costs, and RAILS less one of its parts."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from immunonet import models
from immunonet.defences.rails import RAILS
from immunonet.evaluation.asking import Subject

_SINGLE = 5
_BATCHES = (8, 32, 128)


def measure(subject: Subject, base: nn.Module, x: Tensor, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return seconds per image at batch 1 (the median of a few) and at the best batch, and forward passes per image.

    A forward pass is one input that enters `base`, wherever the pass ends; 0 where a defence has no need of it.
    """
    single = sorted(subject.labels(part, seeds[:1])[1] for part in x[:_SINGLE].split(1))
    sizes = sorted({min(size, len(x)) for size in _BATCHES})
    batches = {size: subject.labels(x[:size], seeds[:1])[1] / size for size in sizes}
    best = min(batches, key=lambda size: batches[size])
    with models.counted(base) as entered:
        subject.labels(x[:best], seeds[:1])
    return {
        "seconds_batch_1": single[len(single) // 2],
        "seconds_best_batch": batches[best],
        "best_batch": best,
        "forward_passes": entered() / best,
    }


def without(rails: RAILS) -> dict[str, RAILS]:
    """Return RAILS without crossover, mutation, selection, or any generation, on the same fitted repertoire."""
    changes: dict[str, dict[str, Any]] = {
        "crossover": {"crossover": None},
        "mutation": {"mutation_rate": 0.0},
        "selection": {"temperature": 1e9},  # every cell is as likely a parent as any other
        "generations": {"generations": 0},
    }
    return {
        part: rails.with_settings(maturation=[dataclasses.replace(m, **change) for m in rails.maturations])
        for part, change in changes.items()
    }
