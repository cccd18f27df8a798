"""The command line.

How a command is added: `cli/<name>.py` holds one plain function `<name>` with typer annotations, whose
docstring is its help text; `cli/app.py` lists it. Options that several commands share, and the helpers that
find data and models and write JSON, are in `cli/common.py`. A command raises ValueError, TypeError, OSError
or ImportError with a message that says what to do: `main` prints it as one line and exits with code 2. It
never prints a traceback for a user's mistake.
"""

from immunonet.cli.app import app, main

__all__ = ["app", "main"]
