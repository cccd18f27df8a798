"""Norms: sizes, steps, projections and random points by closed forms, for every norm that there is; L1 by oracles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from immunonet.attacks import NORMS

L1 = NORMS["l1"]
ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)

DELTA = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])


@pytest.mark.parametrize(
    ("norm", "size", "step", "inside"),
    [
        ("linf", 4.0, [1.0, -1.0], [2.0, -2.0]),
        ("l2", 5.0, [0.6, -0.8], [1.2, -1.6]),
        ("l1", 7.0, [0.0, -1.0], [0.5, -1.5]),
    ],
)
def test_sizes_steps_and_projections_by_hand(norm, size, step, inside):
    ball, low, high = NORMS[norm], torch.tensor(-1.5), torch.tensor(9.0)
    assert ball.size(DELTA).tolist() == [size, 0.0]
    torch.testing.assert_close(ball.steepest(DELTA), torch.tensor([[step], [[0.0, 0.0]]]))
    centre = torch.full((2, 1, 2), 0.5)
    found = ball.project(centre + DELTA, centre, 2.0, low, high)
    torch.testing.assert_close(found[0, 0], (centre[0, 0] + torch.tensor(inside)).clamp(min=-1.5))
    assert torch.equal(found[1], centre[1])


@pytest.mark.parametrize(("norm", "reach"), [("linf", 2.0), ("l2", 13**0.5), ("l1", 7.0)])
def test_the_reach_is_the_size_of_the_width(norm, reach):
    width = torch.tensor([2.0, 2.0, 1.0, 2.0])
    assert NORMS[norm].reach(width) == pytest.approx(reach)
    assert NORMS[norm].reach(width) == pytest.approx(float(NORMS[norm].size(width[None])))


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball_uniformly(norm):
    ball = NORMS[norm]
    points = ball.random_within(torch.zeros(4000, 2), 2.0, torch.Generator().manual_seed(0))
    size = ball.size(points)
    assert float(size.max()) <= 2.0 + 1e-5
    # Uniform in two dimensions: the share within half the radius is a quarter, in any norm.
    assert abs(float((size <= 1).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert points.mean(0).abs().max() < 4 * 2.0 / 4000**0.5


def test_extreme_points_are_the_corners_of_linf_and_any_of_l2():
    x = torch.zeros(200, 3)
    corners = NORMS["linf"].extreme(x, 0.3, torch.Generator().manual_seed(0), ZERO, ONE)
    assert corners.abs().eq(torch.tensor(0.3)).all()
    assert abs(float(corners.sign().mean())) < 4 / 600**0.5
    any_point = NORMS["l2"].random_within(x, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(NORMS["l2"].extreme(x, 0.3, torch.Generator().manual_seed(0), ZERO, ONE), any_point)


def test_tiny_gradients_still_give_full_l2_steps():
    torch.testing.assert_close(NORMS["l2"].steepest(torch.tensor([[3e-30, 4e-30]])), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("norm", NORMS)
def test_of_nothing_there_is_nothing(norm):
    ball, none = NORMS[norm], torch.zeros(0, 2, 3)
    generator = torch.Generator().manual_seed(0)
    assert ball.size(none).shape == (0,)
    for found in (
        ball.steepest(none),
        ball.project(none, none, 1.0, ZERO, ONE),
        ball.random_within(none, 1.0, generator),
        ball.direction(none, none, ZERO, ONE),
        ball.farthest(none, none, 1.0, ZERO, ONE),
        ball.extreme(none, 1.0, generator, ZERO, ONE),
    ):
        assert found.shape == none.shape


# L1: where ball and bounds meet.

# Channels whose ranges differ.
LOW, HIGH = torch.tensor([[-1.0, 2.0], [0.0, 0.5]]).T[..., None]


def drawn(seed, n=6, features=5, scale=2.0):
    """Centres `(n, 2, features)`, a third of their values at a bound, and points around them, some values unmoved."""
    generator = torch.Generator().manual_seed(seed)
    share = (1.5 * torch.rand(n, 2, features, generator=generator) - 0.25).clamp(0, 1)
    centre = (LOW + share * (HIGH - LOW)).clamp(LOW, HIGH)
    moves = scale * torch.randn(centre.shape, generator=generator)
    return centre, centre + moves * (torch.rand(centre.shape, generator=generator) < 0.8)


def bisected(x, centre, eps):
    """Return the projection of each row by bisection on the amount that all values shrink by, in float64."""
    delta = (x - centre).double()
    room = torch.where(delta > 0, (HIGH - centre).double(), (centre - LOW).double())

    def kept(amount):
        return torch.minimum((delta.abs() - amount).clamp(min=0), room)

    least, most = torch.zeros(len(x), 1, 1, dtype=torch.float64), delta.abs().amax((1, 2), keepdim=True)
    for _ in range(100):
        middle = (least + most) / 2
        over = kept(middle).sum((1, 2), keepdim=True) > eps
        least, most = torch.where(over, middle, least), torch.where(over, most, middle)
    fits = kept(0.0).sum((1, 2), keepdim=True) <= eps
    return centre.double() + delta.sign() * torch.where(fits, kept(0.0), kept(most))


@given(
    seed=st.integers(0, 10_000), eps=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 3.0, 8.0, 100.0]), scale=st.floats(0, 50)
)
@settings(max_examples=60, deadline=None)
def test_the_projection_is_that_of_a_bisection(seed, eps, scale):
    centre, x = drawn(seed, scale=scale)
    x[0], x[1] = centre[0], HIGH  # nothing to do, and a corner
    found = L1.project(x, centre, eps, LOW, HIGH)
    torch.testing.assert_close(found.double(), bisected(x, centre, eps), atol=1e-6, rtol=0)
    assert bool(((found >= LOW) & (found <= HIGH)).all())
    assert bool((L1.size((found - centre).double()) <= eps * (1 + 1e-6) + 1e-6).all())
    if eps == 0:
        assert torch.equal(found, centre)


@given(seed=st.integers(0, 10_000), eps=st.floats(0.01, 5))
@settings(max_examples=50, deadline=None)
def test_what_is_projected_stays_and_every_row_by_itself(seed, eps):
    centre, x = drawn(seed)
    found = L1.project(x, centre, eps, LOW, HIGH)
    for i in range(len(x)):
        assert torch.equal(L1.project(x[i : i + 1], centre[i : i + 1], eps, LOW, HIGH)[0], found[i])
    within = L1.project(found, centre, eps * (1 + 1e-5), LOW, HIGH)
    assert torch.equal(within, found)


def test_no_other_point_of_ball_and_bounds_is_nearer():
    """To project onto the ball and then onto the bounds is farther away: what bounds cut off, other values may use."""
    centre, x = drawn(0, n=50)
    found = L1.project(x, centre, 1.0, LOW, HIGH)
    wide = L1.project(x, centre, 1.0, centre - 100, centre + 100).clamp(LOW, HIGH)
    others = [wide, *(centre + L1.extreme(centre, 1.0, torch.Generator().manual_seed(i), LOW, HIGH) for i in range(50))]
    near = (found - x).flatten(1).norm(dim=1)
    for other in others:
        assert bool((near <= (other - x).flatten(1).norm(dim=1) + 1e-5).all())
    assert (near < (wide - x).flatten(1).norm(dim=1) - 0.1).any()


@pytest.mark.parametrize("size", [3, 784])
def test_many_equal_values_and_large_images_are_projected_exactly(size):
    centre = torch.full((2, size), 0.25)
    x = centre + torch.tensor([[0.5], [-3.0]])
    found = L1.project(x, centre, 0.6, ZERO, ONE)
    shares = torch.tensor([[min(0.5, 0.6 / size)], [-min(0.25, 0.6 / size)]])
    torch.testing.assert_close(found, (centre + shares), atol=1e-6, rtol=0)


@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.0, 0.1, 0.7, 2.0, 50.0]))
@settings(max_examples=40, deadline=None)
def test_the_farthest_point_is_the_optimum_of_the_linear_programme(seed, eps):
    centre, _ = drawn(seed, n=2, features=3)
    gradient = torch.randn(centre.shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    found = L1.farthest(gradient, centre, eps, LOW, HIGH)
    assert bool(((found >= LOW) & (found <= HIGH)).all())
    assert bool((L1.size(found - centre) <= eps * (1 + 1e-6) + 1e-6).all())
    for slope, middle, point in zip(gradient, centre, found, strict=True):
        up, down = (HIGH - middle).flatten(), (middle - LOW).flatten()
        weight = slope.flatten().double().numpy()
        rooms = [(0, float(room)) for room in torch.cat([up, down])]
        best = linprog(-np.concatenate([weight, -weight]), A_ub=np.ones((1, 12)), b_ub=[eps], bounds=rooms)
        assert float((slope * (point - middle)).sum()) == pytest.approx(-best.fun, abs=1e-5)
        assert bool((point == middle)[slope == 0].all())


def test_slide_moves_the_steepest_percent_that_bounds_let_move():
    generator = torch.Generator().manual_seed(0)
    gradient, point = torch.randn(4, 3, 150, generator=generator), torch.full((4, 3, 150), 0.5)
    ranked = gradient.flatten(1).abs().argsort(1, descending=True)
    # The steepest leads out, the next does not though it is at a bound too.
    flat, rows = point.flatten(1), torch.arange(4)
    flat[rows, ranked[:, 0]] = (gradient.flatten(1)[rows, ranked[:, 0]] > 0).float()
    flat[rows, ranked[:, 1]] = (gradient.flatten(1)[rows, ranked[:, 1]] < 0).float()
    way = L1.direction(gradient, flat.view_as(point), ZERO, ONE).flatten(1)
    torch.testing.assert_close(L1.size(way), torch.ones(4))
    for row, places, slope in zip(way, ranked, gradient.flatten(1), strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == set(places[1:6].tolist())  # 1 % of 450, rounded up
        assert torch.equal(row.sign()[places[1:6]], slope.sign()[places[1:6]])


def test_fewer_values_move_where_fewer_have_a_slope():
    gradient = torch.zeros(2, 300)
    gradient[0, 7] = -3.0
    way = L1.direction(gradient, torch.full((2, 300), 0.5), ZERO, ONE)
    assert way[0, 7] == -1
    assert way.count_nonzero() == 1


@pytest.mark.parametrize("features", [1, 10, 784])
def test_random_points_of_l1_have_the_mean_size_of_uniform_ones(features):
    points = L1.random_within(torch.zeros(4000, features), 3.0, torch.Generator().manual_seed(0))
    size = L1.size(points) / 3
    assert float(size.max()) <= 1 + 1e-5
    # The size of a uniform point is that of the largest of d uniform numbers, Beta(d, 1).
    spread = math.sqrt(features / (features + 2)) / (features + 1)
    assert abs(float(size.mean()) - features / (features + 1)) < 4 * spread / 4000**0.5 + 1e-6


def test_extreme_points_of_l1_are_corners_of_ball_and_bounds():
    centre = drawn(3, n=400)[0]
    moved = L1.extreme(centre, 1.5, torch.Generator().manual_seed(0), LOW, HIGH)
    torch.testing.assert_close(L1.size(moved), torch.full((400,), 1.5))
    at_bound = ((centre + moved - LOW).abs() < 1e-6) | ((centre + moved - HIGH).abs() < 1e-6)
    assert int(((moved != 0) & ~at_bound).flatten(1).sum(1).max()) <= 1  # only the last one moves partly
    share = (moved != 0).double().mean(0)
    assert float(share.max()) < 3 * float(share.min())
    twice = [L1.extreme(centre[:2], 1.5, torch.Generator().manual_seed(i), LOW, HIGH) for i in (1, 1, 2)]
    assert torch.equal(twice[0], twice[1])
    assert not torch.equal(twice[0], twice[2])
    # Where the bounds leave no room for all of it, every value moves as far as it may one way.
    wide = L1.extreme(centre, 1e3, torch.Generator().manual_seed(0), LOW, HIGH)
    assert bool((((centre + wide - LOW).abs() < 1e-6) | ((centre + wide - HIGH).abs() < 1e-6)).all())
