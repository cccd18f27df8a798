"""The page that shows an evaluation to a reviewer. Needs `pip install 'immunonet[report]'`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

from immunonet.evaluation.checklist import SOURCE, checklist
from immunonet.report import figures
from immunonet.report.html import flat

if TYPE_CHECKING:
    from immunonet.evaluation.outcome import Evaluation


def page(found: Evaluation) -> str:
    """Return a self-contained HTML page: verdict, checks and flags, attacks, curves, gallery, checklist, settings."""
    record = found.to_dict()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("immunonet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    bounds = record["threat_model"]["bounds"]
    return environment.get_template("evaluation.html.j2").render(
        verdict=found.verdict,
        base=found.base_verdict,
        clean=next(row for row in found.rows if row.defence == found.verdict.defence and row.attack == "none"),
        unreliable=found.unreliable,
        checks=found.checks,
        flags=found.flags,
        rows=found.rows,
        ablations=found.ablations,
        record=record,
        by=_by(found),
        curves=figures.svg_uri(figures.accuracy_curves(record["curves"])) if record["curves"] else None,
        losses=figures.svg_uri(figures.loss_curves(_losses(record))) if _losses(record) else None,
        gallery=[_pictures(specimen, bounds) for specimen in found.gallery if _is_image(specimen)],
        checklist=checklist(found),
        source=SOURCE,
        settings=flat(found.verdict.settings),
        environment=flat(record["environment"]),
        command=record["command"],
    )


def _by(found: Evaluation) -> list[tuple[str, int]]:
    """Return how many images each attack broke: those wrong in most draws of their worst case."""
    count: dict[str, int] = {}
    for image in found.record["per_example"]:
        if image["worst"] <= 0.5:
            count[image["attack"]] = count.get(image["attack"], 0) + 1
    return sorted(count.items(), key=lambda item: -item[1])


def _losses(record: dict[str, Any]) -> dict[str, list[float]]:
    return {name: attack["losses"] for name, attack in record["attacks"].items() if len(attack["losses"]) > 2}


def _is_image(specimen: Any) -> bool:
    return specimen.clean.ndim == 3 and specimen.clean.shape[0] in (1, 3)


def _pictures(specimen: Any, bounds: Any) -> dict[str, Any]:
    difference, largest = figures.difference_array(specimen.clean, specimen.adversarial)
    return {
        "clean": figures.png_uri(figures.image_array(specimen.clean, bounds=bounds)),
        "adversarial": figures.png_uri(figures.image_array(specimen.adversarial, bounds=bounds)),
        "difference": figures.png_uri(difference),
        "largest": largest,
        "truth": specimen.truth,
        "answer": specimen.answer,
        "attack": specimen.attack,
    }
