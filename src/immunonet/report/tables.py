"""Tables of text, and the one writer of them, for Markdown and for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from immunonet.defences import REGISTRY, Undefended

Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, sentences, a table (its head first; none if empty), a figure's name."""

    title: str
    text: Sequence[str] = ()
    table: Table = ()
    figure: str = ""


def title(name: str) -> str:
    """Return what a defence is called in tables, by its name in rows: its kind's title, and what else that says.

    One that stands behind another, as `control+rails`, is called by both.
    """
    before, _, last = name.rpartition("+")
    if _kind(before) and _kind(last):
        return f"{title(last)} behind {title(before)}"
    kind = _kind(name)
    more = name[len(kind) + 1 :].replace("-", " ")
    return f"{REGISTRY[kind].title} {more}".rstrip() if kind else name


def _kind(name: str) -> str:
    """Return the kind that a name in rows begins with; "" where none does."""
    return max(
        (kind for kind in REGISTRY if name == kind or name.startswith(tuple(kind + end for end in "- +"))), default=""
    )


def bare(kind: str) -> bool:
    """Return whether a kind of defence is none: the network itself."""
    return kind == Undefended.kind


def share(row: Mapping[str, Any], places: int = 3, *, key: str = "accuracy", ci95: str = "ci95") -> str:
    """Return a row's share right with its interval, which has so many decimal places."""
    low, high = row[ci95]
    return f"{row[key]:.3f} ({low:.{places}f} to {high:.{places}f})"


def line(*cells: Any) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def head(*cells: Any) -> str:
    """Return the two lines that a Markdown table begins with."""
    return f"{line(*cells)}\n{line(*['---'] * len(cells))}"


def grid(table: Table) -> str:
    """Return a table, its head first, in Markdown."""
    return "\n".join([head(*table[0]), *(line(*cells) for cells in table[1:])])


def watched(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table of what a sentinel stops, from a row per attack, way to ask, and norm where that is told."""
    heads = ("attack", "way", "fall without", "stopped", "flagged first", "fall all the same", "queries until flagged")
    return [(*heads, "until won")] + [
        (
            " ".join((row["attack"], *filter(None, [row.get("norm")]))), row["way"], f"{row['fell']} of {row['n']}",
            share(row, key="stopped_share") if row["fell"] else "",
            f"{row['flagged_first']} of {row['fell']}", f"{row['fell_behind']} of {row['n']}",
            f"{row['queries_until_flagged'] or 'never'}", f"{row['queries_until_won'] or ''}",
        )
        for row in rows
    ]  # fmt: skip


def honest(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table of what a sentinel flags of honest queries, from a row per stream."""
    return [("queries", "flagged", "n")] + [(row["stream"], share(row, key="share"), f"{row['n']:,}") for row in rows]


def markdown(section: Section, level: int = 2, *, image: str = "") -> str:
    """Return a section in Markdown; `image`: where its figure lies."""
    parts = [f"{'#' * level} {section.title}", *section.text, grid(section.table) if section.table else ""]
    return "\n\n".join(filter(None, [*parts, f"![{section.title}]({image})" if image else ""]))


def console(section: Section, width: int = 120) -> None:
    """Print a section's table, `width` columns wide where the output is no terminal. Needs `immunonet[cli]`."""
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Grid

    columns, *body = section.table
    drawn = Grid(*(Column(name) for name in columns), title=section.title or None)
    for cells in body:
        drawn.add_row(*(cell.replace("**", "") for cell in cells))
    Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False).print(drawn)


def vaccine(settings: Mapping[str, Any]) -> str:
    """Return in words which attacked examples are in a repertoire; nothing where there are none."""
    if "vaccine" not in settings:
        return ""
    share = settings["vaccine_share"]
    return f"vaccinated {settings['vaccine']:.3g}" + (f", {share:.0%}" if share < 1 else "")
