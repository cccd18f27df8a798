"""What an immune response consists of."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from immunonet import _check, _looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Antigens that a response shows of itself.
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

    def named(self, labels: Tensor) -> Cells:
        """Return the same cells, their labels being places in `labels` `(B, M)`."""
        return Cells(self.x, labels.gather(1, self.label), self.affinity, self.origin)

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

    def among(self, labels: Tensor, naive_distances: Tensor) -> Trace:
        """Return the curve of classes `labels` `(B, M)` among all C; others keep their naive cells, and have no votes.

        `naive_distances` `(B, C, K)`.
        """
        mean, best = -naive_distances.mean(2), -naive_distances.amin(2)
        return Trace(
            affinity_mean=onto(mean, labels, self.affinity_mean),
            affinity_best=onto(best, labels, self.affinity_best),
            votes=onto(torch.zeros_like(mean), labels, self.votes),
            entropy=self.entropy,
        )

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
    without one. `antigens` `(B, *S)`: those that are answered. `source`: who asked about each, None where nobody is
    named.

    `print(response)` shows a table; `explain(i)` says, `plot(i)` and `animate(i, file)` show what answered antigen i.
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
    antigens: Tensor | None = None
    source: tuple[str, ...] | None = None

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

    def __str__(self) -> str:
        return _looks.text(self._table(), self._total())

    def _repr_html_(self) -> str:
        return _looks.markup("Immune response", self._table(), self._total())

    def explain(self, i: int, *, names: Sequence[str] | None = None) -> str:
        """Return in words what answered antigen `i`, and how much there is to it; `names`: one per class.

        ValueError or TypeError for an antigen that is not there, and for another number of names.
        """
        i, called = self._place(i), _check.class_names(names, self.votes.shape[1])
        answer = f"Antigen {i} is answered as {called[int(self.labels[i])]}"
        if self.recalled[i]:
            found = self._recalled(i, answer)
        elif self.innate[i]:
            found = [f"{answer} by the network itself: enough of its nearest training examples carry that label."]
        else:
            found = self._answered(i, answer, called)
        found.append(
            f"Its credibility is {float(self.credibility[i]):.2g}: about that share of the calibration examples have "
            "neighbours that agree no better with their own label."
        )
        if self.foreign[i]:
            found.append(
                "It looks foreign, farther from the training examples than clean inputs are: do not rely on it."
            )
        return " ".join(found)

    def plot(
        self,
        i: int,
        *,
        names: Sequence[str] | None = None,
        repertoire: Tensor | None = None,
        bounds: Any = (0.0, 1.0),
    ) -> Figure:
        """Return a figure of the response to antigen `i`: votes, affinities, the learning curve if it was traced.

        Images are drawn too, between their `bounds`, with the fittest cells; cells of a hidden layer by the examples
        that they descend from, where `repertoire` `(N, *S)` (`rails.repertoire.shown`) is given. `names`: one per
        class. Notebooks show it, `.savefig("response.png")` writes it. Needs `immunonet[report]`. ValueError or
        TypeError that names the argument.
        """
        figure: Figure = _drawing().figure(
            self, self._place(i), names=_check.class_names(names, self.votes.shape[1]), repertoire=repertoire,
            bounds=bounds,
        )  # fmt: skip
        return figure

    def animate(
        self, i: int, file: str | Path, *, names: Sequence[str] | None = None, layer: int = 0, seconds: float = 0.6
    ) -> Path:
        """Return the path of a GIF: votes and affinities of antigen `i` in each generation.

        It is written whole or not at all. The response must be one with a trace; `layer`: which of its traces, by
        number; `seconds` per generation; `names`: one per class. Needs `immunonet[report]`. ValueError or TypeError
        that names the argument.
        """
        if not self.trace:
            raise ValueError("trace must be there to animate a response, got None: ask respond(x, trace=True)")
        layer = _check.integer("layer", layer, least=0, most=len(self.trace) - 1)
        seconds = _check.number("seconds", seconds, least=0.01)
        called = _check.class_names(names, self.votes.shape[1])
        _drawing().animation(self.trace[layer], self._place(i), Path(file), names=called, seconds=seconds)
        return Path(file)

    def _place(self, i: object) -> int:
        n = len(self.labels)
        place = _check.integer("i", i, least=-n, most=n - 1)
        return place % n

    def _recalled(self, i: int, answer: str) -> list[str]:
        entry = self.imprint.entries[i] if self.imprint else "unknown"
        return [f"{answer} from memory, by entry {entry}: its features are within the radius of an antigen met before."]

    def _answered(self, i: int, answer: str, called: Sequence[str]) -> list[str]:
        after, origins = self._next(i), Counter(self.plasma.origin[i].tolist())
        last = int(self.generations[i])
        evolved = f"after generation {last}" if last else "without generations"
        following = "" if after is None else f"; {called[after]} comes next, with {self._share(i, after):.0%}"
        (most, count), n = origins.most_common(1)[0], self.plasma.origin.shape[1]
        several = f"{len(origins)} training examples, {count} of them from" if len(origins) > 1 else "training example"
        return [
            f"{answer} by the immune response: the label has {self._share(i, int(self.labels[i])):.0%} of the votes "
            f"{evolved}{following}.",
            f"The {n} plasma cells, the fittest of all, descend from {several} number {most}.",
        ]

    def _share(self, i: int, label: int) -> float:
        return float(self.votes[i, label])

    def _next(self, i: int) -> int | None:
        """Return the other label with most votes, if another has any."""
        others = self.votes[i].clone()
        others[self.labels[i]] = 0
        return int(others.argmax()) if bool(others.any()) else None

    def _table(self) -> list[Sequence[str]]:
        lines: list[Sequence[str]] = [("antigen", "label", "votes", "next", "credibility", "generations", "")]
        for i, label in enumerate(self.labels[:SHOWN].tolist()):
            after = self._next(i)
            known = ("foreign", self.foreign), ("innate", self.innate), ("recalled", self.recalled)
            marks = [word for word, on in known if on[i]]
            following = "" if after is None else f"{after} ({self._share(i, after):.2f})"
            figures = f"{self._share(i, label):.2f}", following, f"{float(self.credibility[i]):.2f}"
            lines.append((str(i), str(label), *figures, str(int(self.generations[i])), ", ".join(marks)))
        return lines

    def _total(self) -> str:
        n = len(self.labels)
        found = {"foreign": self.foreign, "innate": self.innate, "recalled": self.recalled}
        counts = ", ".join(f"{int(flags.sum())} {name}" for name, flags in found.items())
        return f"and {n - SHOWN} more; of all {n}: {counts}" if n > SHOWN else ""

    @staticmethod
    def cat(parts: Sequence[ImmuneResponse]) -> ImmuneResponse:
        """Return the responses to consecutive batches as one."""
        traces = [part.trace or () for part in parts]
        imprints = [part.imprint for part in parts if part.imprint is not None]
        antigens = [part.antigens for part in parts if part.antigens is not None]
        said = [part.source for part in parts if part.source is not None]
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
            antigens=torch.cat(antigens) if len(antigens) == len(parts) else None,
            source=tuple(one for part in said for one in part) if len(said) == len(parts) else None,
        )


def onto(all_classes: Tensor, labels: Tensor, values: Tensor) -> Tensor:
    """Return `all_classes` `(B, C)` with values `(..., B, M)` in the places of `labels` `(B, M)`: `(..., B, C)`."""
    out = all_classes.expand(*values.shape[:-1], -1).clone()
    return out.scatter_(-1, labels.expand(values.shape), values)


def _drawing() -> Any:
    # By name: reports are about responses, and imports point that way alone.
    return importlib.import_module("immunonet.report.responses")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
