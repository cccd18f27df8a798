"""Packages that an extra brings; what a name such as `package.module:factory` stands for; whose fault a failure is."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

# Where code lies that is not the user's own.
_LIBRARIES = (Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))


def require(module: str, extra: str) -> Any:
    """Return an optional dependency; ImportError says which extra of the package brings what is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"this needs {module.partition('.')[0]}: pip install 'immunonet[{extra}]'"
        raise type(error)(message, name=error.name) from error


def imported(option: str, name: str) -> Callable[..., Any]:
    """Return what `package.module:factory` names; ValueError that names the option if it cannot be imported."""
    module, _, factory = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: the user's own module lies in the working directory
    try:
        return cast(Callable[..., Any], getattr(importlib.import_module(module), factory))
    except Exception as error:  # a module runs when it is imported, and may raise anything
        raise ValueError(f"{option} {name} cannot be imported ({blame(error)}): give package.module:factory") from error


def called(option: str, name: str, *arguments: Any, **settings: Any) -> Any:
    """Return what `package.module:factory` gives for these arguments; ValueError that names the option if it fails."""
    make = imported(option, name)
    try:
        return make(*arguments, **settings)
    except Exception as error:  # whatever a user's function raises
        how = "" if arguments or settings else " (it is called without arguments)"
        raise ValueError(f"{option} {name} failed{how}: {blame(error, make)}") from error


def blame(error: Exception, function: Callable[..., Any] | None = None) -> str:
    """Return an error's kind and message on one line, and the file of the user's code that raised it or was called."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    theirs = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(own) for own in _LIBRARIES)]
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
    if theirs:
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
