"""What a study leaves behind: its record, figures, one HTML page, and the README of a folder of results."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from immunonet import _store
from immunonet.evaluation.records import envelope
from immunonet.report.figures import save, svg_uri
from immunonet.studies import behaviour, figures, search, tables
from immunonet.studies.experiments import Measured
from immunonet.studies.lab import Lab
from immunonet.studies.settings import Study

MARK = "<!-- Written by `immunonet reproduce` from the JSON files beside it: do not edit. -->"

Record = Mapping[str, Any]


def record(study: Study, name: str, lab: Lab, seed: int, found: Sequence[Measured], *, drawn: bool) -> dict[str, Any]:
    """Return what the JSON file of a study holds; `found`: its measurements; `drawn`: whether figures lie beside it."""
    remark = study.remarks.get(study.dataset, "").format(n=len(lab.splits["test"]))
    return envelope([m.row.to_json() for m in found]) | {
        "study": {
            "name": name,
            "title": study.title,
            "dataset": study.dataset,
            "remark": remark,
            "notes": list(study.notes),
            "curves": [[curve.name, curve.title or curve.name] for curve in study.curves],
        },
        "pairs": tables.pairs(found),
        "targets": tables.targets(study, found),
        "learning": behaviour.learned(study, lab, seed),
        "sensing": behaviour.sensed(study, lab, seed),
        "hardening": behaviour.hardened(study, lab, seed),
        "search": search.searched(study, lab, seed),
        "figures": drawn,
    }


def write_correctness(path: Path, found: Sequence[Measured]) -> None:
    """Write which images were right, bool `(runs, n)` as `row-<place in the results>`, whole or not at all."""
    _store.write_tensors(path, {f"row-{i}": m.correct for i, m in enumerate(found)})


def page(result: Record) -> str:
    """Return the HTML page of a record, complete in itself: no script, nothing fetched; everything is escaped."""
    drawn = {name: svg_uri(figure) for name, figure in figures.draw(result).items()}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("immunonet.studies"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("study.html.j2").render(
        study=result["study"],
        sections=[dataclasses.asdict(section) for section in tables.sections(result)],
        figures=drawn,
        command=result["command"],
        environment=result["environment"],
    )


def draw(result: Record, folder: Path, stem: str) -> None:
    """Write a record's page, `<stem>.html`, and its figures, `figures/<name of the study>-<figure>.png`."""
    save(figures.draw(result), folder / "figures", result["study"]["name"])
    _store.write_text(folder / f"{stem}.html", page(result))


def write_readme(folder: Path) -> Path | None:
    """Write `README.md` from the studies' JSON files in a folder; None, and nothing written, beside someone's own."""
    path = folder / "README.md"
    if path.exists() and not path.read_text(encoding="utf-8").startswith(MARK):
        return None
    records = [_store.read_json(file) for file in sorted(folder.glob("*.json"))]
    studies = [found for found in records if isinstance(found, dict) and "study" in found]
    intro = "What the committed studies measured, each with its command and machine. Per-image correctness lies beside."
    parts = [MARK, "# Results", intro, *(tables.markdown(found) for found in studies)]
    _store.write_text(path, "\n\n".join(parts).rstrip() + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write pages, figures and README again from the JSON files of studies, beside them; nothing is measured."""
    parser = argparse.ArgumentParser(prog="python -m immunonet.studies.report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="files that immunonet reproduce --json wrote")
    for path in parser.parse_args(arguments).files:
        draw(_store.read_json(path), path.parent, path.stem)
        write_readme(path.parent)


if __name__ == "__main__":
    main()
