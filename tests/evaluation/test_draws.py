"""Which seeds choose, which count, and which runs of a trial are theirs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunonet.evaluation.draws import Draws


@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20))
def test_what_chooses_never_counts_and_every_candidate_has_as_many_of_both(seed, each, few):
    draws = Draws.of(seed, each, few)
    assert len(draws.choose) == len(draws.count) == each
    assert sorted({*draws.choose, *draws.count}) == list(range(seed, seed + 2 * each))
    assert draws.seeds == draws.choose[: draws.few] + draws.counting
    assert len(draws.counting) == draws.few == min(few, each)
    runs = torch.tensor(draws.seeds)[:, None]
    assert tuple(draws.chosen(runs)[:, 0].tolist()) == draws.choose[: draws.few]
    assert tuple(draws.counted(runs)[:, 0].tolist()) == draws.counting


def test_seeds_of_a_protocol_are_written_out():
    draws = Draws.of(3, 4, 2)
    assert (draws.choose, draws.count, draws.seeds) == ((3, 4, 5, 6), (7, 8, 9, 10), (3, 4, 7, 8))


def test_without_randomness_the_one_run_chooses_and_counts():
    draws, runs = Draws(), torch.tensor([[True, False]])
    assert (draws.seeds, draws.counting) == ((), ())
    assert draws.chosen(runs).equal(runs)
    assert draws.counted(runs).equal(runs)


@pytest.mark.parametrize("name", ["choose", "count", "few"])
def test_draws_are_fixed(name):
    with pytest.raises(AttributeError):
        setattr(Draws(), name, ())
