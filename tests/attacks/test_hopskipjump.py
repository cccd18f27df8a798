"""HopSkipJump: closed-form distances on a linear model, foolbox as oracle, starts."""

import dataclasses
import warnings

import pytest
import torch

from immunonet.attacks import HopSkipJump

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # foolbox imports scipy by a name that scipy has deprecated
    import foolbox


def labels_only(model):
    """Scores that say nothing but the label."""
    return lambda x: torch.nn.functional.one_hot(model(x).argmax(1), model(x).shape[1]).float()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_to_a_plane(linear_model, norm):
    weight = torch.tensor([1.0, -2.0, 0.5, 1.0])
    x = torch.tensor([[0.5, 0.6, 0.5, 0.4], [0.4, 0.6, 0.5, 0.4]])
    y = torch.zeros(2, dtype=torch.long)
    result = HopSkipJump(norm=norm, iterations=15)(labels_only(linear_model(weight)), x, y)
    exact = -(x @ weight) / (weight.abs().sum() if norm == "linf" else weight.norm())
    assert bool(result.success.all())
    assert bool((result.distance >= exact - 1e-6).all())
    torch.testing.assert_close(result.distance, exact, atol=0, rtol=0.03)
    assert bool((result.losses.diff(dim=0) >= 0).all())
    torch.testing.assert_close(-result.losses[-1].float(), result.distance)


def test_it_comes_as_close_as_foolbox(digits):
    net, x, y, _, _ = digits
    x, y = x[:6], y[:6]
    result = HopSkipJump(norm="l2", iterations=8)(labels_only(net), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            oracle = foolbox.attacks.HopSkipJumpAttack(
                foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(), steps=8, initial_gradient_eval_steps=100
            )
            theirs = oracle.run(model, x, foolbox.criteria.Misclassification(y))
    assert result.distance.median() <= 1.1 * (theirs - x).flatten(1).norm(dim=1).median()


def test_success_means_within_eps(digits):
    net, x, y, _, _ = digits
    attack = HopSkipJump(iterations=2, evaluations=20)
    free = attack(net, x[:8], y[:8])
    assert bool(free.success.all())
    eps = float(free.distance.median())
    bound = dataclasses.replace(attack, eps=eps)(net, x[:8], y[:8])
    assert torch.equal(bound.adversarials, free.adversarials)
    assert torch.equal(bound.success, free.distance <= eps)
    assert 0 < int(bound.success.sum()) < 8


def test_targeted_goes_from_starts_to_the_input(digits):
    net, x, y, _, _ = digits
    with torch.no_grad():
        sure = net(x).argmax(1) == y
    x, y = x[sure][:40], y[sure][:40]
    wanted = (y[:4] + 1) % 10
    starts = torch.stack([x[y == label][0] for label in wanted.tolist()])
    result = HopSkipJump(norm="l2", iterations=3, evaluations=20, targeted=True)(net, x[:4], wanted, starts=starts)
    with torch.no_grad():
        assert torch.equal(net(result.adversarials).argmax(1), wanted)
    assert bool(result.success.all())
    assert bool((result.distance < (starts - x[:4]).flatten(1).norm(dim=1)).all())


def test_what_is_fooled_already_and_what_cannot_be(digits):
    net, x, *_ = digits
    with torch.no_grad():
        answers = net(x[:3]).argmax(1)
    done = HopSkipJump(iterations=1)(net, x[:3], (answers + 1) % 10)
    assert torch.equal(done.adversarials, x[:3])
    assert bool(done.success.all())
    never = HopSkipJump(iterations=1)(lambda z: torch.eye(10)[torch.zeros(len(z)).long()], x[:3], torch.zeros(3).long())
    assert torch.equal(never.adversarials, x[:3])
    assert not never.success.any()
    assert bool(torch.isinf(never.losses).all())


def test_most_evaluations_are_at_least_as_many_as_those_of_the_first_iteration():
    with pytest.raises(ValueError, match="most_evaluations must be at least 100, got 50"):
        HopSkipJump(most_evaluations=50)


def test_bad_starts_are_named(digits):
    net, x, y, _, _ = digits
    with pytest.raises(ValueError, match="starts must be given for a targeted attack"):
        HopSkipJump(targeted=True)(net, x, y)
    with pytest.raises(ValueError, match="starts must be one per input, 200, got 3"):
        HopSkipJump()(net, x, y, starts=x[:3])
    with pytest.raises(ValueError, match="starts must lie within bounds"):
        HopSkipJump()(net, x, y, starts=x + 5)
