"""Attacks behind a sentinel: what is counted, refusals, ways around, honest queries, and the protocol's record."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from immunonet import Sentinel, attacks, evaluate, incoming
from immunonet.evaluation import stream
from immunonet.evaluation.stream import COPIES, WAYS, Assault, Guarded, Way, Won, alarms, askers, attacked, honest, told
from immunonet.evaluation.suite import PROTOCOLS
from immunonet.evaluation.threats import Threat

BOUNDS = incoming.bounds("bounds", (0.0, 1.0))
THREAT = Threat(eps=0.2, norm="linf", bounds=BOUNDS, seed=0)


class First(nn.Module):
    """Answers 1 where the first value is above a half."""

    def forward(self, x):
        first = 40 * (x.flatten(1)[:, 0] - 0.5)
        return torch.stack([-first, first], 1)


@pytest.fixture
def sentinel():
    clean = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    return Sentinel(First(), "input", window=100, neighbours=2, false_alarm=0.05).fit(clean)


def guarded(sentinel, *, queries=100, refuses=True, way=WAYS["plain"]):
    x, traffic = torch.full((1, 6), 0.4), torch.rand(50, 6)
    y = torch.zeros(1, dtype=torch.long)
    assault = Assault(method=attacks.NES(), threat=THREAT, way=way, queries=queries, refuses=refuses)
    return Guarded(First(), sentinel, x, y, assault, traffic)


def test_what_is_flagged_is_refused_or_marked(sentinel):
    same = torch.full((1, 6), 0.4)
    for refuses in (True, False):
        one = guarded(sentinel.twin(), refuses=refuses)
        answered = torch.cat([one.heard(same)[1] for _ in range(5)])
        assert answered.tolist() == [True, True, *([not refuses] * 3)]
        assert (one.asked, one.flags, one.flagged, one.won) == (5, 3, 3, None)


def test_a_wrong_answer_within_the_threat_wins_and_others_do_not(sentinel):
    one = guarded(sentinel)
    far = torch.full((1, 6), 0.9)
    assert one.heard(far)[0].argmax(1).item() == 1
    with pytest.raises(Won):
        one.heard(torch.cat([torch.rand(2, 6) * 0.1, torch.tensor([[0.55, 0.4, 0.4, 0.4, 0.4, 0.4]])]))
    assert (one.asked, one.won) == (4, 4)


def test_nothing_is_answered_beyond_the_budget(sentinel):
    one = guarded(sentinel, queries=3)
    x = torch.rand(5, 6) * 0.5
    logits, answered = one.heard(x)
    assert answered.tolist() == [True, True, True, False, False]
    assert logits.shape == (5, 2)
    assert not one.heard(x)[1].any()
    assert one.asked == 3


def test_sources_and_traffic_go_through_the_same_sentinel(sentinel):
    one = guarded(sentinel, way=Way(sources=3, between=4), refuses=False)
    one.heard(torch.rand(6, 6) * 0.5)
    told = sentinel.stats()
    assert set(told["sources"]) == {"source 0", "source 1", "source 2"}
    assert (told["queries"], told["held"]) == (6, 6 + 24)


def test_who_keeps_out_of_the_way_of_his_own_queries_comes_through():
    """A sentinel that flags near copies alone: by itself the search is refused, larger steps are answered."""
    clean = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    watch = Sentinel(First(), "input", window=200, neighbours=1, false_alarm=0.05).fit(clean)
    watch.threshold = 0.02
    x, y = torch.full((1, 6), 0.45), torch.zeros(1, dtype=torch.long)
    method = attacks.NES(eps=0.2, step=0.005, sigma=0.001, samples=4, queries=200)

    def come_to(way):
        assault = Assault(method=method, threat=THREAT, way=WAYS[way], queries=200, refuses=True)
        return attacked(First(), watch, x, y, assault, clean)

    plain, guided = come_to("plain"), come_to("oars")
    assert plain["won"] is None
    assert plain["flags"] > 100
    assert guided["won"] is not None
    assert come_to("oars") == guided
    assert watch.queries == 0


def test_rows_by_hand():
    def one(won, flagged):
        return {"asked": 10, "flags": 1, "flagged": flagged, "won": won}

    marked = [one(5, 3), one(5, None), one(None, 2), one(4, 4)]
    refused = [one(None, 3), one(5, None), one(None, 2), one(None, 4)]
    row = told(marked, refused)
    assert (row["n"], row["fell"], row["stopped"], row["flagged_first"], row["fell_behind"]) == (4, 3, 2, 2, 1)
    assert row["stopped_share"] == pytest.approx(2 / 3)
    assert (row["queries_until_flagged"], row["queries_until_won"], row["never_flagged"]) == (3, 5, 1)
    assert told([one(None, None)], [one(None, None)])["stopped_share"] is None


def test_honest_copies_and_their_alarms(sentinel):
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    copies = honest(x, BOUNDS)
    assert set(copies) == {"noise", "turned", "moved", "film"}
    assert all(one.shape == (5 * COPIES, 1, 8, 8) for one in copies.values())
    assert torch.equal(copies["film"][3], x[0].roll(3, 2))
    assert set(honest(x.flatten(1), BOUNDS)) == {"noise"}
    vectors = torch.rand(40, 6, generator=torch.Generator().manual_seed(2))
    rows = {row["stream"]: row for row in alarms(sentinel, {"clean": vectors, "same": vectors[:1].repeat(10, 1)})}
    assert rows["same"]["flagged"] == 8
    assert rows["clean"]["flagged"] < 8
    assert sentinel.queries == 0


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_spend_about_what_they_may(norm):
    for method in askers(Threat(eps=0.2, norm=norm, bounds=BOUNDS, seed=0), 2000).values():
        assert 1900 < method.calls() < 4200


def test_the_protocol_tells_what_a_sentinel_stops(tmp_path, unchecked, monkeypatch):
    spent = {"steps": 2, "iterations": 1, "queries": 20, "decisions": 1, "evaluations": 4, "noise": 2, "checks": 4}
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], **spent))
    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(3))
    y = (x[:, 0] > 0.5).long()
    net = nn.Sequential(First())
    net.add_module("scale", nn.Linear(2, 2))
    net[1].weight.data, net[1].bias.data = torch.eye(2), torch.zeros(2)
    clean = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    watch = Sentinel(net, "input", window=100, neighbours=2, false_alarm=0.05).fit(clean)
    heard = []
    known = {"base": net, "eps": 0.1, "black_box": 1, "folder": tmp_path, "sentinel": watch}
    found = evaluate(lambda z: net(z).log_softmax(1), x, y, on_progress=heard.append, **known)
    told = found.to_dict()["sentinel"]
    assert [(row["attack"], row["way"]) for row in told["attacks"]] == [
        (attack, way) for attack in ("hop-skip-jump", "nes", "square") for way in WAYS
    ]
    assert {row["stream"] for row in told["false_alarms"]} == {"clean", "noise"}
    assert told["settings"]["neighbours"] == 2
    assert any("stopped by the sentinel" in text for text in heard)
    again = evaluate(lambda z: net(z).log_softmax(1), x, y, **known)
    assert again.to_dict()["sentinel"] == told
    found.to_html(tmp_path / "page.html")
    assert "Behind a sentinel" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="sentinel must be fitted"):
        evaluate(net, x, y, base=net, eps=0.1, sentinel=Sentinel(net, "input"))
    assert stream.identity(watch)[0]["window"] == 100
