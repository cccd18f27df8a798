import pytest
import torch

from immunonet.immune.sensing import nonconformity, p_values, remoteness, tolerated


def test_the_textbook_rule_by_hand():
    # Calibration scores 0 1 1 2 5: of a score s, (how many are >= s, plus one) over 5 + 1.
    calibration = torch.tensor([0.0, 1.0, 1.0, 2.0, 5.0])
    scores = torch.tensor([[-1.0, 0.0, 0.5, 1.0], [1.5, 2.0, 5.0, 6.0]])
    expected = torch.tensor([[6.0, 6.0, 5.0, 5.0], [3.0, 3.0, 2.0, 1.0]]) / 6
    torch.testing.assert_close(p_values(calibration, scores), expected)


def test_p_values_of_exchangeable_scores_are_valid():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(5000, 20, generator=g)
    p = torch.cat([p_values(row[:-1].sort().values, row[-1:]) for row in scores])
    for level in (0.05, 0.2, 0.5):
        # With 19 calibration scores without ties, P(p <= level) is level exactly; five standard deviations.
        assert abs(p.le(level).double().mean().item() - level) < 5 * (level * (1 - level) / 5000) ** 0.5


def test_nonconformity_counts_the_other_labels():
    # The nearest three of all: .1 .3 of class 0 and .2 of class 2; then all of class 1.
    distances = torch.tensor([[[0.1, 0.3, 0.9], [4, 5, 6], [0.2, 0.7, 0.8]], [[4, 5, 6], [1, 2, 3], [7, 8, 9]]])
    assert nonconformity(distances).tolist() == [[1, 3, 2], [3, 0, 3]]


def test_what_is_equally_near_shares_the_neighbourhood():
    # One of three places is taken; three at .2 share the others, so that class 0 has 1 + 2 / 3 and class 1 4 / 3.
    distances = torch.tensor([[[0.1, 0.2, 0.9], [0.2, 0.2, 0.9]]])
    torch.testing.assert_close(nonconformity(distances), torch.tensor([[3 - 5 / 3, 3 - 4 / 3]]))


def test_the_mean_distance_to_the_nearest_over_all_classes():
    distances = torch.tensor([[[1.0, 4.0], [2.0, 3.0], [0.5, 9.0]]])
    assert remoteness(distances).tolist() == [0.75]


@pytest.mark.parametrize("n", [18, 19])
def test_false_alarm_needs_enough_calibration(n):
    p = p_values(torch.arange(float(n)), torch.tensor([1e9]))
    assert bool(p <= 0.05) == (n >= 19)


@pytest.mark.parametrize("level", [0.0, 0.05, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_the_highest_tolerated_score_is_the_last_above_the_level(level):
    calibration = torch.tensor([0.0, 1.0, 1.0, 2.0, 5.0, 5.0, 7.0, 8.0, 9.0])
    found = tolerated(calibration, level)
    at = torch.tensor([found, found + 0.01]).clamp(-1e9, 1e9)
    p = p_values(calibration, at)
    assert bool(p[0] > level) == (found > -torch.inf)
    assert bool(p[1] > level) == (found == torch.inf)
