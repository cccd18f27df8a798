"""Innate answers: the gate against a plain loop, what it spares, and that all else stays as it was."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, Maturation, Memory, load
from immunonet._identity import identity
from immunonet.defences.spec import Spec
from immunonet.immune.spared import Spared, joined

SMALL = Maturation(population=45, neighbours=3, generations=2)
FIELDS = ("labels", "votes", "credibility", "foreign", "recalled", "generations")


def mixed(n, seed):
    """Return mixtures of two of three patterns, labelled by the one that most likely has the larger share."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    y, share = torch.arange(n) % 3, 0.3 + 0.5 * torch.rand(n, 1, 1, 1, generator=draw)
    other = (y + torch.randint(1, 3, (n,), generator=draw)) % 3
    noise = torch.rand(n, 1, 6, 6, generator=draw)
    return 0.7 * (share * patterns[y] + (1 - share) * patterns[other]) + 0.3 * noise, y


X, Y = mixed(240, 0)
HELD = mixed(60, 1)


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(X), Y).backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def always(trained):
    """RAILS in two layers around a network with which neighbours agree more or less."""
    return RAILS(trained, ["input", "0"], maturation=SMALL, seed=0).fit(X, Y, calibration=HELD)


@pytest.fixture
def antigens():
    return mixed(40, 2)[0]


def scores(rails, x, labels):
    """How many of the three nearest at each layer carry another label, over layers: by loops, in float64."""
    found = np.zeros(len(x))
    for layer, features in enumerate(rails.features(x)):
        keys = rails.index(layer).rows(torch.arange(len(rails.repertoire))).double().numpy()
        for i, one in enumerate(features.double().numpy()):
            near = np.argsort(((keys - one) ** 2).sum(1))[:3]
            found[i] += (rails.repertoire.y.numpy()[near] != int(labels[i])).sum()
    return found


def by_hand(rails, x):
    """The p-value of the network's label, by the textbook rule."""
    own, held = rails.model(x).argmax(1), rails.held.x
    calibration = scores(rails, held, rails.model(held).argmax(1))
    return [Fraction(int((calibration >= s).sum()) + 1, len(calibration) + 1) for s in scores(rails, x, own)]


def part(response, rows):
    cells = [getattr(getattr(response, kind), name)[rows]
             for kind in ("plasma", "memory") for name in ("x", "label", "affinity", "origin")]  # fmt: skip
    return [getattr(response, name)[rows] for name in FIELDS] + cells


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_p_values_above_alpha_leave_the_answer_to_the_network(always, antigens, alpha):
    rails = always.with_settings(innate=alpha)
    p = by_hand(always, antigens)
    assert len(set(p)) > 3
    assert_close(rails.support(antigens), torch.tensor([float(one) for one in p]))
    found, full = rails.respond(antigens), always.respond(antigens)
    hit = torch.tensor([one > Fraction(str(alpha)) for one in p])
    assert hit.any()
    assert not hit.all()
    assert torch.equal(found.innate, hit)
    logits = always.model(antigens)
    assert torch.equal(found.labels[hit], logits.argmax(1)[hit])
    assert_close(found.votes[hit], logits.softmax(1)[hit])
    assert found.generations[hit].eq(0).all()
    assert found.plasma.label[hit].eq(-1).all()
    assert_close(found.credibility, full.credibility)
    assert torch.equal(found.foreign, full.foreign)
    for one, other in zip(part(found, ~hit), part(full, ~hit), strict=True):
        assert torch.equal(one, other)
    assert f"{int(hit.sum())} innate" in repr(found)


def test_a_p_value_of_exactly_alpha_is_not_above_it(always, antigens):
    rails = always.with_settings(innate=0.5)
    # 60 calibration examples: p-values are multiples of 1 / 61.
    own = by_hand(always, antigens)
    level = max(one for one in own if one < 1)
    found = rails.with_settings(innate=float(level)).respond(antigens)
    assert found.innate.tolist() == [one > level for one in own]


def test_the_least_alpha_gives_the_network_and_the_highest_rails(always, antigens):
    p = by_hand(always, antigens)
    network, all_of = always.model(antigens).argmax(1), always.predict(antigens)
    low, high = (always.with_settings(innate=alpha) for alpha in (1e-6, 1 - 1e-6))
    assert low.respond(antigens).innate.all()
    assert torch.equal(low.predict(antigens), network)
    assert torch.equal(low.draws(antigens, [1, 2]), network.expand(2, -1))
    sure = torch.tensor([one == 1 for one in p])
    assert torch.equal(high.respond(antigens).innate, sure)
    assert torch.equal(high.predict(antigens), torch.where(sure, network, all_of))


@pytest.mark.parametrize("settings", [{}, {"voice": 0.3}, {"shared_noise": False}, {"space": "0"}])
def test_all_ways_of_asking_agree(trained, antigens, settings):
    rails = RAILS(trained, "0", maturation=SMALL, seed=0, innate=0.5, **settings).fit(X, Y, calibration=HELD)
    found = rails.respond(antigens)
    assert found.innate.any()
    assert not found.innate.all()
    assert torch.equal(rails.predict(antigens), found.labels)
    assert torch.equal(rails.predict_proba(antigens), found.votes)
    assert_close(found.votes.sum(1), torch.ones(40))
    logs = rails(antigens)
    assert torch.equal(logs.argmax(1), found.labels)
    assert_close(logs[found.innate], rails.model(antigens).log_softmax(1)[found.innate].detach())
    for one, other in zip(part(found, slice(None)), part(rails.respond(antigens), slice(None)), strict=True):
        assert torch.equal(one, other)
    draws = rails.draws(antigens, [0, 5])
    assert torch.equal(draws, torch.stack([found.labels, rails.predict(antigens, 5)]))
    assert_close(rails.sense(antigens).distance, rails.answered(antigens).sense.distance)


def test_other_batches_give_the_same_answers(always, antigens):
    rails = always.with_settings(innate=0.5)
    found = rails.respond(antigens)
    for rows in (torch.arange(7), torch.arange(20, 40), torch.randperm(40, generator=torch.manual_seed(0))):
        other = rails.respond(antigens[rows], batch_size=5)
        assert torch.equal(other.innate, found.innate[rows])
        assert torch.equal(other.labels, found.labels[rows])
        assert_close(other.votes, found.votes[rows], atol=0.05, rtol=0)


def test_what_is_spared_costs_no_generation(always, antigens, monkeypatch):
    rails = always.with_settings(innate=0.5)
    hit = rails.respond(antigens).innate
    evolved, whole = [], RAILS._evolved
    monkeypatch.setattr(RAILS, "_evolved", lambda self, a, *rest: evolved.append(len(a.cells)) or whole(self, a, *rest))
    rails.predict(antigens)
    assert sum(evolved) == int((~hit).sum())
    evolved.clear()
    rails.predict(antigens[hit])
    assert evolved == []


def test_a_learning_curve_and_memory_cells_are_those_of_whole_responses(always, antigens):
    rails = always.with_settings(innate=0.5)
    assert not rails.respond(antigens, trace=True).innate.any()
    assert torch.equal(rails.learning_curves(antigens)[0].votes, always.learning_curves(antigens)[0].votes)
    single = RAILS(always.model, "0", maturation=SMALL, innate=0.3, seed=0).fit(X, Y)
    cells, labels = single.memory_cells(antigens, 0, most=4)
    assert labels.min() >= 0
    assert torch.equal(cells, single.with_settings(innate=None).memory_cells(antigens, 0, most=4)[0])


def test_ties_of_the_network_go_where_its_argmax_goes():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    rails = RAILS(net, "input", maturation=SMALL, seed=0, innate=1e-6).fit(X, Y)
    assert rails.predict(X[:6]).tolist() == [0] * 6
    assert rails(X[:6]).argmax(1).tolist() == [0] * 6
    net[1].bias.data = torch.tensor([-300.0, 0.0, 200.0])
    sure = RAILS(net, "input", maturation=SMALL, seed=0, innate=1e-6).fit(X, Y)
    assert torch.isfinite(sure(X[:6])).all()


def test_without_it_nothing_changes(always, antigens):
    rails = always.with_settings(innate=0.5)
    again = rails.with_settings(innate=None)
    assert "innate" not in always.settings()
    assert always.setting("innate") is None
    assert [name for name, _ in always.calibration.named_buffers()] == ["strangeness", "scales", "label_scores"]
    assert identity(again) == identity(always)
    assert identity(rails) != identity(always)
    assert list(again.surrogates()) == list(always.surrogates())
    assert [*rails.surrogates()] == ["unrolled", "soft-clones", "gated", "credible", "adv-knn", "ask", "soft-knn"]
    for one, other in zip(part(again.respond(antigens), slice(None)), part(always.respond(antigens), slice(None)),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="innate must be set"):
        always.support(antigens)


def test_it_is_saved_told_and_read_from_words(trained, always, antigens, tmp_path):
    rails = always.with_settings(innate=0.5)
    rails.save(tmp_path)
    again = load(tmp_path, always.model)
    assert again.setting("innate") == 0.5
    assert torch.equal(again.calibration.own_scores, rails.calibration.own_scores)
    assert torch.equal(again.respond(antigens).innate, rails.respond(antigens).innate)
    assert "innate=0.5" in repr(rails)
    for text, alpha in (("rails 0 innate=.05", 0.05), ("rails 0 innate=none", None), ("rails 0", None)):
        assert Spec.parse(text).made(trained, lambda name, net: name, 1000).innate == alpha
    other = copy.deepcopy(trained)
    other[3].bias[0] += 5.0
    with pytest.raises(ValueError, match="gives other logits than when this was saved"):
        load(tmp_path, other)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 2, float("nan")])
def test_alpha_lies_between_0_and_1(mlp, alpha):
    with pytest.raises(ValueError, match=r"innate must be a finite number in \(0, 1\), got"):
        RAILS(mlp, "input", innate=alpha)
    with pytest.raises(TypeError, match=r"innate must be a number, got '0\.05'"):
        RAILS(mlp, "input", innate="0.05")


def test_what_memory_knows_is_left_to_it(always, antigens):
    rails = always.with_settings(innate=0.5, memory=Memory(None))
    first = rails.respond(antigens)
    hit = first.innate.nonzero()[:, 0]
    known = hit[:1]
    ids = rails.memory.remember(rails.respond(antigens[known]), antigens[known])
    wrong = (first.labels[known] + 1) % 3
    rails.memory.confirm(ids, wrong)
    found = rails.respond(antigens)
    assert found.recalled[known].all()
    assert not found.innate[known].any()
    assert torch.equal(found.labels[known], wrong)
    assert not (found.innate & found.recalled).any()
    assert torch.equal(found.imprint.signature, first.imprint.signature)
    assert [one is None for one in found.imprint.entries] == (~found.recalled).tolist()
    fresh = always.with_settings(innate=1e-6, memory=Memory(None))
    all_innate = fresh.respond(antigens[:3])
    assert all_innate.innate.all()
    assert len(fresh.memory.remember(all_innate, antigens[:3])) == 3


def test_calibration_is_scored_again_where_the_repertoire_or_the_examples_change(always):
    rails = always.with_settings(innate=0.5)
    before = rails.calibration.own_scores
    rails.calibrate(*mixed(30, 8))
    assert len(rails.calibration.own_scores) == 30
    assert len(always.calibration.label_scores) == len(before) == 60
    rails.held = type(rails.held)(rails.held.x[:0], rails.held.y[:0])
    rails.calibration = rails.calibration.without_own()
    with pytest.raises(ValueError, match="calibration examples"):
        rails.with_settings(innate=0.1)


def test_what_is_spared_stands_in_its_place(always, antigens):
    met = always.respond(antigens[:2])
    hit = torch.tensor([True, False, True, False])
    spared = Spared(
        hit=hit, labels=torch.tensor([2, 1]), votes=torch.eye(3)[[2, 1]], credibility=torch.tensor([0.5, 0.25]),
        foreign=torch.tensor([False, True]), far=torch.ones(2, 2),
    )  # fmt: skip
    response, far = joined(spared, met, torch.zeros(2, 2))
    assert response.labels.tolist() == [2, int(met.labels[0]), 1, int(met.labels[1])]
    assert response.innate.tolist() == hit.tolist()
    assert far[:, 0].tolist() == [1, 0, 1, 0]
    assert torch.equal(response.plasma.x[~hit], met.plasma.x)
