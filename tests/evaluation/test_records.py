"""Rows and the file they are kept in."""

import json
import platform

import pytest
import torch

from immunonet import statistics
from immunonet.evaluation import Row, records

KEYS = [
    "dataset", "defence", "attack", "knows", "eps", "norm", "n", "correct", "accuracy", "ci95",
    "seconds_per_image", "seeds", "settings",
]  # fmt: skip
FIELDS = {
    "dataset": "digits",
    "defence": "rails",
    "attack": "pgd",
    "knows": "base",
    "eps": 0.1,
    "norm": "linf",
    "seconds_per_image": 0.25,
    "settings": {"model": "digits", "layers": ["input"], "slice": [0, 4]},
}


def test_one_run_is_counted_with_its_wilson_interval():
    row = Row.of(torch.tensor([[True, True, True, False]]), **FIELDS)
    assert (row.n, row.correct, row.accuracy, row.seeds) == (4, 3.0, 0.75, ())
    assert row.ci95 == statistics.wilson(3, 4)


def test_runs_are_averaged():
    row = Row.of(torch.tensor([[True, True], [True, False], [False, False]]), seeds=[4, 5, 6], **FIELDS)
    assert (row.n, row.correct, row.accuracy, row.seeds) == (2, 1.0, 0.5, (4, 5, 6))
    assert row.ci95[0] <= statistics.wilson(1, 2)[0]


def test_the_file_has_the_keys_of_the_contract_and_survives_json():
    row = Row.of(torch.tensor([[True, False]] * 2), seeds=[0, 1], **FIELDS)
    record = json.loads(json.dumps(records.envelope([row.to_json()]), allow_nan=False))
    assert list(record) == ["results", "environment", "command"]
    (found,) = record["results"]
    assert list(found) == KEYS
    assert found["seeds"] == [0, 1]
    assert found["ci95"] == list(row.ci95)
    assert found["settings"] == FIELDS["settings"]
    assert record["environment"]["python"] == platform.python_version()
    assert record["environment"]["torch"] == torch.__version__


def test_the_share_that_looked_foreign_stands_only_where_there_is_one():
    row = Row.of(torch.tensor([[True]]), **FIELDS, foreign=0.5)
    assert row.to_json()["foreign"] == 0.5
    assert "foreign" not in Row.of(torch.tensor([[True]]), **FIELDS).to_json()


def test_the_command_is_quoted_and_names_no_folder(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/immunonet", "evaluate", "a b"])
    assert records.command() == "immunonet evaluate 'a b'"


def test_the_environment_names_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    assert records.environment()["cuda"] == "some GPU"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"knows": "nothing"}, "knows must be one of"),
        ({"seconds_per_image": -1.0}, "seconds_per_image must be"),
        ({"settings": {"model": "m", "layers": []}}, "settings must have 'slice'"),
        ({"seeds": [1]}, r"seeds must name the 2 runs of correct, got \[1\]"),
    ],
)
def test_bad_fields_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        Row.of(torch.tensor([[True], [False]]), **{"seeds": [0, 1]} | FIELDS | change)


def test_several_runs_need_seeds_and_images():
    with pytest.raises(ValueError, match="seeds must name the 2 runs"):
        Row.of(torch.tensor([[True], [False]]), **FIELDS)
    with pytest.raises(ValueError, match="correct must have shape"):
        Row.of(torch.empty(1, 0), **FIELDS)


def test_an_argument_is_shown_without_folders_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = {"--data": "--data", "results/a.json": "results/a.json", "/data/mnist": "DIR", "60/255": "60/255"}
    for argument, told in (shown | {str(tmp_path / "out" / "a.json"): "out/a.json"}).items():
        assert records.public(argument) == told
