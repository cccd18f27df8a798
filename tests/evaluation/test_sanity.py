"""Checks and flags: each must be able to fail."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from immunonet import RAILS, Maturation, incoming
from immunonet.attacks import PGD
from immunonet.evaluation import cost, sanity
from immunonet.evaluation.asking import LogProbabilities, Subject
from immunonet.evaluation.runner import Runner
from immunonet.evaluation.suite import Noise, Planned

BOUNDS = incoming.bounds("bounds", (0.0, 1.0))


@pytest.fixture
def base():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]))
        net.bias.copy_(torch.tensor([4.5, -4.5]))
    return net


@pytest.fixture
def points():
    x = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0.5).long()


def runner(defence, base, points):
    subject = Subject(defence, classes=2)
    return Runner(subject, base, *points, seeds=(), settings={"name": "d"}, folder=None, told=lambda text: None)


def planned(method, target, name="a"):
    return Planned(name=name, knows="base", kind="adaptive", n=20, method=method, target=target)


def test_eps_zero_fails_for_a_defence_that_never_answers_twice_alike(base, points):
    calls = []

    def forgetful(x):
        calls.append(0)
        return nn.functional.one_hot(torch.full((len(x),), len(calls) % 2), 2).mul(9.0).log_softmax(1)

    attacks = [planned(Noise(eps=0.3, points=2, bounds=BOUNDS), base, name) for name in ("a", "b")]
    assert sanity.eps_zero(runner(LogProbabilities(base), base, points), attacks, ()).passed
    failed = sanity.eps_zero(runner(forgetful, base, points), attacks, ())
    assert not failed.passed
    assert "changed under a" in failed.detail


@pytest.mark.parametrize(
    ("accuracy", "intervals", "passed"),
    [
        ([1.0, 0.5, 0.0], [(0.9, 1.0), (0.3, 0.7), (0.0, 0.2)], True),
        ([1.0, 0.5, 0.6], [(0.9, 1.0), (0.3, 0.7), (0.4, 0.8)], True),
        ([1.0, 0.2, 0.5], [(0.9, 1.0), (0.1, 0.4), (0.3, 0.7)], False),
        ([1.0, 0.9, 0.8], [(0.9, 1.0), (0.8, 1.0), (0.6, 0.9)], False),
    ],
    ids=["falls", "rises within the interval", "rises", "stays above chance"],
)
def test_accuracy_must_fall_to_chance(accuracy, intervals, passed):
    found = {"eps": [0.0, 0.1, 1.0], "accuracy": accuracy, "ci95": intervals, "n": 20}
    assert sanity.grows(found, "pgd", 2).passed is passed


def test_weaker_attacks_must_not_lower_the_worst_case():
    right = torch.ones(1, 50, dtype=torch.bool)
    assert sanity.compared("c", "others", right, right).passed
    assert not sanity.compared("c", "others", right, torch.arange(50)[None] < 40).passed


def test_a_batch_flag_sees_neighbours_and_order(points):
    assert not sanity.batch(Subject(lambda x: (9 * x).log_softmax(1), classes=2), points[0], (), True).raised
    centred = sanity.batch(Subject(lambda x: (9 * (x - x.mean(0))).log_softmax(1), classes=2), points[0], (), True)
    assert centred.raised
    assert "not tested" in sanity.batch(Subject(lambda x: x, classes=2), points[0], (), False).detail


def test_flags_of_networks(base, points):
    assert not sanity.probabilities(base, points[0]).raised
    assert sanity.probabilities(nn.Sequential(base, nn.Softmax(1)), points[0]).raised
    assert not sanity.zero_gradients({"base": base}, *points).raised
    flag = sanity.zero_gradients({"flat": lambda x: 0 * x, "base": base}, *points)
    assert flag.raised
    assert flag.detail == "flat: 20 of 20"
    assert not sanity.failed(Counter()).raised
    assert sanity.failed(Counter(ValueError=3)).detail == "3 times ValueError"


def test_the_reach_is_the_diagonal_of_the_bounds():
    x = torch.zeros(1, 3, 4, 4)
    assert sanity.reach_of(BOUNDS, x, "linf") == 1.0
    assert sanity.reach_of(BOUNDS, x, "l2") == pytest.approx(math.sqrt(48))
    wide = incoming.bounds("bounds", [(0, 1), (0, 2), (0, 1)])
    assert sanity.reach_of(wide, x, "linf") == 2.0


def test_forward_passes_of_the_network_are_counted(base, points):
    twice = Subject(lambda x: (base(x) + base(x)).log_softmax(1), classes=2)
    found = cost.measure(twice, base, points[0], ())
    assert found["forward_passes"] == 2.0
    assert found["best_batch"] in (8, 20)
    assert found["seconds_best_batch"] > 0
    assert cost.measure(Subject(lambda x: x.log_softmax(1), classes=2), base, points[0], ())["forward_passes"] == 0


def test_rails_less_one_part_shares_the_rest(images, conv):
    rails = RAILS(conv, "input", maturation=Maturation(population=300, neighbours=2)).fit(*images)
    found = cost.without(rails)
    assert list(found) == ["crossover", "mutation", "selection", "generations"]
    assert found["generations"].maturations[0].generations == 0
    assert found["mutation"].maturations[0].rates == (0.0, 0.0)
    assert found["crossover"].maturations[0].crossover is None
    assert rails.maturations[0] == Maturation(population=300, neighbours=2)
    assert all(variant.repertoire is rails.repertoire for variant in found.values())
    assert found["selection"].predict(images[0][:3], seed=0).shape == (3,)


class Stops(PGD):
    """An attack that gives up where logits are large, as the cross-entropy in single precision does."""

    def _loss(self, logits, y):
        return (logits.float().softmax(1).gather(1, y[:, None])[:, 0] * -1).double()


@pytest.mark.parametrize(("method", "passed"), [(PGD, True), (Stops, False)])
def test_an_attack_that_large_logits_stop_is_found(method, passed, base, points):
    attack = planned(method(eps=0.2, step=0.05, iterations=10, random_start=False), base, "pgd")
    (check,) = sanity.scale(runner(LogProbabilities(base), base, points), [attack], 20)
    assert check.passed is passed, check.detail


def test_a_network_that_depends_on_the_batch_is_flagged(points):
    x, _ = points
    unsteady = sanity.steady(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2)), x)
    assert unsteady.raised
    assert "what else is in the batch" in unsteady.detail
    assert not sanity.steady(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2)).train(), x).raised


def test_labels_that_are_not_those_of_the_log_probabilities_are_flagged(base, points):
    class Beside(LogProbabilities):
        def predict(self, x):
            return 1 - self(x).argmax(1)

    x, _ = points
    assert sanity.agreement(Subject(Beside(base), classes=2), x, (), True).raised
    assert not sanity.agreement(Subject(LogProbabilities(base), classes=2), x, (), True).raised
