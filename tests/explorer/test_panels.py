from __future__ import annotations

import html
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from immunonet import data, incoming
from immunonet.explorer import panels, story
from immunonet.explorer.watching import Seen
from immunonet.response import Trace

BOUNDS = incoming.bounds("bounds", (0.0, 1.0))
NAMES = ("nought <b>", "one", "two")


def page(make: Any, kind: str, conv: nn.Module, tests: data.Images, attack: bool = True) -> str:
    x = tests.x[:1]
    met = None
    if attack:
        met = story.assailed(conv, x, 0, knows="it", eps=0.2, bounds=(0, 1), steps=2, seconds=60, seed=0)
    told = story.told(make(kind), conv, x, truth=0 if attack else None, attack=met, seed=0)
    return panels.story(told, names=NAMES, bounds=BOUNDS)


def headings(text: str) -> list[str]:
    return re.findall(r"<h3[^>]*>([^<]*)", text)


ALL = ["What was asked", "What was answered", "Nearest known examples", "Generations", "Plasma and memory cells"]


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("rails", ALL),
        ("hidden", ALL),
        ("several", [*ALL[:3], "Generations at input", "Generations at 0", ALL[4]]),
        ("dknn", ALL[:3]),
        ("control", [*ALL[:2], "No cells to show"]),
        ("network", [*ALL[:2], "No cells to show"]),
    ],
)
def test_panels_are_those_that_can_be_filled(
    kind: str, shown: list[str], make: Any, conv: nn.Module, tests: data.Images
) -> None:
    text = page(make, kind, conv, tests)
    assert headings(text) == shown
    assert "<b>nought <b></b>" not in text
    assert "nought &lt;b&gt;" in text
    assert ("brought back" in text) == (kind == "control")
    assert all("alt=" in image for image in re.findall(r"<img[^>]*>", text))
    assert not re.search(r"(src|href)=\"(?!data:image/png)", text)


def test_without_an_attack_and_without_a_truth(make: Any, conv: nn.Module, tests: data.Images) -> None:
    text = page(make, "rails", conv, tests, attack=False)
    assert "Nothing was attacked" in text
    assert "✓" not in text
    assert "✗" not in text
    assert "difference" not in text


def test_the_generations_are_those_of_the_trace(make: Any, conv: nn.Module, tests: data.Images) -> None:
    text = page(make, "rails", conv, tests)
    curve = json.loads(html.unescape(re.findall(r'data-curve="([^"]*)"', text)[0]))
    met = story.assailed(conv, tests.x[:1], 0, knows="it", eps=0.2, bounds=(0, 1), steps=2, seconds=60, seed=0)
    (trace,) = make("rails").learning_curves(met.x, 0)
    assert torch.tensor(curve["frames"]).allclose(trace.votes[:, 0])
    assert torch.tensor(curve["entropy"]).allclose(trace.entropy[:, 0])


def test_the_classes_with_most_votes_are_shown() -> None:
    votes = torch.zeros(2, 1, 30)
    votes[0, 0, 20:] = 0.1
    votes[1, 0, 3] = 1
    trace = Trace(votes, votes, votes, torch.tensor([[math.log(10)], [0.0]]))
    found = panels.generations(trace, [f"class {i}" for i in range(30)])
    assert found["names"] == ["class 3", *(f"class {i}" for i in range(20, 29))]
    assert [sum(frame) for frame in found["frames"]] == pytest.approx([0.9, 1.0])
    first, last = (float(point.split(",")[1]) for point in found["points"].split())
    assert first == pytest.approx(40 - 40 * math.log(10) / math.log(30), abs=0.01)
    assert last == 40


def test_curves_leave_out_what_is_infinite() -> None:
    values = torch.tensor([math.inf, 0.0, 1.0, 9.0])
    assert panels.points(values, 2.0) == "33.33,40.00 66.67,20.00 100.00,0.00"
    assert panels.points(values[:3], 2.0, last=4) == "25.00,40.00 50.00,20.00"
    assert panels.points(values[1:2], 1.0) == "0.00,40.00"


def seen(**how: Any) -> Seen:
    settings: dict[str, Any] = {
        "honest": [math.inf, 3.0], "scores": [2.0, 0.4, 0.3], "threshold": 0.5, "flags": 2, "flagged": 2, "won": None,
        "over": True, "late": False,
    }  # fmt: skip
    return Seen(**settings | how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"over": False}, "3 queries so far, 2 flagged."),
        (
            {},
            "gave up after 3 queries; the defence was not fooled. The first flag was at query 2. 2 of 3 were flagged.",
        ),
        ({"late": True}, "Time was up after 3 queries"),
        ({"won": 3}, "The attacker fooled the defence by query 3."),
        ({"flags": 0, "flagged": None, "scores": [2.0]}, "None was flagged."),
    ],
)
def test_what_the_sentinel_saw_is_told(how: dict[str, Any], words: str) -> None:
    text = panels.watch(seen(**how), queries=10)
    assert words in " ".join(re.sub(r"<[^>]*>", "", text).split())


def test_what_is_flagged_has_a_mark() -> None:
    assert panels.watch(seen(), queries=10).count('class="im-mark"') == 2
    assert panels.watch(seen(honest=[], scores=[], flags=0, over=False, flagged=None), queries=10)


def test_an_antigen_tells_its_class() -> None:
    x = torch.zeros(1, 3, 4, 4)
    assert "class &lt;i&gt;" in panels.antigen(x, bounds=BOUNDS, label="<i>")
    assert "nobody has told" in panels.antigen(x, bounds=BOUNDS, label=None)
