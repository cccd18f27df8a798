import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunonet.immune.consensus import consensus, decided, entropy, lots, shared, winner


def never(rows, among):
    raise AssertionError("nothing is even")


def test_consensus_is_the_share_of_each_class_among_the_fittest():
    distances = torch.tensor([[[0.1, 0.2], [0.4, 0.9], [0.3, 0.8]], [[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]]])
    assert consensus(distances, 4).tolist() == [[0.5, 0.25, 0.25], [0, 0.5, 0.5]]
    torch.testing.assert_close(consensus(distances, 6), torch.full((2, 3), 1 / 3))


def test_cells_at_the_edge_share_the_places_that_are_left():
    # Of three places one is taken at .1; three cells at .2, two of them of class 1, share the others.
    distances = torch.tensor([[[0.1, 0.2, 0.9], [0.2, 0.2, 0.9]]])
    torch.testing.assert_close(consensus(distances, 3), torch.tensor([[(1 + 2 / 3) / 3, (4 / 3) / 3]]))
    # A place for each of them, and none of them shares.
    assert consensus(distances, 4).tolist() == [[0.5, 0.5]]
    # Cells infinitely far share as well.
    distances = torch.tensor([[[0.1, math.inf], [math.inf, math.inf]]])
    torch.testing.assert_close(consensus(distances, 2), torch.tensor([[(1 + 1 / 3) / 2, (2 / 3) / 2]]))


def test_whole_places_are_whole_numbers():
    nearer, level = torch.tensor([[31, 7, 0]]), torch.tensor([[3, 0, 34]])
    assert shared(nearer, level, 75).tolist() == [[34, 7, 34]]
    # Equal shares are the same number however they come about.
    assert shared(torch.tensor([[0, 0]]), torch.tensor([[4, 2]]), 10)[0, 0] == shared(
        torch.tensor([[0, 0]]), torch.tensor([[30, 15]]), 10
    )[0, 0]  # fmt: skip


def test_the_most_votes_win_and_a_tie_goes_to_the_fittest():
    votes = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.5, 0.0, 0.5]])
    best = torch.tensor([[-9.0, -1.0, 0.0], [-2.0, -1.0, 0.0], [-1.0, -2.0, 0.0], [-9.0, -1.0, -1.0], [-2.0, 0, -1.0]])
    assert winner(votes, best, never).tolist() == [0, 1, 0, 0, 2]


def test_what_is_still_even_is_settled_by_scores_in_turn():
    votes = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.5, 0.5]])
    best = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, -1.0, 0.0], [-math.inf] * 3, [0.0, -1.0, -1.0]])
    asked = []

    def settle(rows, among):
        asked.append((rows.tolist(), among.tolist()))
        return torch.tensor([[2, 3, 9], [4, 4, 1], [9, 5, 5]]), torch.tensor([[1, 0, 2], [6, 7, 8], [9, 0, 1]])

    assert winner(votes, best, settle).tolist() == [1, 1, 1, 2]
    assert asked == [([0, 2, 3], [[True, True, False], [True, True, True], [False, True, True]])]


def test_lots_differ_and_prefer_no_number():
    drawn = lots(torch.arange(100_000))
    assert len(drawn.unique()) == 100_000
    assert (drawn >= 0).all()
    assert (drawn < 2**32).all()
    rises = (drawn[1:] > drawn[:-1]).double().mean()
    # Independent draws rise half of the time; five standard deviations.
    assert abs(rises - 0.5) < 5 * 0.5 / 99_999**0.5


@given(
    seed=st.integers(0, 2**31),
    classes=st.sampled_from([2, 3, 10, 1000]),
    tied=st.integers(1, 1000),
    n=st.sampled_from([1, 2, 50, 3000]),
)
def test_what_is_decided_stays_so_in_float32(seed, classes, tied, n):
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(classes, generator=g) for _ in range(20)])
    # The first few have the most votes, alike but for what a sum over layers rounds.
    tied = min(tied, classes)
    votes = torch.rand(20, classes, generator=g)
    votes[:, :tied] = 1 + 1e-7 * torch.rand(20, tied, generator=g)
    votes = torch.empty_like(votes).scatter(1, order, votes / votes.sum(1, keepdim=True))
    logs = ((n * votes + 1) / (n + classes)).log()
    labels = order[:, 0]
    found = decided(logs, labels)
    for form in (found, found.log_softmax(1), found.softmax(1), found.exp().log(), found.log_softmax(1).log_softmax(1)):
        assert torch.equal(form.argmax(1), labels)
        assert ((form == form.amax(1, keepdim=True)).sum(1) == 1).all()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double().exp().sum(1), torch.ones(20).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, logs, rtol=2e-6, atol=1e-6)


def test_a_clear_answer_is_handed_on_as_it_is():
    logs = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]).log()
    assert torch.equal(decided(logs, torch.tensor([0, 2])), logs)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_any_label_can_be_first_of_a_tie(label):
    assert decided(torch.full((1, 3), 1 / 3).log(), torch.tensor([label])).argmax(1).tolist() == [label]


def test_entropy_in_nats():
    votes = torch.tensor([[1.0, 0.0], [0.5, 0.5], [2 / 3, 1 / 3]])
    expected = torch.tensor([0.0, math.log(2), math.log(3) - 2 / 3 * math.log(2)])
    torch.testing.assert_close(entropy(votes), expected)
