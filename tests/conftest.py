"""Small models and data that several test modules share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when torch and numba are first imported. Threads that wait for each other cost more than these small tests take,
# and many times more on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from immunonet import data, zoo
from immunonet.cli import main
from immunonet.evaluation import sanity

# Half as many examples as by default: the properties are many.
hypothesis.settings.register_profile("suite", hypothesis.settings.default, max_examples=50)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of every later search for garbage, and search less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def conv_net(inplace: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


@pytest.fixture
def conv() -> nn.Module:
    """Inputs `(B, 1, 6, 6)` to 3 logits, with activations in place."""
    return seeded(lambda: conv_net(True))


@pytest.fixture
def functional_conv() -> nn.Module:
    """The weights of `conv`, with activations out of place."""
    return seeded(lambda: conv_net(False))


@pytest.fixture
def residual() -> nn.Module:
    """Inputs `(B, 3, 8, 8)` to 3 logits."""
    return seeded(lambda: zoo.ResidualNet(3, width=4))


@pytest.fixture
def vit() -> nn.Module:
    """Inputs `(B, 1, 6, 6)` to 3 logits."""
    return seeded(lambda: zoo.TinyViT(3, size=6, patch=3, dim=8, depth=1))


@pytest.fixture
def mlp() -> nn.Module:
    """Inputs `(B, 4)` to 3 logits."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))


def make(n: int, shape: tuple[int, ...], classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy copies of one random pattern per class, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    patterns = torch.rand(classes, *shape, generator=torch.Generator().manual_seed(99))
    noise = torch.rand(n, *shape, generator=generator)
    return 0.6 * patterns[y] + 0.4 * noise, y


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """90 examples `(1, 6, 6)` of 3 classes."""
    return make(90, (1, 6, 6))


@pytest.fixture
def examples() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that makes them: n examples of a shape."""
    return make


@pytest.fixture(scope="session")
def digits_net() -> nn.Module:
    """A network trained a little on scikit-learn's digits."""
    images = data.load("digits", "train")
    net = zoo.build("digits")
    zoo.train(net, images[:800], images[800:900], epochs=4, batch_size=64, lr=3e-3)
    return net


@pytest.fixture
def unchecked(monkeypatch: Any) -> None:
    """Evaluations whose attacks are not checked, which is nearly half of the work, for tests that look elsewhere."""
    monkeypatch.setattr(sanity, "_of_threat", lambda campaign, threat: ([], {}))
    monkeypatch.setattr(sanity, "holds", lambda campaign, outer, inner: None)


@pytest.fixture
def command(capsys: Any, monkeypatch: Any, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """The function that runs `immunonet ...` in tmp_path and returns (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMMUNONET_DATA", raising=False)
    monkeypatch.delenv("IMMUNONET_DEBUG", raising=False)

    def call(*arguments: Any) -> tuple[int, str, str]:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["immunonet", *words])
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call
