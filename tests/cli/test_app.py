"""How the command starts where its packages are missing."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

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
# Each in a process of its own, but all with the torch that is imported once; to take that down takes as long again.
EACH = """
import json, os, sys, torch, traceback
for missing, code, _ in json.loads(sys.argv[1]):
    if not os.fork():
        sys.modules[missing] = None
        os.dup2(1, 2)
        try:
            exec(code)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(f"exit {status}", flush=True)
"""


def test_without_a_package_it_is_told_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(WITHOUT)], capture_output=True, text=True, check=True
    )  # fmt: skip
    told = [part.strip().splitlines() for part in re.split(r"exit \d+\n", done.stdout)[:-1]]
    extras = {extra: f"pip install 'immunonet[{extra}]'" for extra in ("cli", "report", "memory")}
    assert [lines[-1] for lines in told] == [text.format(**extras) for *_, text in WITHOUT]
    assert [len(lines) for lines in told[:3]] == [1, 1, 1]
    assert re.findall(r"exit (\d+)", done.stdout) == ["2"] * 3 + ["1"] * 4


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
