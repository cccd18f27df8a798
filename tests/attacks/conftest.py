"""A small undefended network on 8x8 digits, and other models that attacks are measured on."""

from __future__ import annotations

from collections.abc import Callable

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
    """An adversarially trained network, and 360 test images `(1, 8, 8)` with labels."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    net = zoo.build("digits")
    adversarial = zoo.Adversarial(eps=0.15, iterations=5)
    zoo.train(net, train[:1100], train[1100:], epochs=5, batch_size=64, lr=3e-3, adversarial=adversarial)
    return net, test.x, test.y
