"""How the command starts where its packages are missing."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from typing import Any

import click
import pytest
import typer

from immunonet.cli import app

# What is missing, what is run without it, and what is told.
WITHOUT = [
    *(
        (name, "from immunonet.cli import main; main(['--help'])", f"immunonet: the command needs {name}: {{cli}}")
        for name in ("typer", "rich", "matplotlib")
    ),
    ("matplotlib", "import immunonet.report", "ModuleNotFoundError: this needs matplotlib: {report}"),
    ("jinja2", "import immunonet.report.evaluation", "ModuleNotFoundError: this needs jinja2: {report}"),
    ("pyarrow", "from immunonet import Memory; Memory(None)", "ModuleNotFoundError: this needs pyarrow: {memory}"),
    ("lancedb", "from immunonet import Memory; Memory('folder')", "ModuleNotFoundError: this needs lancedb: {memory}"),
]
# What the package needs where no extra is installed.
OPTIONAL = (
    "typer", "rich", "click", "jinja2", "matplotlib", "ray", "pydantic", "optuna", "datasets", "pyarrow", "PIL",
    "sklearn", "pandas", "scipy", "faiss", "torchvision", "lancedb", "gradio", "fastapi", "uvicorn",
)  # fmt: skip
REPORTS = "import immunonet.report; print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
CLUSTER = "import immunonet.evaluation.cluster; print('ray' in sys.modules)"
# Each in a process of its own, but all with the torch that is imported once, and with the package, which brings in
# nothing that may be missing; to take that down takes as long again.
EACH = """
import json, os, sys, traceback
import numpy, safetensors.torch, torch

before = set(sys.modules)
import immunonet

print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}), flush=True)
for missing, code in json.loads(sys.argv[1]):
    if not os.fork():
        sys.modules |= {missing: None} if missing else {}
        os.dup2(1, 2)
        try:
            exec(code)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
        else:
            code = 0
        sys.stdout.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(f"exit {status}", flush=True)
"""


@pytest.fixture(scope="module")
def started() -> tuple[list[list[str]], list[int]]:
    """What a process tells that imports the package, then others from there on, line by line, and their exit codes."""
    runs = [("", REPORTS), ("", CLUSTER), *(run for *run, _ in WITHOUT)]
    done = subprocess.run([sys.executable, "-c", EACH, json.dumps(runs)], capture_output=True, text=True, check=True)
    first, rest = done.stdout.split("\n", 1)
    told = [part.strip().splitlines() for part in re.split(r"exit \d+\n", rest)[:-1]]
    return [[first], *told], [int(code) for code in re.findall(r"exit (\d+)", rest)]


def test_the_import_of_the_package_brings_in_the_core_alone_and_reports_no_pyplot(started: Any) -> None:
    """What torch itself imports is its own affair."""
    ((core,), *told), codes = started
    assert "immunonet" in core.split()
    assert not set(core.split()) & set(OPTIONAL)
    assert told[:2] == [["True False"], ["False"]]
    assert codes[:2] == [0, 0]


def test_without_a_package_it_is_told_what_to_install(started: Any) -> None:
    (_, _, _, *told), (_, _, *codes) = started
    extras = {extra: f"pip install 'immunonet[{extra}]'" for extra in ("cli", "report", "memory")}
    assert [lines[-1] for lines in told] == [text.format(**extras) for *_, text in WITHOUT]
    assert [len(lines) for lines in told[:3]] == [1, 1, 1]
    assert codes == [2] * 3 + [1] * 4


@pytest.mark.parametrize("name", app._COMMANDS)
def test_the_help_of_a_command_ends_with_an_example_that_can_be_read(command, name: str) -> None:
    code, out, _ = command(name, "--help")
    example = app._COMMANDS[name]
    assert code == 0
    assert out.split()[-len(example.split()) :] == example.split()
    read = typer.main.get_command(app.app)
    words = shlex.split(example)[1:]
    while isinstance(read, click.Group):
        read = read.commands[words.pop(0)]
    read.make_context(name, words)


def test_shells_can_be_taught_to_complete(command) -> None:
    assert "--install-completion" in command("--help")[1]


def test_the_package_is_run_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["immunonet", "fit", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("immunonet", run_name="__main__")
    assert ended.value.code == 0
    assert "--defence" in capsys.readouterr().out
