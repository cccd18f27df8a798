"""The page that shows an evaluation to a reviewer, from its record. Needs `pip install 'immunonet[report]'`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from immunonet.report import figures, images, pages


def page(record: Mapping[str, Any], gallery: Iterable[Any] = ()) -> str:
    """Return a self-contained HTML page: verdict, checks and flags, attacks, curves, gallery, checklist, settings.

    `record`: what `Evaluation.to_dict` gives. `gallery`: images that were broken, with `clean` and `adversarial`
    `(*S)`, `truth`, `answer` and `attack`; those of another shape than an image are left out.
    """
    *rows, base, verdict = record["results"]
    losses = {name: attack["losses"] for name, attack in record["attacks"].items() if len(attack["losses"]) > 2}
    return pages.template("evaluation.html.j2").render(
        record=record,
        rows=rows,
        base=base,
        verdict=verdict,
        clean=[row for row in rows if row["attack"] == "none"],
        broken=Counter(image["attack"] for image in record["per_example"] if image["worst"] <= 0.5).most_common(),
        curves=figures.svg_uri(figures.accuracy_curves(record["curves"])) if record["curves"] else None,
        losses=figures.svg_uri(figures.loss_curves(losses)) if losses else None,
        gallery=[_drawn(one, record["threat_model"]["bounds"]) for one in gallery if images.is_image(one.clean.shape)],
        checks={check["name"]: check for check in record["checks"]},
        flags={flag["name"]: flag for flag in record["flags"]},
        roles=_roles(record["attacks"]),
    )


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
