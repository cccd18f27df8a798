"""The page that shows an evaluation to a reviewer, from its record. Needs `pip install 'immunonet[report]'`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

from immunonet.report import figures, images, pages


def page(record: Mapping[str, Any], gallery: Iterable[Any] = ()) -> str:
    """Return a self-contained HTML page: verdict, checks and flags, attacks, curves, gallery, checklist, settings.

    `record`: what `Evaluation.to_dict` gives. `gallery`: images that were broken, with `clean` and `adversarial`
    `(*S)`, `truth`, `answer` and `attack`; those of another shape than an image are left out.
    """
    *rows, base, verdict = record["results"]
    worst = [row for row in rows if row["attack"] == "worst-case"]
    return pages.template("evaluation.html.j2").render(
        record=record,
        rows=[row for row in rows if row["attack"] != "worst-case"],
        base=base,
        verdict=verdict,
        aims=_aims(verdict),
        threats=list(zip(worst[::2], worst[1::2], strict=True)),
        clean=[row for row in rows if row["attack"] == "none"],
        broken=Counter(map(_breaker, filter(_is_broken, record["per_example"]))).most_common(),
        plots=[_plots(record, row["norm"] if worst else None) for row in worst[::2] or [verdict]],
        gallery=[_drawn(one, record["threat_model"]["bounds"]) for one in gallery if images.is_image(one.clean.shape)],
        checks=record["checks"],
        flags={flag["name"]: flag for flag in record["flags"]},
        roles=_roles(record["attacks"]),
        noise=[attack for name, attack in record["attacks"].items() if name.split()[-1] == "noise"],
    )


def figure(record: Mapping[str, Any]) -> Figure:
    """Return a figure of a record's accuracies with their intervals: a line per attack, a point per defence.

    The norm of an attack stands before it where there are several. `record`: what `Evaluation.to_dict` gives.
    """
    several = len({row["norm"] for row in record["results"] if row["attack"] != "none"}) > 1
    lines: dict[str, dict[str, Any]] = {}
    for row in record["results"]:
        named = several and row["attack"] != "none"
        lines.setdefault(f"{row['norm']} {row['attack']}" if named else row["attack"], {})[row["defence"]] = row
    return figures.accuracy_points({"": lines})


def _aims(verdict: Mapping[str, Any]) -> list[str]:
    """Return how far each threat of a verdict goes, in words."""
    threats = verdict["settings"].get("threats", {verdict["norm"]: verdict["eps"]})
    return [f"{eps:.4g} ({norm})" for norm, eps in threats.items()]


def _is_broken(image: Mapping[str, Any]) -> bool:
    return bool(image["worst"] <= 0.5)


def _breaker(image: Mapping[str, Any]) -> str:
    """Return the attack that broke an image, its norm before it where there are several threats."""
    named = "norm" in image and image["attack"] != "none"
    return f"{image['norm']} {image['attack']}" if named else image["attack"]


def _plots(record: Mapping[str, Any], norm: str | None) -> dict[str, Any]:
    """Return the curves and losses of the attacks in one norm, or of all."""
    own = {
        name: attack for name, attack in record["attacks"].items()
        if norm is None or attack.get("attack", {}).get("norm") == norm
    }  # fmt: skip
    curves = {name: curve for name, curve in record["curves"].items() if name in own}
    losses = {name: attack["losses"] for name, attack in own.items() if len(attack["losses"]) > 2}
    return {
        "norm": norm,
        "curves": figures.svg_uri(figures.accuracy_curves(curves)) if curves else None,
        "losses": figures.svg_uri(figures.loss_curves(losses)) if losses else None,
    }


def _roles(attacks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of attacks by kind and by role."""
    named: dict[str, list[str]] = {}
    for name, attack in attacks.items():
        for role in sorted(pages.roles(name, attack) | {attack["kind"]}):
            named.setdefault(role, []).append(name)
    return named


def _drawn(broken: Any, bounds: Any) -> dict[str, Any]:
    difference, largest = images.difference_array(broken.clean, broken.adversarial)
    clean, attacked = (images.image_array(x, bounds=bounds) for x in (broken.clean, broken.adversarial))
    pixels = {"clean": clean, "adversarial": attacked, "difference": difference}
    told = {name: getattr(broken, name) for name in ("truth", "answer", "attack")}
    return {name: images.png_uri(image) for name, image in pixels.items()} | {"largest": largest} | told
