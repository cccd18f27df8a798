"""How a table looks where it is shown: in a terminal, and in a notebook of any colours."""

from __future__ import annotations

import html
from collections.abc import Sequence

# Its head first; all lines have as many cells.
Table = Sequence[Sequence[str]]


def text(table: Table, *more: str) -> str:
    """Return a table as lines whose columns are aligned, and `more` lines below it."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table]
    return "\n".join([*(line.rstrip() for line in lines), *filter(None, more)])


def markup(title: str, table: Table, *more: str) -> str:
    """Return a table as HTML below a title, and `more` sentences below it; all of them are escaped.

    It sets no colours: the page's own are readable, be they dark or light.
    """
    rows = [_row(cells, "td" if i else "th") for i, cells in enumerate(table)]
    notes = [f"<div>{html.escape(note)}</div>" for note in filter(None, more)]
    return f"<div><strong>{html.escape(title)}</strong></div><table>{''.join(rows)}</table>{''.join(notes)}"


def _row(cells: Sequence[str], tag: str) -> str:
    inside = "".join(f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in cells)
    return f"<tr>{inside}</tr>"
