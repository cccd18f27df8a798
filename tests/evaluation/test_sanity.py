"""Checks and flags: each must be able to fail."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn
from trials import BOUNDS, THREAT, campaign, trial

from immunonet.attacks import PGD, HopSkipJump, Noise
from immunonet.defences.undefended import Undefended
from immunonet.evaluation import sanity
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.outcome import outcome
from immunonet.evaluation.suite import Planned


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


def planned(method, target, name="a", role="adaptive"):
    return Planned(name=name, roles=frozenset({role}), n=20, method=method, target=target)


def against(defence, base, points, *attacks, **budget):
    return campaign(defence, *points, base=base, attacks=attacks, **budget)


def test_eps_zero_fails_for_a_defence_that_never_answers_twice_alike(base, points):
    calls = []

    def forgetful(x):
        calls.append(0)
        return nn.functional.one_hot(torch.full((len(x),), len(calls) % 2), 2).mul(9.0).log_softmax(1)

    attacks = [planned(Noise(eps=0.3, points=2, bounds=BOUNDS), base, name) for name in ("a", "b")]
    assert sanity.eps_zero(against(Undefended(base), base, points, *attacks), THREAT).passed
    failed = sanity.eps_zero(against(forgetful, base, points, *attacks), THREAT)
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


def cost(defence, base, points):
    done = against(defence, base, points)
    done.trials = [trial("none", [[1] * 20], role=None)]
    return outcome(done, done.worst_cases(), [], [], {}).record["cost"]


def test_forward_passes_of_the_network_are_counted(base, points):
    found = cost(lambda x: (base(x) + base(x)).log_softmax(1), base, points)
    assert found["forward_passes"] == 2.0
    assert found["best_batch"] in (8, 20)
    assert found["seconds_best_batch"] > 0
    assert cost(lambda x: x.log_softmax(1), base, points)["forward_passes"] == 0


class Stops(PGD):
    """An attack that gives up where logits are large, as the cross-entropy in single precision does."""

    def _loss(self, logits, y):
        return (logits.float().softmax(1).gather(1, y[:, None])[:, 0] * -1).double()


@pytest.mark.parametrize(("method", "passed"), [(PGD, True), (Stops, False)])
def test_an_attack_that_large_logits_stop_is_found(method, passed, base, points):
    attack = planned(method(eps=0.2, step=0.05, iterations=10, random_start=False), base, "pgd")
    (check,) = sanity.scale(against(Undefended(base), base, points, attack), THREAT)
    assert check.passed is passed, check.detail


def test_a_network_that_depends_on_the_batch_is_flagged(points):
    x, _ = points
    unsteady = sanity.steady(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2)), x)
    assert unsteady.raised
    assert "what else is in the batch" in unsteady.detail
    assert not sanity.steady(nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2)).train(), x).raised


def test_labels_that_are_not_those_of_the_log_probabilities_are_flagged(base, points):
    class Beside(Undefended):
        def predict(self, x):
            return 1 - self(x).argmax(1)

    x, _ = points
    assert sanity.agreement(Subject(Beside(base), classes=2), x, (), True).raised
    assert not sanity.agreement(Subject(Undefended(base), classes=2), x, (), True).raised


def test_a_plan_that_was_cut_fails(base, points):
    pgd = planned(PGD(eps=0.2, step=0.05, iterations=2, random_start=False), base, "pgd")
    done = against(Undefended(base), base, points, Planned(name="none", n=20), pgd)
    done.run(10)
    cut = sanity.checks(done)[0][-1]
    assert (cut.name, cut.passed) == ("all planned images were attacked", True)
    done.plan = [done.plan[0], dataclasses.replace(pgd, n=7)]
    assert sanity.checks(done)[0][-1].detail == "pgd 7 of 20"


def test_checks_compare_roles_and_twice_the_steps_with_once(base, points):
    """Attacks that ask and break what gradients do not are found, as is a stronger transfer."""
    pgd = PGD(eps=0.2, step=0.05, iterations=2, random_start=False)
    plan = [Planned(name="none", n=20), planned(pgd, base, "pgd")]
    done = against(Undefended(base), base, points, *plan)
    done.run(10)
    right = [1] * 20

    def verdicts(**corrects):
        clean, adaptive = trial("none", [right], role=None), trial("adaptive", [right])
        done.trials = [clean, adaptive, *(trial(role, [values], role=role) for role, values in corrects.items())]
        return {check.name: check.passed for check in sanity.checks(done)[0]}

    transfer, asks = "transfer is no stronger than attacks that know", "asking alone is no stronger than gradients"
    assert verdicts(transfer=right, asks=right) == verdicts(transfer=right, asks=right) | {transfer: True, asks: True}
    broken = [0] * 10 + [1] * 10
    assert verdicts(transfer=broken, asks=right)[transfer] is False
    found = verdicts(transfer=right, asks=broken)
    assert (found[transfer], found[asks]) == (True, False)
    assert sanity.doubled(trial("a", [right]), trial("a", [right]), done.draws.counted).passed
    assert not sanity.doubled(trial("a", [right]), trial("a", [broken]), done.draws.counted).passed


def test_points_outside_the_threat_model_are_flagged_unless_the_attack_has_no_ball(base):
    def left(method):
        attack = planned(method, base)
        return sanity.outside([dataclasses.replace(trial("a", [[1]]), attack=attack, outside=3)])

    flag = left(PGD(eps=0.2, step=0.05, iterations=2))
    assert (flag.raised, flag.detail) == (True, "a: 3")
    assert not left(HopSkipJump(eps=0.2)).raised
