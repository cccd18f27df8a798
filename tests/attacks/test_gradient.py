"""FGSM and PGD: closed forms on linear models, foolbox as oracle, properties, bad input."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from immunonet.attacks import APGD, FGSM, PGD

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # foolbox imports scipy by a name that scipy has deprecated
    import foolbox

EPS = 0.1


def linear(weight):
    """A model of two classes whose cross-entropy of class 0 is softplus(weight . x)."""
    model = nn.Linear(len(weight), 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(len(weight)), weight]))
    return model


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def batch(net):
    x = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_attains_the_optimum_on_a_linear_model(norm, random_start):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, generator=generator)
    x = 0.3 + 0.4 * torch.rand(6, 20, generator=generator)
    y = torch.zeros(6, dtype=torch.long)
    attack = PGD(eps=EPS, step=EPS / 4, iterations=60, norm=norm, random_start=random_start)
    result = attack(linear(weight), x, y)
    direction = weight.sign() if norm == "linf" else weight / weight.norm()
    best = x + EPS * direction
    torch.testing.assert_close(result.losses.amax(0).float(), best @ weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.adversarials, best, atol=1e-3, rtol=0)
    torch.testing.assert_close(result.distance, torch.full((6,), EPS), atol=1e-4, rtol=0)
    assert torch.equal(result.success, best @ weight > 0)


# Values at a bound, near one and in the middle.
CENTRE = torch.tensor([0.0, 0.02, 0.5, 0.97, 1.0]).repeat(4)


def best_gain(weight, centre, eps):
    """Return the most that weight . (x - centre) can be in the L1 ball and [0, 1], by trying values one by one."""
    room = torch.where(weight > 0, 1 - centre, centre)
    gain = 0.0
    for i in weight.abs().argsort(descending=True).tolist():
        spent = min(eps, float(room[i]))
        gain, eps = gain + spent * abs(float(weight[i])), eps - spent
    return gain


@pytest.mark.parametrize("eps", [0.01, 0.4, 3.0, 100.0])
def test_fgsm_in_l1_attains_the_optimum_of_ball_and_bounds(eps):
    weight = torch.randn(20, generator=torch.Generator().manual_seed(0))
    result = FGSM(eps=eps, norm="l1")(linear(weight), CENTRE[None], torch.tensor([0]))
    assert float((result.adversarials - CENTRE) @ weight) == pytest.approx(best_gain(weight, CENTRE, eps), rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_in_l1_comes_within_a_thousandth_of_the_optimum_of_ball_and_bounds(momentum, targeted):
    weight = torch.randn(20, generator=torch.Generator().manual_seed(0))
    attack = PGD(eps=2.0, step=0.5, iterations=60, norm="l1", momentum=momentum, random_start=False)
    attack = dataclasses.replace(attack, targeted=targeted)
    result = attack(linear(weight), CENTRE.expand(3, -1), torch.full((3,), int(targeted)))
    gain = (result.adversarials - CENTRE) @ weight
    torch.testing.assert_close(gain, torch.full((3,), best_gain(weight, CENTRE, 2.0)), rtol=1e-3, atol=0)


def test_targeted_climbs_towards_the_target_and_counts_reaching_it():
    weight = torch.tensor([1.0, -2.0])
    x = torch.full((2, 2), 0.5)
    target = torch.tensor([0, 1])
    result = PGD(eps=EPS, step=EPS, iterations=3, targeted=True, random_start=False)(linear(weight), x, target)
    away, to = x[0] - EPS * weight.sign(), x[0] + EPS * weight.sign()
    torch.testing.assert_close(result.adversarials, torch.stack([away, to]))
    assert result.success.tolist() == [True, False]  # 0.5 - 1 -+ 0.3 stays below 0: class 0 either way
    torch.testing.assert_close(result.losses[-1, 0].float(), -(away @ weight))


@pytest.mark.parametrize(
    ("norm", "eps", "oracle"),
    [
        ("linf", 0.06, foolbox.attacks.LinfProjectedGradientDescentAttack),
        ("l2", 0.4, foolbox.attacks.L2ProjectedGradientDescentAttack),
    ],
)
def test_pgd_walks_the_path_of_foolbox(net, batch, norm, eps, oracle):
    x, y = batch
    ours = PGD(eps=eps, step=eps / 4, iterations=8, norm=norm, random_start=False)(net, x, y)
    attack = oracle(abs_stepsize=eps / 4, steps=8, random_start=False)
    theirs, success = with_foolbox(attack, net, x, y, eps)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(theirs), y, reduction="none")
    torch.testing.assert_close(nn.functional.softplus(ours.losses[-1]).float(), loss, atol=1e-4, rtol=0)
    last_is_best = ours.losses[-1] >= ours.losses.amax(0)
    assert last_is_best.sum() > 8
    torch.testing.assert_close(ours.adversarials[last_is_best], theirs[last_is_best], atol=1e-4, rtol=0)
    assert 0 < success.sum() < len(x)
    assert bool((ours.success | ~success).all())


def test_pgd_in_l1_takes_the_steps_of_foolbox_within_the_ball(net, batch):
    """Not on its surface: what theirs projects onto is not the ball exactly."""
    x, y = 0.4 + 0.2 * batch[0], batch[1]
    ours = PGD(eps=0.65, step=0.15, iterations=4, norm="l1", random_start=False)(net, x, y)
    oracle = foolbox.attacks.SparseL1DescentAttack(quantile=0.99, abs_stepsize=0.15, steps=4, random_start=False)
    theirs, _ = with_foolbox(oracle, net, x, y, 0.65)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(theirs), y, reduction="none")
    torch.testing.assert_close(nn.functional.softplus(ours.losses[-1]).float(), loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("norm", "eps", "oracle"),
    [
        ("linf", 0.04, foolbox.attacks.LinfFastGradientAttack),
        ("l2", 0.3, foolbox.attacks.L2FastGradientAttack),
    ],
)
def test_fgsm_equals_foolbox(net, batch, norm, eps, oracle):
    x, y = batch
    ours = FGSM(eps=eps, norm=norm)(net, x, y)
    theirs, success = with_foolbox(oracle(), net, x, y, eps)
    torch.testing.assert_close(ours.adversarials, theirs, atol=1e-5, rtol=0)
    assert torch.equal(ours.success, success)
    assert 0 < success.sum() < len(x)


def with_foolbox(attack, net, x, y, eps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        _, adversarials, success = attack(model, x, y, epsilons=eps)
    return adversarials, success


def test_result_describes_the_points_it_gives(net, batch):
    x, y = batch
    result = PGD(eps=0.06, step=0.02, iterations=5, restarts=3, seed=4)(net, x, y)
    with torch.no_grad():
        logits = net(result.adversarials)
    torch.testing.assert_close(result.success, logits.argmax(1) != y)
    torch.testing.assert_close(result.distance, (result.adversarials - x).abs().flatten(1).amax(1))
    assert result.losses.shape == (6, len(x))
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    failed = ~result.success
    assert failed.any()
    assert result.success.any()
    highest = nn.functional.softplus(result.losses.amax(0)).float()
    torch.testing.assert_close(loss[failed], highest[failed])
    assert bool((loss <= highest + 1e-6).all())


def test_more_restarts_never_do_worse_and_begin_with_the_same_run(net, batch):
    x, y = batch
    one, five = (PGD(eps=0.05, step=0.03, iterations=2, restarts=r)(net, x, y) for r in (1, 5))
    assert bool((five.success | ~one.success).all())
    same = one.success == five.success
    assert bool((kept_loss(net, five, y) >= kept_loss(net, one, y) - 1e-6)[same].all())
    assert (kept_loss(net, five, y) > kept_loss(net, one, y) + 1e-4).any()


def kept_loss(net, result, y):
    with torch.no_grad():
        return nn.functional.cross_entropy(net(result.adversarials), y, reduction="none")


def test_a_success_is_kept_before_a_higher_loss():
    def model(x):
        """At 0 sure and right, at .5 wrong by a little, at 1 right but torn between four classes."""
        pieces = torch.tensor([[3.0, 0, 0, 0], [0, 0.1, -9, -9], [0.01, 0, 0, 0]])
        slope = torch.tensor([-1e-4, 0, 0, 0])  # leads from 0 to 1
        return pieces[(2 * x[:, 0]).round().long()] + slope * x

    x, y = torch.zeros(1, 1), torch.tensor([0])
    result = PGD(eps=1.0, step=0.5, iterations=2, random_start=False)(model, x, y)
    assert result.losses[2, 0] > result.losses[1, 0]
    torch.testing.assert_close(result.adversarials, torch.full((1, 1), 0.5))
    assert bool(result.success)
    # Where nothing succeeds, the highest loss stays: here the least likely class comes closest at 1.
    failed = PGD(eps=1.0, step=0.5, iterations=2, random_start=False, targeted=True)(model, x, y + 3)
    torch.testing.assert_close(failed.adversarials, torch.ones(1, 1))
    assert not bool(failed.success)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_that_is_sure_is_still_climbed(norm):
    """A margin of 60: the loss, e^-60, is far below what single precision tells from zero in one minus p."""
    weight = torch.tensor([-60.0, 80.0])
    x = torch.tensor([[0.6, 0.3]])
    with torch.no_grad():
        (model := linear(weight)).weight[1] *= 5
    found = FGSM(eps=EPS, norm=norm)(model, x, torch.tensor([0]))
    direction = torch.tensor([-1.0, 1.0]) if norm == "linf" else torch.tensor([-0.6, 0.8])
    torch.testing.assert_close(found.adversarials, x + EPS * direction)
    torch.testing.assert_close(found.losses[0], torch.tensor([-60.0], dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_of_zero_gives_no_nan(norm):
    class Flat(nn.Module):
        def forward(self, x):
            return x[:, :2] * 0

    x = torch.full((3, 4), 0.5)
    result = PGD(eps=EPS, norm=norm, random_start=False)(Flat(), x, torch.zeros(3, dtype=torch.long))
    assert torch.equal(result.adversarials, x)
    torch.testing.assert_close(result.losses.float(), torch.zeros(11, 3))


def test_training_flags_come_back_after_an_error(net, batch):
    net.train()
    with pytest.raises(ValueError, match="finite"):
        PGD()(nn.Sequential(net, Broken(torch.nan)), *batch)
    assert all(m.training for m in net.modules())


class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x * self.value


X, Y = torch.full((2, 1, 6, 6), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        (X * 255, Y, ValueError, "x must lie within bounds"),
        (X.long(), Y, TypeError, "x must have a floating dtype"),
        (X * torch.nan, Y, ValueError, "x must be finite"),
        (X, Y.float(), TypeError, "y must have an integer dtype"),
        (X, Y[:1], ValueError, r"y must have shape \(2,\)"),
        (X, Y + 4, ValueError, "y must be in 0 to 4, the model's 5 classes"),
        (X, Y - 1, ValueError, "y must be in 0"),
    ],
)
def test_bad_inputs_are_named(net, x, y, error, match):
    with pytest.raises(error, match=match):
        PGD()(net, x, y)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda x: x, ValueError, r"model must return logits \(2, C\)"),
        (lambda x: x.flatten(1)[:, :1], ValueError, "model must return logits"),
        (lambda x: x.flatten(1)[:1].repeat(3, 1), ValueError, "model must return logits"),
        (lambda x: ("x",), TypeError, "model must return a tensor of logits"),
        (lambda x: x.flatten(1) / 0, ValueError, "model must return finite logits"),
        (lambda x: x.flatten(1).detach(), ValueError, "model must be differentiable .*SoftNeighbours"),
    ],
)
def test_bad_models_are_named(model, error, match):
    with pytest.raises(error, match=match):
        PGD()(model, X, Y)


def test_a_model_that_cuts_the_graph_before_its_weights_is_named(net):
    with pytest.raises(ValueError, match="differentiable"):
        PGD()(lambda x: net(x.detach()), X, Y)


class Louder(nn.Module):
    """A network with its logits multiplied: the same labels everywhere."""

    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.net(x) * self.factor


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(eps=0.06),
        PGD(eps=0.06, step=0.02, iterations=5),
        PGD(eps=0.5, step=0.2, iterations=5, norm="l2"),
        APGD(eps=0.06, iterations=8),
        PGD(eps=0.06, step=0.02, iterations=5, momentum=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [1e-2, 1e2, 1e4])
def test_the_scale_of_the_logits_does_not_matter(net, batch, attack, factor):
    x, y = batch
    plain, scaled = attack(net, x, y), attack(Louder(net, factor), x, y)
    # The best of several other classes counts for more the larger the logits are, which moves a few images.
    assert abs(int(plain.success.sum()) - int(scaled.success.sum())) <= 2
    moved = (scaled.adversarials - x).abs().flatten(1).amax(1)
    assert (moved > 0).all()
