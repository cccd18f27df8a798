"""What is told and seen of an antigen, as HTML: pictures, bars and curves with words beside them.

Text and lines take the page's colours, so that they are read in the dark as well, and nothing is fetched. Blue and
orange are Okabe and Ito's; what they tell is told by words, dashes or shapes too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from torch import Tensor

from immunonet._check import Bounds
from immunonet.explorer.story import Story
from immunonet.explorer.watching import Seen
from immunonet.report.images import difference_array, image_array, png_uri
from immunonet.response import Trace

# Classes that a generation's votes are shown of: the others have few.
SHOWN = 10


def antigen(x: Tensor, *, bounds: Bounds, label: str | None) -> str:
    """Return the picture of an antigen `x` `(1, *S)`, with its `label` if it is known."""
    return _render("antigen", picture=_picture(x[0], bounds), label=label)


def story(told: Story, *, names: Sequence[str], bounds: Bounds) -> str:
    """Return all panels about an antigen; `names`: one per class."""
    difference, largest = difference_array(told.clean[0], told.met[0])
    healed = None if told.healed is None else _picture(told.healed[0], bounds)
    return _render(
        "story",
        told=told,
        names=names,
        clean=_picture(told.clean[0], bounds),
        met=_picture(told.met[0], bounds),
        difference=png_uri(difference),
        largest=largest,
        healed=healed,
        curves=[(layer, generations(trace, names)) for layer, trace in told.curves if len(trace.votes) > 1],
        cell=lambda image: _picture(image, bounds),
    )


def generations(trace: Trace, names: Sequence[str]) -> dict[str, Any]:
    """Return what the animation of one antigen's generations shows, as its script reads it.

    `names` of the classes that are shown, in their order; `frames` `[G + 1][classes]`, shares of votes; `entropy`
    `[G + 1]` in nats, and its `points`, x from 0 to 100 and y from 0, the largest entropy there can be, to 40.
    """
    votes, entropy = trace.votes[:, 0].float().cpu(), trace.entropy[:, 0].float().cpu()
    shown = votes.amax(0).argsort(descending=True, stable=True)[:SHOWN].sort().values
    most = math.log(votes.shape[1])
    found: dict[str, Any] = {
        "names": [names[label] for label in shown.tolist()],
        "frames": votes[:, shown].tolist(),
        "entropy": entropy.tolist(),
        "points": points(entropy, most),
    }
    return found | {"json": json.dumps({key: found[key] for key in ("frames", "entropy")})}


def points(values: Tensor, most: float, *, first: int = 0, last: int | None = None) -> str:
    """Return a curve `(n,)` as the points of an SVG polyline: x from 0 to 100, y from 40 at 0 to 0 at `most`.

    `first`, `last`: the places of the whole curve that lie at 0 and at 100, by default those of its own. What is
    infinite is left out.
    """
    end = len(values) - 1 if last is None else last
    width = max(1, end - first)
    rows = enumerate(values.tolist())
    return " ".join(
        f"{100 * (i - first) / width:.2f},{40 - 40 * min(1.0, v / most):.2f}" for i, v in rows if math.isfinite(v)
    )


def watch(seen: Seen, *, queries: int) -> str:
    """Return the sentinel's curve: scores of honest and of the attacker's queries, the threshold, and flags.

    `queries`: how many the attacker has, for which there is room from the beginning.
    """
    scores = torch.tensor([*seen.honest, *seen.scores])
    finite = scores[scores.isfinite()]
    most = 1.1 * max([seen.threshold, 1e-9, *finite.tolist()])
    n, last = len(seen.honest), len(seen.honest) + (len(seen.scores) if seen.over else max(queries, len(seen.scores)))
    theirs = torch.cat([torch.full((n,), torch.inf), scores[n:]])
    flags = [n + i for i, score in enumerate(seen.scores) if score < seen.threshold]
    return _render(
        "watch",
        seen=seen,
        honest=points(scores[:n], most, last=last - 1),
        scores=points(theirs, most, last=last - 1),
        line=40 - 40 * seen.threshold / most,
        flags=[100 * place / max(1, last - 1) for place in flags],
        start=100 * n / max(1, last - 1),
        most=most,
        last=last - n,
    )


def _picture(image: Tensor, bounds: Bounds) -> str:
    return png_uri(image_array(image, bounds=bounds))


def _render(name: str, **content: Any) -> str:
    return _ENVIRONMENT.get_template(f"{name}.html.j2").render(**content)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("immunonet.explorer"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
