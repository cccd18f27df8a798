"""The look-up in two stages finds what a comparison with all finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from immunonet.immune.spared import among
from immunonet.memory.index import Lookup, half
from immunonet.memory.recall import chosen
from immunonet.memory.space import learned, nearest_other, radius_of


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    width=st.integers(1, 20),
    radius=st.floats(0, 8),
    scale=st.sampled_from([1e-3, 1.0, 40.0, 1e5]),
)
def test_as_by_a_comparison_with_all(seed, sizes, width, radius, scale):
    random = np.random.default_rng(seed)
    spread = random.exponential(size=width).astype(np.float32)
    found, radius = Lookup(spread), radius * scale
    parts = [(scale * random.normal(size=(n, width)) * spread).astype(np.float32) for n in sizes]
    for part in parts:
        found.add({"signature": part, "label": np.arange(len(part))})
    every = np.concatenate(parts)
    assert len(found) == len(every)
    assert found["label"].tolist() == [i for n in sizes for i in range(n)]
    for query in [*every[:3], (scale * random.normal(size=width) * spread).astype(np.float32)]:
        rows, distances = found.within(query, radius)
        exact = np.linalg.norm(half(every).astype(np.float32) - half(query).astype(np.float32), axis=1)
        assert sorted(rows) == np.flatnonzero(exact < np.float32(radius)).tolist()
        np.testing.assert_allclose(distances, exact[rows], rtol=1e-4, atol=1e-6 * scale)
        assert (np.diff(distances) >= 0).all()


@pytest.mark.parametrize(
    ("trusted", "labels", "expected"),
    [
        ([True, True], [1, 1], 4),
        ([False, True], [1, 1], 2),
        ([False, False], [1, 1], -1),
        ([True, True], [1, 0], -1),
        ([True, False], [1, 0], -1),
    ],
)
def test_the_nearest_trusted_entry_answers_unless_labels_differ(trusted, labels, expected):
    rows = np.array([4, 2])
    both = np.zeros(5, bool), np.zeros(5, int)
    both[0][rows], both[1][rows] = trusted, labels
    assert chosen(rows, np.array([0.1, 0.2]), *both) == expected
    assert chosen(rows[:0], np.array([]), *both) == -1


def test_answers_stand_where_they_belong():
    hit = torch.tensor([True, False, True])
    assert among(torch.tensor([1, 3]), torch.tensor([2]), hit).tolist() == [1, 2, 3]


def test_the_radius_holds_the_share_it_says():
    distances = torch.linspace(1, 2, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    radius = radius_of(distances, 0.05)
    assert (distances < radius).sum() == 10
    assert (distances <= radius).sum() == 11
    assert radius_of(torch.tensor([3.0, 2.0])) == 2


def test_the_nearest_other_is_no_copy_of_itself():
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
    assert nearest_other(points[:3], points, 3).tolist() == [1, 1, 0]


def test_signatures_keep_distances():
    """A sample of few dimensions is left whole; lengths beyond the directions count as well."""
    x = torch.randn(400, 80, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0, 80)
    known = {"fingerprint": "", "classes": 2, "shape": (80,), "cell_shape": (80,)}
    made = learned(
        lambda i: [x[i, :30], x[i, 30:] / 7], 400, torch.tensor([1.0, 1 / 7]), [x[:2, :30], x[:2, 30:] / 7], **known
    )
    signs = made.sign([x[:, :30], x[:, 30:] / 7])
    assert signs.shape == (400, 64)
    exact, found = torch.pdist(x), torch.pdist(signs)
    assert (found <= exact + 1e-3).all()
    assert (found / exact).mean() > 0.97
    assert (made.spread[:-1].diff() <= 1e-3).all()
