"""What long work takes is said once, early, and only if it is long."""

import logging

import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation, _estimates
from immunonet.cli import common

X, Y = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


@pytest.fixture
def said(caplog):
    """What is said, all work being long."""
    caplog.set_level(logging.INFO, logger="immunonet.estimates")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(30, "30 seconds"), (89.4, "89 seconds"), (90, "1.5 minutes"), (754, "13 minutes"), (5400, "1.5 hours"),
     (43_200, "12 hours"), (1e6, "12 days"), (1e9, "12000 days")],
)  # fmt: skip
def test_times_in_words(seconds, words):
    assert _estimates.in_words(seconds) == words


def test_the_first_part_tells_of_all(said, monkeypatch):
    clock = iter([0.0, 0.5])
    monkeypatch.setattr(_estimates.time, "perf_counter", lambda: next(clock))
    assert list(_estimates.told("abc", 90, "counting", "there is much")) == ["a", "b", "c"]
    assert said() == ["counting takes about 45 seconds: there is much"]


def test_nothing_is_said_of_short_work(said, net):
    RAILS(net, "1", maturation=Maturation(generations=10, population=60), seed=0).fit(X, Y).predict(X[:3])
    assert said() == []


def test_fit_and_the_first_answer_say_what_they_take(said, net, monkeypatch):
    monkeypatch.setattr(_estimates, "LONG", 0.0)
    settings = Maturation(population=120, neighbours=5, generations=4)
    rails = RAILS(net, ["1", "input"], maturation=settings, seed=0).fit(X, Y)
    described, calibrated = said()
    assert described.startswith("describing 57 examples takes about")
    assert calibrated.startswith("calibrating on 3 examples takes about")
    expected = rails.predict(X[:3])
    assert torch.equal(rails.predict(X[:3]), expected)
    (answered,) = said()[2:]
    assert answered.startswith("answering 3 antigens, unless they stop early, takes about")
    # T (G + 1) for each of two layers.
    assert "cells are inputs, and 1,200 of them an antigen pass on to 1 and input" in answered
    assert "space=" in answered
    rails.fit(X, Y).respond(X[:1])
    assert said()[-1].startswith("answering 1 antigens")
    hidden = RAILS(net, "1", space="0", maturation=settings, seed=0).fit(X, Y)
    hidden.predict(X[:2])
    assert "cells are outputs of '0', and 600 of them" in said()[-1]


def test_features_that_are_computed_again_say_so(said, net, monkeypatch):
    monkeypatch.setattr(_estimates, "LONG", 0.0)
    DkNN(net, "1", neighbours=5, memory_budget=1).fit(X, Y)
    assert any(text.startswith("computing the features of 57 examples") for text in said())


def test_what_a_call_takes_is_not_taken_for_what_its_cells_take(net, monkeypatch):
    rails = RAILS(net, "1", maturation=Maturation(generations=10, population=120, neighbours=5), seed=0).fit(X, Y)
    monkeypatch.setattr(_estimates, "timed", lambda work: 0.05 + len(work()[0]) * 1e-6)
    # 64 cells would make it 391 seconds.
    assert rails._timed(X[:1], 0, 500_000) == pytest.approx(0.5 + 500_000 * 0.05 / 4096)


def test_an_estimate_is_the_time_of_a_cell_times_all_cells(net, monkeypatch):
    rails = RAILS(net, "1", maturation=Maturation(generations=10, population=120, neighbours=5), seed=0).fit(X, Y)
    monkeypatch.setattr(_estimates, "timed", lambda work: len(work()[0]) * 1e-3)
    assert rails._timed(X[:1], 0, 50_000) == pytest.approx(50)
    assert rails._timed(X[:1], 0, 99) == 0


def test_the_command_line_prints_them(capsys):
    common.listen()
    try:
        _estimates.tell(45, "this", "that")
    finally:
        _estimates.LOG.handlers = []
    assert capsys.readouterr().err == "this takes about 45 seconds: that\n"
