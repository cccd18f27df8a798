from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunonet import Sentinel, data, incoming
from immunonet.defences.undefended import Undefended
from immunonet.evaluation.stream import Assault, askers, assaults
from immunonet.evaluation.threats import Threat
from immunonet.explorer.watching import Seen, asking


def assault(name: str = "square", eps: float = 0.3, queries: int = 60, refuses: bool = False) -> Assault:
    threat = Threat(eps=eps, norm="linf", bounds=incoming.bounds("bounds", (0.0, 1.0)), seed=0)
    return assaults(askers(threat, queries)[name], threat, "plain", queries)[refuses]


def watched(conv: nn.Module, sentinel: Sentinel, x: Tensor, y: int, how: Assault, **more: Any) -> list[Seen]:
    honest = torch.rand(10, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"assault": how, "honest": honest, "seconds": 60.0, "every": 0.05}
    return list(asking(Undefended(conv), sentinel, x, y, **settings | more))


@pytest.mark.parametrize("name", ["nes", "square"])
def test_near_copies_are_seen(name: str, conv: nn.Module, sentinel: Sentinel, tests: data.Images) -> None:
    x = tests.x[:1]
    y = int(Undefended(conv).answered(x).labels)
    seen = watched(conv, sentinel, x, y, assault(name, eps=1e-3))[-1]
    assert seen.over
    assert not seen.late
    assert seen.won is None
    assert len(seen.honest) == 10
    assert not math.isfinite(seen.honest[0])
    assert 40 <= len(seen.scores) <= 60
    assert seen.flags == sum(score < seen.threshold for score in seen.scores) > 30
    first = next(i for i, score in enumerate(seen.scores) if score < seen.threshold)
    assert seen.flagged == first + 1
    assert sentinel.queries == 0  # a twin has watched


def test_who_wins_stops(conv: nn.Module, sentinel: Sentinel, tests: data.Images) -> None:
    x = tests.x[:1]
    wrong = 1 + int(Undefended(conv).answered(x).labels)
    seen = watched(conv, sentinel, x, wrong % 3, assault())[-1]
    assert (seen.won, len(seen.scores)) == (1, 1)


def test_what_is_flagged_is_refused(conv: nn.Module, sentinel: Sentinel, tests: data.Images) -> None:
    x = tests.x[:1]
    y = int(Undefended(conv).answered(x).labels)
    asked: list[int] = []

    class Counting(Undefended):
        def answer(self, inputs: Any, seed: int | None = None) -> Any:
            asked.append(len(inputs))
            return super().answer(inputs, seed)

    how = assault(eps=1e-3, refuses=True)
    *_, found = asking(Counting(conv), sentinel, x, y, assault=how, honest=x[:0], seconds=60, every=0.05)
    assert found.honest == []
    assert sum(asked) == len(found.scores) - found.flags < 30


def test_it_ends_when_its_time_is_up(conv: nn.Module, sentinel: Sentinel, tests: data.Images) -> None:
    y = int(Undefended(conv).answered(tests.x[:1]).labels)
    seen = watched(conv, sentinel, tests.x[:1], y, assault(eps=1e-3), seconds=-1.0)[-1]
    assert seen.late
    assert seen.won is None


def test_it_ends_when_nobody_watches(conv: nn.Module, sentinel: Sentinel, tests: data.Images) -> None:
    x = tests.x[:1]
    y = int(Undefended(conv).answered(x).labels)
    stream = asking(
        Undefended(conv), sentinel, x, y, assault=assault(eps=1e-3, queries=500_000), honest=x[:0], seconds=600,
        every=0.01,
    )  # fmt: skip
    assert not next(stream).over
    stream.close()  # type: ignore[attr-defined]


def test_errors_of_a_model_come_out(conv: nn.Module, sentinel: Sentinel, tests: data.Images) -> None:
    class Broken(Undefended):
        def answer(self, inputs: Any, seed: int | None = None) -> Any:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(asking(Broken(conv), sentinel, tests.x[:1], 0, assault=assault(), honest=tests.x[:0], seconds=60))
