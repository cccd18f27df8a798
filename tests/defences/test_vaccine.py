"""Attacked training examples beside the clean ones: which, how far, under which labels, and what they bring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation, load
from immunonet.attacks import PGD
from immunonet.defences.spec import Spec

EPS = 0.2


def problem(n=200):
    """Two classes apart in the first of two values, and a network that sees nothing but the second."""
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 2
    x[:, 0] = torch.where(y == 0, 0.3 * x[:, 0], 0.7 + 0.3 * x[:, 0])
    x[:, 1] = torch.where(y == 0, 0.4 + 0.05 * x[:, 1], 0.55 + 0.05 * x[:, 1])
    net = nn.Linear(2, 2)
    net.weight.data = torch.tensor([[0.0, -20.0], [0.0, 20.0]])
    net.bias.data = torch.tensor([10.0, -10.0])
    return net, x, y


def seconds(x):
    return x[:, 1:]


def dknn(net, layers="input", **how):
    return DkNN(net, layers, neighbours=3, metric="euclidean", **how)


def rails(net, layers="input", **how):
    return RAILS(net, layers, maturation=Maturation(population=40, neighbours=3, generations=1), seed=0, **how)


KINDS = pytest.mark.parametrize("made", [dknn, rails])


@KINDS
@pytest.mark.parametrize(("share", "copies"), [(1.0, 190), (0.5, 95), (1e-3, 1)])
def test_copies_stand_after_the_examples_within_the_radius_and_under_their_labels(made, share, copies):
    net, x, y = problem()
    clean, fitted = made(net).fit(x, y), made(net, vaccine=EPS, vaccine_share=share).fit(x, y)
    n, held, found = len(clean.repertoire.x), fitted.held, fitted.repertoire
    assert (n, len(found.x)) == (190, 190 + copies)
    assert torch.equal(found.x[:n], clean.repertoire.x)
    # What sensing is calibrated on stays clean.
    assert torch.equal(held.x, clean.held.x)
    distance = (found.x[n:, None] - found.x[None, :n]).abs().amax(2)
    same = found.y[n:, None] == found.y[None, :n]
    assert ((distance <= EPS + 1e-6) & same).any(1).all()
    # The attack found what it looked for: the network is wrong about every copy.
    assert (net(found.x[n:]).argmax(1) != found.y[n:]).all()


@KINDS
def test_what_an_attack_moved_is_answered_by_copies_that_it_moved_alike(made):
    net, x, y = problem()
    attacked = PGD(eps=EPS, step=EPS / 4, iterations=10, seed=5)(net, x[:40], y[:40]).adversarials
    clean, fitted = made(net, seconds).fit(x, y), made(net, seconds, vaccine=EPS).fit(x, y)
    before, after = ((one.predict(attacked) == y[:40]).float().mean() for one in (clean, fitted))
    assert after > before


@KINDS
def test_it_is_the_same_again_and_saved(made, tmp_path):
    net, x, y = problem()
    one, other = (made(net, vaccine=EPS, vaccine_share=0.3).fit(x, y) for _ in range(2))
    assert torch.equal(one.repertoire.x, other.repertoire.x)
    one.save(tmp_path)
    back = load(tmp_path, net)
    assert back.settings() == one.settings()
    assert torch.equal(back.repertoire.x, one.repertoire.x)
    assert torch.equal(back.predict_proba(x[:20]), one.predict_proba(x[:20]))


@KINDS
def test_settings_are_told_and_need_another_fit(made):
    net, x, y = problem()
    assert "vaccine" not in made(net).settings()
    assert made(net).setting("vaccine") is None
    fitted = made(net, vaccine=EPS).fit(x, y)
    assert fitted.settings()["vaccine"] == EPS
    assert fitted.setting("vaccine_share") == 1.0
    with pytest.raises(ValueError, match=r"vaccine must stay 0.2, which this was fitted with, got None: fit another"):
        fitted.with_settings(vaccine=None)
    assert Spec.parse(f"{fitted.kind} input vaccine=60/255").settings == {"vaccine": 60 / 255}


@KINDS
@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"vaccine": 0}, "vaccine must be .* > 0|vaccine must be a finite number"),
        ({"vaccine": -0.1}, "vaccine must be"),
        ({"vaccine": 0.1, "vaccine_share": 0}, "vaccine_share must be"),
        ({"vaccine": 0.1, "vaccine_share": 1.5}, "vaccine_share must be"),
    ],
)
def test_wrong_ones_are_refused(made, how, match):
    net, _, _ = problem()
    with pytest.raises(ValueError, match=match):
        made(net, **how)


def test_examples_that_stay_in_their_source_are_refused():
    net, x, y = problem()
    with pytest.raises(ValueError, match="vaccine must be None where examples are read from their source"):
        dknn(net, vaccine=EPS).fit(x.numpy(), y.numpy(), keep="source")
