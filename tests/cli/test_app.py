"""How the command starts where its packages are missing."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click
import pytest
import typer

from immunonet.cli import app


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_without_its_packages_the_command_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from immunonet.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"immunonet: the command needs {missing}: pip install 'immunonet[cli]'\n"


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


@pytest.mark.parametrize(
    ("missing", "extra", "code"),
    [
        ("matplotlib", "report", "import immunonet.report"),
        ("jinja2", "report", "import immunonet.report.evaluation"),
        ("pyarrow", "memory", "from immunonet import Memory; Memory(None)"),
        ("lancedb", "memory", "from immunonet import Memory; Memory('folder')"),
    ],
)
def test_what_an_extra_brings_is_asked_for_by_its_name(missing: str, extra: str, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{missing!r}] = None; {code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = f"ModuleNotFoundError: this needs {missing}: pip install 'immunonet[{extra}]'\n"
    assert done.stderr.endswith(said)
