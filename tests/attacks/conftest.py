"""A small undefended network on 8x8 digits, and other models that attacks are measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from immunonet import data, zoo


@pytest.fixture
def linear_model() -> Callable[[Tensor], nn.Module]:
    """The function that makes, of a weight, a model whose margin of class 1 over class 0 is weight . x."""

    def make(weight: Tensor) -> nn.Module:
        model = nn.Linear(len(weight), 2, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.stack([torch.zeros(len(weight)), weight]))
        return model

    return make


@pytest.fixture(scope="session")
def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A trained network, 200 test images `(1, 8, 8)` with labels, then the 1,200 training images with theirs."""
    data = load_digits()
    x, y = torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimiser.step()
    net.zero_grad(set_to_none=True)
    return net.eval(), x[1200:1400], y[1200:1400], x[:1200], y[:1200]


@pytest.fixture(scope="session")
def robust_digits() -> tuple[nn.Module, Tensor, Tensor]:
    """An adversarially trained network, whose recipe lies beside it, and 360 test images `(1, 8, 8)` with labels."""
    net, test = zoo.build("digits"), data.load("digits", "test")
    zoo.load_weights(net, Path(__file__).with_name("robust-digits.safetensors"))
    return net.eval().to(memory_format=torch.channels_last), test.x, test.y  # the quicker one of the same answers
