"""The one writer of tables, and what reports may lean on."""

import ast
from pathlib import Path

import pytest

from immunonet import Defence, defences, report
from immunonet._words import apart, leaves, show
from immunonet.report import tables
from immunonet.report.pages import roles
from immunonet.report.tables import Section


def test_reports_are_made_of_records_alone():
    for path in Path(report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith(
                    ("immunonet.evaluation", "immunonet.studies", "immunonet.cli")
                ), path


def test_a_table_in_markdown_escapes_what_would_end_a_cell():
    section = Section("Title", ["Words."], [("a|b", "c"), ("1", "2|3")], "fig")
    assert tables.markdown(section, 3, image="figures/f.png") == (
        "### Title\n\nWords.\n\n| a\\|b | c |\n| --- | --- |\n| 1 | 2\\|3 |\n\n![Title](figures/f.png)"
    )
    assert tables.markdown(Section("Title")) == "## Title"


def test_a_table_on_a_terminal_takes_cells_as_they_are(capsys):
    tables.console(Section("", table=[("name", "x"), ("[bold]a[/bold]", "**1.00 %**")]))
    assert "[bold]a[/bold]" in (out := capsys.readouterr().out)
    assert "1.00 %" in out
    assert "**" not in out


def test_a_share_has_its_interval():
    row = {"accuracy": 0.98765, "ci95": [0.9, 1], "before": 0.5, "ci95_before": [0.25, 0.75]}
    assert tables.share(row) == "0.988 (0.900 to 1.000)"
    assert tables.share(row, 2, key="before", ci95="ci95_before") == "0.500 (0.25 to 0.75)"


def test_titles_come_from_the_registry(monkeypatch):
    class Wall(Defence):
        kind, title = "wall", "A wall"

    monkeypatch.setitem(defences.REGISTRY, "wall", Wall)
    monkeypatch.setitem(defences.REGISTRY, "rails-wall", Wall)
    titles = {
        "cnn": "CNN, undefended", "rails": "RAILS", "wall": "A wall", "mine": "mine", "dknn-tuned": "DkNN tuned",
        "rails voice=0.25": "RAILS voice=0.25", "rails-wall high": "A wall high", "railsy": "railsy",
        "wall+rails": "RAILS behind A wall", "wall+cnn+rails": "RAILS behind CNN, undefended behind A wall",
        "mine+rails": "mine+rails", "rails fc1+fc2": "RAILS fc1+fc2",
    }  # fmt: skip
    assert {name: tables.title(name) for name in titles} == titles


@pytest.mark.parametrize(
    ("name", "attack", "known"),
    [
        ("unrolled-eot-2", {}, {"eot"}),
        ("square-known-seed", {}, {"known seed"}),
        ("direct-apgd-targeted-dlr", {}, {"direct", "targeted"}),
        ("unrolled-eot-2", {"roles": ["asks"]}, {"asks"}),
        ("pgd", {"roles": []}, set()),
    ],
)
def test_roles_are_read_from_the_record_or_else_from_the_name(name, attack, known):
    assert roles(name, attack) == known


def test_settings_in_words():
    assert [show(value) for value in (0.12345, 3, None, ["a", 0.5])] == ["0.123", "3", "None", "a + 0.5"]
    assert leaves({"a": [{"b": 1}, 2], "c": {}}) == {"a.0.b": 1, "a.1": 2}
    named = [("x", {"k": 1, "m": 2}), ("x", {"k": 3, "m": 2}), ("y", {"k": 4}), ("x", {"m": 2})]
    assert apart(named) == ["k 1", "k 3", "", "k untold"]
