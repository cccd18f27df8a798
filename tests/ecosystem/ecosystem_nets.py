"""A small network, what it knows, and a RAILS around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from immunonet import RAILS, Maturation


def net() -> nn.Module:
    """Inputs `(B, 1, 6, 6)` to 3 logits: how near they are to three fixed patterns."""
    layer = nn.Linear(36, 3)
    with torch.no_grad():
        layer.weight.copy_(PATTERNS.flatten(1) - 0.5)
        layer.bias.copy_(-0.5 * (PATTERNS.flatten(1) - 0.5).square().sum(1))
    return nn.Sequential(nn.Flatten(), layer).eval()


PATTERNS = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def examples(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy copies of the patterns, in [0, 1]."""
    y = torch.arange(n) % 3
    return 0.7 * PATTERNS[y] + 0.3 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)), y


def fitted(model: nn.Module, layers: str = "input") -> RAILS:
    return RAILS(model, layers, maturation=Maturation(population=60, generations=3), seed=0).fit(*examples(90))
