"""What ties a defence by nearest neighbours to a memory: signatures, and cells that join the repertoire."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from immunonet import _store
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.memory.space import Space, learned
from immunonet.memory.store import Memory

# Inputs by whose features a memory tells another model.
SIGNED = 4


class RememberingDefence(NeighbourDefence):
    """A defence by nearest neighbours that may answer from a `memory`, and whose repertoire it may harden."""

    memory: Memory | None = None
    _space: Space | None = None

    def _have(self, memory: Memory | str | Path | None) -> None:
        """Take a memory, or its folder, that the constructor was given."""
        if not isinstance(memory, Memory | str | Path | None):
            raise TypeError(f"memory must be a Memory, its folder, or None, got {memory!r}")
        self.memory = Memory(memory) if isinstance(memory, str | Path) else memory

    @torch.no_grad()
    def remember_in(self, memory: Memory) -> None:
        """Answer from a memory from now on; ValueError where it is another model's."""
        self.check_current()
        self._space, self.memory = self._bound(memory), memory

    @torch.inference_mode(False)
    @torch.no_grad()
    def harden(self, memory: Memory | None) -> Self:
        """Let the confirmed entries' cells join the repertoire, in place of those that joined before; return self.

        Of every confirmed entry those kept cells join whose label is the confirmed one; the antigen itself does not.
        The calibration examples are scored again. The same version of a memory gives the same answers, so that after
        `memory.rollback` this brings back those of before. None: the repertoire is again what `fit` took. Nothing may
        be asked meanwhile; what fails changes nothing.

        ValueError for a memory that is another model's or no model's yet, that keeps signatures alone, or in which no
        confirmed entry has such a cell.
        """
        self.check_current()
        self._check_held()
        before = self.repertoire, self.indices, self.held, self.calibration
        try:
            self._join(*self._joining(memory))
            self._measure(self.held)
        except BaseException:
            self.repertoire, self.indices, self.held, self.calibration = before
            raise
        return self

    def _check_held(self) -> None:
        if not len(self.held):
            raise ValueError(
                f"this {type(self).__name__} was saved without its calibration examples: call calibrate(x, y) first"
            )

    def _joining(self, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """Return the cells `(M, *S')` of a memory that join the repertoire, and their labels `(M,)`; None: no cells."""
        if memory is None:
            return self.repertoire.inputs(slice(0)), self.repertoire.y[:0]
        if not isinstance(memory, Memory):
            raise TypeError(f"memory must be a Memory or None, got {memory!r}")
        if memory.space is None:
            raise ValueError(f"memory {memory.where} belongs to no model yet: remember() and confirm() something first")
        self._bound(memory)
        cells, labels = memory.confirmed_cells()
        if not len(cells):
            raise ValueError(
                f"memory {memory.where} must have confirmed entries with cells of the confirmed label, got none: "
                "confirm() some, or take back what joined before by harden(None)"
            )
        return cells.to(self.device), labels.to(self.device)

    @torch.no_grad()
    def signatures(self, features: Sequence[Tensor]) -> Tensor | None:
        """Return the signatures `(B, W)` of features, `(B, D)` per layer, in the space of the memory, if there is one.

        ValueError where the memory is another model's.
        """
        if self.memory is None:
            return None
        if self._space is None:
            self._space = self._bound(self.memory)
        return self._space.sign(features)

    def _bound(self, memory: Memory) -> Space:
        """Return the space of a memory, which is made if it has none yet; ValueError where it is another model's."""
        low, high = self.bounds.tensors(self.repertoire.inputs(slice(0)), self.shape)
        drawn = torch.rand(SIGNED, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        probes = self._described(low + (high - low) * drawn)[1]
        fingerprint = self._fingerprint()
        known: dict[str, Any] = {
            "classes": self.classes, "shape": self.shape,
            "cell_shape": tuple(self._cells(self.repertoire.inputs(slice(1))).shape[1:]), "fingerprint": fingerprint,
        }  # fmt: skip
        return memory.bind(
            fingerprint,
            probes,
            lambda: learned(self._stored, len(self.repertoire.x), self.calibration.scales, probes, **known),
        )

    def _stored(self, examples: Tensor) -> list[Tensor]:
        return [self.index(layer).rows(examples) for layer in range(len(self.indices))]

    def _fingerprint(self) -> str:
        """Return what tells a memory's model from another: its weights, and where it is looked at."""
        weights = [t for net in self._networks() for t in (*net.parameters(), *net.buffers())]
        return _store.fingerprint([_store.digest(weights), list(self.layers), self.space, self.metric])

    def with_settings(self, **changes: Any) -> Self:
        """Return a twin with some settings changed, and the same memory unless another, or None, is given."""
        return super().with_settings(**({"memory": self.memory} | changes))

    def identity(self) -> list[Any]:
        """Return all that answers depend on, what the memory holds among it."""
        return [*super().identity(), *([] if self.memory is None else [self.memory.identity()])]
