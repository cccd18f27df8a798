"""What an immune response consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cells:
    """B cells of a batch of antigens, n per antigen, fittest first (per layer, where there are several).

    `x` `(B, n, *S)` in the space that cells live in; `label` `(B, n)` int64; `affinity` `(B, n)`, minus a
    Euclidean distance of features; `origin` `(B, n)` int64, the repertoire index of the naive cell that a
    cell descends from.
    """

    x: Tensor
    label: Tensor
    affinity: Tensor
    origin: Tensor

    def part(self, cells: slice) -> Cells:
        """Return a slice of each antigen's cells."""
        return Cells(self.x[:, cells], self.label[:, cells], self.affinity[:, cells], self.origin[:, cells])

    @staticmethod
    def cat(parts: Sequence[Cells], dim: int = 0) -> Cells:
        """Return several batches (dim 0), or several sets of cells per antigen (dim 1), as one."""
        return Cells(
            x=torch.cat([part.x for part in parts], dim),
            label=torch.cat([part.label for part in parts], dim),
            affinity=torch.cat([part.affinity for part in parts], dim),
            origin=torch.cat([part.origin for part in parts], dim),
        )


@dataclass(frozen=True)
class Trace:
    """The learning curve of one layer's maturation, generation 0 (expansion) to G.

    `affinity_mean`, `affinity_best`, `votes`: `(G + 1, B, C)`; `entropy`: `(G + 1, B)`, of the votes over
    labels, in nats. An antigen that stopped early keeps its last values.
    """

    affinity_mean: Tensor
    affinity_best: Tensor
    votes: Tensor
    entropy: Tensor

    @staticmethod
    def cat(parts: Sequence[Trace]) -> Trace:
        """Return the curves of several batches of antigens as one."""
        return Trace(
            affinity_mean=torch.cat([part.affinity_mean for part in parts], 1),
            affinity_best=torch.cat([part.affinity_best for part in parts], 1),
            votes=torch.cat([part.votes for part in parts], 1),
            entropy=torch.cat([part.entropy for part in parts], 1),
        )


@dataclass(frozen=True)
class ImmuneResponse:
    """The answer of RAILS to a batch of antigens.

    `labels` `(B,)` int64. `votes` `(B, C)`, the consensus, sums to 1. `credibility` `(B,)` in (0, 1], the
    conformal p-value of the best-supported label among the naive cells. `foreign` `(B,)` bool: the antigen
    is farther from the repertoire than all but `false_alarm` of the calibration examples. `generations`
    `(B,)` int64, the last generation that ran (the most over layers). `plasma`, `memory`: the cells that
    voted and those kept. `trace`: one `Trace` per layer if asked for.
    """

    labels: Tensor
    votes: Tensor
    credibility: Tensor
    foreign: Tensor
    generations: Tensor
    plasma: Cells
    memory: Cells
    trace: tuple[Trace, ...] | None = None
