"""One self-contained HTML page about a measurement: table, gallery, learning curves, settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from immunonet import _check, _store
from immunonet.report import figures, images, pages
from immunonet.response import ImmuneResponse

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A B cell to show: `image` `(1, H, W)` or `(3, H, W)`, its class, and its distance or affinity."""

    image: Tensor
    label: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Exhibit:
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


def exhibits(
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
) -> list[Exhibit]:
    """Return the gallery entries of some antigens.

    `rails`: the fitted defence; `clean`, `adversarial` `(B, 1, H, W)` or `(B, 3, H, W)`: the same antigens
    before and after an attack; `truth` `(B,)`; `response`: that of `rails` to all of `adversarial`;
    `answers`: per defence its labels `(B,)` for clean and for adversarial; `indices`: which antigens to
    show, with at most `naive` naive cells per class and `cells` plasma and memory cells. Cells of a hidden
    layer are shown by the training images that they descend from. ValueError for antigens that are no
    images.
    """
    images.require_images("clean", clean.shape[1:])
    members, distances = rails.naive(adversarial[list(indices)])
    repertoire = rails.repertoire.shown
    evolved = {
        kind: (part, images.cell_images(part, clean.shape[1:], repertoire))
        for kind, part in (("plasma", response.plasma), ("memory", response.memory))
    }

    def nearest(row: int, label: int) -> list[Cell]:
        pairs = zip(members[row, label, :naive].tolist(), distances[row, label, :naive].tolist(), strict=True)
        return [Cell(image=repertoire[place], label=label, value=distance) for place, distance in pairs]

    def fittest(i: int, kind: str) -> list[Cell]:
        part, drawn = evolved[kind]
        best = zip(drawn[i, :cells], part.label[i, :cells].tolist(), part.affinity[i, :cells].tolist(), strict=True)
        return [Cell(image=image, label=label, value=affinity) for image, label, affinity in best]

    return [
        Exhibit(
            clean=clean[i],
            adversarial=adversarial[i],
            truth=int(truth[i]),
            answers={name: (int(before[i]), int(after[i])) for name, (before, after) in answers.items()},
            votes=response.votes[i].tolist(),
            credibility=float(response.credibility[i]),
            foreign=bool(response.foreign[i]),
            generations=int(response.generations[i]),
            naive=[nearest(row, label) for label in range(members.shape[1])],
            plasma=fittest(i, "plasma"),
            memory=fittest(i, "memory"),
        )
        for row, i in enumerate(indices)
    ]


def render(
    *,
    title: str,
    rows: Sequence[Row],
    meaning: str = "",
    gallery: Sequence[Exhibit] = (),
    choice: str = "",
    curves: Sequence[Figure] = (),
    names: Sequence[str] | None = None,
    bounds: Any = (0.0, 1.0),
    environment: Row | None = None,
    command: str = "",
) -> str:
    """Return the page as HTML, complete in itself: no script, and nothing is fetched from anywhere.

    `rows`: result rows of the JSON contract, one per defence and attack; a row's `foreign`, the share flagged
    foreign, is shown where it has one. `meaning`: what the numbers mean, in plain words. `gallery`: see
    `exhibits`; `choice`: how its antigens were chosen. `curves`: see `learning_curves`. `names`: one per class;
    `bounds`: valid range of the images. Everything is escaped. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError("rows must hold at least one result row, got none")
    # Earlier rows of a defence come last: their settings replace those of its later ones.
    settings: dict[str, dict[str, str]] = {row["defence"]: {} for row in rows}
    for row in reversed(rows):
        settings[row["defence"]] |= pages.flat(row.get("settings", {}))
    return pages.template(
        "report.html.j2",
        image=lambda image: images.png_uri(images.image_array(image, bounds=bounds)),
        difference=lambda pair: images.png_uri(images.difference_array(*pair)[0]),
        largest=lambda pair: f"{images.difference_array(*pair)[1]:.2g}",
    ).render(
        title=title,
        meaning=meaning,
        table=table(rows),
        gallery=gallery,
        choice=choice,
        curves=[figures.svg_uri(figure) for figure in curves],
        names=_check.class_names(names, len(gallery[0].votes) if gallery else len(names or ())),
        settings=settings,
        environment=environment or {},
        command=command,
    )


def write(path: str | Path, **content: Any) -> Path:
    """Write the page `render(**content)` to `path`, whole or not at all; return the path."""
    _store.write_text(path, render(**content))
    return Path(path)


def table(rows: Iterable[Row]) -> dict[str, Any]:
    """Return result rows as the main table has them.

    `heads`, the title and subtitle of one column per attack; `lines`: defence -> one row (or None)
    per head; `n` and `dataset`, each as a short text. The clean column is one, whatever the attacker knows.
    """
    rows = list(rows)
    heads: dict[tuple[str, str], tuple[str, str]] = {}
    lines: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        key = ("none", "") if row["attack"] == "none" else (row["attack"], row["knows"])
        heads.setdefault(key, _head(row))
        lines.setdefault(row["defence"], {})[key] = row
    return {
        "heads": list(heads.values()),
        "lines": {defence: [line.get(key) for key in heads] for defence, line in lines.items()},
        "n": " or ".join(dict.fromkeys(f"{row['n']:,}" for row in rows)),
        "dataset": " and ".join(dict.fromkeys(str(row["dataset"]) for row in rows)),
    }


def _head(row: Row) -> tuple[str, str]:
    if row["attack"] == "none":
        return "Clean", "not attacked"
    knows = "the CNN" if row["knows"] == "base" else "the defence"
    name = row["attack"].upper() if row["attack"] in ("fgsm", "pgd") else row["attack"]
    return f"Attacker knows {knows}", f"{name}, eps {row['eps']:.3g}"
