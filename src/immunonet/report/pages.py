"""Templates of pages and documents, with what they have in common."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from immunonet.report import tables


# To read one takes as long as to fill many.
@functools.lru_cache(maxsize=16)
def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """Return a template of this package, with filters besides the common ones; HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("immunonet.report"),
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "flat": flat, "share": tables.share}
    environment.filters |= {"title_of": tables.title, "bare": tables.bare} | filters
    environment.globals |= {"head": tables.head, "line": tables.line}
    return environment.get_template(name)


def percent(share: float) -> str:
    """Return a share in percent, without the sign."""
    return f"{100 * share:.1f}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as one level of dotted names and short texts."""
    texts: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            texts |= flat(value, f"{prefix}{key}.")
        else:
            texts[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return texts


def roles(name: str, attack: Mapping[str, Any]) -> set[str]:
    """Return what an attack of a record is for; those of before roles were written down tell it by their names."""
    parts = {"targeted": "targeted", "eot": "eot", "known-seed": "known seed", "direct": "direct"}
    return set(attack.get("roles", (role for part, role in parts.items() if part in name)))
