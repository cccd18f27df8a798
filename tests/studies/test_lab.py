"""Which images the experiments of a study get, where files are in the order of their classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from immunonet import zoo
from immunonet.data import Images
from immunonet.evaluation.journal import Journal
from immunonet.studies import load
from immunonet.studies.lab import Lab

HERE = Path(__file__).parent


def ordered(n: int) -> Images:
    """n images of each of 10 classes, in the order of the classes; their values tell their places."""
    x = (torch.arange(10 * n) / (10 * n))[:, None, None, None].expand(-1, 1, 8, 8)
    return Images(x, torch.arange(10).repeat_interleave(n), tuple("0123456789"))


def lab(tmp_path: Path, order: str) -> Lab:
    study = dataclasses.replace(load(HERE / "small.toml"), order=order)
    parts = {"training": ordered(30), "held_out": ordered(20), "test": ordered(20), "others": {"odd": ordered(10)}}
    nets = {name: zoo.build("digits") for name in study.bases}
    journal = Journal(tmp_path / "parts.jsonl", {})
    return Lab(study, nets=nets, layer=lambda name, net: name, folder=tmp_path, journal=journal, **parts)


@pytest.mark.parametrize("split", ["validation", "test", "odd"])
def test_the_first_few_are_of_every_class(tmp_path: Path, split: str) -> None:
    found = lab(tmp_path, "random")
    _, y = found.images(split, slice(0, 60))
    assert len(y.unique()) == 10  # a class of these is missing by chance once in 2,000 times
    assert found.where(split, 60) == {"sample": [60, len(found.splits[split])], "seed": 0}
    x, _ = found.images(split, slice(0, len(found.splits[split])))
    assert len(x[:, 0, 0, 0].unique()) == len(x)


def test_the_papers_first_test_images_stay(tmp_path: Path) -> None:
    found = lab(tmp_path, "file")
    x, y = found.images("test", slice(0, 20))
    assert torch.equal(x, ordered(20).x[:20])
    assert y.unique().tolist() == [0]
    assert found.where("test", 20) == [0, 20]
    assert len(found.images("validation", slice(0, 60))[1].unique()) == 10
    assert found.where("validation", 60) == {"sample": [60, 200], "seed": 0}


def test_a_smaller_repertoire_is_of_every_class(tmp_path: Path) -> None:
    found = lab(tmp_path, "file")
    x, y = found.examples(80)
    assert len(y.unique()) == 10
    assert torch.equal(y, y.sort().values)  # their order is kept
    assert all(torch.equal(a, b) for a, b in zip(found.examples(None), (ordered(30).x, ordered(30).y), strict=True))
    places = (x[:, 0, 0, 0] * 300).round().long()
    assert torch.equal(ordered(30).y[places], y)


def test_the_studies_of_the_papers_say_which_images_they_take() -> None:
    assert {load(name).order for name in ("mnist", "cifar10", "svhn")} == {"file"}
    with pytest.raises(ValueError, match="order must be one of 'random', 'file', got 'sorted'"):
        dataclasses.replace(load("mnist"), order="sorted")
