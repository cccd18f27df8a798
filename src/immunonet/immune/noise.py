"""The random numbers of a maturation, a function of seed, layer and (unless shared) antigen alone."""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor


class Noise:
    """Uniform numbers in [0, 1): one stream for all antigens of a batch, or one for each."""

    def __init__(self, seeds: list[int], *, shared: bool, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._shared = shared
        self._device = device

    def draw(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the next numbers `shape`, or `(b, *shape)` for the antigens `rows` `(b,)` if each has its own."""
        if self._shared:
            return torch.rand(shape, generator=self._generators[0], device=self._device)
        own = [self._generators[row] for row in rows.tolist()]
        return torch.stack([torch.rand(shape, generator=g, device=self._device) for g in own])


def derive(*parts: object) -> int:
    """Return a seed in [0, 2**63) that depends on every part."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def identities(x: Tensor) -> list[str]:
    """Return one name per antigen of `x` `(B, *S)`: its content, and a count where the same antigen comes again.

    Private noise that follows the content does not change with batch size, order or sharding.
    """
    seen: Counter[str] = Counter()
    names = []
    for row in x.detach().cpu().contiguous().numpy():
        digest = hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest()
        names.append(f"{digest}/{seen[digest]}")
        seen[digest] += 1
    return names
