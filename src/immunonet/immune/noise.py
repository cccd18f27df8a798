"""The random numbers of a maturation: a pure function of seed, layer, generation and place in the population.

Counter-based numbers need no state: antigens of a batch share them at no cost, an antigen that stops early
or a class that is pruned leaves the others' numbers as they were, and every backend gives the same ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import torch
from torch import Tensor

# Odd constants of the "lowbias32" integer hash (C. Wellons, "Prospecting for hash functions", 2018), and 2**32 / phi.
FIRST, SECOND, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
MASK = 0xFFFFFFFF


class Noise:
    """Keys of the uniform numbers that each antigen's maturation uses, one seed per antigen or one for all."""

    def __init__(self, seeds: list[int], *, antigens: int) -> None:
        """Take one seed for all antigens of a batch (shared noise), or one for each."""
        self._seeds = seeds if len(seeds) == antigens else seeds * antigens
        self._shared = len(seeds) == 1

    def keys(self, generation: int, use: str, device: torch.device) -> Tensor:
        """Return keys `(B, 2)` int64 in [0, 2**32), independent for every generation and use."""
        seeds = self._seeds[:1] if self._shared else self._seeds
        found = np.array([derive(seed, generation, use) for seed in seeds], dtype=np.int64)
        keys = torch.from_numpy(np.stack([found & MASK, found >> 32], 1))
        return keys.expand(len(self._seeds), 2).to(device)

    def draw(self, generation: int, use: str, family: tuple[Tensor, Tensor], count: int) -> Tensor:
        """Return `count` numbers for each family, antigens and labels `(F,)`: `(F, count)`."""
        antigen, label = family
        return uniform(self.keys(generation, use, label.device)[antigen], label * count, count)


def uniform(keys: Tensor, start: Tensor, count: int) -> Tensor:
    """Return numbers `(F, count)` float32, uniform in [0, 1) at 24 bits: places `start` and on of each key's stream.

    `keys` `(F, 2)`, `start` `(F,)`, int64.
    """
    n = start[:, None] + torch.arange(count, device=keys.device)
    x = ((n * GOLDEN) & MASK) ^ keys[:, :1]
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = (((x ^ (x >> 15)) + keys[:, 1:]) * SECOND) & MASK
    x = x ^ (x >> 16)
    return (x >> 8).float() * 2.0**-24


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
