"""`--sentinel`: who watches what is asked, described as a defence is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from immunonet import data
from immunonet._check import nearest
from immunonet.defences.spec import read
from immunonet.memory.sentinel import Sentinel

GRAMMAR = "SPACE [KEY=VALUE ...], as 'pooled' or 'fc1 neighbours=3 window=2000 false_alarm=.01'"
SETTINGS = ("neighbours", "window", "false_alarm")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Return the space and the settings that a description tells; ValueError names the part that is wrong."""
    space, *rest = text.split() or [""]
    if not space or "=" in space:
        raise ValueError(f"--sentinel must be {GRAMMAR}, got {text!r}")
    settings = dict[str, Any]()
    with _blamed(text):
        for part in rest:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{part!r} must be KEY=VALUE")
            if key not in SETTINGS:
                raise ValueError(f"a sentinel has no setting {key!r}{nearest(key, SETTINGS)}")
            if key in settings:
                raise ValueError(f"{key} is given twice")
            settings[key] = read(value)
        # Wrong values are told before there is a network.
        Sentinel(nn.Identity(), "input", **settings)
    return space, settings


def fitted(text: str, net: nn.Module, images: data.Images) -> Sentinel:
    """Return the sentinel of a description, fitted on images, with a random sample of them as its last queries.

    ValueError for what `parse` refuses, a space that the network does not have, and too few images.
    """
    space, settings = parse(text)
    with _blamed(text):
        found = Sentinel(net, space, **settings).fit(images.x)
    found.take(found.signatures(images.x[data.sample(len(images), found.window)]))
    return found


@contextlib.contextmanager
def _blamed(text: str) -> Iterator[None]:
    """Say in an error which description it is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"--sentinel {text!r}: {error}") from error
