"""What a notebook shows of a memory."""

from __future__ import annotations

from memories import bound, remember

from immunonet import Memory


def test_a_memory_shows_its_sources_and_takes_none_for_markup() -> None:
    memory = bound(Memory(None))
    ids = remember(memory, 3, source="<script>", label=1)
    remember(memory, 2, at=100, source="me")
    memory.confirm(ids[:2], [1, 2])
    page = memory._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    rows = [[cell.partition("<")[0] for cell in line.split('left">')[1:]] for line in page.split("<tr>")[1:]]
    assert rows[1:] == [["&lt;script&gt;", "3", "2", "1"], ["me", "2", "0", "0"]]
    assert "5 are trusted, 0 looked foreign." in page


def test_a_memory_of_nothing_is_shown_too() -> None:
    assert Memory(None)._repr_html_().count("<tr>") == 1


def test_a_figure_of_entries_over_time_names_versions() -> None:
    memory = bound(Memory(None))
    remember(memory, 3)
    memory.tag("clean")
    remember(memory, 2, at=100)
    (axes,) = memory.plot().axes
    assert axes.lines[0].get_ydata().tolist() == [0, 3, 5]
    assert [text.get_text() for text in axes.texts] == ["clean"]
    assert Memory(None).plot().axes[0].lines[0].get_xdata().tolist() == []
