import numpy as np
import pytest
import torch
from scipy import stats

from immunonet.immune.noise import Noise, derive, identities, uniform

CPU = torch.device("cpu")
# Every test of a distribution has a fixed seed and fails by chance alone with probability 1e-4.
LEVEL = 1e-4


def family(antigens, labels):
    return torch.tensor(antigens), torch.tensor(labels)


def stream(seed, generation, use, count):
    return Noise([seed], antigens=1).draw(generation, use, family([0], [0]), count)[0].double().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2, 2**62])
def test_numbers_are_uniform(seed):
    u = stream(seed, 1, "mutate", 200_000)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > LEVEL


@pytest.mark.parametrize("lag", [1, 2, 28, 784, 4096])
def test_numbers_at_different_places_are_independent(lag):
    u = stream(3, 1, "mutate", 400_000)
    cells = np.histogram2d(u[:-lag], u[lag:], bins=16, range=[(0, 1), (0, 1)])[0]
    assert stats.chisquare(cells.ravel()).pvalue > LEVEL


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((5, 1, "cross"), (5, 1, "mutate")),
        ((5, 1, "mutate"), (5, 2, "mutate")),
        ((5, 1, "mutate"), (6, 1, "mutate")),
        ((5, 1, "select"), (5, 1, "cross")),
    ],
)
def test_streams_are_independent(one, other):
    a, b = stream(*one, 400_000), stream(*other, 400_000)
    cells = np.histogram2d(a, b, bins=16, range=[(0, 1), (0, 1)])[0]
    assert stats.chisquare(cells.ravel()).pvalue > LEVEL


def test_rare_values_come_as_often_as_they_should():
    u = stream(7, 1, "mutate", 1_000_000)
    for rate in (1e-4, 1e-3, 0.05):
        assert stats.binomtest(int((u < rate).sum()), len(u), rate).pvalue > LEVEL


def test_a_number_depends_on_its_place_alone():
    keys = Noise([3], antigens=1).keys(1, "cross", CPU)
    whole = uniform(keys, torch.tensor([0]), 100)
    torch.testing.assert_close(uniform(keys, torch.tensor([40]), 60), whole[:, 40:], rtol=0, atol=0)


def test_antigens_share_numbers_and_classes_do_not():
    found = Noise([3], antigens=2).draw(1, "cross", family([0, 1, 0, 1], [0, 0, 1, 1]), 50)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[3], Noise([3], antigens=9).draw(1, "cross", family([8], [1]), 50)[0])


def test_antigens_with_seeds_of_their_own():
    noise = Noise([3, 4], antigens=2)
    found = noise.draw(1, "cross", family([0, 1], [0, 0]), 50)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], Noise([4], antigens=1).draw(1, "cross", family([0], [0]), 50)[0])


def test_derived_seeds():
    seeds = {derive(seed, layer, name) for seed in range(20) for layer in range(5) for name in ("a", "b", "a/0")}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1, 2) == derive(1, 2) != derive(12)


def test_identities_follow_content_and_count_repeats():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    first, second, again = identities(x)
    assert len({first, second, again}) == 3
    assert identities(x[1:]) == [second, first]
    assert identities(x[[2, 0, 1]]) == [first, again, second]
