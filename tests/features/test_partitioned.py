"""A search in parts: the same distances, examples and answers as in one piece, whatever their number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from immunonet import RAILS, DkNN, Maturation
from immunonet.features.partitioned import PartitionedIndex
from immunonet.features.search import ExactIndex


def index(n: int, seed: int, classes: int = 3, width: int = 5, grid: bool = False) -> ExactIndex:
    generator = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) % classes)[torch.randperm(n, generator=generator)]
    x = torch.randn(n, width, generator=generator)
    x = x.round() if grid else x
    order = y.argsort(stable=True)
    return ExactIndex(x[order].clone(), order, torch.bincount(y, minlength=classes).tolist())


@settings(deadline=None, max_examples=40)
@given(st.integers(60, 120), st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4))
def test_parts_find_what_the_whole_finds(n: int, seed: int, partitions: int, k: int) -> None:
    whole = index(n, seed)
    parts = PartitionedIndex(whole, partitions)
    queries = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed + 1))
    for by_class in (True, False):
        distances, found = whole.nearest(queries, k, by_class=by_class)
        own, also = parts.nearest(queries, k, by_class=by_class)
        assert torch.equal(distances, own)
        assert torch.equal(found, also)
    radius = whole.nearest(queries, 2, by_class=False)[0][:, 1]
    for one, other in zip(whole.within(queries, radius), parts.within(queries, radius), strict=True):
        assert torch.equal(one, other)
    some = torch.randint(n, (3, 2), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(whole.rows(some), parts.rows(some))
    assert torch.equal(whole.centre, parts.centre)
    assert parts.width == whole.width


def test_equal_distances_are_counted_over_all_parts() -> None:
    whole = index(90, 3, width=2, grid=True)
    parts = PartitionedIndex(whole, 3)
    queries = torch.zeros(1, 2)
    radius = whole.nearest(queries, 4)[0][:, 0, -1]
    for one, other in zip(whole.within(queries, radius), parts.within(queries, radius), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def fitted() -> tuple[RAILS, DkNN, torch.Tensor]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    y = torch.arange(240) % 3
    x = torch.rand(3, 1, 4, 4)[y] * 0.7 + torch.rand(240, 1, 4, 4) * 0.3
    small = Maturation(population=30, generations=2, neighbours=5)
    return RAILS(net, "input", maturation=small, seed=0).fit(x, y), DkNN(net, "input", neighbours=9).fit(x, y), x


def test_answers_in_parts_are_the_same(fitted: tuple[RAILS, DkNN, torch.Tensor]) -> None:
    rails, dknn, x = fitted
    for defence in (rails, dknn):
        before = defence.predict_proba(x[:20])
        foreign = defence.foreign(x[:20])
        try:
            assert defence.partition(3) is defence
            assert torch.equal(before, defence.predict_proba(x[:20]))
            assert torch.equal(foreign, defence.foreign(x[:20]))
            with pytest.raises(ValueError, match="only where all features are kept"):
                defence.partition(2)
        finally:
            defence.indices = defence._sealed = None  # type: ignore[assignment]
            fitted_again(defence)


def fitted_again(defence: Any) -> None:
    given = defence.repertoire
    defence.fit(given.x, given.y, calibration=(defence.held.x, defence.held.y))


def test_too_many_parts_are_refused_and_change_nothing(fitted: tuple[RAILS, DkNN, torch.Tensor]) -> None:
    rails, _, x = fitted
    before = rails.predict_proba(x[:5])
    with pytest.raises(ValueError, match=r"partitions=40 leaves \d examples of a class to a part, fewer than the 5"):
        rails.partition(40)
    with pytest.raises(ValueError, match="partitions must be at least 1"):
        rails.partition(0)
    assert torch.equal(before, rails.predict_proba(x[:5]))
