"""Norms: sizes, steps, projections and random points by closed forms, for every norm that there is."""

import pytest
import torch

from immunonet.attacks import NORMS

DELTA = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])


@pytest.mark.parametrize(
    ("norm", "size", "step", "inside"), [("linf", 4.0, [1.0, -1.0], [2.0, -2.0]), ("l2", 5.0, [0.6, -0.8], [1.2, -1.6])]
)
def test_sizes_steps_and_projections_by_hand(norm, size, step, inside):
    ball, low, high = NORMS[norm], torch.tensor(-1.5), torch.tensor(9.0)
    assert ball.size(DELTA).tolist() == [size, 0.0]
    torch.testing.assert_close(ball.steepest(DELTA), torch.tensor([[step], [[0.0, 0.0]]]))
    centre = torch.full((2, 1, 2), 0.5)
    found = ball.project(centre + DELTA, centre, 2.0, low, high)
    torch.testing.assert_close(found[0, 0], (centre[0, 0] + torch.tensor(inside)).clamp(min=-1.5))
    assert torch.equal(found[1], centre[1])


@pytest.mark.parametrize(("norm", "reach"), [("linf", 2.0), ("l2", 13**0.5)])
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
    corners = NORMS["linf"].extreme(x, 0.3, torch.Generator().manual_seed(0))
    assert corners.abs().eq(torch.tensor(0.3)).all()
    assert abs(float(corners.sign().mean())) < 4 / 600**0.5
    same = [
        getattr(NORMS["l2"], name)(x, 0.3, torch.Generator().manual_seed(0)) for name in ("extreme", "random_within")
    ]
    assert torch.equal(*same)


def test_tiny_gradients_still_give_full_l2_steps():
    torch.testing.assert_close(NORMS["l2"].steepest(torch.tensor([[3e-30, 4e-30]])), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("norm", NORMS)
def test_of_nothing_there_is_nothing(norm):
    ball, none = NORMS[norm], torch.zeros(0, 2, 3)
    generator = torch.Generator().manual_seed(0)
    assert ball.size(none).shape == (0,)
    for found in (
        ball.steepest(none),
        ball.project(none, none, 1.0, none.new_zeros(()), none.new_ones(())),
        ball.random_within(none, 1.0, generator),
        ball.extreme(none, 1.0, generator),
    ):
        assert found.shape == none.shape
