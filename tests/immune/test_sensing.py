import pytest
import torch

from immunonet.immune.sensing import nonconformity, overall_nearest, p_values


def test_the_textbook_rule_by_hand():
    # Calibration scores 0 1 1 2 5: of a score s, (how many are >= s, plus one) over 5 + 1.
    calibration = torch.tensor([0.0, 1.0, 1.0, 2.0, 5.0])
    scores = torch.tensor([[-1.0, 0.0, 0.5, 1.0], [1.5, 2.0, 5.0, 6.0]])
    expected = torch.tensor([[6.0, 6.0, 5.0, 5.0], [3.0, 3.0, 2.0, 1.0]]) / 6
    torch.testing.assert_close(p_values(calibration, scores), expected)


def test_p_values_of_exchangeable_scores_are_valid():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(20000, 20, generator=g)
    p = torch.cat([p_values(row[:-1].sort().values, row[-1:]) for row in scores])
    for level in (0.05, 0.2, 0.5):
        # With 19 calibration scores without ties, P(p <= level) is level exactly; five standard deviations.
        assert abs(p.le(level).double().mean().item() - level) < 5 * (level * (1 - level) / 20000) ** 0.5


def test_nonconformity_counts_the_other_labels():
    assert nonconformity(torch.tensor([[0, 0, 2], [1, 1, 1]]), 4).tolist() == [[1, 3, 2, 3], [3, 0, 3, 3]]


def test_the_nearest_over_all_classes():
    distances = torch.tensor([[[1.0, 4.0], [2.0, 3.0], [0.5, 9.0]]])
    near, labels = overall_nearest(distances)
    assert near.tolist() == [[0.5, 1.0]]
    assert labels.tolist() == [[2, 0]]


@pytest.mark.parametrize("n", [18, 19])
def test_false_alarm_needs_enough_calibration(n):
    p = p_values(torch.arange(float(n)), torch.tensor([1e9]))
    assert bool(p <= 0.05) == (n >= 19)
