"""Noise: the worst of its points, and no question more than that."""

import torch
from torch import nn

from immunonet import models
from immunonet.attacks import Noise


def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
    x = torch.full((5, 2), 0.5)
    return model, x, model(x).argmax(1)


def test_it_keeps_the_worst_point_and_losses_only_grow():
    model, x, y = problem()
    for norm in ("linf", "l2", "l1"):
        few, many = (Noise(eps=0.3, points=n, norm=norm)(model, x, y) for n in (1, 30))
        assert (many.losses[-1] >= few.losses[-1]).all()
        assert (many.losses.diff(dim=0) >= 0).all()
        got = -model(many.adversarials).double().log_softmax(1).gather(1, y[:, None])[:, 0]
        assert got.allclose(nn.functional.softplus(many.losses[-1]))


def test_in_linf_points_are_corners():
    model, x, y = problem()
    found = Noise(eps=0.3, points=3)(model, x, y).adversarials
    torch.testing.assert_close((found - x).abs(), torch.full_like(x, 0.3))


def test_an_unlikelier_failure_is_kept_before_a_success():
    """At the left corner wrong by a little, at the right one right but torn between four classes."""

    def model(x):
        pieces = torch.tensor([[0.0, 0.1, -9.0, -9.0], [0.01, 0.0, 0.0, 0.0]])
        return pieces[(x[:, 0] > 0.5).long()]

    result = Noise(eps=0.3, points=20)(model, torch.full((2, 1), 0.5), torch.tensor([0, 0]))
    torch.testing.assert_close(result.adversarials, torch.full((2, 1), 0.8))
    assert not result.success.any()


def test_what_counts_its_calls_is_asked_for_nothing_but_the_points():
    """As a random defence under evaluation does, whose draws are those of its calls."""

    class Counting(models.Asking):
        asked = 0

        def forward(self, x):
            self.asked += 1
            return x * self.asked

    _, x, y = problem()
    Noise(points=4, batch_size=3)(model := Counting(), x, y)
    assert model.asked == 4 * 2
