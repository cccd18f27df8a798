import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from immunonet.features.search import ExactIndex
from immunonet.immune import flocking
from immunonet.immune.flocking import smallest


@pytest.fixture(autouse=True, params=[flocking.AT_ONCE, 0], ids=["at once", "class by class"])
def way(request, monkeypatch):
    """Few queries are searched in all classes at once, many class by class."""
    monkeypatch.setattr(flocking, "AT_ONCE", request.param)


def oracle(queries, keys, labels, k):
    """Distances and indices `(B, C, k)` in float64 by scikit-learn's brute force."""
    distances, indices = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(keys[members].double().numpy())
        near, index = search.kneighbors(queries.double().numpy())
        distances.append(near)
        indices.append(members.numpy()[index])
    return np.stack(distances, 1), np.stack(indices, 1)


def search(queries, keys, labels, k):
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels).tolist()
    distances, found = ExactIndex(keys[order].clone(), order, counts).nearest(queries, k)
    return distances.numpy(), found.numpy()


def spread(g):
    return torch.randn(200, 12, generator=g), torch.randn(20, 12, generator=g)


def offset(g):
    keys, queries = spread(g)
    return keys + 3000, queries + 3000


def near_duplicates(g):
    seeds = torch.randn(20, 12, generator=g)
    keys = seeds.repeat(10, 1) + 1e-3 * torch.randn(200, 12, generator=g)
    return keys, seeds + 1e-3 * torch.randn(20, 12, generator=g)


def near_duplicates_far_out(g):
    keys, queries = near_duplicates(g)
    return keys + 30, queries + 30


def columns_of_different_scale(g):
    scale = torch.logspace(-3, 5, 12)
    keys, queries = spread(g)
    return keys * scale, queries * scale


def clusters_far_apart(g):
    """Two groups 2e4 apart, whose members are about 1 apart: the squared norms hide the differences."""
    keys, queries = spread(g)
    side = 1e4 * (2.0 * (torch.arange(200) % 2) - 1)
    return keys + side[:, None], queries + 1e4 * (2.0 * (torch.arange(20) % 2) - 1)[:, None]


def wide(g):
    return torch.randn(60, 3000, generator=g).relu(), torch.randn(10, 3000, generator=g).relu()


@pytest.mark.parametrize(
    "features",
    [
        spread,
        offset,
        near_duplicates,
        near_duplicates_far_out,
        columns_of_different_scale,
        clusters_far_apart,
        wide,
    ],
)
def test_it_equals_brute_force_per_class(features):
    g = torch.Generator().manual_seed(1)
    keys, queries = features(g)
    labels = torch.randint(0, 3, (len(keys),), generator=g)
    near, index = search(queries, keys, labels, 7)
    expected, expected_index = oracle(queries, keys, labels, 7)
    np.testing.assert_allclose(near, expected, rtol=1e-4, atol=1e-6 * expected.mean())
    # Where two examples are equally far to float precision, either may come first.
    own = (queries[:, None, None].double() - keys[torch.from_numpy(index)].double()).norm(dim=3).numpy()
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6 * expected.mean())
    assert (index == expected_index).mean() > 0.99


def test_a_key_itself_has_distance_zero_and_comes_first():
    keys = 100 + torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    near, index = search(keys, keys, torch.zeros(50, dtype=torch.long), 3)
    assert (near[:, 0, 0] == 0).all()
    assert (index[:, 0, 0] == np.arange(50)).all()


def test_all_of_a_class_in_order():
    keys = torch.tensor([[5.0], [1.0], [3.0], [10.0], [20.0], [30.0]])
    near, index = search(torch.tensor([[4.5]]), keys, torch.tensor([0, 0, 0, 1, 1, 1]), 3)
    assert index.tolist() == [[[0, 2, 1], [3, 4, 5]]]
    assert near.tolist() == [[[0.5, 1.5, 3.5], [5.5, 15.5, 25.5]]]


@pytest.mark.parametrize("n", [2**14, 2**14 + 31, 20_000])
def test_the_smallest_of_many(n):
    values = torch.rand(3, n, generator=torch.Generator().manual_seed(4))
    values[1] = values[1].sort().values  # the smallest are side by side
    values[2, -5:] = -torch.arange(5.0)  # or after the last whole group
    found, places = smallest(values, 18)
    expected = values.sort(dim=1).values[:, :18]
    assert torch.equal(found, expected)
    assert torch.equal(values.gather(1, places), expected)
    assert all(len(row.unique()) == 18 for row in places)


def test_many_examples_of_a_class():
    g = torch.Generator().manual_seed(5)
    keys, queries = torch.randn(40_000, 4, generator=g), torch.randn(10, 4, generator=g)
    labels = (torch.arange(40_000) >= 20_000).long()
    near, index = search(queries, keys, labels, 10)
    expected, expected_index = oracle(queries, keys, labels, 10)
    np.testing.assert_allclose(near, expected, rtol=1e-4)
    assert (index == expected_index).mean() > 0.99


def test_autocast_does_not_reach_the_search():
    g = torch.Generator().manual_seed(3)
    keys, queries = offset(g)
    labels = torch.arange(len(keys)) % 2
    expected = search(queries, keys, labels, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = search(queries, keys, labels, 5)
    assert (found[0] == expected[0]).all()
    assert (found[1] == expected[1]).all()
