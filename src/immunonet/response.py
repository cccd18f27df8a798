"""What an immune response consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Labels that a response shows of itself.
SHOWN = 8


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"Cells(x {_shape(self.x)})"

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


@dataclass(frozen=True, repr=False)
class Trace:
    """The learning curve of one layer's maturation, generation 0 (expansion) to G.

    `affinity_mean`, `affinity_best`, `votes`: `(G + 1, B, C)`; `entropy`: `(G + 1, B)`, of the votes over
    labels, in nats. An antigen that stopped early keeps its last values.
    """

    affinity_mean: Tensor
    affinity_best: Tensor
    votes: Tensor
    entropy: Tensor

    def __repr__(self) -> str:
        return f"Trace(votes {_shape(self.votes)})"

    @staticmethod
    def cat(parts: Sequence[Trace]) -> Trace:
        """Return the curves of several batches of antigens as one."""
        return Trace(
            affinity_mean=torch.cat([part.affinity_mean for part in parts], 1),
            affinity_best=torch.cat([part.affinity_best for part in parts], 1),
            votes=torch.cat([part.votes for part in parts], 1),
            entropy=torch.cat([part.entropy for part in parts], 1),
        )


@dataclass(frozen=True, repr=False)
class Imprint:
    """What a memory keeps of antigens beside their response.

    `signature` `(B, W)` of their features; `far` `(B, L)`, their mean distance to the nearest examples at each layer;
    `entries`: per antigen the id of the entry that it was recalled from, or None; `fingerprint` of the model.
    """

    signature: Tensor
    far: Tensor
    entries: tuple[str | None, ...]
    fingerprint: str

    def __repr__(self) -> str:
        return f"Imprint(signature {_shape(self.signature)})"

    @staticmethod
    def cat(parts: Sequence[Imprint]) -> Imprint:
        """Return the imprints of several batches as one."""
        return Imprint(
            signature=torch.cat([part.signature for part in parts]),
            far=torch.cat([part.far for part in parts]),
            entries=tuple(one for part in parts for one in part.entries),
            fingerprint=parts[0].fingerprint,
        )


@dataclass(frozen=True, repr=False)
class ImmuneResponse:
    """The answer of RAILS to a batch of antigens.

    `labels` `(B,)` int64. `votes` `(B, C)`, the consensus, sums to 1. `credibility` `(B,)` in (0, 1], the
    conformal p-value of the best-supported label among the naive cells. `foreign` `(B,)` bool: the antigen
    is farther from the repertoire than all but `false_alarm` of the calibration examples. `generations`
    `(B,)` int64, the last generation that ran (the most over layers). `plasma`, `memory`: the cells that
    voted and those kept. Of cells exactly as near as the last plasma cell any may be in `plasma` or in `memory`, but
    all of them have a share in `votes`. `trace`: one `Trace` per layer if asked for.

    `recalled` `(B,)` bool: answered from memory, where there is one. Such an antigen has no cells of its own: their
    labels and origins are -1, their affinity -inf, and its generations 0. `innate` `(B,)` bool: answered by the network
    itself, whose softmax are its votes, and without cells likewise. `imprint`: what the memory keeps beside, None
    without one.
    """

    labels: Tensor
    votes: Tensor
    credibility: Tensor
    foreign: Tensor
    innate: Tensor
    recalled: Tensor
    generations: Tensor
    plasma: Cells
    memory: Cells
    trace: tuple[Trace, ...] | None = None
    imprint: Imprint | None = None

    def __repr__(self) -> str:
        n, first = len(self.labels), self.labels[:SHOWN].tolist()
        parts = [
            f"{n} antigen{'s' * (n != 1)}",
            f"labels {', '.join(map(str, first))}{', ...' * (n > SHOWN)}",
            f"{int(self.foreign.sum())} foreign",
            *([f"{int(self.innate.sum())} innate"] if self.innate.any() else []),
            *([f"{int(self.recalled.sum())} recalled"] if self.recalled.any() else []),
            f"votes {_shape(self.votes)}",
            f"plasma {_shape(self.plasma.x)}",
            f"memory {_shape(self.memory.x)}",
        ]
        if self.trace:
            parts.append(f"trace {len(self.trace)} x {_shape(self.trace[0].votes)}")
        return f"ImmuneResponse({'; '.join(parts)})"

    @staticmethod
    def cat(parts: Sequence[ImmuneResponse]) -> ImmuneResponse:
        """Return the responses to consecutive batches as one."""
        traces = [part.trace or () for part in parts]
        imprints = [part.imprint for part in parts if part.imprint is not None]
        return ImmuneResponse(
            labels=torch.cat([part.labels for part in parts]),
            votes=torch.cat([part.votes for part in parts]),
            credibility=torch.cat([part.credibility for part in parts]),
            foreign=torch.cat([part.foreign for part in parts]),
            innate=torch.cat([part.innate for part in parts]),
            recalled=torch.cat([part.recalled for part in parts]),
            generations=torch.cat([part.generations for part in parts]),
            plasma=Cells.cat([part.plasma for part in parts]),
            memory=Cells.cat([part.memory for part in parts]),
            trace=parts[0].trace and tuple(Trace.cat(layer) for layer in zip(*traces, strict=True)),
            imprint=Imprint.cat(imprints) if len(imprints) == len(parts) else None,
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
