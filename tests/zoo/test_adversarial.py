import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from immunonet import data, models, zoo
from immunonet.zoo import training
from immunonet.zoo.adversarial import LOSSES, Adversary, divergence


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def attacked(settings, net, x, y, generator, epoch=0):
    """Return what the attacks of adversarial training find, one tensor or one per threat."""
    with models.evaluating(net):
        return Adversary(settings).attacked(functools.partial(models.ask, net), x, y, generator, epoch)[0]


def linear(classes=2):
    """Return a linear net on (B, 1, 2, 2) with known weights."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(classes, 4, generator=seeded()))
        net[1].bias.zero_()
    return net


def normalised(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train()


def grey(n=24, seed=0):
    """Return images so far from 0 and 1 that an eps of .2 is never clipped, of two classes."""
    return data.Images(0.3 + 0.4 * torch.rand((n, 1, 2, 2), generator=seeded(seed)), torch.arange(n) % 2, ("a", "b"))


def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_inner_maximum_of_a_linear_net_is_a_corner():
    net, images = linear(), grey()
    # From anywhere in the ball, 2 eps / step steps reach the corner.
    (found,) = attacked(zoo.Adversarial(eps=0.1, step=0.05, iterations=4), net, images.x, images.y, seeded())
    weight = (net[1].weight[1] - net[1].weight[0]).detach()
    away = torch.where(images.y[:, None] == 0, weight, -weight).sign().reshape(-1, 1, 2, 2)
    torch.testing.assert_close(found, images.x + 0.1 * away)


def test_trades_climbs_the_divergence_from_the_clean_answer():
    net, images = linear(), grey()
    settings = zoo.Adversarial(loss="trades", eps=0.1, step=0.05, iterations=4)
    (found,) = attacked(settings, net, images.x, 1 - images.y, seeded())
    weight = (net[1].weight[1] - net[1].weight[0]).detach().sign().reshape(1, 1, 2, 2)
    # The divergence grows either way along the weights; which way depends on the random start, not on the labels.
    way = ((found - images.x) * weight).mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found - images.x, way.sign() * 0.1 * weight.expand_as(found))


@pytest.mark.parametrize("loss", LOSSES)
@given(
    eps=st.floats(0, 0.5),
    step=st.floats(0, 0.5),
    iterations=st.integers(1, 3),
    epoch=st.floats(0, 4),
    seed=st.integers(0),
)
@settings(max_examples=15, deadline=None)
def test_attacked_images_stay_in_the_ball_and_the_net_as_it_was(loss, eps, step, iterations, epoch, seed):
    net, x = normalised(), torch.rand((5, 1, 2, 2), generator=seeded())
    before = state(net)
    attack = zoo.Adversarial(loss=loss, eps=eps, step=step, iterations=iterations, ramp=2)
    y = torch.tensor([0, 1, 2, 0, 1])
    (found,) = attacked(attack, net, x, y, seeded(seed % 2**63), epoch)
    assert float((found - x).abs().max()) <= eps * min(1, epoch / 2) + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert not found.requires_grad
    assert net.training
    assert all(module.training for module in net.modules())
    assert same(before, state(net))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(found, attacked(attack, net, x, y, seeded(seed % 2**63), epoch)[0])


def test_eps_rises_over_the_ramp():
    net, images = linear(), grey()
    attack = zoo.Adversarial(eps=0.2, step=0.1, iterations=4, ramp=4)
    sizes = [
        float((attacked(attack, net, images.x, images.y, seeded(), e)[0] - images.x).abs().max())
        for e in (0, 1, 2, 4, 9)
    ]
    assert sizes == pytest.approx([0, 0.05, 0.1, 0.2, 0.2], abs=1e-6)


def test_objectives():
    net, images = linear(3).double(), grey()
    x, y = images.x.double(), images.y
    turned = x.flip(0)
    clean, moved = net(x).float().detach(), net(turned).float().detach()
    found = Adversary(zoo.Adversarial()).objective(net, x, [turned], y)
    torch.testing.assert_close(found.detach(), F.cross_entropy(moved, y))
    expected = (
        F.cross_entropy(clean, y) + 2.5 * kl_divergence(Categorical(logits=clean), Categorical(logits=moved)).mean()
    )
    found = Adversary(zoo.Adversarial(loss="trades", beta=2.5)).objective(net, x, [turned], y)
    torch.testing.assert_close(found.detach(), expected)
    assert float(divergence(clean, clean)) == pytest.approx(0, abs=1e-6)


def test_eps_0_is_plain_training():
    nets = [normalised(), normalised()]
    options = {"epochs": 3, "batch_size": 8, "lr": 0.05}
    for net, adversarial in zip(nets, (None, zoo.Adversarial(eps=0.0)), strict=True):
        zoo.train(net, grey(), grey(10, seed=1), adversarial=adversarial, **options)
    assert same(state(nets[0]), state(nets[1]))


def test_robust_accuracy_is_that_of_the_margin():
    net, images = linear(), grey(200)
    weight = (net[1].weight[1] - net[1].weight[0]).detach()
    margin = (images.x.flatten(1) @ weight) * (2 * images.y - 1) / weight.abs().sum()  # in units of eps
    for eps in (0.0, 0.05, 0.15):
        assert zoo.robust_accuracy(net, images, eps=eps) == pytest.approx(float((margin > eps).double().mean()))
    chosen = float((margin[data.sample(200, 50)] > 0.05).double().mean())
    assert zoo.robust_accuracy(net, images, eps=0.05, most=50) == pytest.approx(chosen)


def test_the_best_epoch_is_the_most_robust(monkeypatch):
    seen, scores = [], iter([0.5, 0.75, 0.25])

    def measured(net, images, *, threats):
        assert threats == {"linf": 0.07}
        seen.append(state(net))
        return {"linf": (score := next(scores)), "union": score}

    monkeypatch.setattr(training, "robust_accuracies", measured)
    net, attack = normalised(), zoo.Adversarial(eps=0.1, iterations=1, validation_eps=0.07)
    history = zoo.train(net, grey(), grey(10, seed=1), epochs=3, batch_size=8, lr=0.05, adversarial=attack)
    assert [row["validation_robust_accuracy"] for row in history] == [0.5, 0.75, 0.25]
    assert same(state(net), seen[1])


def test_hardened_digits_withstand_more():
    images, test = data.load("digits", "train"), data.load("digits", "test")[:120]
    train, held = images[:600], images[1000:1020]
    robust = []
    for adversarial in (
        None,
        zoo.Adversarial(eps=0.15, iterations=2),
        zoo.Adversarial(loss="trades", eps=0.15, iterations=2),
    ):
        net = zoo.build("digits")
        zoo.train(net, train, held, epochs=4, batch_size=32, lr=5e-3, adversarial=adversarial)
        robust.append(zoo.robust_accuracy(net, test, eps=0.15))
    assert min(robust[1:]) > robust[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "fgsm"}, ValueError, "loss must be one of 'pgd', 'trades', got 'fgsm'"),
        ({"eps": -0.1}, ValueError, r"eps must be a finite number in \[0, 1\], got -0.1"),
        ({"eps": 8}, ValueError, r"eps must be a finite number in \[0, 1\], got 8"),
        ({"step": "small"}, TypeError, "step must be a number, got 'small'"),
        ({"validation_eps": 2}, ValueError, "validation_eps must be a finite number"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"beta": -1}, ValueError, "beta must be"),
        ({"ramp": 1.5}, TypeError, "ramp must be an integer, got 1.5"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        zoo.Adversarial(**options)
