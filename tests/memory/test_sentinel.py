"""Scores of a stream by hand, the threshold's promise, near copies, sources, and bad input."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from torch import nn

from immunonet import Sentinel, data
from immunonet.memory import sentinel as module
from immunonet.memory.views import VIEWS, pooled, spectrum


def fitted(window=50, neighbours=2, false_alarm=0.05, **how):
    clean = torch.rand(400, 3, generator=torch.Generator().manual_seed(0))
    return Sentinel(nn.Identity(), "input", window=window, neighbours=neighbours, false_alarm=false_alarm, **how).fit(
        clean
    )


def by_hand(queries, window, k):
    scores = []
    for i, one in enumerate(queries):
        before = queries[max(0, i - window) : i]
        distances = sorted(float((one - other).norm()) for other in before)
        scores.append(sum(distances[:k]) / k if len(distances) >= k else math.inf)
    return scores


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    window=st.integers(3, 60), k=st.integers(1, 3), at_once=st.integers(1, 50),
)  # fmt: skip
def test_scores_are_those_of_a_stream_whatever_the_batches(seed, sizes, window, k, at_once):
    queries = torch.rand(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    watch = Sentinel(nn.Identity(), "input", window=window, neighbours=k)
    watch.threshold = 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", at_once)
        parts = [watch.judge(part) for part in queries.split(sizes)]
    expected = torch.tensor(by_hand(queries, window, k))
    found = torch.cat([part.score for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([part.flagged for part in parts]), found < 0.2)
    assert len(watch.held()) == min(window, len(queries))


def test_no_more_clean_queries_are_flagged_than_was_promised():
    watch = fitted()
    more = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1))
    share = float(watch.watch(more).flagged.float().mean())
    assert 0.01 < share < 0.05


@pytest.mark.parametrize(("n", "share"), [(20_000, 1e-3), (3000, 1e-3), (400, 0.05), (59, 0.05), (58, 0.05)])
def test_the_promise_is_that_of_the_beta_distribution(n, share):
    m = module.promised(n, share)
    above = [beta.sf(share, i, n + 1 - i) for i in (m, m + 1) if i]
    assert above[-1] > module.UNSURE
    assert all(one <= module.UNSURE for one in above[:-1])
    assert (m == 0) == (n == 58)


def test_near_copies_are_flagged_and_others_go_on():
    watch = fitted()
    watch.watch(torch.rand(60, 3, generator=torch.Generator().manual_seed(2)))
    copies = torch.full((10, 3), 0.5) + 1e-3 * torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    flagged = watch.watch(copies, source="one").flagged.tolist()
    assert flagged[2:] == [True] * 8
    assert watch.stats()["sources"]["one"] == {"queries": 10, "flagged": sum(flagged)}
    assert next(iter(watch.stats()["sources"])) == "one"


def test_sources_do_not_hide_an_attack():
    together, apart = fitted(), fitted()
    copies = torch.full((10, 3), 0.5) + 1e-3 * torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    expected = together.watch(copies).flagged
    found = torch.cat([apart.watch(one, source=f"source {i}").flagged for i, one in enumerate(copies.split(1))])
    assert torch.equal(found, expected)
    assert found.any()


def test_it_forgets_what_is_older_than_its_window():
    watch = fitted()
    copies = torch.full((5, 3), 0.5)
    assert watch.watch(copies).flagged.any()
    watch.watch(torch.rand(50, 3, generator=torch.Generator().manual_seed(4)))
    assert not watch.watch(copies[:1]).flagged.any()


def test_a_twin_goes_on_by_itself():
    watch = fitted()
    watch.watch(torch.full((3, 3), 0.5))
    other = pickle.loads(pickle.dumps(watch.twin()))
    assert other.watch(torch.full((1, 3), 0.5)).flagged.all()
    assert (watch.queries, other.queries) == (3, 4)
    assert len(watch.held()) == 3
    watch.reset()
    assert not watch.watch(torch.full((1, 3), 0.5)).flagged.any()


def test_queries_of_several_sources_are_counted_for_each():
    watch = fitted()
    copies = torch.zeros(6, 3)
    flagged = watch.watch(copies, ["a", "b", "a", "b", "a", "c"]).flagged
    assert flagged.tolist() == [False, False, True, True, True, True]
    assert watch.stats()["sources"] == {
        "a": {"queries": 3, "flagged": 2}, "b": {"queries": 2, "flagged": 1}, "c": {"queries": 1, "flagged": 1},
    }  # fmt: skip
    for wrong in (["a"], ["a"] * 7, ["a"] * 5 + [""]):
        with pytest.raises(ValueError, match="source must"):
            watch.watch(copies, wrong)
    assert watch.queries == 6


def test_it_is_saved_with_its_threshold_and_read_again(tmp_path):
    watch = fitted()
    watch.save(tmp_path / "sentinel.json")
    again = Sentinel.load(tmp_path / "sentinel.json", nn.Identity(), log=tmp_path / "flags")
    assert again.settings() == watch.settings()
    more = torch.rand(30, 3, generator=torch.Generator().manual_seed(2)).repeat(2, 1)
    assert torch.equal(again.watch(more).flagged, watch.watch(more).flagged)
    assert (tmp_path / "flags").is_file()
    with pytest.raises(ValueError, match="shape"):
        again.watch(torch.zeros(1, 4))
    for edited in (
        '{"threshold": 1}',
        "[]",
        '{"threshold": "x", "shape": [3]}',
        '{"threshold": 1, "shape": [3], "z": 1}',
    ):
        (tmp_path / "sentinel.json").write_text(edited)
        with pytest.raises(ValueError, match="does not describe a sentinel"):
            Sentinel.load(tmp_path / "sentinel.json", nn.Identity())
    with pytest.raises(RuntimeError, match="fitted before it is saved"):
        Sentinel(nn.Identity(), "input").save(tmp_path / "x")
    of_a_module = Sentinel(nn.Identity(), nn.Identity(), window=50, neighbours=2, false_alarm=0.05)
    of_a_module.fit(torch.rand(400, 3))
    with pytest.raises(ValueError, match="space must have a name"):
        of_a_module.save(tmp_path / "x")


def test_sources_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "SOURCES", 3)
    watch = fitted()
    for i in range(10):
        watch.watch(torch.rand(1, 3), source=f"{i}")
    assert set(watch.stats()["sources"]) == {"7", "8", "9"}


def test_views_of_images():
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert pooled(x).shape == (2, 49)
    torch.testing.assert_close(pooled(x)[0, 0], x[0, 0, :4, :4].mean())
    torch.testing.assert_close(spectrum(x.roll(3, 2)), spectrum(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(spectrum(x.flip(2) ** 2), spectrum(x), atol=1e-2)
    # Those of a whole transform, the lowest.
    sizes = torch.fft.fft2(x.double(), norm="ortho").abs().roll(5, 2)[:, :, :11, :6]
    torch.testing.assert_close(spectrum(x), sizes.sqrt().float().flatten(1), rtol=1e-3, atol=1e-3)
    assert spectrum(torch.rand(1, 3, 4, 5)).shape == (1, 3 * 3 * 3)
    for one in VIEWS.values():
        assert len(one(x[:0])) == 0
        assert torch.equal(one(torch.ones(2, 5)), torch.ones(2, 5))


def test_it_looks_where_it_is_told(digits_net):
    net, x = digits_net, data.load("digits", "test").x
    layer = next(name for name, _ in net.named_modules() if name)
    watch = Sentinel(net, layer, window=20, false_alarm=0.05).fit(x[:200])
    assert watch.signatures(x[:2]).shape[0] == 2
    own = Sentinel(net, lambda z: z.flatten(1)[:, :2], window=20, false_alarm=0.05).fit(x[:200])
    assert own.signatures(x[:2]).shape == (2, 2)
    with pytest.raises(ValueError, match="nothing"):
        Sentinel(net, "nothing")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"neighbours": 0}, "neighbours must be"),
        ({"window": 3}, "window must be"),
        ({"false_alarm": 0}, "false_alarm must be"),
        ({"false_alarm": 1.0}, "false_alarm must be"),
    ],
)
def test_wrong_settings_are_named(how, told):
    with pytest.raises(ValueError, match=told):
        Sentinel(nn.Identity(), **{"space": "input"} | how)


def test_bad_input_is_refused_before_anything_is_remembered():
    with pytest.raises(TypeError, match="defence must be a torch"):
        Sentinel(3)
    with pytest.raises(RuntimeError, match="must be fitted before it watches"):
        Sentinel(nn.Identity(), "input").watch(torch.rand(1, 3))
    with pytest.raises(ValueError, match=r"clean must hold at least 2,995 inputs, for false_alarm=0\.001 .* got 30"):
        Sentinel(nn.Identity(), "input", window=20).fit(torch.rand(30, 3))
    watch = fitted()
    for wrong, told in (
        (torch.full((1, 3), torch.nan), "x must"), (torch.full((1, 3), 2.0), "x must"),
        (torch.rand(1, 4), r"x must have shape \(B, 3\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            watch.watch(wrong)
    with pytest.raises(ValueError, match="source must have 1 to 256 characters, got 10,000"):
        watch.watch(torch.rand(1, 3), source="x" * 10_000)
    assert watch.queries == len(watch.held()) == 0
    assert watch.watch(torch.rand(0, 3)).flagged.shape == (0,)
