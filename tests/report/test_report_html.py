from __future__ import annotations

import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_samples import B, C, made_rails, made_response, made_rows

from immunonet import report
from immunonet.report import html


class Reader(HTMLParser):
    """Collects what a browser would see: tags with attributes, balanced, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    reader.text = " ".join(reader.text.split())
    return reader


def content(shape: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    response = made_response(shape)
    assert response.trace is not None
    clean = torch.rand(B, *shape, generator=torch.Generator().manual_seed(5))
    truth = torch.arange(B) % C
    gallery = report.exhibits(
        made_rails(shape),
        clean,
        (clean + 0.25).clamp(0, 1),
        truth,
        response,
        {"cnn": (truth, (truth + 1) % C), "rails": (truth, truth)},
        indices=[0, 4],
        naive=2,
        cells=3,
    )
    return {
        "title": "A measurement",
        "rows": made_rows(),
        "meaning": "What it means.",
        "gallery": gallery,
        "choice": "The first two.",
        "environment": {"torch": "2", "cpu": {"name": "x", "cores": 2}},
        "command": "immunonet demo --seed 0",
    } | changes


def whole(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return all that a page may hold."""
    (trace,), truth = made_response(shape).trace or (), torch.arange(B) % C
    curves = report.learning_curves(trace, trace, truth, (truth + 1) % C)
    return content(shape, curves=curves, names=["ant", "bee", "cat"])


@functools.cache
def rendered(shape: tuple[int, ...]) -> str:
    return report.render(**whole(shape))


def test_page_is_complete_and_self_contained(shape: tuple[int, ...]) -> None:
    page = rendered(shape)
    reader = read(page)
    # Nothing that a browser would fetch: sources are data: addresses; no script, link or import.
    sources = [attrs["src"] for tag, attrs in reader.tags if tag == "img"]
    assert sources
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    assert not re.search(r"<(script|link|iframe|object|base)|@import|url\(|https?:", page)
    assert all(attrs.get("alt") for tag, attrs in reader.tags if tag == "img")
    # Per antigen: clean, adversarial, difference, two naive cells of three classes, three plasma, and memory.
    assert len(sources) == 2 * (3 + 2 * 3 + 3 + 3) + 2


def test_main_table_says_every_number() -> None:
    text = read(rendered((1, 8, 8))).text
    assert "RAILS 97.5 % 94.5 to 99.5 % 4.0 % flagged foreign" in text
    assert "85.0 % 82.0 to 87.0 % 31.0 % flagged foreign 44.0 % 41.0 to 46.0 % 20.0 % flagged foreign 20" in text
    assert "CNN, undefended 98.0 % 95.0 to 100.0 % 12.0 % 9.0 to 14.0 % no defence to know 0.1" in text
    assert "Attacker knows the CNN PGD, eps 0.2" in text
    assert "on 360 test images of digits" in text


def test_gallery_and_settings_are_told() -> None:
    text = read(rendered((1, 8, 8))).text
    assert "Antigen 1, class ant" in text
    assert "CNN, undefended ant bee ✗ RAILS ant ant" in text
    assert "difference, at most 0.25" in text
    assert "immunonet demo --seed 0" in text
    assert "another. The first two." in text
    assert "m.a 1" in text
    assert "cpu.cores 2" in text


def test_everything_is_escaped() -> None:
    evil = "<b>&\"'"
    rows = made_rows()
    rows[0]["settings"] = {evil: evil}
    page = report.render(
        **content(
            (1, 8, 8),
            title=evil,
            meaning=evil,
            command=evil,
            names=[evil] * C,
            environment={evil: evil},
            rows=rows,
        )
    )
    assert evil not in page
    assert evil in read(page).text


def test_page_with_a_table_alone() -> None:
    reader = read(report.render(title="t", rows=made_rows()))
    assert "Antigens and the cells" not in reader.text
    assert "How the cells learn" not in reader.text
    assert "Environment" not in reader.text


def test_table_orders_attacks_and_leaves_gaps() -> None:
    rows = [
        {"defence": d, "attack": a, "knows": k, "eps": 0.1, "n": n, "dataset": "x"}
        for d, a, k, n in [
            ("a", "none", "base", 5),
            ("b", "none", "defence", 5),
            ("b", "fgsm", "defence", 1500),
        ]
    ]
    found = html.table(rows)
    assert found["heads"] == [("Clean", "not attacked"), ("Attacker knows the defence", "FGSM, eps 0.1")]
    assert found["lines"] == {"a": [rows[0], None], "b": [rows[1], rows[2]]}
    assert found["n"] == "5 or 1,500"


def test_specimen_holds_what_the_response_says() -> None:
    response = made_response((1, 8, 8))
    specimen = content((1, 8, 8))["gallery"][1]
    assert specimen.truth == 4 % C
    assert specimen.answers == {"cnn": (4 % C, 5 % C), "rails": (4 % C, 4 % C)}
    assert specimen.votes == response.votes[4].tolist()
    assert [cell.value for cell in specimen.plasma] == response.plasma.affinity[4, :3].tolist()
    assert [cell.label for cell in specimen.memory] == response.memory.label[4, :3].tolist()
    assert [[cell.value for cell in cells] for cells in specimen.naive] == [
        pytest.approx(values) for values in [(0.0, 0.1), (0.4, 0.5), (0.8, 0.9)]
    ]
    assert torch.equal(specimen.naive[2][1].image, made_rails((1, 8, 8)).repertoire.x[9])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="rows must hold at least one result row"):
        report.render(title="t", rows=[])
    with pytest.raises(ValueError, match="names must hold one name per class, 3, got 1"):
        report.render(**content((1, 8, 8), names=["a"]))
    with pytest.raises(ValueError, match="clean must be images"):
        report.exhibits(None, torch.rand(2, 4), torch.rand(2, 4), torch.zeros(2), made_response((4,)), {}, indices=[0])


def test_write_leaves_one_whole_file(tmp_path: Path) -> None:
    some = content((1, 8, 8))
    path = report.write(tmp_path / "new" / "report.html", **some)
    assert path.read_text(encoding="utf-8") == report.render(**some)
    with pytest.raises(ValueError, match="rows must"):
        report.write(path, title="t", rows=[])
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
