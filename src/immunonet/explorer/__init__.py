"""The explorer: a page on which anybody draws an antigen, attacks it, and watches the response."""

from immunonet.explorer.app import build
from immunonet.explorer.serving import launch, mount

__all__ = ["build", "launch", "mount"]
