"""Gated and Credible: what they take for the gate, by hand, and that who knows it finds more than who does not."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from immunonet import RAILS, DkNN, Maturation
from immunonet.attacks import APGD, PGD, Credible, Gated
from immunonet.attacks.innate import Agreement

SMALL = Maturation(population=100, neighbours=5, generations=1, alignment=0.0)


@pytest.fixture(scope="module")
def rails(digits):
    """RAILS of a network that nothing was done for, whose gate lets most pass."""
    net, _, _, x, y = digits
    fitted = RAILS(net, "input", maturation=SMALL, seed=0, innate=0.05)
    return fitted.fit(x[:800], y[:800], calibration=(x[800:], y[800:]))


def test_agreement_is_told_from_what_is_asked_for(rails, digits):
    net, x, *_ = digits
    mixed = (x[:100] + x[100:]) / 2
    labels = net(mixed).argmax(1)
    innate = rails.support(mixed) > rails.innate
    assert 10 < innate.sum() < 90
    found = Agreement(rails)(mixed, labels)
    # The edge of the count is soft, so that a few of those near it are told otherwise.
    assert ((found > 0) == innate).float().mean() > 0.85


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_what_is_asked_for_lies_midway_to_the_first_count_that_does_not_pass(rails, alpha):
    gated = rails.with_settings(innate=alpha)
    own = gated.calibration.own_scores
    passing = [s for s in range(6) if (int((own >= s).sum()) + 1) / (len(own) + 1) > alpha]
    share = 1 - (max(passing) + 0.5) / 5
    assert Agreement(gated).asked == pytest.approx(math.log(share / (1 - share)), abs=1e-3)


def test_a_gate_that_asks_for_nothing_is_open(rails, digits):
    gated = Gated(rails.with_settings(innate=1e-6))
    net, x, *_ = digits
    assert_close(gated(x[:5]), net(x[:5]).log_softmax(1), atol=1e-3, rtol=1e-3)


def test_it_is_the_mixture_by_the_gate(rails, digits):
    net, x, *_ = digits
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    mixed = (x[:20] + x[20:40]) / 2
    own = net(mixed)
    gate = torch.sigmoid(Agreement(rails)(mixed, own.argmax(1)))[:, None]
    expected = gate * own.softmax(1) + (1 - gate) * other(mixed).softmax(1)
    found = Gated(rails, other)(mixed)
    assert_close(found.exp(), expected, rtol=1e-4, atol=1e-6)
    assert_close(found.exp().sum(1), torch.ones(20))


@pytest.mark.parametrize("layers", ["input", ["input", "1"]])
def test_gradients_reach_every_antigen(digits, layers):
    net, x, _, x_train, y_train = digits
    rails = RAILS(net, layers, maturation=SMALL, seed=0, innate=0.3).fit(x_train[:400], y_train[:400])
    point = ((x[:12] + x[12:24]) / 2).requires_grad_()
    for model in (Gated(rails), Credible(rails)):
        (slope,) = torch.autograd.grad(model(point)[:, 0].sum(), point)
        assert bool(torch.isfinite(slope).all())
        assert bool((slope.flatten(1).norm(dim=1) > 0).all())
    penalty = Credible(rails).penalty(point)
    assert penalty.min() == 0
    (slope,) = torch.autograd.grad(penalty.sum(), point)
    assert bool((slope.flatten(1).norm(dim=1) > 0).equal(penalty > 0))


def test_who_knows_the_gate_finds_more_than_who_knows_the_network(rails, digits):
    net, x, y, *_ = digits
    x, y = x[:60], y[:60]
    attack = PGD(eps=0.25, step=0.05, iterations=12, random_start=False)
    climbed = APGD(eps=0.25, iterations=12)
    right = {}
    for name, found in {
        "network": attack(net, x, y),
        "credible": attack(Credible(rails), x, y),
        "gated": climbed(Gated(rails), x, y),
    }.items():
        right[name] = rails.predict(found.adversarials) == y
        right[f"{name}, innate"] = rails.respond(found.adversarials).innate
    share = {name: float(hits.float().mean()) for name, hits in right.items()}
    assert float((rails.predict(x) == y).float().mean()) > 0.9
    assert share["gated"] < share["network"] - 0.05
    assert share["credible"] < share["network"] - 0.05
    assert share["credible, innate"] > share["network, innate"]


def test_bad_arguments_are_named(rails, digits):
    net, *_ = digits
    with pytest.raises(ValueError, match="rails must let its network answer, got innate=None"):
        Gated(rails.with_settings(innate=None))
    with pytest.raises(ValueError, match="rails must let its network answer"):
        Credible(DkNN(net, "input", neighbours=5).fit(*digits[3:]))
    with pytest.raises(TypeError, match="defence must be a RAILS or a DkNN"):
        Gated(net)
    with pytest.raises(ValueError, match="weight must be"):
        Credible(rails, weight=-1)
