"""APGD: ART and AutoAttack as oracles, the optimum on linear models, targets, too few classes."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from immunonet.attacks import APGD, NORMS, PGD
from immunonet.attacks._losses import dlr, margin, targeted_dlr
from immunonet.attacks.apgd import _checkpoints, _Thinning

BUDGETS = [("linf", 0.1, np.inf), ("l2", 0.6, 2)]


@pytest.mark.parametrize(
    ("norm", "eps", "order", "loss", "theirs"),
    [(*BUDGETS[0], "ce", "cross_entropy"), (*BUDGETS[1], "dlr", "difference_logits_ratio")],
)
def test_it_breaks_as_much_as_art_does(digits, norm, eps, order, loss, theirs):
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    net, x, y, _, _ = digits
    ours = APGD(eps=eps, norm=norm, loss=loss, iterations=25, random_start=True)(net, x, y)
    oracle = AutoProjectedGradientDescent(
        PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1)),
        norm=order, eps=eps, eps_step=2 * eps, max_iter=25, nb_random_init=1, loss_type=theirs, verbose=False,
        batch_size=len(x),
    )  # fmt: skip
    found = torch.from_numpy(oracle.generate(x.numpy(), y.numpy()))
    with torch.no_grad():
        accuracy = float((net(found).argmax(1) == y).float().mean())
    assert 0.2 < accuracy < 0.8
    assert 1 - float(ours.success.float().mean()) <= accuracy + 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_the_optimum_on_a_linear_model_within_one_percent(linear_model, norm, random_start):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, generator=generator)
    x = 0.3 + 0.4 * torch.rand(6, 20, generator=generator)
    model, y = linear_model(weight), torch.zeros(6, dtype=torch.long)
    result = APGD(eps=0.1, iterations=40, norm=norm, random_start=random_start)(model, x, y)
    gain = (result.adversarials - x) @ weight
    most = 0.1 * (weight.abs().sum() if norm == "linf" else weight.norm())
    assert bool((gain <= most + 1e-4).all())
    assert bool((gain >= 0.99 * most).all())


@pytest.mark.parametrize(("loss", "eps"), [("ce", 2.0), ("dlr", 1.5)])
def test_in_l1_it_breaks_as_much_of_a_robust_network_as_autoattack_does(robust_digits, loss, eps):
    from pyautoattack.autopgd_base import APGDAttack

    net, x, y = robust_digits
    ours = APGD(eps=eps, norm="l1", loss=loss, iterations=25)(net, x, y)
    state = torch.random.get_rng_state()
    oracle = APGDAttack(net, n_iter=25, norm="L1", eps=eps, loss=loss, device="cpu", use_largereps=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of gradients that are 0
        found = oracle.perturb(x, y)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        accuracy = float((net(found).argmax(1) == y).float().mean())
    assert 0.2 < accuracy < 0.8
    assert 1 - float(ours.success.float().mean()) <= accuracy + 0.01


@pytest.mark.parametrize("iterations", [9, 60])
@pytest.mark.parametrize("random_start", [False, True])
def test_in_l1_it_attains_the_optimum_of_ball_and_bounds_on_a_linear_model(linear_model, iterations, random_start):
    """Values at a bound, near one and in the middle; few iterations come nearly as far."""
    weight = torch.randn(20, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([0.0, 0.02, 0.5, 0.97, 1.0]).repeat(3, 4)
    attack = APGD(eps=2.0, iterations=iterations, norm="l1", random_start=random_start)
    result = attack(linear_model(weight), x, torch.zeros(3, dtype=torch.long))
    best = NORMS["l1"].farthest(weight.expand_as(x), x, 2.0, torch.tensor(0.0), torch.tensor(1.0))
    gain, most = (result.adversarials - x) @ weight, (best - x) @ weight
    assert bool((gain <= most * (1 + 1e-5)).all())
    assert bool((gain >= (0.985 if iterations > 9 else 0.95) * most).all())


@pytest.mark.parametrize("iterations", [1, 2, 9, 10, 11, 20, 100, 999])
def test_in_l1_the_balls_shrink_to_eps_and_all_iterations_are_spent(iterations):
    balls = _Thinning.balls(iterations)
    assert sum(asked for _, asked in balls) == iterations + 1
    assert min(asked for _, asked in balls) >= 2
    assert [times for times, _ in balls] == ([3, 2, 1] if iterations >= 10 else [1])


def test_in_l1_a_success_that_only_a_larger_ball_holds_does_not_count():
    """The answer changes at twice eps; what is found on the way there is brought back."""
    model = lambda x: torch.stack([0.5 + 0 * x[:, 0], x.sum(1)], 1)  # noqa: E731
    result = APGD(eps=0.25, norm="l1", iterations=20)(model, torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    assert bool((result.losses[:6] > 0).any(0).all())
    assert not result.success.any()
    torch.testing.assert_close(result.distance, torch.full((4,), 0.25))


@pytest.mark.parametrize(("norm", "eps", "order"), [*BUDGETS, ("l1", 1.5, 1)])
def test_targets_break_at_least_as_much_as_one_ascent(digits, norm, eps, order):
    net, x, y, _, _ = digits
    one = APGD(eps=eps, norm=norm, loss="dlr", iterations=10)(net, x[:40], y[:40])
    all_targets = APGD(eps=eps, norm=norm, loss="targeted-dlr", iterations=10)(net, x[:40], y[:40])
    assert all_targets.success.sum() >= one.success.sum()
    assert bool((all_targets.distance <= eps + 1e-5).all())
    assert all_targets.losses.shape == (11, 40)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_targeted_reaches_the_wanted_class(digits, loss):
    net, x, y, _, _ = digits
    wanted = (y[:30] + 1) % 10
    result = APGD(eps=0.4, loss=loss, iterations=20, targeted=True)(net, x[:30], wanted)
    with torch.no_grad():
        answers = net(result.adversarials).argmax(1)
    assert torch.equal(result.success, answers == wanted)
    assert result.success.float().mean() > 0.5


def test_losses_are_the_formulas():
    z = torch.tensor([[4.0, 1.0, 3.0, 0.0]])
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert margin(z, zero).item() == -1
    assert margin(z, one).item() == 3
    assert dlr(z, zero).item() == pytest.approx(-1 / 3)
    assert dlr(z, one).item() == pytest.approx(1)
    assert targeted_dlr(z, zero, one).item() == pytest.approx(-3 / 3.5)


def test_losses_do_not_change_with_shift_and_scale(digits):
    net, x, y, _, _ = digits
    one, other = (
        APGD(eps=0.1, loss="dlr", iterations=10)(model, x[:20], y[:20]) for model in (net, lambda z: 3 * net(z) + 7)
    )
    torch.testing.assert_close(one.losses, other.losses, atol=1e-4, rtol=0)


def test_checkpoints_are_those_of_the_paper():
    assert [at for at, _ in _checkpoints(100)] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sum(gap for _, gap in _checkpoints(7)) == max(at for at, _ in _checkpoints(7))


def test_the_step_halves_where_the_loss_swings():
    """A narrow valley at .5: full steps jump over it, halved ones end close by."""
    model = lambda x: torch.cat([(x[:, :1] - 0.43).abs() * 5, x[:, :1] * 0], 1)  # noqa: E731
    x, y = torch.full((1, 1), 0.9), torch.tensor([0])
    result = APGD(eps=0.5, iterations=60)(model, x, y)
    assert abs(float(result.adversarials) - 0.43) < 0.01


def test_early_stop_leaves_the_fooled_alone_and_without_it_losses_grow(digits):
    net, x, y, _, _ = digits
    attack = APGD(eps=0.1, iterations=5, restarts=3, random_start=True)
    stopped = attack(net, x[:60], y[:60])
    went_on = dataclasses.replace(attack, early_stop=False)(net, x[:60], y[:60])
    assert bool((went_on.losses.amax(0) >= stopped.losses.amax(0) - 1e-9)[stopped.success].all())
    assert (went_on.losses.amax(0) > stopped.losses.amax(0) + 1e-3).any()


def test_momentum_keeps_on_where_plain_pgd_turns_back():
    """One steep step down in the gradient's sign: the running sum still leads on."""

    class Cliff(torch.autograd.Function):
        """Slopes 1, then -.5 at the second call, as a rough surface would show."""

        calls = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            Cliff.calls += 1
            return grad.abs() * (-1 if Cliff.calls == 2 else 1)

    def end(momentum):
        Cliff.calls = 0
        model = lambda x: torch.cat([x[:, :1] * 0, Cliff.apply(x[:, :1])], 1)  # noqa: E731
        attack = PGD(eps=0.5, step=0.1, iterations=3, random_start=False, momentum=momentum)
        return float(attack(model, torch.full((1, 1), 0.4), torch.tensor([0])).adversarials)

    assert end(0.0) == pytest.approx(0.5)  # up, down, up
    assert end(1.5) == pytest.approx(0.7)  # the sums are 1, .5, 1.75


@pytest.mark.parametrize(
    ("loss", "classes", "match"),
    [("dlr", 2, "model must tell 3 or more .*got 2: use loss='ce'"), ("targeted-dlr", 3, "4 or more")],
)
def test_too_few_classes_are_named(loss, classes, match):
    x, y = torch.full((2, classes), 0.5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=match):
        APGD(loss=loss)(nn.Linear(classes, classes), x, y)
