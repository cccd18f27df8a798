"""Several processes write one memory at once, and some are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from memories import bound, remember

from immunonet import Memory

# It forks what it is told to run, with what takes long to import but for LanceDB, which may not survive that.
NURSERY = """
import contextlib, json, os, sys, traceback
sys.path.insert(0, {here!r})
import memories
with contextlib.suppress(ImportError):
    import lance_namespace, pyarrow.dataset

def run(code, out):
    for file, path in ((1, out), (2, out + ".err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), file)
    try:
        exec(code, {{"__name__": "a process"}})
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    told = json.loads(line)
    if isinstance(told, int):
        print(os.waitstatus_to_exitcode(os.waitpid(told, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        os._exit(run(*told))
"""


class Nursery:
    """Processes of their own, which have not long to start."""

    def __init__(self) -> None:
        code = NURSERY.format(here=str(Path(__file__).parent))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def asked(self, what: object) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, code: str, out: Path) -> int:
        """Return the id of a process that runs code and writes what it says to a file, errors beside it."""
        return self.asked([code, str(out)])

    def ended(self, pid: int) -> int:
        """Return the exit code of a process when it has ended."""
        return self.asked(pid)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.process.communicate()


WRITER = """
from memories import bound, remember
from immunonet import Memory
from immunonet.memory import writing
writing.COMPACTED = 16
memory = bound(Memory({folder!r}))
for i in range({n}):
    ids = remember(memory, 2, source={source!r})
    if i % 5 == 4:
        memory.confirm(ids[:1], [2])
    print(*ids, flush=True)
"""


def told(out: Path) -> list[str]:
    """The ids of whole lines that a writer left: what was acknowledged."""
    text = out.read_text() if out.exists() else ""
    return text[: text.rfind("\n") + 1].split()


def test_what_was_acknowledged_outlives_kills(tmp_path, nursery):
    folder = tmp_path / "store"
    writers = {"killed": 10_000, "also killed": 10_000, "done": 15}
    outs = [tmp_path / source for source in writers]
    started = [
        nursery.start(WRITER.format(folder=str(folder), source=source, n=n), out)
        for (source, n), out in zip(writers.items(), outs, strict=True)
    ]
    try:
        end = time.monotonic() + 100
        for least, pid, out in zip((8, 20), started, outs, strict=False):
            while len(told(out)) < least:
                assert time.monotonic() < end
                time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
        codes = [nursery.ended(started[2])]
    finally:
        for pid in started[:2]:
            os.kill(pid, signal.SIGKILL)
        codes += [nursery.ended(pid) for pid in started[:2]]
    assert codes == [0, -signal.SIGKILL, -signal.SIGKILL]
    outs = [told(out) for out in outs]
    assert len(outs[2]) == 30
    memory = Memory(folder)
    held = {name: counts["entries"] for name, counts in memory.stats()["sources"].items()}
    for source, ids in zip(("killed", "also killed"), outs, strict=False):
        # What was written but not told yet may be there as well.
        assert len(ids) <= held[source] <= len(ids) + 2
    assert memory.stats()["sources"]["done"] == {"entries": 30, "confirmed": 3, "contradicted": 3}
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
import ctypes, subprocess, sys
import pytest, torch
from memories import bound, remember
from immunonet import Memory

def mount(*words):
    if subprocess.run(["mount", *words], capture_output=True).returncode:
        sys.exit(77)

# A namespace of its own: nobody else sees what it mounts.
if ctypes.CDLL(None).unshare(0x20000):
    sys.exit(77)
mount("--make-rprivate", "/")
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
def test_a_full_and_a_read_only_disk(tmp_path, nursery):
    home, out = tmp_path / "disk", tmp_path / "out"
    home.mkdir()
    code = nursery.ended(nursery.start(DISK.format(home=str(home)), out))
    if code == 77:
        pytest.skip("nothing may be mounted here")
    assert code == 0, Path(f"{out}.err").read_text()
