from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunonet import Memory, data, models
from immunonet.explorer import story

Make = Any
BOUNDS = (0.0, 1.0)


def attacked(model: Any, x: Tensor, y: int, **how: Any) -> story.Assailed:
    settings: dict[str, Any] = {"knows": "it", "eps": 0.2, "bounds": BOUNDS, "steps": 6, "seconds": 60, "seed": 0}
    return story.assailed(model, x, y, **settings | how)


@pytest.mark.parametrize(
    ("kind", "cells", "near", "curves", "senses"),
    [
        ("rails", True, True, 1, True),
        ("several", True, True, 2, True),
        ("hidden", True, True, 1, True),
        ("dknn", False, True, 0, True),
        ("control", False, False, 0, True),
        ("network", False, False, 0, False),
    ],
)
def test_every_kind_tells_what_it_can(
    kind: str, cells: bool, near: bool, curves: int, senses: bool, make: Make, conv: nn.Module, tests: data.Images
) -> None:
    defence, x = make(kind), tests.x[:1]
    attack = attacked(conv, x, int(tests.y[0]))
    told = story.told(defence, conv, x, truth=0, attack=attack, seed=3)
    assert torch.equal(told.met, attack.x)
    before, after = told.defence
    assert [before.label, after.label] == [int(defence.answered(one, 3).labels[0]) for one in (x, attack.x)]
    assert sum(after.shares) == pytest.approx(1, abs=1e-4)
    assert (after.foreign is not None) == senses
    assert (told.plasma is not None) == (told.memory is not None) == cells
    assert (told.nearest is not None) == near
    assert (told.healed is not None) == (kind == "control")
    assert [layer for layer, _ in told.curves] == list(defence.layers)[:curves]
    assert after.innate is after.recalled is None
    for some in (told.plasma, told.memory, told.nearest):
        for cell in some or ():
            assert tuple(cell.image.shape) == tuple(x.shape[1:])


def test_the_nearest_are_one_of_each_class_nearest_first(make: Make, tests: data.Images) -> None:
    rails = make("rails")
    found = story.nearest(rails, tests.x[:1])
    assert found is not None
    assert sorted(cell.label for cell in found) == [0, 1, 2]
    assert [cell.value for cell in found] == sorted(cell.value for cell in found)
    index, distances = rails.naive(tests.x[:1])
    for cell in found:
        assert cell.value == pytest.approx(float(distances[0, cell.label, 0]))
        assert torch.equal(cell.image, rails.repertoire.x[int(index[0, cell.label, 0])])
    assert len(story.nearest(rails, tests.x[:1], most=2) or ()) == 2


def test_what_is_recalled_has_no_cells_but_still_a_curve(make: Make, conv: nn.Module, tests: data.Images) -> None:
    rails, x = make("rails"), tests.x[:1]
    rails = rails.with_settings(memory=Memory(None))
    ids = rails.memory.remember(rails.respond(x), x, source="me")
    rails.memory.confirm(ids, tests.y[:1])
    told = story.told(rails, conv, x, truth=None, attack=None, seed=0)
    assert told.defence[1].recalled is True
    assert told.plasma == told.memory == []
    assert len(told.curves) == 1


def test_innate_answers_are_told_of_a_defence_that_gives_them(make: Make, tests: data.Images) -> None:
    gated = make("rails").with_settings(innate=0.5)
    for x in tests.x[:3].split(1):
        assert story.reply(gated, x, 0).innate is bool(gated.respond(x, seed=0).innate[0])
        assert story.reply(gated, x, 0).recalled is None


def test_an_attack_keeps_to_its_radius_and_takes_as_many_steps_as_fit(conv: nn.Module, tests: data.Images) -> None:
    x, y = tests.x[:1], int(tests.y[0])
    found = attacked(conv, x, y)
    assert found.steps == 6
    assert 0.1 < float((found.x - x).abs().max()) <= 0.2 + 1e-6
    before, after = (models.logits(conv, one)[0].softmax(0)[y] for one in (x, found.x))
    assert after < before
    short = attacked(conv, x, y, seconds=1e-6)
    assert short.steps == 1
    assert torch.equal(attacked(conv, x, y).x, found.x)
