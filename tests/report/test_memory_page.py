"""The page of a memory: what it shows of a record, escaped, balanced, complete in itself."""

from __future__ import annotations

import re

from test_report_html import read

from immunonet.report import memory as module

TIMES = [f"2026-01-0{day}T12:00:00+00:00" for day in range(1, 6)]
STATS = {
    "entries": 5, "version": 5, "keep": "cells", "model": "abc", "radius": 0.25, "confirmed": 3, "contradicted": 1,
    "foreign": 0, "trusted": 4, "first": TIMES[0], "last": TIMES[4], "labels": [2, 3],
}  # fmt: skip


def version(number, entries, change, *names):
    return {"number": number, "time": TIMES[number - 1], "entries": entries, "change": change, "names": list(names)}


def record(**changes):
    sources = {
        "a<b": {"written": [3, 0, 1, 0], "contradicting": [1, 0, 0, 0], "flagged": [0, 0, 0, 0]},
        "c": {"written": [0, 0, 0, 1], "contradicting": [0, 0, 0, 0], "flagged": [0, 7, 0, 0]},
    }
    return {
        "stats": STATS | {"sources": {"a<b": {}, "c": {}}}, "from": TIMES[0], "to": TIMES[4], "parts": 4,
        "versions": [version(1, 0, None), version(2, 4, 4, "good & old"), version(3, 8, 4), version(4, 5, -3)],
        "sources": sources,
    } | changes  # fmt: skip


def test_the_page_shows_who_wrote_when_versions_and_flags():
    text = module.page(record(), title="Memory m&m", command="immunonet memory page m")
    told = read(text)
    assert not told.open
    assert "script" not in {tag for tag, _ in told.tags}
    assert not [v for _, held in told.tags for k, v in held.items() if k in ("src", "href")]
    assert "5 entries of 2 sources, written from 2026-01-01 12:00:00" in told.text
    assert "4 entries, <b>1 contradicted</b>; at most 3 in a bar" in text
    assert "7 flagged" in told.text
    assert "A bar is 1 days" in told.text
    assert "a&lt;b" in text
    assert "good &amp; old" in text
    # Of version 2, a third of the way; of 4, where 3 went.
    assert 'd="M0,100H0.0V100.0H333.3V50.0H666.7V0.0H1000.0V37.5H1000"' in text
    assert 'class="named" d="M333.3,0V100"' in text
    assert 'class="gone" d="M1000.0,100V88"' in text
    bars = [held for tag, held in told.tags if tag == "rect"]
    assert [(one["class"], one["x"]) for one in bars] == [
        ("up", "0.08"), ("up", "2.08"), ("down", "0.08"), ("up", "3.08"), ("up", "1.08"),
    ]  # fmt: skip
    assert [one["height"] for one in bars] == ["100.0", "33.3", "16.0", "100.0", "100.0"]


def test_a_memory_that_holds_nothing_has_a_page():
    empty = STATS | {"entries": 0, "first": None, "last": None, "sources": {}}
    text = module.page(record(stats=empty, sources={}, versions=[version(1, 0, None)]), title="Memory m")
    assert "It holds nothing now" in text
    assert 'id="flags"' not in text
    assert not read(text).open


def test_many_sources_are_few_strips_that_lose_nothing():
    sources = {f"s{i}": {"written": [i + 1, 0], "contradicting": [0, i % 2], "flagged": [0, 0]} for i in range(13)}
    text = module.page(record(sources=sources), title="Memory m")
    assert re.findall(r'<div class="name">([^<]*)<', text) == [*(f"s{i}" for i in range(12, 2, -1)), "3 other sources"]
    assert "6 entries, <b>1 contradicted</b>" in text
