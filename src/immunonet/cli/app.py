"""The `immunonet` command: its subcommands, and how it ends when something goes wrong."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Sequence

import typer

from immunonet._progress import TAKEN
from immunonet.cli.common import listen, note

# An example of each command, for its help.
_COMMANDS = {
    "demo": "immunonet demo --out demo",
    "train": "immunonet train mnist --model mnist-small --adversarial pgd --threat linf=.3",
    "connect": "immunonet connect A.safetensors B.safetensors --dataset mnist --threat linf=.3 --threat l1=10",
    "fit": 'immunonet fit --dataset mnist --weights weights/mnist.safetensors --defence "rails input"',
    "predict": "immunonet predict picture.png --weights weights/mnist.safetensors",
    "evaluate": "immunonet evaluate --dataset mnist --weights weights/mnist.safetensors --protocol quick",
    "reproduce": "immunonet reproduce mnist --report",
    "memory": "immunonet memory stats DIR",
    "serve": "immunonet serve defence --weights weights/mnist.safetensors --memory memory",
    "doctor": "immunonet doctor --json doctor.json",
}

app = typer.Typer(
    name="immunonet",
    help="Classify through an adaptive immune response, and attack, study and remember it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, _example in _COMMANDS.items():
    _found = getattr(importlib.import_module(f"immunonet.cli.{_name}"), _name)
    if isinstance(_found, typer.Typer):
        app.add_typer(_found, name=_name, epilog=f"Example: {_example}")
    else:
        app.command(_name, epilog=f"Example: {_example}")(_found)


# To read the options of all commands from their signatures takes a fifth of a second.
_command = functools.cache(typer.main.get_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a user's mistake in one line on stderr, 130 after Ctrl-C.

    With $IMMUNONET_DEBUG set, errors keep their traceback.
    """
    listen()
    shown = TAKEN.set(True)
    try:
        _command(app)(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("IMMUNONET_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        note(f"immunonet: {message}", style="red")
        sys.exit(2)
    finally:
        TAKEN.reset(shown)
