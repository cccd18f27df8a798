"""A study of a sentinel, end to end on handwritten digits."""

import json
from pathlib import Path


def test_a_study_of_a_sentinel_from_raw_data_to_tables(run, tiny):
    call = ("--study", "watching.toml", "--json", "results/watching.json", "--out", "work")
    code, _, err = run(*call, "--report")
    assert code == 0, err
    found = json.loads(Path("results/watching.json").read_text())
    (watched,) = found["watching"]
    rows = {(row["attack"], row["way"]): row for row in watched["rows"]}
    assert rows.keys() == {
        (attack, way) for attack in ("hop-skip-jump", "nes", "square") for way in ("plain", "oars", "slow")
    }
    assert watched["sentinel"]["threshold"] > 0
    for attack in ("hop-skip-jump", "nes", "square"):
        plain, oars = rows[attack, "plain"], rows[attack, "oars"]
        assert plain["n"] == 3
        assert plain["stopped"] <= plain["fell"]
        # Where nothing is refused both ask alike.
        assert (plain["fell"], plain["flagged_first"]) == (oars["fell"], oars["flagged_first"])
    streams = {row["stream"]: row for row in watched["false_alarms"]}
    assert streams["clean"]["n"] == streams["noise"]["n"] == 30
    assert streams["noise"]["flagged"] > streams["clean"]["flagged"]
    assert Path("results/figures/watching-pooled.png").stat().st_size > 5000
    text = Path("results/README.md").read_text()
    assert "### Behind a sentinel: CNN, undefended" in text
    assert "### Honest queries" in text
    again = run(*call)
    assert again[0] == 0
    assert json.loads(Path("results/watching.json").read_text())["watching"] == found["watching"]
