"""Memories, their space and responses, made by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from immunonet import Memory
from immunonet.memory.space import Space
from immunonet.response import Cells, ImmuneResponse, Imprint

CLASSES, SHAPE, PROBES = 3, (5,), torch.eye(3)[:2]


def space(fingerprint: str = "a model", radius: float = 0.5) -> Space:
    """Return a space whose signatures are features `(n, 3)`, and the length of nothing left out."""
    made = Space(
        mean=torch.zeros(3),
        directions=torch.eye(3),
        scales=torch.ones(1),
        spread=torch.ones(4),
        probes=torch.cat([PROBES, torch.zeros(2, 1)], 1),
        radius=radius,
        fingerprint=fingerprint,
        classes=CLASSES,
        shape=SHAPE,
        cell_shape=SHAPE,
    )
    assert torch.equal(made.sign([PROBES]), made.probes)
    return made


def bound(memory: Memory, made: Space | None = None) -> Memory:
    """Return the memory, which then belongs to a model."""
    made = made or space()
    memory.bind(made.fingerprint, [PROBES], lambda: made)
    return memory


def response(signature: Any, label: Any = 0, *, credibility: float = 1.0, foreign: bool = False) -> ImmuneResponse:
    """Return the response to n antigens by their signatures `(n, 4)` and labels."""
    signature = torch.as_tensor(signature, dtype=torch.float32).reshape(-1, 4)
    n = len(signature)
    labels = torch.as_tensor(label).expand(n)
    votes = 0.6 * torch.eye(CLASSES)[labels] + 0.4 / CLASSES
    cells = Cells(
        x=torch.arange(n * 15.0).reshape(n, 3, 5),
        label=labels[:, None].expand(n, 3),
        affinity=-torch.arange(3.0).expand(n, 3),
        origin=torch.arange(3).expand(n, 3),
    )
    return ImmuneResponse(
        labels=labels,
        votes=votes,
        credibility=torch.full((n,), credibility),
        foreign=torch.full((n,), foreign),
        innate=torch.zeros(n, dtype=torch.bool),
        recalled=torch.zeros(n, dtype=torch.bool),
        generations=torch.ones(n, dtype=torch.long),
        plasma=cells.part(slice(1)),
        memory=cells.part(slice(1, 3)),
        imprint=Imprint(signature, torch.ones(n, 1), (None,) * n, "a model"),
    )


def antigens(n: int) -> Tensor:
    """Return n antigens."""
    return torch.arange(n * 5.0).reshape(n, 5)


def remember(memory: Memory, n: int = 1, at: float = 0.0, **how: Any) -> list[str]:
    """Return the ids of n new entries that lie `at` a place, ten apart."""
    known = {key: how.pop(key) for key in ("label", "credibility", "foreign") if key in how}
    places = torch.cat([at + 10.0 * torch.arange(n)[:, None], torch.zeros(n, 3)], 1)
    return memory.remember(response(places, **known), antigens(n), **how)
