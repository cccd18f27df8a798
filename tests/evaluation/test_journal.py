"""The journal: what is kept, dropped and refused."""

import pytest

from immunonet.evaluation.journal import Journal


def test_parts_survive_and_are_found_by_key(tmp_path):
    journal = Journal(tmp_path / "new" / "parts.jsonl")
    assert "a" not in journal
    journal.add("a", {"labels": [[1, 2]]})
    assert journal["a"] == {"labels": [[1, 2]]}
    again = Journal(tmp_path / "new" / "parts.jsonl")
    assert again["a"] == {"labels": [[1, 2]]}
    assert "b" not in again


def test_nothing_is_written_before_something_is_kept(tmp_path):
    Journal(tmp_path / "new" / "parts.jsonl")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_a_value_is_given_as_it_will_be_read_again(tmp_path, kept):
    journal = Journal(tmp_path / "parts.jsonl" if kept else None)
    value = {"eps": (0, 1)}
    journal.add("a", value)
    assert journal["a"] == {"eps": [0, 1]}
    value["eps"] = None
    assert journal["a"] == {"eps": [0, 1]}
    assert list(tmp_path.iterdir()) == ([journal.path] if kept else [])


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "parts.jsonl"
    journal = Journal(path)
    journal.add("a", 1)
    journal.add("b", 2)
    path.write_text(path.read_text()[:-4])
    again = Journal(path)
    assert ("a" in again, "b" in again) == (True, False)
    again.add("b", 3)
    assert Journal(path)["b"] == 3


@pytest.mark.parametrize(
    "text", ["[]\n", "{}\n", "not json\n", '{"settings": {}}\n{"key": 1, "value": 2}\n', '{"key": 1}\n', "7\n"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "parts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"parts.jsonl is not a journal of results"):
        Journal(path)


def test_a_value_that_json_cannot_hold_leaves_the_file_whole(tmp_path):
    journal = Journal(tmp_path / "parts.jsonl")
    journal.add("a", 1)
    before = journal.path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.add("b", float("nan"))
    assert journal.path.read_text() == before
    assert "b" not in journal
