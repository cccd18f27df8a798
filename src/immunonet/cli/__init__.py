"""The command line.

How a command is added: `cli/<name>.py` holds one plain function `<name>` with typer annotations, whose
docstring is its help text; `cli/app.py` lists it. Options that several commands share, and the helpers that
find data and models and write JSON, are in `cli/common.py`. A command raises ValueError, TypeError, OSError
or ImportError with a message that says what to do: `main` prints it as one line and exits with code 2. It
never prints a traceback for a user's mistake.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line as `app.main` does; where its packages are missing, say which extra brings them."""
    try:
        from immunonet.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "immunonet"):
            raise
        print(f"immunonet: the command needs {missing}: pip install 'immunonet[cli]'", file=sys.stderr)
        sys.exit(2)
    app.main(arguments)
