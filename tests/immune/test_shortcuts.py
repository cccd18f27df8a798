"""What makes maturation cheap must not change its answers: early stop, pruning, batches, chunks, memory formats."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation, models
from immunonet.defences import maturing
from immunonet.features.maps import FeatureMap
from immunonet.immune.maturation import Naive, mature
from immunonet.immune.noise import Noise

FULL = Maturation(population=200, neighbours=5, generations=6, early_stop=None, prune=None)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# On cells that are vectors, every number of an antigen can be followed.


class Columns(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 1.0


def points(**changes):
    """A RAILS on 5-dimensional points of three classes, some antigens near one class and some between them."""
    x, y = rand(120, 5), torch.arange(120) % 3
    x[:, 0] = (x[:, 0] / 3 + y / 3).clamp(0, 1)
    settings = {"population": 90, "neighbours": 5, "generations": 5} | changes
    defence = RAILS(Columns(), "input", maturation=Maturation(**settings), seed=3).fit(x, y, calibration=(x, y))
    return defence, rand(30, 5, seed=1)


@pytest.mark.parametrize("shortcuts", [{}, {"early_stop": None}, {"prune": None}, {"prune": 0}, {"candidates": 2}])
def test_an_antigens_answer_does_not_depend_on_its_batch(shortcuts):
    defence, antigens = points(**shortcuts)
    whole = defence.respond(antigens, trace=True)
    assert len(whole.generations.unique()) > 1 or shortcuts.get("early_stop", 2) is None
    for some in (torch.tensor([7]), torch.tensor([29, 4, 11]), torch.arange(29, -1, -1)):
        part = defence.respond(antigens[some], trace=True)
        assert torch.equal(part.votes, whole.votes[some])
        assert torch.equal(part.generations, whole.generations[some])
        assert torch.equal(part.plasma.x, whole.plasma.x[some])
        assert torch.equal(part.memory.affinity, whole.memory.affinity[some])
        assert torch.equal(part.trace[0].affinity_mean, whole.trace[0].affinity_mean[:, some])


def test_what_is_pruned_keeps_its_cells_and_the_best_class_goes_on():
    # Decay looks at the whole population, so that with it a class that stands still would be felt by the others.
    defence, antigens = points(early_stop=None, prune=0.0, plasma=0.2, decay=1.0)
    full, _ = points(early_stop=None, prune=None, plasma=0.2, decay=1.0)
    curve, reference = defence.respond(antigens, trace=True).trace[0], full.respond(antigens, trace=True).trace[0]
    # Generation 0 is the same for both: pruning comes after it.
    assert torch.equal(curve.affinity_mean[0], reference.affinity_mean[0])
    stands = curve.affinity_mean.diff(dim=0) == 0
    # Once a class stands still it does so for good.
    assert (stands[1:] >= stands[:-1]).all()
    assert stands[-1].any()
    best = curve.affinity_best[:-1].argmax(2, keepdim=True)
    assert not stands.gather(2, best).any()
    # What is not pruned evolves as it would without pruning.
    pruned = stands.any(0)
    assert torch.equal(curve.affinity_mean[-1][~pruned], reference.affinity_mean[-1][~pruned])


def cells_of(shares, **changes):
    """The cells that a feature map saw in each generation: antigens at 0, classes at `shares` from them."""
    settings = Maturation(
        **{"population": 6, "neighbours": 1, "generations": 3, "early_stop": None, "plasma": 0.5, "memory": 0.5}
        | changes
    )
    distances = torch.tensor(shares)[None, :, None]
    x = distances[..., None].expand(1, -1, 1, 50).clone()
    seen = []

    def distances_of(cells, family):
        seen.append(cells.clone())
        return cells[family].norm(dim=2) / 50**0.5

    naive = Naive(x, x, distances, torch.arange(len(shares))[None, :, None])
    bounds = (torch.tensor(0.0), torch.tensor(1.0))
    end, _ = mature(naive, distances_of, settings, Noise([0], antigens=1), bounds=bounds)
    return seen, end


def test_the_cells_of_a_pruned_class_stay():
    seen, end = cells_of([0.1, 0.9], prune=0.05)
    assert not torch.equal(seen[0][0, 0], seen[1][0, 0])
    for cells in seen[1:]:
        assert torch.equal(cells[0, 1], seen[0][0, 1])
    assert_close(end.best[0, 1], -(seen[0][0, 1].norm(dim=1) / 50**0.5).min())
    seen, _ = cells_of([0.1, 0.9], prune=None)
    assert not torch.equal(seen[0][0, 1], seen[1][0, 1])


def test_candidates_that_fall_behind_the_clones_of_others_end_well():
    """Mutation takes the candidate's cells from its antigen; the clones of the other class stand still, nearer."""
    seen, end = cells_of(
        [0.100, 0.101], candidates=1, prune=0.0, mutation_rate=1.0, mutation_range=(0.9, 0.9), early_stop=2
    )
    assert torch.isfinite(end.best).all()
    assert end.votes.tolist() == [[0.0, 1.0]]
    assert all(torch.equal(cells, seen[0]) for cells in seen)


# Batches and chunks.


@pytest.fixture
def deep(conv, images):
    maturation = Maturation(population=60, neighbours=4, generations=3)
    return RAILS(conv, "2", maturation=maturation, seed=0).fit(*images)


def alike(a, b):
    """The same response to float tolerance: BLAS sums depend on shapes."""
    assert torch.equal(a.labels, b.labels)
    assert ((a.votes - b.votes).abs().amax(1) <= 0.05).all()
    assert_close(a.plasma.affinity, b.plasma.affinity, rtol=1e-3, atol=1e-4)


def test_a_population_larger_than_a_batch(deep, images, monkeypatch):
    expected = deep.respond(images[0][:6])
    monkeypatch.setattr(maturing, "BATCH_VALUES", 1)
    sizes = []
    answer = RAILS._mature
    monkeypatch.setattr(RAILS, "_mature", lambda self, a, *rest: sizes.append(len(a.cells)) or answer(self, a, *rest))
    alike(deep.respond(images[0][:6]), expected)
    assert sizes == [1] * 6


@pytest.mark.parametrize("rows", [1, 7, 20, 23, 60, 10_000])
def test_chunks_of_cells_do_not_matter(rows, deep, images, monkeypatch):
    antigens = images[0][:10]
    (feature_map,) = deep.feature_maps
    expected, whole = deep.respond(antigens), deep.features(antigens)[0]
    calls = []
    run = models.outputs
    monkeypatch.setattr(
        models, "outputs", lambda model, names, x, **how: calls.append(len(x)) or run(model, names, x, **how)
    )
    feature_map.rows = rows
    assert_close(deep.features(antigens)[0], whole)
    alike(deep.respond(antigens), expected)
    assert max(calls) <= rows


def test_the_rows_of_a_chunk_follow_the_widest_layer(conv):
    x = rand(4, 1, 6, 6)
    found = FeatureMap("2", conv[:3])
    found.probe(x)
    # 4 channels of 36 pixels are the widest.
    assert found.rows == 2**22 // 144


class ByView(nn.Module):
    """Reshapes by view after a convolution, which refuses channels-last activations."""

    def __init__(self, safe):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 5, 3)
            self.last = nn.Linear(80, 3)
        self.safe = safe

    def forward(self, x):
        x = self.conv(x).relu()
        return self.last(x.flatten(1) if self.safe else x.view(len(x), -1))


def test_models_that_reshape_by_view_answer_alike(images):
    answers = []
    for safe in (True, False):
        net = ByView(safe).eval()
        defence = RAILS(net, "last", maturation=dataclasses.replace(FULL, population=60), seed=0).fit(*images)
        expected = torch.channels_last if safe else torch.preserve_format
        assert defence.feature_maps[0].memory_format == expected
        answers.append(defence.respond(images[0][:10]))
        assert_close(defence.features(images[0][:10])[0], net(images[0][:10]), rtol=1e-4, atol=1e-5)
    alike(*answers)


def test_inputs_stay_as_they_are_whatever_is_done_to_features(images):
    x, y = images
    kept = x.clone()
    for metric in ("cosine", "euclidean"):
        defence = DkNN(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), "input", neighbours=5, metric=metric).fit(x, y)
        defence.predict(x[:5])
        assert torch.equal(x, kept)


# Features that are no numbers.


def broken(value):
    """A feature map whose features are `value` for inputs whose first pixel is 1."""
    return lambda x: torch.where(x.flatten(1)[:, :1] >= 1, value, x.flatten(1).square())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("defence", [RAILS, DkNN])
def test_features_that_are_no_numbers(defence, value):
    layer = broken(value)
    x, y = 0.9 * rand(60, 1, 2, 2), torch.arange(60) % 3
    options = {"maturation": dataclasses.replace(FULL, population=60)} if defence is RAILS else {"neighbours": 5}
    message = "layer '<lambda>' gave NaN or infinite features"
    good = defence(Columns(), layer, **options).fit(x, y)
    bad = x.clone()
    bad[30, 0, 0, 0] = 1
    with pytest.raises(ValueError, match=message):
        good.predict(bad)
    with pytest.raises(ValueError, match=message):
        defence(Columns(), layer, **options).fit(bad, y)
    assert len(good.predict(x)) == 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cells_without_features_never_vote(value):
    """Mutation takes cells where the map is no number, though antigens and repertoire have features."""
    layer = broken(value)
    x, y = 0.9 + 0.099 * rand(60, 1, 2, 2), torch.arange(60) % 3
    maturation = Maturation(
        population=60,
        neighbours=4,
        mutation_rate=0.5,
        mutation_range=(0.05, 0.15),
        early_stop=None,
        prune=None,
        plasma=0.1,
        memory=0.9,
    )
    r = RAILS(Columns(), layer, maturation=maturation, seed=0).fit(x, y).respond(x[:10], trace=True)
    lost = r.memory.x[:, :, 0, 0, 0] >= 1
    assert lost.any()
    assert (r.memory.affinity[lost] == -torch.inf).all()
    assert torch.isfinite(r.plasma.affinity).all()
    assert torch.isfinite(r.votes).all()
    assert not torch.isnan(r.trace[0].affinity_mean).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_that_overflow_in_half_precision(dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = rand(60, 1, 4, 4), torch.arange(60) % 3
    maturation = dataclasses.replace(FULL, population=60)
    with torch.no_grad():
        net[1].weight.fill_(1e4 if dtype == torch.float16 else 1e38)
        net[3].weight.fill_(0)
    net = net.to(dtype)
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        RAILS(net, "2", maturation=maturation).fit(x, y)
