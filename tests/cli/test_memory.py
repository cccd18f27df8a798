"""`immunonet memory`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

from memories import bound, remember

from immunonet import Memory


@pytest.fixture
def store(tmp_path):
    memory = bound(Memory(tmp_path / "store"))
    ids = remember(memory, 3, source="me") + remember(memory, 2, source="you", label=1)
    memory.tag("before")
    memory.confirm(ids[:1], [2])
    return memory


def test_stats_and_versions(command, store, tmp_path):
    code, out, _ = command("memory", "stats", "store", "--json", "s.json")
    assert code == 0
    assert "entries: 5\n" in out
    assert "source me: 3 entries, 1 confirmed, 1 contradicted\n" in out
    (row,) = json.loads((tmp_path / "s.json").read_text())["results"]
    assert (row["entries"], row["labels"]) == (5, [2, 2, 1])
    code, out, _ = command("memory", "versions", "store", "--json", "v.json")
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "1: 0 entries",
        "2: 3 entries",
        "3: 5 entries",
        "4: 5 entries",
    ]
    assert out.splitlines()[2].endswith("(before)")
    assert json.loads((tmp_path / "v.json").read_text())["results"][2]["names"] == ["before"]


def test_forget_rollback_and_export(command, store, tmp_path):
    code, out, _ = command("memory", "forget", "store", "--source", "you")
    assert (code, out) == (0, "2 entries forgotten, 3 left; version 4 is the one before\n")
    code, out, _ = command("memory", "forget", "store", "--until", "2000-01-01")
    assert out.startswith("0 entries forgotten")
    code, out, _ = command("memory", "rollback", "store", "before")
    assert (code, out) == (0, "version 6 holds what before held: 5 entries\n")
    assert command("memory", "rollback", "store", "2")[1] == "version 7 holds what 2 held: 3 entries\n"
    code, out, _ = command("memory", "export", "store", "all.parquet")
    assert (code, out) == (0, "3 entries: all.parquet\n")
    assert (tmp_path / "all.parquet").stat().st_size > 0


def test_page(command, store, tmp_path):
    flag = {"time": "2026-01-01T00:00:00+00:00", "source": "you", "queries": 3, "flagged": 2}
    (tmp_path / "flags.jsonl").write_text(json.dumps(flag) + "\n")
    words = ("store", "--out", "p.html", "--flags", "flags.jsonl", "--json", "p.json")
    assert command("memory", "page", *words)[:2] == (0, "p.html\n")
    (row,) = json.loads((tmp_path / "p.json").read_text())["results"]
    assert sum(row["sources"]["you"]["flagged"]) == 2
    text = (tmp_path / "p.html").read_text()
    assert "Memory store" in text
    assert "Flags of the sentinel" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stats", "nowhere"], "there is no memory in nowhere"),
        (["stats", "."], "is no memory"),
        (["page", "nowhere"], "there is no memory in nowhere"),
        (["page", "store", "--flags", "nowhere"], "nowhere"),
        (["rollback", "store", "99"], "version 99 is not there"),
        (["rollback", "store", "soon"], "there is no tag 'soon'"),
        (["forget", "store"], "forget needs to be told what"),
        (["forget", "store", "--id", "nobody"], "got 'nobody'"),
    ],
)
def test_mistakes_end_in_one_line(command, store, words, told):
    code, out, err = command("memory", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1
    assert not Path("nowhere").exists()
