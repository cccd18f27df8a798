"""Which images the experiments of a study get, where files are in the order of their classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from immunonet import studies
from immunonet.cli import reproduce
from immunonet.data import Images
from immunonet.evaluation.lab import Lab

HERE = Path(__file__).parent


def ordered(n: int) -> Images:
    """n images of each of 10 classes, in the order of the classes; their values tell their places."""
    x = (torch.arange(10 * n) / (10 * n))[:, None, None, None].expand(-1, 1, 8, 8)
    return Images(x, torch.arange(10).repeat_interleave(n), tuple("0123456789"))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """The function that makes a lab of training, validation, test and strange images in some order."""

    def found(order: str) -> Lab:
        study = studies.load(HERE / "digits.toml").model_copy(update={"order": order, "validation": 200})
        sizes = {("tiny.parquet", "train"): 50, ("tiny.parquet", "test"): 20, ("digits", "test"): 10}
        monkeypatch.setattr(reproduce, "_images", lambda name, split, *_, **__: ordered(sizes[name, split]))
        monkeypatch.setattr(reproduce.Nursery, "built", lambda *_: torch.nn.Linear(1, 1))
        monkeypatch.setattr(reproduce.common, "check_model", lambda *_: None)
        return reproduce._lab(study, torch.device("cpu"), None, tmp_path, given=False, own=True)[0]

    return found


@pytest.mark.parametrize("split", ["validation", "test", "digits"])
def test_the_first_few_are_of_every_class(lab, split: str) -> None:
    found = lab("random")
    _, y = found.images(split, slice(0, 60))
    assert len(y.unique()) == 10  # a class of these is missing by chance once in 2,000 times
    assert found.where(split, 60) == {"sample": [60, len(found.splits[split])], "seed": 0}
    x, _ = found.images(split, slice(0, len(found.splits[split])))
    assert len(x[:, 0, 0, 0].unique()) == len(x)


def test_the_papers_first_test_images_stay(lab) -> None:
    found = lab("file")
    x, y = found.images("test", slice(0, 20))
    assert torch.equal(x, ordered(20).x[:20])
    assert y.unique().tolist() == [0]
    assert found.where("test", 20) == [0, 20]
    assert len(found.images("validation", slice(0, 60))[1].unique()) == 10
    assert found.where("validation", 60) == {"sample": [60, 200], "seed": 0}


def test_a_smaller_repertoire_is_of_every_class(lab) -> None:
    found = lab("file")
    x, y = found.examples(80)
    assert len(y.unique()) == 10
    assert torch.equal(y, y.sort().values)  # their order is kept
    assert found.size(80) == 80
    assert found.size(None) == len(found.examples(None)[1]) == 300
    places = (x[:, 0, 0, 0] * 500).round().long()
    assert torch.equal(ordered(50).y[places], y)
