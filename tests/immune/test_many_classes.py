"""Of more than a hundred classes only those near the antigen have cells."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from immunonet import RAILS, Maturation
from immunonet.immune.maturation import populated
from immunonet.immune.settings import MANY

CLASSES, K = 130, 2
SETTINGS = {"population": 48, "neighbours": K, "generations": 2}


@given(
    classes=st.integers(1, 5000),
    population=st.integers(1, 20_000),
    k=st.integers(1, 50),
    candidates=st.one_of(st.none(), st.just("auto"), st.integers(1, 6000)),
)
@settings(deadline=None)
def test_how_many_classes_have_cells(classes, population, k, candidates):
    found = Maturation(population=population, neighbours=k, candidates=candidates)
    few = found.populated(classes)
    if classes <= MANY or candidates is None:
        assert few == classes
    else:
        assert few == min(classes, max(10, population // (2 * k)) if candidates == "auto" else candidates)
        # Two clones of every naive cell, where there are ten classes' worth of cells.
        assert candidates != "auto" or population < 20 * k or found.per_class(classes) >= 2 * k or few == classes
    # Those that have cells are a problem of so many classes.
    assert found.populated(few) == few
    assert found.per_class(few) == found.per_class(classes)
    assert found.sizes(few) == found.sizes(classes)
    assert found.total(classes) == found.per_class(classes) * few
    assert found.evolving(classes) == (few if candidates in (None, "auto") else min(few, candidates))


def test_up_to_a_hundred_classes_nothing_is_left_out():
    assert Maturation().populated(100) == 100
    assert Maturation().populated(101) == Maturation().populated(1000) == 50
    assert Maturation.paper().populated(1000) == Maturation.authors("mnist").populated(1000) == 1000


@given(n=st.integers(1, 4), distances=st.lists(st.integers(0, 4), min_size=104, max_size=104), few=st.integers(1, 104))
@settings(deadline=None, max_examples=30)
def test_the_nearest_classes_have_cells(n, distances, few):
    nearest = torch.tensor(distances, dtype=torch.float32).repeat(n, 1)
    both = torch.stack([nearest, nearest + 1], 2)
    found = populated(both, torch.arange(104 * 2).view(1, 104, 2).repeat(n, 1, 1), Maturation(candidates=few))
    assert found.shape == (n, few)
    assert all(len(set(row)) == few and row == sorted(row) for row in found.tolist())
    left = torch.ones_like(nearest, dtype=torch.bool).scatter_(1, found, False)
    assert not left.any() or nearest.gather(1, found).max() <= nearest[left].min()


class Counted:
    """Examples that tell which of them were read."""

    def __init__(self, x, y):
        self.x, self.y, self.read = x, y, []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        self.read.append(i)
        return self.x[i], int(self.y[i])


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    y = torch.arange(4 * CLASSES) % CLASSES
    centres = torch.rand(CLASSES, 12, generator=generator)
    x = (centres[y] + 0.05 * torch.randn(len(y), 12, generator=generator)).clamp(0, 1)
    return net, x, y, centres[:20]


@pytest.mark.parametrize("layers", ["1", ["input", "1"]])
def test_answers_are_those_of_all_classes(problem, layers):
    net, x, y, asked = problem
    few, every = (
        RAILS(net, layers, maturation=Maturation(**SETTINGS, candidates=candidates), seed=0).fit(x, y)
        for candidates in ("auto", None)
    )
    response = few.respond(asked, trace=True)
    assert few.maturations[0].populated(CLASSES) == 12
    assert torch.equal(response.labels, torch.arange(20))
    assert (every.predict(asked) == torch.arange(20)).float().mean() >= 0.8
    torch.testing.assert_close(response.votes.sum(1), torch.ones(20))
    assert ((response.votes > 0).sum(1) <= 12 * len(few.layers)).all()
    assert torch.equal(few.repertoire.y[response.plasma.origin], response.plasma.label)
    assert torch.equal(few.repertoire.y[response.memory.origin], response.memory.label)
    assert torch.equal(few.predict(asked), few(asked).argmax(1))
    # Sensing looks at all classes.
    assert torch.equal(few.p_values(asked), every.p_values(asked))
    for curve in response.trace:
        assert curve.votes.shape == curve.affinity_best.shape == (3, 20, CLASSES)
        assert (curve.affinity_best >= curve.affinity_mean).all()
    index = few.index()
    near, _ = index.nearest(few.features(asked)[0], K)
    left = response.trace[0].votes.sum(0) == 0
    best = response.trace[0].affinity_best[-1]
    assert (best == -near.amin(2))[left].float().mean() > 0.8
    assert json.dumps(few.settings())


def test_a_batch_may_want_different_classes(problem):
    net, x, y, asked = problem
    rails = RAILS(net, "1", maturation=Maturation(**SETTINGS), shared_noise=False, seed=0).fit(x, y)
    assert torch.equal(rails(asked), torch.cat([rails(one) for one in asked.split(1)]))
    assert torch.equal(rails.draws(asked, [0, 3])[0], rails.predict(asked, seed=0))


def test_only_the_candidates_are_read(problem):
    net, x, y, asked = problem
    data = Counted(x, y)
    rails = RAILS(net, "1", maturation=Maturation(**SETTINGS), seed=0).fit(data, keep="source")
    data.read.clear()
    rails.predict(asked[:1])
    assert len(np.unique(data.read)) == 12 * K
