"""A search in parts, each over a share of the examples of every class: here, or one on each of a cluster's machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from immunonet import _check
from immunonet._imports import require
from immunonet.features.search import ExactIndex, Kept

# How often a part is asked, by an actor that is made anew where one died or has not answered for so many seconds.
TRIES = 5
PATIENCE = 120


class Parts(Protocol):
    """What searches in all parts at once: a method of every part's index, by name, with the same arguments or own."""

    def all(self, method: str, *args: Any, **settings: Any) -> list[Any]:
        """Return what each part's index gives for the same arguments."""

    def one(self, part: int, method: str, *args: Any) -> Any:
        """Return what one part's index gives."""


class Here:
    """Parts in this process, one after the other."""

    def __init__(self, indices: Sequence[ExactIndex]) -> None:
        self._indices = indices

    def all(self, method: str, *args: Any, **settings: Any) -> list[Any]:
        """Return what each part's index gives for the same arguments."""
        return [getattr(index, method)(*args, **settings) for index in self._indices]

    def one(self, part: int, method: str, *args: Any) -> Any:
        """Return what one part's index gives."""
        return getattr(self._indices[part], method)(*args)


class OnRay:
    """Parts as actors of the Ray cluster that is connected, spread over its machines; one that dies is made again.

    They claim no CPU, so that a machine may take over another's. OSError where an answer does not come.
    """

    def __init__(self, indices: Sequence[ExactIndex]) -> None:
        self._ray = require("ray", "cluster")
        self._actor = self._ray.remote(num_cpus=0)(_Part).options(scheduling_strategy="SPREAD")
        # Held here, for an actor that is made again is given its part again.
        self._held = [self._ray.put(index) for index in indices]
        self._actors = [self._actor.remote(held) for held in self._held]

    def all(self, method: str, *args: Any, **settings: Any) -> list[Any]:
        """Return what each part's index gives for the same arguments."""
        return self._asked(range(len(self._actors)), method, args, settings)

    def one(self, part: int, method: str, *args: Any) -> Any:
        """Return what one part's index gives."""
        return self._asked([part], method, args, {})[0]

    def _asked(self, parts: Sequence[int], method: str, args: tuple[Any, ...], settings: dict[str, Any]) -> list[Any]:
        ray, sent, found = self._ray, self._ray.put((args, settings)), dict[int, Any]()
        lost = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)
        for _ in range(TRIES):
            flying = {part: self._actors[part].ask.remote(method, sent) for part in parts if part not in found}
            for part, value in flying.items():
                try:
                    found[part] = ray.get(value, timeout=PATIENCE)
                except lost:
                    ray.kill(self._actors[part])
                    self._actors[part] = self._actor.remote(self._held[part])
            if len(found) == len(parts):
                return [found[part] for part in parts]
        raise OSError(
            f"a search in {len(self._actors)} parts has no answer from {len(parts) - len(found)} of them, each of "
            f"which was made {TRIES} times: see `ray status`, and whether a machine has the memory for a part"
        )


class _Part:
    """An actor that holds one part."""

    def __init__(self, index: ExactIndex) -> None:
        self._index = index

    def ask(self, method: str, sent: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, settings = sent
        return getattr(self._index, method)(*args, **settings)


class PartitionedIndex(Kept):
    """An exact index in parts: each gives a shortlist, and the nearest of all of these are the nearest.

    Distances are those of the one index to the bit: all parts keep its centre. `on`: `Here` or `OnRay`.
    """

    centre: Tensor

    def __init__(self, whole: Kept, partitions: int, on: Callable[[Sequence[ExactIndex]], Parts] = Here) -> None:
        super().__init__()
        partitions = _check.integer("partitions", partitions)
        self._numbers, indices = zip(*whole.shares(partitions), strict=True)
        self.parts = on(indices)
        self._width, self._examples = indices[0].width, sum(map(len, self._numbers))
        self._least = {True: min(min(own.counts) for own in indices), False: min(map(len, self._numbers))}
        self.register_buffer("centre", indices[0].centre, persistent=False)
        part, place = torch.empty(2, self._examples, dtype=torch.long)
        for i, numbers in enumerate(self._numbers):
            part[numbers.cpu()], place[numbers.cpu()] = i, torch.arange(len(numbers))
        self._part, self._place = part, place

    @property
    def width(self) -> int:
        """D, the values of a feature vector."""
        return int(self._width)

    def nearest(self, features: Tensor, k: int, *, by_class: bool = True) -> tuple[Tensor, Tensor]:
        """Return distances and examples of the k nearest of every class, `(B, C, k)`, or of all, `(B, k)`.

        ValueError where a part has fewer of a class than k.
        """
        if k > (least := self._least[by_class]):
            raise ValueError(
                f"partitions={len(self._numbers)} leaves {least} examples{' of a class' * by_class} to a part, fewer "
                f"than the {k} that are looked for: give fewer partitions"
            )
        found = self.parts.all("nearest", features, k, by_class=by_class)
        near = torch.cat([distances for distances, _ in found], -1)
        numbers = torch.cat([own.to(i.device)[i] for own, (_, i) in zip(self._numbers, found, strict=True)], -1)
        distances, order = near.sort(dim=-1, stable=True)
        return distances[..., :k], numbers.gather(-1, order[..., :k])

    def within(self, features: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many examples of every class lie within `radius` `(B,)`, and their least number, `(B, C)`."""
        found = self.parts.all("within", features, radius)
        least = []
        for own, (_, first) in zip(self._numbers, found, strict=True):
            # What a part has none of has its number of examples there.
            numbers = torch.cat([own, own.new_tensor([self._examples])]).to(first.device)
            least.append(numbers[first])
        return torch.stack([inside for inside, _ in found]).sum(0), torch.stack(least).amin(0)

    def rows(self, examples: Tensor) -> Tensor:
        """Return the features `(*, D)` of examples `(*)`."""
        asked = examples.cpu()
        out = self.centre.new_empty(*examples.shape, self._width)
        for i in range(len(self._numbers)):
            mine = self._part[asked] == i
            if bool(mine.any()):
                out[mine.to(out.device)] = self.parts.one(i, "rows", self._place[asked[mine]].to(examples.device))
        return out
