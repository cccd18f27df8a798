"""A study of closed-loop control, end to end on handwritten digits."""

import dataclasses
import json
from pathlib import Path

from immunonet.evaluation.suite import PROTOCOLS


def test_a_study_of_control_from_raw_data_to_tables(run, tiny, monkeypatch):
    spent = {"steps": 2, "iterations": 1, "noise": 2, "queries": 3, "decisions": 1, "evaluations": 1, "checks": 2}
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], **spent))
    call = ("--study", "healing.toml", "--json", "results/healing.json", "--report", "--out", "work")
    code, _, err = run(*call)
    assert code == 0, err
    found = json.loads(Path("results/healing.json").read_text())
    main = [row for row in found["results"] if row["settings"]["experiment"] == "main"]
    rows = {(row["defence"], row["attack"]): row for row in main}
    assert rows["linear", "none"]["settings"]["rank"] == 12
    assert rows["linear", "pgd"]["accuracy"] >= rows["cnn", "pgd"]["accuracy"]
    assert rows["behind", "none"]["accuracy"] > 0.5
    assert rows["autoencoder", "none"]["settings"]["manifold"]["eps"] == 0.15
    curve = [row for row in found["results"] if row["settings"]["experiment"] == "rank"]
    assert [row["settings"]["rank"] for row in curve if row["attack"] == "pgd"] == [4, 64]
    (healed,) = found["healing"]
    far = {(row["images"], row["when"]): row["mean"][0] for row in healed["rows"]}
    assert far["clean", "after"] < far["clean", "before"] < far["attacked", "before"]
    assert healed["rows"][0]["n"] == 20
    assert Path("results/figures/healing-healed.png").stat().st_size > 5000
    plain, controlled = found["contests"][0]["entrants"]
    attacks = {attack for _, attack, *_ in controlled["attacks"]}
    assert {"frozen", "inside", "direct-pgd", "stealthy"} <= attacks
    assert "Attacks that know of it" in Path("results/README.md").read_text()
    assert len(list(Path("work/fitted").glob("control-*/defence.json"))) == 1
    assert plain["n"] == 4
