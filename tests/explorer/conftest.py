"""A defence of each sort around one small network, and images to ask it about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from immunonet import RAILS, ClosedLoop, DkNN, Maturation, Sentinel, data
from immunonet.defences.base import Defence
from immunonet.defences.undefended import Undefended

SHAPE = (1, 6, 6)


def images(n: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 3
    patterns = torch.rand(3, *shape, generator=torch.Generator().manual_seed(99))
    return 0.6 * patterns[y] + 0.4 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)), y


@pytest.fixture
def examples() -> tuple[Tensor, Tensor]:
    return images(150)


@pytest.fixture
def tests() -> data.Images:
    x, y = images(12, seed=1)
    return data.Images(x, y, ("nought", "one", "two"))


Make = Callable[[str], Defence]


@pytest.fixture
def make(conv: nn.Module, examples: tuple[Tensor, Tensor]) -> Make:
    def made(kind: str) -> Defence:
        maturation = Maturation(population=60, generations=3, neighbours=4)
        kinds: dict[str, Callable[[], Defence]] = {
            "rails": lambda: RAILS(conv, "input", maturation=maturation, seed=0),
            "several": lambda: RAILS(conv, ["input", "0"], maturation=maturation, seed=0),
            "hidden": lambda: RAILS(conv, "0", space="0", maturation=maturation, seed=0),
            "dknn": lambda: DkNN(conv, "input", neighbours=9),
            "control": lambda: ClosedLoop(conv, ["input"], rank=4),
            "network": lambda: Undefended(conv),
        }
        return kinds[kind]().fit(*examples)

    return made


@pytest.fixture
def sentinel(conv: nn.Module, examples: tuple[Tensor, Tensor]) -> Sentinel:
    return Sentinel(conv, "input", window=20, neighbours=2, false_alarm=0.05).fit(examples[0])
