from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from immunonet import Sentinel, data
from immunonet.explorer.desk import DRAWING, FILE, NETWORK, TEST, Desk, Source


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("L", (9, 9), 200).save(file, "PNG")
    return file.getvalue()


def source(kind: str = TEST, **how: Any) -> Source:
    settings: dict[str, Any] = {"place": 0, "drawing": None, "file": None, "swap": False}
    return Source(kind, **settings | how)


@pytest.fixture
def desk(make: Any, conv: nn.Module, tests: data.Images, sentinel: Sentinel) -> Desk:
    return Desk(defence=make("rails"), base=conv, images=tests, sentinel=sentinel, seconds=30)


def test_antigens_come_from_three_sources(desk: Desk, tests: data.Images) -> None:
    assert desk.sources == [TEST, DRAWING, FILE]
    found = desk.given(source(place=2.0))
    assert torch.equal(found.x, tests.x[2:3])
    assert found.truth == 2
    drawn = desk.given(source(DRAWING, drawing="data:image/png;base64," + base64.b64encode(picture()).decode()))
    read = desk.given(source(FILE, file=picture(), swap=True))
    assert (drawn.truth, read.truth) == (None, None)
    assert float(drawn.x.mean() + read.x.mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (source(place=12), "the test image must be at least 0 and at most 11, got 12"),
        (source(DRAWING), "the drawing is empty"),
        (source(FILE), "there is no picture yet"),
        (source("elsewhere"), "the antigen's source must be one of"),
    ],
)
def test_wrong_sources_are_told(given: Source, told: str, desk: Desk) -> None:
    with pytest.raises(ValueError, match=told):
        desk.given(given)


def test_an_attack_may_know_the_network_or_the_defence(desk: Desk) -> None:
    assert [name for _, name in desk.knowledge] == [NETWORK, *desk.defence.surrogates()]
    for words, name in desk.knowledge[:2]:
        told = desk.story(source(), name, 0.2)
        assert told.attack is not None
        assert (told.attack.knows, told.attack.eps) == (words, 0.2)
    assert desk.story(source(), NETWORK, 0).attack is None
    with pytest.raises(ValueError, match="what the attacker knows must be one of"):
        desk.story(source(), "all", 0.2)
    with pytest.raises(ValueError, match=r"the strength must be a finite number in \[0, 0.5\], got 0.6"):
        desk.story(source(), NETWORK, 0.6)


def test_without_a_truth_an_attack_leads_away_from_the_answer(desk: Desk) -> None:
    told = desk.story(source(FILE, file=picture()), NETWORK, 0.5)
    assert told.attack is not None
    before, after = (reply.shares[told.network[0].label] for reply in told.network)
    assert after < before


def test_the_sentinel_watches_whom_is_meant(desk: Desk) -> None:
    *_, last = desk.watch(source(), "square", 0.01, 50, False)
    assert last.over
    assert len(last.honest) == 12
    for given, told in (
        (("square", 0, 50, False), "the strength must be above 0"),
        (("square", 0.1, 5000, False), "queries must be at least 50 and at most 500, got 5000"),
        (("brute", 0.1, 50, False), "the attack must be one of"),
    ):
        with pytest.raises(ValueError, match=told):
            desk.watch(source(), *given)


def test_it_works_without_images_and_sentinel(make: Any, conv: nn.Module) -> None:
    desk = Desk(defence=make("dknn"), base=conv)
    assert desk.sources == [DRAWING, FILE]
    assert desk.names == ["0", "1", "2"]
    assert desk.story(source(FILE, file=picture()), NETWORK, 0.1).truth is None
    with pytest.raises(ValueError, match="there is no sentinel"):
        desk.watch(source(), "square", 0.1, 50, False)


def test_names_are_those_given_or_those_of_the_images(make: Any, conv: nn.Module, tests: data.Images) -> None:
    network = make("network")
    assert Desk(defence=network, base=conv, images=tests).names == ["nought", "one", "two"]
    assert Desk(defence=network, base=conv, images=tests, names=("a", "b", "c")).names == ["a", "b", "c"]
    nameless = data.Images(tests.x, tests.y, ("0", "1"), named=False)
    assert Desk(defence=network, base=conv, images=nameless).names == ["0", "1", "2"]
    assert Desk(defence=network, base=conv, shape=(1, 6, 6)).antigen == (1, 6, 6)


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ({"defence": nn.Identity()}, TypeError, "defence must be a Defence, got Identity"),
        ({"base": None}, TypeError, "base must be a Module, got NoneType"),
        ({"images": torch.rand(2, 1, 6, 6)}, TypeError, "images must be a Images or None, got Tensor"),
        ({"sentinel": 7}, TypeError, "sentinel must be a Sentinel or None, got int"),
        ({"names": ("a",)}, ValueError, "names must hold one name per class, 3, got 1"),
        ({"seconds": 0}, ValueError, "seconds must be a finite number"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"images": None}, ValueError, r"antigens of the explorer must be images of shape .* got shape \(\)"),
        ({"images": None, "shape": (4,)}, ValueError, r"got shape \(4,\)"),
    ],
)
def test_wrong_settings_are_told(
    how: dict[str, Any], error: type[Exception], told: str, make: Any, conv: nn.Module, tests: data.Images
) -> None:
    settings: dict[str, Any] = {"defence": make("network"), "base": conv, "images": tests}
    with pytest.raises(error, match=told):
        Desk(**settings | how)


def test_a_sentinel_must_be_fitted_and_images_there(make: Any, conv: nn.Module, tests: data.Images) -> None:
    with pytest.raises(ValueError, match="sentinel must be fitted"):
        Desk(defence=make("network"), base=conv, images=tests, sentinel=Sentinel(conv))
    with pytest.raises(ValueError, match="images must hold at least one image"):
        Desk(defence=make("network"), base=conv, images=tests[:0])
