"""The real service: `immunonet serve` with its replicas on Ray Serve, asked over sockets, killed, reloaded, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from immunonet import Memory, zoo
from immunonet.cli import main
from immunonet.client import Client

PATIENCE = 120
# Ray's own.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    url: str
    folder: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def children(pid: int) -> dict[int, str]:
    """Return the processes that descend from one, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            found[int(path.name)] = int(fields[1]), (path / "cmdline").read_text()
        except (OSError, ValueError):
            continue
    below, new = {}, {pid}
    while new:
        new = {child for child, (parent, _) in found.items() if parent in new}
        below |= {child: found[child][1] for child in new}
    return below


def alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_text())
    except OSError:
        return False


def refit(folder: Path, defence: str) -> None:
    fit = ["fit", "--dataset", "digits", "--weights", str(folder / "net.safetensors"), "--defence", defence]
    with pytest.raises(SystemExit) as ended:
        main([*fit, "--out", str(folder / "defence")])
    assert ended.value.code == 0


def of_replicas(running: Running) -> list[int]:
    return sorted(pid for pid, line in children(running.process.pid).items() if "ServeReplica" in line)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    zoo.save_weights(zoo.build("digits", classes=10, seed=0), folder / "net.safetensors")
    known = ["--weights", str(folder / "net.safetensors")]
    refit(folder, "rails input population=50 generations=1")
    port = free_port()
    command = [
        sys.executable, "-c", "from immunonet.cli import main; main()", "serve", str(folder / "defence"), *known,
        "--memory", str(folder / "memory"), "--port", str(port), "--threads", "1",
    ]  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(url, process, folder)
        yield Running(process, url, folder)
    finally:
        process.kill()
        process.wait()


def wait(url: str, process: subprocess.Popen[str], folder: Path) -> None:
    # One client: each reads all certificates of this machine.
    with httpx.Client() as client:
        for _ in range(4 * PATIENCE):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
    raise AssertionError((folder / "log").read_text())


def asked(url: str, value: float) -> httpx.Response:
    return httpx.post(f"{url}/v1/respond", json={"inputs": [[[[value] * 8] * 8]]}, timeout=PATIENCE)


def explored(url: str) -> None:
    """Ask the explorer what it asks itself when another source is chosen, and wait for the answer."""
    config = httpx.get(f"{url}/config").json()
    first, *_ = config["dependencies"]
    (chosen,) = (one["props"] for one in config["components"] if [one["id"]] == first["inputs"])
    sent = {"data": [chosen["value"]], "fn_index": first["id"], "session_hash": "real"}
    assert httpx.post(f"{url}/gradio_api/queue/join", json=sent).status_code == 200
    with httpx.stream("GET", f"{url}/gradio_api/queue/data", params={"session_hash": "real"}, timeout=30) as events:
        for line in events.iter_lines():
            if "process_completed" in line:
                assert '"success":true' in line.replace(" ", "")
                return
    raise AssertionError("the explorer does not answer")


def test_it_answers_remembers_survives_a_killed_replica_reloads_and_ends(running: Running) -> None:
    first = asked(running.url, 0.5).json()["results"][0]
    with Client(running.url) as client:
        client.feedback(first["id"], 3)
        assert client.memory()["confirmed"] == 1
    # Replicas look at what others wrote once a second.
    time.sleep(1.1)
    again = asked(running.url, 0.5).json()["results"][0]
    assert (again["id"], again["label"], again["recalled"]) == (first["id"], 3, True)

    explored(running.url)

    replicas = of_replicas(running)
    assert replicas
    for pid in replicas:
        os.kill(pid, signal.SIGKILL)
    found = asked(running.url, 0.5)
    assert found.json()["results"][0]["label"] == 3, found.text

    # Replicas read the defence again, and stay; what they would refuse changes nothing.
    replicas = of_replicas(running)
    assert httpx.post(f"{running.url}/v1/reload", timeout=PATIENCE).json() == {"defence": "rails"}
    assert of_replicas(running) == replicas
    refit(running.folder, "rails conv1 population=50 generations=1")
    refused = httpx.post(f"{running.url}/v1/reload", timeout=PATIENCE)
    assert (refused.status_code, "stays the one before" in refused.text) == (409, True), refused.text
    assert asked(running.url, 0.25).status_code == 200
    assert of_replicas(running) == replicas

    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=False).stdout.splitlines()
    own = {running.process.pid, *children(running.process.pid)}
    for line in listening:
        if any(f"pid={pid}," in line for pid in own):
            assert line.split()[3].startswith(("127.", "[::1]", "[::ffff:127.")), line

    running.process.send_signal(signal.SIGTERM)
    running.process.wait(PATIENCE)
    # Ray's processes end with it.
    end = time.monotonic() + PATIENCE
    while any(map(alive, own)):
        assert time.monotonic() < end
        time.sleep(0.1)
    # What was acknowledged is there.
    assert [one["id"] in str(Memory(running.folder / "memory").columns("id")) for one in (first,)] == [True]


def test_what_cannot_be_served_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["serve", str(tmp_path)], "has no fit.json"),
        (["serve", "--host", "0.0.0.0"], "--token-file"),
        (["serve", "--token-file", str(tmp_path / "none")], "No such file"),
        (["serve", "--replicas", "2-1", "--on-flag", "mark"], "fit.json"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
