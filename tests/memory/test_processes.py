"""Several processes write one memory at once, and some are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from memories import bound, remember

from immunonet import Memory

WRITER = """
import sys
sys.path.insert(0, {here!r})
from memories import bound, remember
from immunonet import Memory
from immunonet.memory import store
store.COMPACTED = 16
memory = bound(Memory({folder!r}))
print("ready", flush=True)
for i in range({n}):
    ids = remember(memory, 2, source=sys.argv[1])
    if i % 5 == 4:
        memory.confirm(ids[:1], [2])
    print(*ids, flush=True)
"""


def writer(folder: Path, source: str, n: int) -> subprocess.Popen[str]:
    code = WRITER.format(here=str(Path(__file__).parent), folder=str(folder), n=n)
    return subprocess.Popen([sys.executable, "-c", code, source], stdout=subprocess.PIPE, text=True)


def told(one: subprocess.Popen[str]) -> list[str]:
    """The ids of whole lines that a writer left: what was acknowledged."""
    with one:
        assert one.stdout is not None
        out = one.stdout.read()
    return out[: out.rfind("\n") + 1].split()


def test_what_was_acknowledged_outlives_kills(tmp_path):
    folder = tmp_path / "store"
    started = [writer(folder, "killed", 10_000), writer(folder, "also killed", 10_000), writer(folder, "done", 20)]
    try:
        for one in started:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in started[:2]:
            time.sleep(0.5)
            one.kill()
        outs = [told(one) for one in started]
    finally:
        for one in started:
            one.kill()
    assert len(outs[2]) == 40
    assert all(len(out) > 4 for out in outs)
    memory = Memory(folder)
    held = {name: counts["entries"] for name, counts in memory.stats()["sources"].items()}
    for source, ids in zip(("killed", "also killed"), outs, strict=False):
        # What was written but not told yet may be there as well.
        assert len(ids) <= held[source] <= len(ids) + 2
    assert memory.stats()["sources"]["done"] == {"entries": 40, "confirmed": 4, "contradicted": 4}
    memory.confirm([one for ids in outs for one in ids], [1] * sum(map(len, outs)))
    remember(memory)
    memory.compact(keep=3)
    assert len(memory) == sum(held.values()) + 1


def test_a_forked_process_is_told_to_open_its_own(tmp_path, monkeypatch):
    memory = bound(Memory(tmp_path))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="opened before this process was forked"):
        len(memory)


DISK = """
import subprocess, sys
sys.path.insert(0, {here!r})
import pytest, torch
from memories import bound, remember
from immunonet import Memory

def mount(*words):
    if subprocess.run(["mount", *words], capture_output=True).returncode:
        sys.exit(77)

home = {home!r}
mount("-t", "tmpfs", "-o", "size=300k", "none", home)
memory = bound(Memory(home + "/s"))
ids = []
with pytest.raises(OSError, match="could not be written .*No space left"):
    while True:
        ids += remember(memory, 5, at=100.0 * len(ids))
assert len(Memory(home + "/s")) == len(ids) > 0
mount("-o", "remount,size=4m", home)
ids += remember(memory, at=-100.0)
assert memory.recall(torch.tensor([[-100.0, 0, 0, 0], [0, 0, 0, 0]])).hit.all()
mount("-o", "remount,ro", home)
assert Memory(home + "/s").recall(torch.zeros(1, 4)).hit.all()
for change in (remember, lambda m: m.forget(ids[:1]), lambda m: m.confirm(ids[:1], 1), lambda m: m.tag("x")):
    with pytest.raises(PermissionError, match="read-only"):
        change(Memory(home + "/s"))
with pytest.raises(PermissionError, match="cannot be made: the folder is read-only"):
    bound(Memory(home + "/t"))
assert len(Memory(home + "/s")) == len(ids)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="who is not root mounts nothing")
def test_a_full_and_a_read_only_disk(tmp_path):
    code = DISK.format(here=str(Path(__file__).parent), home=str(tmp_path))
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("nothing may be mounted here")
    assert done.returncode == 0, done.stderr
