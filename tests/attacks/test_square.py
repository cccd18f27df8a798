"""Square: ART and AutoAttack as oracles, the optimum on linear models, random models, inputs of any shape."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from immunonet.attacks import Square
from immunonet.attacks.square import _WAYS


def test_it_breaks_as_much_as_art_does(digits):
    """In L-inf: ART's L2 variant divides by zero on images as small as these."""
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import PyTorchClassifier

    net, x, y, _, _ = digits
    ours = Square(eps=0.1, queries=50)(net, x, y)
    classifier = PyTorchClassifier(net, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1))
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    oracle = SquareAttack(classifier, norm=np.inf, eps=0.1, max_iter=50, p_init=0.8, verbose=False, batch_size=len(x))
    found = torch.from_numpy(oracle.generate(x.numpy(), y.numpy()))
    np.random.set_state(state)  # noqa: NPY002
    with torch.no_grad():
        accuracy = float((net(found).argmax(1) == y).float().mean())
    assert 0.2 < accuracy < 0.9
    assert 1 - float(ours.success.float().mean()) <= accuracy + 0.01
    assert bool((ours.distance <= 0.1 + 1e-5).all())


def test_in_l1_it_breaks_as_much_of_a_robust_network_as_autoattack_does(robust_digits):
    from pyautoattack.square import SquareAttack as AutoSquare

    net, x, y = robust_digits
    ours = Square(eps=2.0, norm="l1", queries=150)(net, x, y)
    state = torch.random.get_rng_state()
    found = AutoSquare(net, norm="L1", n_queries=150, eps=2.0, device="cpu").perturb(x, y)
    torch.random.set_rng_state(state)
    with torch.no_grad():
        accuracy = float((net(found).argmax(1) == y).float().mean())
    assert 0.2 < accuracy < 0.9
    assert 1 - float(ours.success.float().mean()) <= accuracy + 0.01
    assert bool((ours.distance <= 2.0).all())


def test_the_optimum_on_a_linear_model_within_one_percent(linear_model):
    weight, x = random_plane()
    result = Square(eps=0.1, queries=400, early_stop=False)(linear_model(weight), x, torch.zeros(4, dtype=torch.long))
    gain = (result.adversarials - x) @ weight
    assert bool((gain <= 0.1 * weight.abs().sum() + 1e-4).all())
    assert bool((gain >= 0.099 * weight.abs().sum()).all())


def test_l2_comes_nearer_to_the_optimum_than_as_many_random_directions(linear_model):
    weight, x = random_plane()
    attack = Square(eps=0.1, norm="l2", queries=250, early_stop=False)
    result = attack(linear_model(weight), x, torch.zeros(4, dtype=torch.long))
    gain = (result.adversarials - x) @ weight
    directions = torch.randn(250, len(weight), generator=torch.Generator().manual_seed(1))
    by_chance = 0.1 * (nn.functional.normalize(directions) @ weight).max()
    assert bool((gain <= 0.1 * weight.norm() + 1e-4).all())
    assert bool((gain > by_chance).all())


def random_plane():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, generator=generator), 0.3 + 0.4 * torch.rand(4, 16, generator=generator)


def test_targeted_reaches_the_wanted_class(digits):
    net, x, y, _, _ = digits
    wanted = (y[:20] + 1) % 10
    result = Square(eps=0.5, queries=150, targeted=True)(net, x[:20], wanted)
    with torch.no_grad():
        assert torch.equal(result.success, net(result.adversarials).argmax(1) == wanted)
    assert result.success.float().mean() > 0.5


def test_the_margin_only_grows_and_is_that_of_the_points_given(digits):
    net, x, y, _, _ = digits
    result = Square(eps=0.1, queries=60, early_stop=False)(net, x[:20], y[:20])
    assert result.losses.shape == (61, 20)
    assert bool((result.losses[1:].diff(dim=0) >= 0).all())
    with torch.no_grad():
        logits = net(result.adversarials).double()
    own = nn.functional.one_hot(y[:20], 10).bool()
    margin = logits.masked_fill(own, -torch.inf).amax(1) - logits[own]
    torch.testing.assert_close(torch.maximum(result.losses[-1], result.losses[0]), margin, atol=1e-4, rtol=0)


def test_early_stop_asks_no_more_and_without_it_the_margin_grows(digits):
    net, x, y, _, _ = digits
    asked = []

    def counting(z):
        asked.append(len(z))
        return net(z)

    attack = Square(eps=0.2, queries=40)
    stopped = attack(counting, x[:10], y[:10])
    few, asked[:] = sum(asked), []
    went_on = dataclasses.replace(attack, early_stop=False)(counting, x[:10], y[:10])
    assert few < sum(asked) == 2 * 4 + 2 + 10 * 41  # four inputs are looked at together, twice, and two alone
    assert bool(went_on.success[stopped.success].all())
    assert went_on.losses[-1].sum() > stopped.losses[-1].sum()


def test_draws_average_the_margin_of_a_random_model(linear_model):
    """Noise of size 2.5 hides a margin that 200 draws show, to three of their deviations."""
    generator = torch.Generator().manual_seed(0)
    steady = linear_model(torch.ones(4))

    def model(x):
        return steady(x) + 2.5 * torch.randn(len(x), 2, generator=generator)

    x, y = torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long)
    result = Square(eps=0.1, queries=1, draws=200, early_stop=False)(model, x, y)
    torch.testing.assert_close(result.losses[0], torch.full((3,), 2.0, dtype=torch.float64), atol=0.8, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 7), (3, 4, 5), (2, 1, 1)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_inputs_of_any_shape_stay_in_the_ball(shape, norm):
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    model = lambda z: torch.stack([z.flatten(1).sum(1), 3 * z.flatten(1)[:, 0]], 1)  # noqa: E731
    result = Square(eps=0.3, norm=norm, queries=20, early_stop=False)(model, x, torch.zeros(3, dtype=torch.long))
    assert result.adversarials.shape == x.shape
    assert bool((result.distance <= 0.3 + 1e-5).all())
    assert bool(((result.adversarials >= 0) & (result.adversarials <= 1)).all())
    assert result.distance.max() > 0.05


@pytest.mark.parametrize(("height", "width"), [(3, 3), (5, 5), (1, 3), (4, 1), (3, 7)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_bumps_have_size_one_and_two_halves(height, width, turned, norm, order):
    bump = _WAYS[norm].bump(height, width, torch.zeros(1), turned=turned)
    assert bump.shape == (height, width)
    torch.testing.assert_close(torch.linalg.vector_norm(bump, order), torch.tensor(1.0))
    assert bump.min() < 0 < bump.max()
