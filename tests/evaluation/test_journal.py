"""The journal: what is kept, dropped and refused."""

import pytest

from immunonet.evaluation.journal import Journal

SETTINGS = {"eps": 0.1, "pgd": {"step": 0.02, "seeds": (0, 1)}}


def test_parts_survive_and_are_found_by_key(tmp_path):
    journal = Journal(tmp_path / "new" / "parts.jsonl", SETTINGS)
    assert "a" not in journal
    journal.add("a", {"labels": [[1, 2]]})
    assert journal["a"] == {"labels": [[1, 2]]}
    again = Journal(tmp_path / "new" / "parts.jsonl", SETTINGS)
    assert again["a"] == {"labels": [[1, 2]]}
    assert "b" not in again


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "parts.jsonl"
    journal = Journal(path, SETTINGS)
    journal.add("a", 1)
    journal.add("b", 2)
    path.write_text(path.read_text()[:-4])
    again = Journal(path, SETTINGS)
    assert ("a" in again, "b" in again) == (True, False)
    again.add("b", 3)
    assert Journal(path, SETTINGS)["b"] == 3


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "parts.jsonl"
    Journal(path, SETTINGS)
    other = {"eps": 0.1, "pgd": {"step": 0.05, "seeds": (0,)}}
    with pytest.raises(
        ValueError, match=r"other settings \(pgd.seeds.1 was 1, now None; pgd.step was 0.02, now 0.05\)"
    ):
        Journal(path, other)


def test_settings_of_a_part_must_agree(tmp_path):
    journal = Journal(tmp_path / "parts.jsonl", SETTINGS)
    journal.agree("settings of rails", {"population": 100, "range": (0, 1)})
    journal.agree("settings of rails", {"population": 100, "range": (0, 1)})
    with pytest.raises(ValueError, match=r"\(settings of rails population was 100, now 200\): give another folder"):
        Journal(journal.path, SETTINGS).agree("settings of rails", {"population": 200, "range": (0, 1)})


@pytest.mark.parametrize(
    "text", ["", "[]\n", "{}\n", "not json\n", '{"settings": {}}\n{"key": 1}\n', '{"settings": {}}\n7\n']
)
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "parts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"parts.jsonl is not a journal of results"):
        Journal(path, {})


def test_a_value_that_json_cannot_hold_leaves_the_file_whole(tmp_path):
    journal = Journal(tmp_path / "parts.jsonl", SETTINGS)
    before = journal.path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.add("a", float("nan"))
    assert journal.path.read_text() == before
    assert "a" not in journal
