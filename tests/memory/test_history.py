"""A memory's history counted by hand, and the log of a sentinel's flags."""

from __future__ import annotations

import json
import math
import pickle
from datetime import UTC, datetime

import pytest
import torch
from memories import bound, remember
from torch import nn

from immunonet import Memory, Sentinel
from immunonet.memory import entries, flags
from immunonet.memory.history import history


@pytest.fixture
def clock(monkeypatch):
    """Set the clock of entries, in seconds since 1970."""

    def at(seconds):
        monkeypatch.setattr(entries, "now", lambda: datetime.fromtimestamp(seconds, UTC))

    return at


def moment(seconds):
    return datetime.fromtimestamp(seconds, UTC)


@pytest.mark.parametrize("ram", [True, False])
def test_a_history_is_that_of_what_is_held_now(clock, tmp_path, ram):
    clock(1000)
    memory = bound(Memory(None if ram else tmp_path / "store"))
    ids = remember(memory, 3, source="a")
    clock(1040)
    ids += remember(memory, 2, at=100.0, source="b")
    memory.tag("good")
    clock(1100)
    memory.confirm([ids[0], ids[3]], [2, 0])
    memory.forget([ids[1]])
    flagged = [flags.Flags(time=moment(1100), source="c", queries=9, flagged=4)]
    told = history(memory, flagged, parts=10)
    assert json.loads(json.dumps(told)) == told
    assert told["stats"]["entries"] == 4
    assert [one["change"] for one in told["versions"]] == [None, 3, 2, 0, -1]
    assert [one["names"] for one in told["versions"]] == [[], [], ["good"], [], []]
    assert list(told["sources"]) == ["a", "b", "c"]
    assert (told["from"], told["to"]) == (moment(1000).isoformat(), moment(1100).isoformat())
    assert told["sources"] == {
        "a": {"written": [2, *[0] * 9], "contradicting": [1, *[0] * 9], "flagged": [0] * 10},
        "b": {"written": [0] * 4 + [2] + [0] * 5, "contradicting": [0] * 10, "flagged": [0] * 10},
        "c": {"written": [0] * 10, "contradicting": [0] * 10, "flagged": [0] * 9 + [4]},
    }


def test_nothing_is_held_and_one_moment_is_a_history_too(clock):
    clock(5)
    memory = bound(Memory(None))
    assert history(memory)["sources"] == {}
    remember(memory, source="a")
    told = history(memory, parts=2)
    assert (told["from"], told["to"]) == (moment(5).isoformat(), moment(6).isoformat())
    assert told["sources"]["a"]["written"] == [1, 0]
    with pytest.raises(ValueError, match="belongs to no model"):
        history(Memory(None))


def watching(path):
    watch = Sentinel(nn.Identity(), "input", neighbours=2, window=20, log=path)
    watch.threshold = 0.1
    return watch


def test_a_sentinel_tells_its_log_of_flags_alone(clock, tmp_path):
    path = tmp_path / "flags.jsonl"
    clock(7.5)
    watch = watching(path)
    watch.watch(torch.eye(3))
    assert not path.exists()
    watch.twin().watch(torch.ones(4, 3))
    assert not path.exists()
    watch.watch(torch.ones(4, 3), source="me")
    pickle.loads(pickle.dumps(watch)).watch(torch.ones(1, 3))
    assert flags.log(path) == [
        flags.Flags(time=moment(7.5), source="me", queries=4, flagged=2),
        flags.Flags(time=moment(7.5), source="unknown", queries=1, flagged=1),
    ]
    with open(path, "a") as file:
        file.write('{"time"')
    assert len(flags.log(path)) == 2


GOOD = {"time": "2026-01-01T00:00:00+00:00", "source": "me", "queries": 2, "flagged": 1}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{}", "must hold time, source, queries, flagged"),
        ("[1]", "must hold time"),
        ("no", "Expecting value"),
        (json.dumps(GOOD | {"time": "soon"}), "soon"),
        (json.dumps(GOOD | {"time": 3}), "must be str"),
        (json.dumps(GOOD | {"time": "2026-01-01"}), "must tell its zone"),
        (json.dumps(GOOD | {"flagged": 3}), "flagged"),
        (json.dumps(GOOD | {"queries": math.inf}), "queries"),
        (json.dumps(GOOD | {"source": ""}), "source"),
        (b"\xff", "utf-8"),
    ],
)
def test_a_line_that_is_no_flag_is_told(tmp_path, line, told):
    path = tmp_path / "flags.jsonl"
    text = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + text + b"\n")
    with pytest.raises(ValueError, match="line 2, is none of a sentinel's flags") as error:
        flags.log(path)
    assert told in str(error.value)


@pytest.mark.parametrize("where", [".", "nowhere/flags.jsonl"])
def test_a_log_must_have_a_place(tmp_path, where):
    with pytest.raises(ValueError, match="log must be a file in a folder that is there"):
        watching(tmp_path / where)
