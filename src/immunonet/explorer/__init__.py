"""The explorer: a page on which anybody draws an antigen, attacks it, and watches the response."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from immunonet.explorer.app import build
    from immunonet.explorer.serving import launch, mount

# Gradio asks its makers for news unless it is told before it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

__all__ = ["build", "launch", "mount"]

_PLACES = {"build": "app", "launch": "serving", "mount": "serving"}


def __getattr__(name: str) -> Any:
    """Return what is asked for, from a module that takes seconds to import: what it shows needs none of that."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
