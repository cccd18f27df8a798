"""Metrics: RAILS and all that stands in for it compare what the metric makes of features, wherever they do."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation, attacks, data, load
from immunonet.features.maps import METRICS, UnitMap

# All cells of the end are kept: three quarters of them vote, the rest are memory.
ALL = Maturation(population=36, neighbours=3, generations=3, plasma=0.75, memory=0.25, early_stop=None, prune=None)
# Layers whose map is the input, affine (and replaced by its root), behind activations, and a callable's.
FEATURES = {
    "input": lambda net, x: x,
    "0": lambda net, x: net[:1](x),
    "2": lambda net, x: net[:3](x),
    "callable": lambda net, x: half(x),
}
SPACES = [(name, None) for name in FEATURES] + [("2", "0"), ("0", "0"), ("2", "2")]


def half(x):
    return x[..., ::2] + 0.1


@pytest.fixture
def net(functional_conv):
    """With an offset that turns angles: a cosine is not that of a map's linear part."""
    functional_conv[0].bias.data += 0.3
    return functional_conv


@pytest.fixture
def antigens():
    return torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def fitted(net, images, layers, space=None, **settings):
    layers = [half if layer == "callable" else layer for layer in layers]
    own = {"maturation": ALL, "seed": 0, "metric": "cosine"} | settings
    return RAILS(net, layers, space=space, **own).fit(*images)


@torch.no_grad()
def compared(net, layer, x, space=None):
    """The unit features of cells `(..., *S')` in a space, all of the model's layers being those of a Sequential."""
    shape = x.shape[: -3 if x.ndim > 3 else 1]
    cells = x.flatten(0, len(shape) - 1)
    found = FEATURES[layer](net, cells) if space is None else net[int(space) + 1 : int(layer) + 1](cells)
    return normalize(found.flatten(1), dim=1).unflatten(0, shape)


@pytest.mark.parametrize(("layer", "space"), SPACES)
def test_affinities_are_distances_of_unit_features_in_every_generation(net, images, antigens, layer, space):
    whole = fitted(net, images, [layer], space)
    own = compared(net, layer, antigens if space is None else net[: int(space) + 1](antigens).detach(), space)
    curve = whole.respond(antigens, trace=True).trace[0]
    for generation in range(4):
        # The first generations of a longer run, bit for bit: no random number depends on what comes later.
        rails = whole.with_settings(maturation=dataclasses.replace(ALL, generations=generation))
        response = rails.respond(antigens)
        ends = [response.plasma, response.memory]
        for cells in ends:
            far = (compared(net, layer, cells.x, space) - own[:, None]).norm(dim=2)
            assert_close(-cells.affinity, far, rtol=1e-4, atol=2e-4)
        affinity, label = (torch.cat([getattr(cells, name) for cells in ends], 1) for name in ("affinity", "label"))
        best = [affinity.masked_fill(label != c, -torch.inf).amax(1) for c in range(3)]
        assert_close(curve.affinity_best[generation], torch.stack(best, 1), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("layer", "space"), SPACES)
def test_naive_cells_are_the_nearest_by_angle_and_cells_are_no_unit_vectors(net, images, antigens, layer, space):
    rails = fitted(net, images, [layer], space)
    examples, labels = rails.repertoire.x, rails.repertoire.y
    place = (lambda x: x) if space is None else (lambda x: net[: int(space) + 1](x).detach())
    far = torch.cdist(
        compared(net, layer, place(antigens), space), compared(net, layer, place(examples), space),
        compute_mode="donot_use_mm_for_euclid_dist",
    )  # fmt: skip
    index, distances = rails.naive(antigens)
    for label in range(3):
        nearest = far.masked_fill(labels != label, torch.inf).topk(3, largest=False)
        assert torch.equal(index[:, label], nearest.indices)
        assert_close(distances[:, label], nearest.values, rtol=1e-3, atol=1e-4)
    cells = rails.members(0, index)
    assert_close(cells.flatten(0, 2), place(examples[index.flatten()]), rtol=1e-4, atol=1e-5)
    assert (cells.flatten(3).norm(dim=3) - 1).abs().max() > 0.1


def test_scale_is_nothing_to_an_angle(examples):
    """Antigens and examples of other lengths get the same answers by angle, and others by distance."""
    x, y = examples(60, (4,))
    antigens, scale = examples(20, (4,), seed=1)[0], torch.linspace(0.1, 1, 20)[:, None]
    model = nn.Linear(4, 3)
    still = Maturation(population=30, neighbours=3, generations=0, mutation_rate=0.0)
    found = {}
    for metric in ("cosine", "euclidean"):
        rails = RAILS(model, "input", maturation=still, metric=metric, seed=0).fit(x, y, calibration=(x, y))
        found[metric] = [rails.predict_proba(z) for z in (antigens, scale * antigens)]
        assert torch.equal(rails.foreign(antigens), rails.foreign(scale * antigens)) is (metric == "cosine")
    assert_close(*found["cosine"])
    assert not torch.allclose(*found["euclidean"], atol=0.1)


@pytest.mark.parametrize(("layers", "space"), [(["input"], None), (["0", "2"], None), (["2"], "0"), (["0"], "0")])
def test_every_surrogate_has_finite_gradients_that_are_not_zero(net, images, antigens, layers, space):
    rails = fitted(net, images, layers, space)
    x = torch.cat([antigens, rails.repertoire.x[:2]]).requires_grad_()
    surrogates = rails.surrogates()
    assert set(surrogates) == {"unrolled", "soft-clones", "adv-knn", "ask", "soft-knn"}
    for surrogate in surrogates.values():
        votes = surrogate(x)
        assert_close(votes.exp().sum(1), torch.ones(len(x)))
        (slope,) = torch.autograd.grad(votes[:, 0].sum(), x)
        assert bool(torch.isfinite(slope).all())
        assert bool((slope[: len(antigens)].flatten(1).norm(dim=1) > 0).all())
        # Along an input whose layer knows angles alone, no vote changes.
        if layers == ["input"]:
            along = (slope * x).flatten(1).sum(1).abs()
            assert bool((along <= 1e-3 * slope.flatten(1).norm(dim=1) * x.flatten(1).norm(dim=1) + 1e-5).all())


@pytest.mark.parametrize(("layers", "space"), [(["input"], None), (["0", "2"], None), (["2"], "0"), (["0"], "0")])
def test_the_soft_vote_is_that_of_unit_vectors(net, images, antigens, layers, space):
    rails = fitted(net, images, layers, space)
    examples, labels = rails.repertoire.x, rails.repertoire.y
    antigens.requires_grad_()
    votes = []
    for layer in layers:
        a, b = (normalize(FEATURES[layer](net, x).flatten(1)) for x in (antigens, examples))
        squares = (a[:, None] - b).square().sum(2)
        logits = [squares[:, labels == c].sort(dim=1).values[:, :4].div(-0.05).logsumexp(1) for c in range(3)]
        votes.append(torch.stack(logits, 1).log_softmax(1))
    expected = torch.stack(votes).mean(0).log_softmax(1)
    found = attacks.SoftNeighbours(rails, neighbours=4, temperature=0.05)(antigens)
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    ours, theirs = (torch.autograd.grad(v[:, 1].sum(), antigens)[0] for v in (found, expected))
    assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def test_surrogates_climb_towards_what_the_defence_answers(digits_net):
    """PGD on the vote of unit features breaks a cosine RAILS; a vote that guessed raw ones would not follow it."""
    digits = data.load("digits", "train")
    x, y, test, truth = digits.x[:400], digits.y[:400], digits.x[800:840], digits.y[800:840]
    still = Maturation(population=60, neighbours=3, generations=1)
    rails = RAILS(digits_net, "input", maturation=still, metric="cosine", seed=0).fit(
        x, y, calibration=(x[:40], y[:40])
    )
    attack = attacks.PGD(eps=0.2, step=0.05, iterations=8, random_start=False)
    clean = (rails.predict(test) == truth).float().mean()
    found = attack(rails.surrogates()["soft-clones"], test, truth)
    broken = (rails.predict(found.adversarials) == truth).float().mean()
    noise = attacks.Noise(eps=0.2, points=1)(rails, test, truth).adversarials
    assert clean > 0.9
    assert broken < (rails.predict(noise) == truth).float().mean() - 0.3


@pytest.mark.parametrize(("layers", "space"), [(["2", "input"], None), (["2"], "0"), (["0"], "0")])
def test_a_cosine_rails_is_saved_and_loaded(net, images, antigens, tmp_path, layers, space):
    rails = fitted(net, images, layers, space)
    rails.save(tmp_path)
    again = load(tmp_path, net)
    assert again.settings() == rails.settings() == json.loads(json.dumps(rails.settings()))
    assert again.settings()["metric"] == again.metric == "cosine"
    assert torch.equal(again.predict_proba(antigens), rails.predict_proba(antigens))
    assert torch.equal(again.foreign(antigens), rails.foreign(antigens))
    euclidean = RAILS(net, layers, space=space, maturation=ALL, seed=0).fit(*images)
    assert euclidean.settings()["metric"] == "euclidean"
    assert not torch.equal(euclidean.predict_proba(antigens), rails.predict_proba(antigens))
    assert ("metric='cosine'" in repr(rails), "metric" in repr(euclidean)) == (True, False)


def test_the_alarm_of_stealthy_attacks_is_that_of_the_defence(net, images, antigens):
    rails = fitted(net, images, ["2"], false_alarm=0.2)
    x = torch.cat([antigens, images[0][:30]])
    stealthy = attacks.Stealthy(attacks.SoftNeighbours(rails), rails)
    flags = rails.foreign(x)
    assert 0 < int(flags.sum()) < len(x)
    assert torch.equal(stealthy.penalty(x) > 0, flags)


def test_an_unknown_metric_is_named(net):
    for kind in (RAILS, DkNN):
        with pytest.raises(ValueError, match="metric must be one of 'euclidean', 'cosine', got 'l1'"):
            kind(net, "2", metric="l1")


# A metric of one's own.


class Correlation(UnitMap):
    """Unit features less their mean: distances tell how features are correlated."""

    def finished(self, features):
        return super().finished(features - features.mean(1, keepdim=True))

    def __call__(self, cells):
        features = self._inner(cells)
        return normalize(features - features.mean(1, keepdim=True), dim=1)


@pytest.mark.parametrize("layer", ["input", "2"])
@pytest.mark.parametrize("kind", [RAILS, DkNN])
def test_a_metric_is_added_by_one_entry(net, images, antigens, tmp_path, monkeypatch, kind, layer):
    monkeypatch.setitem(METRICS, "correlation", Correlation)
    settings = {"maturation": ALL, "seed": 0} if kind is RAILS else {"neighbours": 3}
    defence = kind(net, layer, metric="correlation", **settings).fit(*images)
    assert defence.settings()["metric"] == "correlation"
    with torch.no_grad():
        own, known = (FEATURES[layer](net, x).flatten(1) for x in (antigens, defence.repertoire.x))
    correlation = torch.corrcoef(torch.cat([own, known]))[: len(own), len(own) :]
    distances, index = defence.index().nearest(defence.features(antigens)[0], 3, by_class=False)
    assert_close(1 - distances.square() / 2, correlation.topk(3).values, rtol=1e-3, atol=1e-4)
    assert torch.equal(index, correlation.topk(3).indices)
    x = antigens.clone().requires_grad_()
    for surrogate in defence.surrogates().values():
        (slope,) = torch.autograd.grad(surrogate(x)[:, 0].sum(), x)
        assert bool(torch.isfinite(slope).all())
        assert bool((slope.flatten(1).norm(dim=1) > 0).all())
    defence.save(tmp_path)
    assert torch.equal(load(tmp_path, net).predict_proba(antigens), defence.predict_proba(antigens))
