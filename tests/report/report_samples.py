"""Small made-up responses, defences and result rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from immunonet import incoming
from immunonet.defences.repertoire import Repertoire
from immunonet.response import Cells, ImmuneResponse, Trace

B, C, K, G = 5, 3, 4, 6


def made_response(shape: tuple[int, ...], cell_shape: tuple[int, ...] | None = None, seed: int = 0) -> ImmuneResponse:
    draw = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=draw)

    def cells(n: int) -> Cells:
        affinity = (-uniform(B, n)).sort(dim=1, descending=True).values
        label, origin = (torch.randint(0, most, (B, n), generator=draw) for most in (C, 20))
        return Cells(uniform(B, n, *(cell_shape or shape)), label, affinity, origin)

    votes = torch.softmax(3 * torch.randn(G + 1, B, C, generator=draw), 2)
    entropy = -(votes * votes.log()).sum(2)
    mean = -uniform(G + 1, B, C)
    return ImmuneResponse(
        labels=votes[-1].argmax(1),
        votes=votes[-1],
        credibility=uniform(B).clamp(min=0.01),
        foreign=uniform(B) > 0.5,
        innate=torch.zeros(B, dtype=torch.bool),
        recalled=torch.zeros(B, dtype=torch.bool),
        generations=torch.full((B,), G),
        plasma=cells(7),
        memory=cells(9),
        trace=(Trace(mean, mean + 0.1, votes, entropy),),
    )


def made_rails(shape: tuple[int, ...], seed: int = 1) -> Any:
    """Stand in for a fitted defence: what the gallery asks of it."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(20, *shape, generator=draw)

    def naive(antigens: Tensor) -> tuple[Tensor, Tensor]:
        members = torch.arange(C * K).reshape(C, K).expand(len(antigens), C, K)
        return members, members.float() / 10

    return SimpleNamespace(
        repertoire=Repertoire(x, torch.zeros(len(x)).long()), naive=naive, bounds=incoming.bounds("bounds", (0, 1))
    )


def made_rows() -> list[dict[str, Any]]:
    common = {
        "dataset": "digits",
        "eps": 0.2,
        "norm": "linf",
        "n": 360,
        "seeds": [0],
        "settings": {"K": 4, "m": {"a": 1}},
    }
    return [
        common
        | {
            "defence": defence,
            "attack": attack,
            "knows": knows,
            "correct": 300,
            "accuracy": accuracy,
            "ci95": [accuracy - 0.03, min(1, accuracy + 0.02)],
            "seconds_per_image": seconds,
            "foreign": foreign,
        }
        for defence, seconds, figures in (
            ("cnn", 0.0001, [("none", "base", 0.98, None), ("pgd", "base", 0.12, None)]),
            (
                "dknn",
                0.001,
                [("none", "base", 0.97, 0.05), ("pgd", "base", 0.8, 0.3), ("pgd", "defence", 0.4, 0.25)],
            ),
            (
                "rails",
                0.02,
                [("none", "base", 0.975, 0.04), ("pgd", "base", 0.85, 0.31), ("pgd", "defence", 0.44, 0.2)],
            ),
        )
        for attack, knows, accuracy, foreign in figures
    ]
