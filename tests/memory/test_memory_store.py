"""What a memory does with entries and versions: the same in a folder and in RAM."""

from __future__ import annotations

import copy
import datetime
import json
import os
import pickle
import threading
import time

import memories
import pyarrow.parquet as pq
import pytest
import torch
from memories import antigens, bound, remember, response, space

from immunonet import Memory
from immunonet.memory import folder, writing
from immunonet.memory.entries import HOT


@pytest.fixture(params=["ram", "folder"])
def make(request, tmp_path):
    """The function that makes a memory, the same folder each time, that sees at once what others write."""

    def made(**how):
        return bound(Memory(None if request.param == "ram" else tmp_path / "store", refresh=0, **how))

    return made


@pytest.fixture
def memory(make):
    return make()


def labels(memory, *places):
    """What is recalled at places, -1 where nothing is."""
    found = memory.recall(torch.tensor([[place, 0.0, 0.0, 0.0] for place in places]))
    left = iter(found.labels.tolist())
    return [next(left) if hit else -1 for hit in found.hit.tolist()]


def test_a_new_memory_is_empty(memory):
    assert len(memory) == 0
    assert memory.stats()["entries"] == 0
    assert labels(memory, 0.0) == [-1]
    assert [v.entries for v in memory.versions()] == [0]


def test_every_change_is_a_version_that_can_be_brought_back(memory):
    first = memory.version
    a, b = remember(memory, 2, label=1)
    second = memory.version
    memory.confirm([a], [2])
    third = memory.version
    assert memory.forget([b]) == 1
    assert first < second < third < memory.version
    assert labels(memory, 0.0, 10.0) == [2, -1]
    memory.rollback(third)
    assert labels(memory, 0.0, 10.0) == [2, 1]
    memory.rollback(second)
    assert labels(memory, 0.0, 10.0) == [1, 1]
    memory.rollback(first)
    assert (len(memory), labels(memory, 0.0)) == (0, [-1])
    memory.rollback(third)
    assert labels(memory, 0.0, 10.0) == [2, 1]
    with pytest.raises(ValueError, match="version 999 is not there"):
        memory.rollback(999)


def test_named_versions_outlive_compaction(memory, monkeypatch):
    monkeypatch.setattr(folder, "MARGIN", datetime.timedelta(milliseconds=50))
    rest = 0.1 if memory.folder else 0
    remember(memory)
    time.sleep(rest)
    remember(memory)
    memory.tag("second")
    time.sleep(rest)
    for _ in range(6):
        remember(memory)
    gone = memory.versions()[1].number
    memory.compact(keep=2)
    left = memory.versions()
    assert memory.tags() == {"second": left[0].number}
    assert gone not in [v.number for v in left]
    with pytest.raises(ValueError, match=f"version {gone} is not there"):
        memory.rollback(gone)
    assert len(memory) == 8
    memory.rollback("second")
    assert len(memory) == 2
    memory.untag("second")
    assert memory.tags() == {}
    with pytest.raises(ValueError, match="there is no tag 'second'"):
        memory.rollback("second")
    time.sleep(rest)
    memory.compact(keep=1)
    assert left[0].number not in [v.number for v in memory.versions()]
    assert len(memory) == 2


def test_many_versions_are_compacted_by_themselves(memory, monkeypatch):
    monkeypatch.setattr(writing, "COMPACTED", 8)
    monkeypatch.setattr(writing, "KEPT", 3)
    monkeypatch.setattr(folder, "MARGIN", datetime.timedelta(milliseconds=50))
    for i in range(20):
        remember(memory, at=float(i))
        time.sleep(0.01 if memory.folder else 0)
    assert len(memory) == 20
    assert len(memory.versions()) <= 3 + 8 + 8
    assert labels(memory, 0.0, 19.0) == [0, 0]


def test_what_is_full_lets_go_what_came_first_and_is_not_confirmed(make):
    memory = make(capacity=4)
    a, b, c, d = remember(memory, 4)
    memory.confirm([a], [2])
    remember(memory, at=100.0)
    assert labels(memory, 0.0, 10.0, 20.0, 30.0, 100.0) == [2, -1, 0, 0, 0]
    memory.confirm([c, d], [0, 0])
    remember(memory, at=110.0)
    remember(memory, at=120.0)
    assert labels(memory, 0.0, 20.0, 30.0, 100.0, 110.0, 120.0) == [2, 0, 0, -1, -1, 0]
    remember(memory, 9, at=200.0)
    assert len(memory) == 4
    with pytest.raises(ValueError, match=b[:8]):
        memory.confirm([b], [1])


def test_what_is_confirmed_goes_where_nothing_else_is_left(make):
    memory = make(capacity=2)
    memory.confirm(remember(memory, 2), [0, 1])
    full = make(capacity=1) if memory.folder else None
    if full is not None:
        remember(full, at=50.0)
        assert labels(full, 0.0, 10.0, 50.0) == [-1, 1, -1]


def test_forget_by_source_and_time(memory):
    remember(memory, 2, source="o'hara")
    before = datetime.datetime.now(datetime.UTC)
    time.sleep(0.002)
    remember(memory, 3, source="b")
    assert memory.forget(source="nobody") == 0
    assert memory.forget(source="b", until=before) == 0
    assert memory.forget(until=before) == 2
    assert memory.forget(since=before.timestamp(), source="b") == 3
    assert len(memory) == 0


def test_what_is_erased_is_nowhere(memory, monkeypatch):
    monkeypatch.setattr(folder, "MARGIN", datetime.timedelta(milliseconds=50))
    x = torch.full((1, 5), 12345.678)
    (one,) = memory.remember(response([0, 0, 0, 0]), x, source="somebody")
    memory.tag("named")
    ids = remember(memory, 50, at=10.0)
    files = memory.folder.rglob("*") if memory.folder else []
    needle = x[:, :2].numpy().tobytes()
    assert any(needle in path.read_bytes() for path in files if path.is_file()) == (memory.folder is not None)
    assert memory.forget(source="somebody", erase=True) == 1
    assert memory.tags() == {}
    assert [version.entries for version in memory.versions()] in ([50], [50, 50])
    files = memory.folder.rglob("*") if memory.folder else []
    held = [path for path in files if path.is_file() and (needle in (b := path.read_bytes()) or one.encode() in b)]
    assert not held
    assert labels(memory, 0.0, 10.0, 500.0) == [-1, 0, 0]
    memory.confirm(ids, [1] * 50)
    with pytest.raises(TypeError, match="erase must be True or False"):
        memory.forget(source="x", erase=1)


def test_a_clock_that_runs_backwards_changes_no_order(make, monkeypatch):
    memory = make(capacity=2)
    for seconds in (3e9, 2e9, 1e9):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: int(seconds * 1e9))
        remember(memory, at=seconds / 1e8)
    assert labels(memory, 30.0, 20.0, 10.0) == [-1, 0, 0]
    monkeypatch.undo()
    if memory.folder:
        remember(make(capacity=2), at=1.0)
        assert labels(memory, 20.0, 10.0, 1.0) == [-1, 0, 0]


def test_stats_tell_sources_apart(memory):
    ids = remember(memory, 2, source="a") + remember(memory, source="b", foreign=True)
    memory.confirm(ids[1:], [2, 0])
    found = memory.stats()
    assert (found["entries"], found["confirmed"], found["contradicted"], found["foreign"]) == (3, 2, 1, 1)
    assert found["sources"]["a"] == {"entries": 2, "confirmed": 1, "contradicted": 1}
    assert (found["labels"], found["trusted"]) == ([2, 0, 1], 3)
    assert json.dumps(found)


def test_entries_of_several_sources_are_written_at_once(memory):
    remember(memory, source="z")
    before = memory.version
    remember(memory, 3, at=100, source=["a", "b", "a"])
    assert memory.version == before + 1
    assert {name: one["entries"] for name, one in memory.stats()["sources"].items()} == {"a": 2, "b": 1, "z": 1}
    assert memory.forget(source="a") == 2
    with pytest.raises(ValueError, match="source must be one text, or 2"):
        remember(memory, 2, source=["a"])
    assert len(memory) == 2


def test_export_holds_all(memory, tmp_path):
    (one,) = remember(memory, source="me", note="seen", label=1)
    memory.confirm([one], 2)
    assert memory.export(tmp_path / "out.parquet") == 1
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert (row["id"], row["source"], row["note"], row["label"], row["confirmed"]) == (one, "me", "seen", 1, 2)
    assert torch.frombuffer(bytearray(row["x"]), dtype=torch.float32).tolist() == antigens(1)[0].tolist()
    assert torch.frombuffer(bytearray(row["cells"]), dtype=torch.float32).tolist() == list(range(15))
    assert (row["plasma"], row["cell_labels"], row["cell_origins"]) == (1, [1, 1, 1], [0, 1, 2])
    assert row["signature"] == [0, 0, 0, 0]
    with pytest.raises(OSError, match="Is a directory"):
        memory.export(tmp_path)


def test_signatures_alone_hold_no_image(make, tmp_path):
    memory = make(keep="signatures")
    memory.remember(response([0, 0, 0, 0]), source="me")
    memory.export(tmp_path / "out.parquet")
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {name for name, value in row.items() if value is None} >= {"x", "cells", "cell_labels", "plasma"}


def test_fewer_cells_are_kept(make, tmp_path):
    memory = make(cells=1)
    remember(memory)
    memory.export(tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["cell_origins"].to_pylist() == [[0, 1]]


def test_threads_write_together(memory):
    before, found = memory.version, []
    gate = threading.Barrier(8)

    def write(i):
        gate.wait()
        found.extend(remember(memory, at=100.0 * i))

    with memory._lock:
        workers = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        for worker in workers:
            worker.start()
        while len(memory._writing.waiting) < 8 and all(worker.is_alive() for worker in workers):
            time.sleep(0.001)
    for worker in workers:
        worker.join()
    assert len(set(found)) == len(memory) == 8
    assert memory.version == before + 1


def test_copies(memory):
    remember(memory, label=1)
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert labels(twin, 0.0) == [1]
        remember(twin, at=50.0)
        assert labels(twin, 50.0) == [0]


# What others write.


def test_look_ups_follow_another_writer(tmp_path):
    one = bound(Memory(tmp_path / "s", refresh=0))
    two = bound(Memory(tmp_path / "s"))
    assert labels(one, 0.0) == [-1]
    (a,) = remember(two, label=1)
    assert labels(one, 0.0) == [1]
    two.confirm(a, 2)
    assert labels(one, 0.0) == [2]
    two.rollback(two.version - 1)
    assert labels(one, 0.0) == [1]
    remember(one, at=10.0)
    remember(two, at=20.0)
    assert labels(one, 10.0, 20.0) == [0, 0]
    two.forget([a])
    remember(two, at=30.0)
    assert labels(one, 0.0, 10.0, 20.0, 30.0) == [-1, 0, 0, 0]
    two.compact()
    assert labels(one, 0.0, 10.0, 20.0, 30.0) == [-1, 0, 0, 0]
    assert labels(Memory(tmp_path / "s"), 0.0, 10.0) == [-1, 0]


def test_additions_are_read_once(tmp_path, monkeypatch):
    one, two = (bound(Memory(tmp_path / "s", refresh=0)) for _ in range(2))
    labels(one, 0.0)
    monkeypatch.setattr(one._following, "_anew", None)
    remember(one)
    remember(two, at=10.0)
    remember(one, at=20.0)
    assert labels(one, 0.0, 10.0, 20.0) == [0, 0, 0]


def test_others_are_seen_after_a_while(tmp_path):
    one, two = bound(Memory(tmp_path / "s", refresh=3600)), bound(Memory(tmp_path / "s"))
    labels(one, 0.0)
    remember(two)
    assert labels(one, 0.0) == [-1]
    remember(one, at=10.0)
    assert labels(one, 0.0, 10.0) == [0, 0]


# Bad input.


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1"),
        ({"keep": "images"}, ValueError, "keep must be one of"),
        ({"cells": -1}, ValueError, "cells"),
        ({"credible": 1.5}, ValueError, "credible"),
        ({"refresh": float("nan")}, ValueError, "refresh"),
    ],
)
def test_settings_are_checked(how, error, told):
    with pytest.raises(error, match=told):
        Memory(None, **how)


def test_what_is_wrong_is_refused_whole(memory):
    (a,) = remember(memory)
    before = memory.version
    wrong = [
        (lambda: memory.confirm([a], [3]), "labels must be at least 0 and at most 2, got 3"),
        (lambda: memory.confirm([a, "nobody"], [0, 0]), "ids must be of entries that are there, got 'nobody'"),
        (lambda: memory.confirm([a, a], [0, 0]), "every entry once"),
        (lambda: memory.confirm([a], [0, 1]), "labels must be 1"),
        (lambda: memory.confirm([a], [0.5]), "labels must be an integer"),
        (lambda: memory.confirm([7], [0]), "ids must be ids"),
        (lambda: memory.forget(), "forget needs to be told what"),
        (lambda: memory.forget(["nobody"]), "got 'nobody'"),
        (lambda: memory.forget(since="yesterday"), "since must be a number"),
        (lambda: remember(memory, source="s" * 10_000), "source must have 1 to 256 characters, got 10,000"),
        (lambda: remember(memory, source=""), "source must have"),
        (lambda: remember(memory, source="a\nb"), "source must be printable"),
        (lambda: remember(memory, source=3), "source must be a string"),
        (lambda: remember(memory, note=""), "note must have"),
        (lambda: memory.remember(response([float("nan"), 0, 0, 0]), antigens(1)), "finite signatures"),
        (lambda: memory.remember(response([0, 0, 0, 0]), antigens(2)), "x must hold the 1 antigens"),
        (lambda: memory.remember(response([0, 0, 0, 0]), torch.zeros(1, 4)), r"x must hold the antigens, \(B, 5\)"),
        (lambda: memory.remember(response([0, 0, 0, 0])), "x must hold the antigens"),
        (lambda: memory.recall(torch.full((1, 4), float("nan"))), "signatures must be finite"),
        (lambda: memory.tag("a b"), "name must be of ASCII letters"),
        (lambda: memory.rollback(-1), "version must be at least 0"),
        (lambda: memory.rollback("nobody"), "there is no tag 'nobody'"),
        (lambda: memory.compact(0), "keep must be at least 1"),
    ]
    for call, told in wrong:
        with pytest.raises((ValueError, TypeError), match=told):
            call()
    assert (memory.version, len(memory), labels(memory, 0.0)) == (before, 1, [0])


def test_another_models_memory_is_refused(memory):
    with pytest.raises(ValueError, match="another model's"):
        bound(memory, space("other"))
    with pytest.raises(ValueError, match="features come out differently"):
        memory.bind("a model", [2 * memories.PROBES], space)
    with pytest.raises(ValueError, match="features come out differently"):
        memory.bind("a model", [torch.zeros(2, 4)], space)


def test_a_memory_that_belongs_to_no_model_says_so(tmp_path):
    for memory in (Memory(None), Memory(tmp_path / "new")):
        assert (len(memory), memory.version, memory.versions(), memory.stats()["entries"]) == (0, 0, [], 0)
        for call in (lambda m: remember(m), lambda m: m.confirm(["a"], [0]), lambda m: m.rollback(1)):
            with pytest.raises(ValueError, match="is empty and belongs to no model"):
                call(memory)
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_memory(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no memory: it has no memory.json, but holds 'notes.txt'"):
        Memory(tmp_path)
    with pytest.raises(NotADirectoryError, match="folder must be a folder"):
        Memory(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda told: told | {"format": 9}, "has format 9"),
        (lambda told: told | {"kind": "other"}, "does not describe a memory"),
        (lambda told: told | {"keep": "signatures"}, "was edited"),
        (lambda told: [], "does not describe a memory"),
    ],
)
def test_other_formats_are_refused(tmp_path, change, told):
    bound(Memory(tmp_path))
    path = tmp_path / "memory.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=told):
        Memory(tmp_path)


def test_a_memory_keeps_what_it_was_made_to_keep(tmp_path):
    bound(Memory(tmp_path, keep="signatures"))
    assert Memory(tmp_path).keep == "signatures"
    with pytest.raises(ValueError, match="keep must be 'signatures'"):
        Memory(tmp_path, keep="cells")


def test_truncated_files_are_told(tmp_path):
    memory = bound(Memory(tmp_path / "s"))
    remember(memory, 50)
    (data,) = (tmp_path / "s").glob("entries-*.lance/data/*.lance")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"could not be read .*put them back from a copy"):
        Memory(tmp_path / "s").stats()
    data.write_bytes(whole)
    assert Memory(tmp_path / "s").stats()["entries"] == 50
    for path in (tmp_path / "s").glob("space-*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or edited"):
        Memory(tmp_path / "s")


def test_a_table_that_is_gone_is_told(tmp_path):
    bound(Memory(tmp_path / "s"))
    (table,) = (tmp_path / "s").glob("entries-*")
    table.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="could not be opened"):
        Memory(tmp_path / "s")


def test_a_process_that_died_while_making_one_stands_in_nobodys_way(tmp_path):
    (tmp_path / ".123").write_text("half")
    (tmp_path / "space-0.safetensors").write_text("half")
    assert len(bound(Memory(tmp_path))) == 0


def test_many_make_one(tmp_path):
    made = [Memory(tmp_path) for _ in range(4)]
    workers = [threading.Thread(target=bound, args=(memory,)) for memory in made]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    remember(made[0])
    assert [len(memory) for memory in made] == [1] * 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_answers_and_takes_nothing(tmp_path):
    memory = bound(Memory(tmp_path / "s"))
    remember(memory)
    paths = [tmp_path / "s", *(tmp_path / "s").rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert labels(Memory(tmp_path / "s"), 0.0) == [0]
        with pytest.raises(PermissionError, match="read-only"):
            remember(Memory(tmp_path / "s"))
    finally:
        for path in paths:
            path.chmod(0o755)


def test_a_write_that_fails_is_told_to_all_who_waited(memory, monkeypatch):
    def full(_rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory._backend, "append", full)
    with pytest.raises(OSError, match="No space left"):
        remember(memory)
    monkeypatch.undo()
    assert len(memory) == 0
    remember(memory)
    assert labels(memory, 0.0) == [0]


def test_hot_columns_are_columns():
    from immunonet.memory.entries import schema

    assert set(HOT) <= set(schema(space()).names)
