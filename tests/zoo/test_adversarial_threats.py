"""Adversarial training against several threats: how their attacks and losses combine, what is kept, what is refused."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from immunonet import Normalised, attacks, data, models, zoo
from immunonet.attacks.norms import NORMS
from immunonet.zoo.adversarial import COMBINED, Adversarial, Adversary

THREATS = {"linf": 0.05, "l2": 0.15, "l1": 0.3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(classes=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, classes)).eval()


def linear(weight):
    found = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    with torch.no_grad():
        found[1].weight.copy_(torch.stack([torch.zeros(9), weight]))
        found[1].bias.zero_()
    return found


def grey(n=24, seed=0):
    """Return images that are far from 0 and 1, of two classes."""
    return data.Images(0.4 + 0.2 * torch.rand((n, 1, 3, 3), generator=seeded(seed)), torch.arange(n) % 2, ("a", "b"))


def attacked(settings, model, images, adversary=None):
    adversary = adversary or Adversary(settings)
    with models.evaluating(model):
        ask = functools.partial(models.ask, model)
        return adversary.attacked(ask, images.x, images.y, seeded(), 0.0)


def losses(model, points, y):
    return torch.stack([F.cross_entropy(model(point), y, reduction="none") for point in points]).detach()


@pytest.mark.parametrize("combine", COMBINED)
def test_attacked_images_lie_in_one_of_the_balls(combine):
    images, settings = grey(), Adversarial(threats=THREATS, combine=combine, iterations=3)
    points, threat = attacked(settings, net(), images)
    assert len(points) == (3 if combine == "average" else 1)
    for i, point in enumerate(points):
        inside = torch.stack([NORMS[n].size(point - images.x) <= eps * (1 + 1e-4) for n, eps in THREATS.items()])
        assert bool(inside.any(0).all())
        if combine == "average":
            assert bool(inside[i].all())
        if combine == "random":
            assert bool(inside[threat].all())


def test_max_takes_per_image_the_attack_of_the_highest_loss():
    images, model = grey(), net()
    each, _ = attacked(Adversarial(threats=THREATS, combine="average", iterations=3), model, images)
    (most,), _ = attacked(Adversarial(threats=THREATS, combine="max", iterations=3), model, images)
    torch.testing.assert_close(losses(model, [most], images.y)[0], losses(model, each, images.y).amax(0))


def test_average_is_the_mean_of_the_losses():
    images, model = grey(), net()
    adversary = Adversary(Adversarial(threats=THREATS, combine="average", iterations=2))
    points, _ = attacked(adversary.settings, model, images)
    found = adversary.objective(model, images.x, points, images.y)
    torch.testing.assert_close(found.detach(), losses(model, points, images.y).mean())


@pytest.mark.parametrize("norm", NORMS)
def test_msd_with_one_threat_is_pgd(norm):
    images, model, eps = grey(), net(), THREATS[norm]
    (found,), _ = attacked(Adversarial(threats={norm: eps}, combine="msd", iterations=5), model, images)
    pgd = attacks.PGD(norm=norm, eps=eps, step=eps / 4, iterations=5, random_start=False)
    expected = pgd(model, images.x, images.y).adversarials
    torch.testing.assert_close(losses(model, [found], images.y), losses(model, [expected], images.y))


def test_msd_climbs_at_least_as_high_as_any_single_step():
    images, model = grey(), net()
    (found,), _ = attacked(Adversarial(threats=THREATS, combine="msd", iterations=1), model, images)
    single = [
        attacked(Adversarial(threats={n: eps}, combine="msd", iterations=1), model, images)[0][0]
        for n, eps in THREATS.items()
    ]
    assert bool((losses(model, [found], images.y)[0] >= losses(model, single, images.y).amax(0) - 1e-6).all())


def test_the_inner_maximum_of_a_linear_net_is_that_of_the_dual_norm():
    weight = torch.arange(1.0, 10.0) / 10
    images, model = grey(), linear(weight)
    way = torch.where(images.y == 0, 1.0, -1.0)
    gains = {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}
    for norm, eps in THREATS.items():
        settings = Adversarial(threats={norm: eps}, combine="msd", iterations=12)
        (found,), _ = attacked(settings, model, images)
        gained = ((found - images.x).flatten(1) @ weight) * way
        torch.testing.assert_close(gained, (eps * gains[norm]).expand_as(gained), rtol=1e-3, atol=1e-5)


def test_random_draws_threats_by_how_often_they_still_fool():
    adversary = Adversary(Adversarial(threats=THREATS, combine="random"))
    assert adversary.weights.tolist() == [1, 1, 1]
    adversary.seen += torch.tensor([10.0, 10, 0])
    adversary.right += torch.tensor([5.0, 9, 0])
    assert adversary.weights.tolist() == [1, 1, 1]  # one was not met yet
    adversary.seen[2], adversary.right[2] = 10, 10
    assert adversary.weights.tolist() == pytest.approx([0.5, 0.1, 0.0], abs=1e-5)
    drawn = [int(torch.multinomial(adversary.weights, 1, generator=seeded(i))) for i in range(600)]
    assert drawn.count(0) / len(drawn) == pytest.approx(5 / 6, abs=0.07)
    assert drawn.count(2) == 0


def test_what_random_has_seen_is_counted_over_the_whole_run():
    images, model = grey(), net()
    adversary = Adversary(Adversarial(threats={"linf": 0.05, "l1": 0.3}, combine="random", iterations=1))
    points, threat = attacked(adversary.settings, model, images, adversary)
    adversary.objective(model, images.x, points, images.y, threat)
    assert adversary.seen[threat] == len(images.y)
    assert adversary.seen[1 - threat] == 0
    assert adversary.right[threat] == (model(points[0]).argmax(1) == images.y).sum()
    again = Adversary(adversary.settings)
    again.restore(adversary.tensors())
    assert torch.equal(again.right, adversary.right)


def test_eps_and_one_threat_in_linf_train_alike():
    nets = [net(), net()]
    for model, settings in zip(nets, (Adversarial(eps=0.1), Adversarial(threats={"linf": 0.1})), strict=True):
        zoo.train(model, grey(), grey(10, 1), epochs=2, batch_size=8, adversarial=settings)
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in nets), strict=True))


def told_twice(n, seed):
    """Return images of two classes that one value tells nine times in ten, and the others always, but faintly."""
    y, generator = torch.arange(n) % 2, seeded(seed)
    way = 2.0 * y - 1
    x = 0.5 + 0.04 * way[:, None] + 0.1 * torch.randn(n, 64, generator=generator)
    x[:, 0] = 0.5 + 0.4 * way * torch.where(torch.rand(n, generator=generator) < 0.9, 1, -1)
    return data.Images(x.clamp(0, 1).view(n, 1, 8, 8), y, ("a", "b"))


def test_training_against_three_threats_withstands_more_of_all_together():
    """In linf all that is faint can be turned round, and the one value that is not remains: nine in ten are right."""
    radii, union = {"linf": 0.1, "l2": 0.2, "l1": 0.2}, {}
    for name, settings in {
        "plain": None,
        "msd": Adversarial(threats=radii, combine="msd", iterations=2),
    }.items():
        model = Normalised(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 0.5, 1)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        zoo.train(model, told_twice(400, 0), told_twice(50, 1), epochs=5, batch_size=50, lr=5e-3, adversarial=settings)
        found = zoo.robust_accuracies(model, told_twice(100, 2), threats=radii)
        each = [found[norm] for norm in radii]
        assert 1 - sum(1 - share for share in each) - 1e-9 <= found["union"] <= min(each)
        union[name] = found["union"]
    assert union["plain"] < 0.2
    assert union["msd"] > 0.7


def test_robust_accuracies_of_a_linear_net_are_those_of_the_dual_norms():
    weight = torch.arange(1.0, 10.0) / 10 - 0.55
    images, model = grey(200), linear(weight)
    margin = (images.x.flatten(1) @ weight) * (2 * images.y - 1)
    duals = {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}
    right = {norm: margin > eps * duals[norm] for norm, eps in THREATS.items()}
    found = zoo.robust_accuracies(model, images, threats=THREATS, iterations=40)
    for norm, one in right.items():
        assert found[norm] == pytest.approx(float(one.double().mean()), abs=0.005)
    assert found["union"] == pytest.approx(float(torch.stack(list(right.values())).all(0).double().mean()), abs=0.01)


def test_a_mean_of_weights_is_what_is_kept():
    plain, mean = net(), net()
    expected = {key: value.clone() for key, value in net().state_dict().items()}

    def watch(step, steps, history):
        if len(history) < 1:  # after every step, not after the epoch
            own = 1 - min(0.8, step / (step + 9))
            for key, value in plain.state_dict().items():
                expected[key] += own * (value - expected[key])

    zoo.train(plain, grey(), grey(10, 1), epochs=1, batch_size=4, lr=0.05, on_progress=watch)
    zoo.train(mean, grey(), grey(10, 1), epochs=1, batch_size=4, lr=0.05, ema=0.8)
    for key, value in mean.state_dict().items():
        torch.testing.assert_close(value, expected[key])
        assert not torch.equal(value, plain.state_dict()[key])
    plain = net()
    zoo.train(plain, grey(), grey(10, 1), epochs=1, batch_size=8, lr=0.05)
    same = net()
    zoo.train(same, grey(), grey(10, 1), epochs=1, batch_size=8, lr=0.05, ema=0.0)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threats": {}}, ValueError, "threats must name at least one of the norms linf, l2, l1, got none"),
        ({"threats": {"l3": 1}}, ValueError, r"there is no norm \(in threats\) 'l3'; nearest: l"),
        ({"threats": {"l1": -1}}, ValueError, r"threats\['l1'\] must be a finite number in \(0, inf\], got -1"),
        ({"threats": {"linf": 0.0, "l1": 1}}, ValueError, r"threats\['linf'\] must be a finite number in \(0, inf\]"),
        ({"threats": {"l1": float("nan")}}, ValueError, r"threats\['l1'\] must be a finite number"),
        ({"threats": {"l1": "many"}}, TypeError, r"threats\['l1'\] must be a number, got 'many'"),
        ({"threats": 0.3}, TypeError, "threats must be a table of radii by norm"),
        ({"threats": {"l1": 1.0}, "eps": 0.1}, ValueError, "eps goes with one radius in linf: leave it out"),
        ({"threats": {"l1": 1.0}, "step": 0.1}, ValueError, "step goes with one radius in linf"),
        ({"combine": "sum"}, ValueError, "combine must be one of 'max', 'average', 'msd', 'random', got 'sum'"),
    ],
)
def test_settings_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Adversarial(**options)


@pytest.mark.parametrize("threats", [{"l1": 9.5}, {"l2": 3.1}, {"linf": 1.5}])
def test_radii_that_images_have_no_room_for_are_refused_before_training(threats):
    with pytest.raises(ValueError, match=rf"threats\['{next(iter(threats))}'\] \(images have room for"):
        zoo.train(net(), grey(), grey(), adversarial=Adversarial(threats=threats))


@pytest.mark.parametrize("ema", [1.0, -0.1])
def test_means_that_never_move_are_refused(ema):
    with pytest.raises(ValueError, match=r"ema must be a finite number in \[0, 1\)"):
        zoo.train(net(), grey(), grey(), ema=ema)
