"""Answers that spare an adaptive response, put among those that had one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from immunonet.response import Cells, ImmuneResponse, Imprint


@dataclass(frozen=True, kw_only=True)
class Spared:
    """Answers to B antigens, of which n need no cells: `hit` `(B,)` bool.

    Of those n: `labels`, `votes` `(n, C)`, `credibility`, `foreign`, and `far` `(n, L)`, their mean distances to the
    nearest examples. `by`: the field of a response that tells them from others.
    """

    by: ClassVar[str] = "innate"

    hit: Tensor
    labels: Tensor
    votes: Tensor
    credibility: Tensor
    foreign: Tensor
    far: Tensor


def joined(spared: Spared, met: ImmuneResponse, far: Tensor) -> tuple[ImmuneResponse, Tensor]:
    """Return the response to B antigens, and their mean distances `(B, L)`, of that to the B - n that were not spared.

    What a memory keeps of them is left out.
    """
    hit = spared.hit

    def flag(name: str) -> Tensor:
        return among(torch.full_like(spared.foreign, name == spared.by), getattr(met, name), hit)

    response = dataclasses.replace(
        met,
        labels=among(spared.labels, met.labels, hit),
        votes=among(spared.votes, met.votes, hit),
        credibility=among(spared.credibility, met.credibility, hit),
        foreign=among(spared.foreign, met.foreign, hit),
        generations=among(torch.zeros_like(spared.labels), met.generations, hit),
        plasma=without_cells(met.plasma, hit),
        memory=without_cells(met.memory, hit),
        innate=flag("innate"),
        recalled=flag("recalled"),
        imprint=None,
    )
    return response, among(spared.far, far, hit)


def imprinted(spared: Spared, signatures: Tensor, far: Tensor, met: Imprint) -> Imprint:
    """Return what a memory keeps of B antigens, of that of the B - n that were not spared.

    `signatures` `(B, W)` and `far` `(B, L)` are those of all B; those that were spared come from no entry.
    """
    return Imprint(signatures, far, traced(met.entries, ~spared.hit), met.fingerprint)


def among(values: Tensor, other: Tensor, hit: Tensor) -> Tensor:
    """Return `(B, ...)`: `values` `(n, ...)` where `hit` `(B,)`, and `other` `(B - n, ...)` elsewhere."""
    found = other.new_empty((len(hit), *other.shape[1:]))
    found[hit], found[~hit] = values.to(other.dtype), other
    return found


def traced(ids: Sequence[str | None], hit: Tensor) -> tuple[str | None, ...]:
    """Return per antigen the next of `ids` where `hit` `(B,)`, and None elsewhere."""
    left = iter(ids)
    return tuple(next(left) if one else None for one in hit.tolist())


def without_cells(cells: Cells, hit: Tensor) -> Cells:
    """Return the cells of `(B - n)` antigens as those of B: the others, where `hit`, have none."""
    n = int(hit.sum())

    def blank(values: Tensor, filling: float) -> Tensor:
        return among(values.new_full((n, *values.shape[1:]), filling), values, hit)

    return Cells(
        x=blank(cells.x, 0),
        label=blank(cells.label, -1),
        affinity=blank(cells.affinity, -torch.inf),
        origin=blank(cells.origin, -1),
    )
