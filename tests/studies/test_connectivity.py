"""Paths and contests of a study, end to end on handwritten digits, and what is refused before anything runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from immunonet import studies
from immunonet.evaluation import sanity
from immunonet.evaluation.suite import PROTOCOLS, Suite

HERE = Path(__file__).parent


def record(path):
    found = json.loads(Path(path).read_text())
    for row in found["results"]:
        del row["seconds_per_image"]
    for contest in found["contests"]:
        for entrant in contest["entrants"]:
            del entrant["seconds_per_image"]
    del found["command"]
    return found


def test_a_study_of_paths_from_raw_data_to_tables_and_figures(run, tiny, monkeypatch):
    spent = {"steps": 1, "iterations": 1, "noise": 2, "queries": 3, "decisions": 1, "evaluations": 1, "checks": 2}
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], **spent))
    # The others, and the checks, are those of any evaluation; the contest of control has them.
    monkeypatch.setattr(sanity, "checks", lambda campaign: ([], {}))
    planned, few = Suite.attacks, ("pgd", "direct-pgd", "square")
    monkeypatch.setattr(Suite, "attacks", lambda *of: [attack for attack in planned(*of) if attack.name in few])
    code, out, err = run("--study", "paths.toml", "--json", "results/paths.json", "--report", "--out", "work")
    assert code == 0, err
    found = record("results/paths.json")
    curve, line, second = found["paths"]
    assert curve["t"] == [0, 0.25, 0.5, 0.75, 1]

    def rows(one):
        return {(row["attack"], row["norm"]): row["accuracy"] for row in one["accuracy"]}

    # Both have the same ends, and the one that is not trained is the straight line.
    for key, values in rows(curve).items():
        assert values[0] == rows(line)[key][0]
        assert values[-1] == rows(line)[key][-1]
    assert line["plane"] is None
    assert curve["loss"]["l1"][0] == line["loss"]["l1"][0]
    assert curve["loss"]["l1"][2] != line["loss"]["l1"][2]
    for attack in ("pgd", "apgd"):
        for i in range(5):
            each = [rows(curve)[attack, norm][i] for norm in ("linf", "l1")]
            assert 1 - sum(1 - value for value in each) - 1e-9 <= rows(curve)[attack, "union"][i] <= min(each) + 1e-9
    assert curve["best"] in curve["t"]
    assert len(curve["best3"]) == 3
    assert second["ends"] == ["curve@best", "l1"]

    (contest,) = found["contests"]
    names = [entrant["name"] for entrant in contest["entrants"]]
    assert names[:2] == ["linf", "curve@best3"]
    for entrant in contest["entrants"]:
        worst = {norm: cell[0] for norm, cell in entrant["worst"].items()}
        assert worst.keys() == {"linf", "l1", "union"}
        assert 0 <= worst["union"] <= min(worst["linf"], worst["l1"])
    kinds = [row["defence"] for row in found["results"]]
    assert kinds == ["cnn"] * 4 + ["path"] * 4 + ["dknn"] * 4
    assert [row["norm"] for row in found["results"]][:4] == ["union", "linf", "l1", "union"]
    assert {row["settings"]["network"] for row in found["results"]} == {"linf", "curve@best3", "curve@0.25+0.75"}
    layers = found["results"][-1]["settings"]["layers"]
    assert layers == ["members.0.fc1", "members.1.fc1"]
    assert len(contest["pairs"]) == 3
    right = load_file("results/paths.safetensors")
    for entrant in contest["entrants"]:
        assert float(right[f"contest {entrant['name']}"].mean()) == pytest.approx(entrant["worst"]["union"][0])
    (goal,) = found["targets"]
    union = {entrant["name"]: entrant["worst"]["union"][0] for entrant in contest["entrants"]}
    assert goal["figure"] == pytest.approx(100 * (union["curve@best3"] - union["linf"]))
    assert goal["status"] == "least"

    text = Path("results/README.md").read_text()
    for heading in ("Under both norms", "Paths from linf to l1", "Losses from linf to l1", "Along curve", "The plane"):
        assert f"### {heading}" in text
    assert "three points" in out
    drawn = {file.name for file in Path("results/figures").iterdir()}
    assert drawn == {f"paths-{name}.png" for name in ("paths-1", "paths-2", "losses-1", "losses-2", "plane")}

    # Everything is kept: the same command does nothing again, and finds the same.
    folders = {file.name: file.stat().st_mtime_ns for file in Path("work/paths").rglob("*.safetensors")}
    shutil.move("results/paths.json", "first.json")
    code, _, err = run("--study", "paths.toml", "--json", "results/paths.json", "--out", "work")
    assert code == 0, err
    again, first = record("results/paths.json"), record("first.json")
    assert again | {"figures": True} == first
    assert {file.name: file.stat().st_mtime_ns for file in Path("work/paths").rglob("*.safetensors")} == folders


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'ends = ["linf", "l1"]',
            'ends = ["linf", "l7"]',
            r"paths.curve.ends\[1\]: there is no base, or path above, 'l7'",
        ),
        ('ends = ["linf", "l1"]', 'ends = ["linf", "line@0.5"]', r"paths.curve.ends\[1\]: there is no base, or path"),
        ('ends = ["linf", "l1"]', 'ends = ["linf"]', r"paths.curve.ends: .* at least 2"),
        (
            'network = "curve@best3"',
            'network = "curve"',
            r"contests\[0\].entrants\[1\].network: must be a base, or a path with a place",
        ),
        (
            'network = "curve@best3"',
            'network = "curve@1.5"',
            r"contests\[0\].entrants\[1\].*t must be a finite number in \[0, 1\]",
        ),
        ('network = "curve@best3"', 'network = "curve@bestof"', r"must be curve@best, curve@best3 or curve@0.5"),
        ("[threats]\nlinf = 0.1\nl1 = 1.5", "", "threats: must be given where there are paths"),
        ("l1 = 1.5\n\n[bases", "l3 = 1.5\n\n[bases", r"threats: there is no norm \(in it\) 'l3'"),
        ("l1 = 1.5\n\n[bases", "l1 = -1\n\n[bases", r"it\['l1'\] must be a finite number"),
        ('entrant = "curve@best3"', 'entrant = "curve@0.1"', r"goals\[0\].entrant: there is no entrant 'curve@0.1'"),
        ("dknn fc1", "dkn fc1", "there is no defence 'dkn'"),
        ("[paths.curve]", "[paths.l1]", "paths.l1: must be no base's name"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path, old, new, message):
    text = (HERE / "paths.toml").read_text()
    assert old in text
    (tmp_path / "wrong.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        studies.load(tmp_path / "wrong.toml")


def test_the_published_study_is_read():
    study = studies.load("connectivity")
    assert study.threats == {"linf": 0.3, "l2": 2.0, "l1": 10.0}
    assert torch.tensor(list(study.threats.values())).min() > 0
