"""Bpda on a quantiser, Eot on random models, Stealthy against the alarm."""

import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation
from immunonet.attacks import PGD, Bpda, Eot, SoftNeighbours, Stealthy


class Quantise(nn.Module):
    """Rounds inputs to multiples of a quarter: its gradient is zero."""

    def forward(self, x):
        return (4 * x).round() / 4


ATTACK = PGD(eps=0.2, step=0.05, iterations=10)


def test_bpda_breaks_a_quantiser_where_plain_pgd_does_not(digits):
    net, x, y, _, _ = digits
    defended = nn.Sequential(Quantise(), net)
    x, y = x[:60], y[:60]
    plain = ATTACK(defended, x, y)
    whole = ATTACK(Bpda(defended, backward=net), x, y)
    part = ATTACK(nn.Sequential(Bpda(Quantise(), backward=nn.Identity()), net), x, y)
    with torch.no_grad():
        clean, after, through = (
            float((defended(z).argmax(1) == y).float().mean())
            for z in (plain.adversarials, whole.adversarials, part.adversarials)
        )
    assert clean > 0.6
    assert after < 0.3
    assert through < 0.3
    assert torch.equal(whole.success, defended(whole.adversarials).argmax(1) != y)


def test_bpda_gives_the_answer_of_one_and_the_gradient_of_the_other():
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    answer = Bpda(lambda z: 1e6 * z.round() + 0.1, backward=torch.square)(x)
    assert torch.equal(answer, 1e6 * x.round() + 0.1)
    (slope,) = torch.autograd.grad(answer.sum(), x)
    torch.testing.assert_close(slope, 2 * x.detach())


def test_bpda_names_what_does_not_fit():
    with pytest.raises(TypeError, match="backward must be a model or another callable on inputs, got int"):
        Bpda(nn.Identity(), backward=3)
    with pytest.raises(TypeError, match="defence must be"):
        Bpda(None, backward=nn.Identity())
    with pytest.raises(ValueError, match=r"backward must give what defence gives, \(2, 3\) .* got \(2, 2\)"):
        Bpda(nn.Identity(), backward=lambda x: x[:, :2])(torch.zeros(2, 3))


def test_eot_is_the_log_of_the_mean_probability():
    def model(x, seed=0):
        return torch.stack([x[:, 0] * seed, x[:, 1]], 1)

    x = torch.tensor([[1.0, 2.0], [0.5, 0.1]], requires_grad=True)
    found = Eot(model, draws=3, seed=4)(x)
    expected = torch.stack([model(x, seed).softmax(1) for seed in (4, 5, 6)]).mean(0).log()
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(v[:, 0].sum(), x)[0] for v in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_eot_calls_random_models_often_and_the_deterministic_once(digits):
    net, x, _, x_train, y_train = digits
    calls = []

    def model(z):
        calls.append(len(z))
        return net(z)

    Eot(model, draws=4)(x[:2])
    assert calls == [2] * 4
    model.randomised = False
    Eot(model, draws=4)(x[:2])
    assert len(calls) == 5
    dknn = DkNN(net, "input", neighbours=5).fit(x_train[:200], y_train[:200])
    assert Eot(dknn, draws=9).draws == 1
    torch.testing.assert_close(Eot(dknn)(x[:2]), dknn(x[:2]).log_softmax(1))


def test_eot_of_rails_takes_seeds_and_can_be_repeated(problem):
    rails, x, _ = problem
    eot = Eot(rails, draws=2, seed=5)
    mean = (rails(x[:4], seed=5).exp() + rails(x[:4], seed=6).exp()) / 2
    torch.testing.assert_close(eot(x[:4]).exp(), mean)
    assert torch.equal(eot(x[:4]), eot(x[:4]))


@pytest.mark.parametrize(("setting", "error"), [({"draws": 0}, ValueError), ({"seed": 0.5}, TypeError)])
def test_bad_settings_of_eot_are_named(setting, error):
    with pytest.raises(error, match=f"{next(iter(setting))} must be"):
        Eot(nn.Identity(), **setting)


@pytest.fixture(scope="module")
def problem():
    """A small RAILS on three clouds in [0, 1]^4, and its examples."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    centres = torch.tensor([[0.3, 0.3, 0.5, 0.5], [0.7, 0.3, 0.5, 0.5], [0.5, 0.7, 0.5, 0.5]])
    x = (centres[y] + 0.06 * torch.randn(len(y), 4, generator=generator)).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    maturation = Maturation(population=30, neighbours=2, generations=1)
    rails = RAILS(model, ["input", "1"], maturation=maturation, false_alarm=0.1, seed=0)
    return rails.fit(x[:60], y[:60], calibration=(x[60:], y[60:])), x[:60], y[:60]


def defences(problem):
    rails, x, y = problem
    for metric in ("cosine", "euclidean"):
        yield DkNN(rails.model, ["input", "1"], neighbours=4, metric=metric, false_alarm=0.1).fit(
            x, y, calibration=(x[:25] * 0.97, y[:25])
        )
    yield rails


def test_strangeness_is_what_the_alarm_goes_by(problem):
    _, x, _ = problem
    antigens = torch.cat([x, x + 0.12 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5)])
    antigens = antigens.clamp(0, 1)
    for defence in defences(problem):
        stealthy = Stealthy(SoftNeighbours(defence), defence, weight=3.0)
        flags = defence.foreign(antigens)
        assert 0 < int(flags.sum()) < len(flags)
        assert torch.equal(stealthy.penalty(antigens) > 0, flags)
        assert torch.equal(stealthy(antigens), stealthy.surrogate(antigens))
        z = antigens[flags][:3].clone().requires_grad_()
        (slope,) = torch.autograd.grad(stealthy.penalty(z).sum(), z)
        step = 1e-3 * slope / slope.norm()
        rise = (stealthy.strangeness(z + step) - stealthy.strangeness(z - step)).sum().item()
        assert rise == pytest.approx(2e-3 * slope.norm().item() / 3, rel=0.05)


def test_the_joint_attack_raises_fewer_alarms(problem):
    rails, x, y = problem
    attack = PGD(eps=0.25, step=0.04, iterations=12)
    loud, quiet = (attack(m, x, y) for m in (SoftNeighbours(rails), Stealthy(SoftNeighbours(rails), rails)))
    alarms = [float(rails.foreign(result.adversarials).float().mean()) for result in (loud, quiet)]
    assert alarms[1] < alarms[0] - 0.2
    assert not bool(rails.foreign(quiet.adversarials)[quiet.success].any())
    assert quiet.success.float().mean() > 0.2


def test_alarms_that_always_or_never_ring(problem):
    rails, x, y = problem
    few = DkNN(rails.model, "input", neighbours=3).fit(x, y, calibration=(x[:4], y[:4]))
    assert not few.foreign(torch.ones(2, 4)).any()
    assert not Stealthy(SoftNeighbours(few), few).penalty(torch.ones(2, 4)).any()
    always = DkNN(rails.model, "input", neighbours=3, false_alarm=1.0).fit(x, y, calibration=(x[:4], y[:4]))
    assert bool(always.foreign(x[:3]).all())
    assert bool((Stealthy(SoftNeighbours(always), always).penalty(x[:3]) > 0).all())


def test_stealthy_names_what_is_wrong(problem):
    rails = problem[0]
    with pytest.raises(ValueError, match="weight must be"):
        Stealthy(SoftNeighbours(rails), rails, weight=-1.0)
    with pytest.raises(TypeError, match="surrogate must be"):
        Stealthy(None, rails)
    with pytest.raises(ValueError, match="not fitted"):
        Stealthy(nn.Identity(), DkNN(rails.model, "input"))
