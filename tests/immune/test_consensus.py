import math

import torch

from immunonet.immune.consensus import consensus, entropy, winner


def test_consensus_is_the_share_of_each_label():
    assert consensus(torch.tensor([[0, 0, 2, 1], [1, 1, 1, 1]]), 3).tolist() == [[0.5, 0.25, 0.25], [0, 1, 0]]


def test_the_most_votes_win_and_a_tie_goes_to_the_fittest():
    votes = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3]])
    best = torch.tensor([[-9.0, -1.0, 0.0], [-2.0, -1.0, 0.0], [-1.0, -2.0, 0.0], [-9.0, -1.0, -1.0]])
    assert winner(votes, best).tolist() == [0, 1, 0, 0]


def test_entropy_in_nats():
    votes = torch.tensor([[1.0, 0.0], [0.5, 0.5], [2 / 3, 1 / 3]])
    expected = torch.tensor([0.0, math.log(2), math.log(3) - 2 / 3 * math.log(2)])
    torch.testing.assert_close(entropy(votes), expected)
