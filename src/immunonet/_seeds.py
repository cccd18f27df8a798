"""A block of code under a seed of torch's global generators, which are left as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[int | torch.device] = ()) -> Iterator[None]:
    """Seed the global generators within the block, and restore those of the CPU and of CUDA `devices` after it."""
    with torch.random.fork_rng(devices=devices):
        if torch.cuda.is_available():
            torch.manual_seed(seed)
        else:
            # The former keeps a call, and the stack of it, for devices that may come: time and memory every time.
            torch.default_generator.manual_seed(seed)
        yield
