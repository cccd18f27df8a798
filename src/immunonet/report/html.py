"""One self-contained HTML page about a measurement: table, gallery, learning curves, settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from torch import Tensor

from immunonet import _store
from immunonet.report import figures
from immunonet.response import Cells, ImmuneResponse

_DEFENCES = {"cnn": "CNN, undefended", "dknn": "DkNN", "rails": "RAILS"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A B cell to show: `image` `(1, H, W)` or `(3, H, W)`, its class, and its distance or affinity."""

    image: Tensor
    label: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One antigen of the gallery and the response to its attacked copy.

    `clean`, `adversarial`: images; `truth`: the true class; `answers`: per defence its labels for clean and
    adversarial; `votes`, `credibility`, `foreign`, `generations`: of the response; `naive`: per class its
    nearest cells with their distances; `plasma`, `memory`: the fittest first, with affinities.
    """

    clean: Tensor
    adversarial: Tensor
    truth: int
    answers: Mapping[str, tuple[int, int]]
    votes: Sequence[float]
    credibility: float
    foreign: bool
    generations: int
    naive: Sequence[Sequence[Cell]]
    plasma: Sequence[Cell]
    memory: Sequence[Cell]


def specimens(
    rails: Any,
    clean: Tensor,
    adversarial: Tensor,
    truth: Tensor,
    response: ImmuneResponse,
    answers: Mapping[str, tuple[Tensor, Tensor]],
    *,
    indices: Sequence[int],
    naive: int = 3,
    cells: int = 12,
) -> list[Specimen]:
    """Return the gallery entries of some antigens.

    `rails`: the fitted defence; `clean`, `adversarial` `(B, 1, H, W)` or `(B, 3, H, W)`: the same antigens
    before and after an attack; `truth` `(B,)`; `response`: that of `rails` to all of `adversarial`;
    `answers`: per defence its labels `(B,)` for clean and for adversarial; `indices`: which antigens to
    show, with at most `naive` naive cells per class and `cells` plasma and memory cells. Cells of a hidden
    layer are shown by the training images that they descend from. ValueError for antigens that are no
    images.
    """
    figures.require_images("clean", clean.shape[1:])
    chosen = list(indices)
    members, distances = rails.naive(adversarial[chosen])
    repertoire = rails.repertoire.x
    plasma, memory = (
        figures.cell_images(part, clean.shape[1:], repertoire) for part in (response.plasma, response.memory)
    )
    return [
        Specimen(
            clean=clean[i],
            adversarial=adversarial[i],
            truth=int(truth[i]),
            answers={name: (int(before[i]), int(after[i])) for name, (before, after) in answers.items()},
            votes=[float(v) for v in response.votes[i]],
            credibility=float(response.credibility[i]),
            foreign=bool(response.foreign[i]),
            generations=int(response.generations[i]),
            naive=[
                [
                    Cell(image=repertoire[int(members[row, c, k])], label=c, value=float(distances[row, c, k]))
                    for k in range(min(naive, members.shape[2]))
                ]
                for c in range(members.shape[1])
            ],
            plasma=_cells(plasma[i], response.plasma, i, cells),
            memory=_cells(memory[i], response.memory, i, cells),
        )
        for row, i in enumerate(chosen)
    ]


def render(
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    meaning: str = "",
    gallery: Sequence[Specimen] = (),
    choice: str = "",
    curves: Sequence[Figure] = (),
    names: Sequence[str] | None = None,
    bounds: Any = (0.0, 1.0),
    environment: Mapping[str, Any] | None = None,
    command: str = "",
) -> str:
    """Return the page as HTML, complete in itself: no script, and nothing is fetched from anywhere.

    `rows`: result rows of the JSON contract, one per defence and attack; a row's `foreign`, the share flagged
    foreign, is shown where it has one. `meaning`: what the numbers mean, in plain words. `gallery`: see
    `specimens`; `choice`: how its antigens were chosen. `curves`: see `learning_curves`. `names`: one per class;
    `bounds`: valid range of the images. Everything is escaped. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError("rows must hold at least one result row, got none")
    titles = figures.class_names(names, len(gallery[0].votes) if gallery else len(names or ()))
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("immunonet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["image"] = lambda image: figures.png_uri(figures.image_array(image, bounds=bounds))
    page.filters["difference"] = lambda pair: figures.png_uri(figures.difference_array(*pair)[0])
    page.filters["largest"] = lambda pair: f"{figures.difference_array(*pair)[1]:.2g}"
    page.filters["percent"] = lambda share: f"{100 * share:.1f}"
    page.filters["defence"] = lambda name: _DEFENCES.get(name, name)
    return page.get_template("report.html.j2").render(
        title=title,
        meaning=meaning,
        table=table(rows),
        gallery=gallery,
        choice=choice,
        curves=[figures.svg_uri(figure) for figure in curves],
        names=titles,
        settings=_settings(rows),
        environment=flat(environment or {}),
        command=command,
    )


def write(path: str | Path, **content: Any) -> Path:
    """Write the page `render(**content)` to `path`, whole or not at all; return the path."""
    _store.write_text(path, render(**content))
    return Path(path)


def table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Arrange result rows for the main table.

    Returns `heads`, the title and subtitle of one column per attack; `lines`: defence -> one row (or None)
    per head; `n` and `dataset`, each as a short text. The clean column is one, whatever the attacker knows.
    """
    rows = list(rows)
    heads: dict[tuple[str, str], tuple[str, str]] = {}
    lines: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        key = ("none", "") if row["attack"] == "none" else (row["attack"], row["knows"])
        heads.setdefault(key, _head(row))
        lines.setdefault(row["defence"], {})[key] = row
    return {
        "heads": list(heads.values()),
        "lines": {defence: [found.get(key) for key in heads] for defence, found in lines.items()},
        "n": " or ".join(dict.fromkeys(f"{row['n']:,}" for row in rows)),
        "dataset": " and ".join(dict.fromkeys(str(row["dataset"]) for row in rows)),
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as one level of dotted names and short texts."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found


def _settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return per defence its settings, those of its later rows filling in what the earlier ones lack."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        mine = found.setdefault(row["defence"], {})
        found[row["defence"]] = flat(row.get("settings", {})) | mine
    return found


def _head(row: Mapping[str, Any]) -> tuple[str, str]:
    if row["attack"] == "none":
        return "Clean", "not attacked"
    knows = "the CNN" if row["knows"] == "base" else "the defence"
    name = row["attack"].upper() if row["attack"] in ("fgsm", "pgd") else row["attack"]
    return f"Attacker knows {knows}", f"{name}, eps {row['eps']:.3g}"


def _cells(images: Tensor, cells: Cells, i: int, most: int) -> list[Cell]:
    return [
        Cell(image=images[j], label=int(cells.label[i, j]), value=float(cells.affinity[i, j]))
        for j in range(min(most, len(images)))
    ]
