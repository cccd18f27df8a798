"""Intervals and tests against scipy, closed forms and simulation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from immunonet import statistics


@given(n=st.integers(1, 2000), share=st.floats(0, 1), confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n, share, confidence):
    correct = round(share * n)
    theirs = binomtest(correct, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert statistics.wilson(correct, n, confidence=confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_in_closed_form():
    # With nothing correct the upper end is z^2 / (n + z^2).
    z = 1.959963984540054
    assert statistics.wilson(0, 10) == pytest.approx((0, z**2 / (10 + z**2)))
    assert statistics.wilson(10, 10)[1] == 1.0
    low, high = statistics.wilson(2.5, 5)
    assert (low + high) / 2 == pytest.approx(0.5)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
)
def test_mcnemar_equals_scipy(pairs):
    a, b = torch.tensor(pairs).T
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert statistics.mcnemar(a, b) == pytest.approx(expected)


def test_mcnemar_by_hand():
    a, b = torch.tensor([True] * 5 + [False]), torch.tensor([False] * 6)
    assert statistics.mcnemar(a, b) == pytest.approx(2 / 2**5)
    assert statistics.mcnemar(a, a) == 1.0


def test_mcnemar_of_many_images_does_not_overflow():
    a = torch.arange(2000) % 2 == 0
    assert statistics.mcnemar(a, ~a) == 1.0


def test_bootstrap_of_one_run_matches_the_binomial_spread():
    correct = (torch.arange(400) < 300)[None]
    low, high = statistics.bootstrap(correct, draws=4000)
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.006)


def test_bootstrap_sees_the_variance_between_runs():
    """Runs that are wholly right or wholly wrong: four fair coins, however many the images."""
    correct = torch.tensor([[True], [True], [False], [False]]).expand(4, 500)
    low, high = statistics.bootstrap(correct, draws=4000)
    assert (low, high) == (0.0, 1.0)  # 4 heads: 1/16 > .025
    alike = (torch.arange(500) % 2 == 0).expand(4, 500)
    assert statistics.bootstrap(alike, draws=500)[0] > 0.4


@pytest.mark.parametrize("block", [1, 2**20])
def test_bootstrap_is_that_of_one_draw_after_the_other(block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", block)
    correct = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    generator, means = torch.Generator().manual_seed(5), []
    for _ in range(300):
        runs = torch.randint(3, (3,), generator=generator)
        images = torch.randint(50, (50,), generator=generator)
        means.append(int(correct[runs][:, images].sum()) / 150)
    expected = torch.tensor(means, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert statistics.bootstrap(correct, draws=300, seed=5) == pytest.approx(tuple(expected.tolist()), abs=1e-12)


def test_bootstrap_depends_on_its_seed_alone():
    correct = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    assert statistics.bootstrap(correct, seed=1) == statistics.bootstrap(correct, seed=1)
    assert statistics.bootstrap(correct, seed=1) != statistics.bootstrap(correct, seed=2)


def test_interval_is_wilson_for_one_run_and_never_empty_for_several():
    one = (torch.arange(50) < 41)[None]
    assert statistics.interval(one) == statistics.wilson(41, 50)
    perfect = torch.ones(5, 50, dtype=torch.bool)
    assert statistics.interval(perfect) == statistics.wilson(50, 50)
    split = torch.tensor([[True], [True], [False], [False]]).expand(4, 500)
    assert statistics.interval(split) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: statistics.wilson(1, 0), "n must be at least 1"),
        (lambda: statistics.wilson(6, 5), "correct must be"),
        (lambda: statistics.wilson(1, 5, confidence=1), "confidence must be in"),
        (lambda: statistics.bootstrap(torch.ones(3)), "correct must have shape"),
        (lambda: statistics.bootstrap(torch.ones(1, 1), draws=0), "draws must be at least 1"),
        (lambda: statistics.interval(torch.ones(0, 4)), "correct must have shape"),
        (lambda: statistics.mcnemar(torch.ones(3), torch.ones(3)), "a must be bool"),
        (lambda: statistics.mcnemar(torch.ones(3) > 0, torch.ones(4) > 0), r"b must be bool of shape \(3,\)"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
