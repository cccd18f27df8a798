"""`immunonet evaluate --protocol` on digits, and the document about what it found."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest

from immunonet import zoo
from immunonet.attacks import PGD
from immunonet.evaluation import sanity, stream
from immunonet.evaluation.records import Check
from immunonet.evaluation.suite import PROTOCOLS
from immunonet.report import figures, robustness, tables

COMMAND = [
    "--protocol", "quick", "--dataset", "digits", "--weights", "digits.safetensors", "--eps", "0.2",
    "--n", "6",
]  # fmt: skip
RAILS_20 = "rails input population=20 generations=1 voice=.25"


def cell(record, attack):
    (row,) = (row for row in record["results"] if (row["defence"], row["attack"]) == ("rails", attack))
    return tables.share(row, 2)


@pytest.fixture
def run(command, monkeypatch, digits_net):
    """Return a function that runs `immunonet evaluate`, its quick protocol cut short, in tmp_path."""
    budget = {
        "steps": 2, "iterations": 1, "black_box": 2, "queries": 3, "decisions": 1, "evaluations": 2, "noise": 1,
        "seeds": 1, "row_seeds": 1, "finalists": 1, "checks": 2,
    }  # fmt: skip
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], **budget))
    zoo.save_weights(digits_net, "digits.safetensors", half=False)
    return functools.partial(command, "evaluate")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their figures, which tests of the pages draw."""
    for name in ("accuracy_curves", "loss_curves"):
        monkeypatch.setattr(figures, name, lambda values: None)
    monkeypatch.setattr(figures, "svg_uri", lambda figure: "data:,")


def test_three_defences_are_attacked_and_the_document_is_written(run, undrawn, unchecked, monkeypatch):
    specs = ("--defence", "cnn", "--defence", "dknn tuned metric=cosine", "--defence", RAILS_20)
    own = (*specs, "--transfer", "digits=digits.safetensors")
    code, out, err = run(*COMMAND, *own, "--json", "r.json")
    assert code == 0, err
    record = json.loads(Path("r.json").read_text())
    worst = {row["defence"]: row for row in record["results"] if row["attack"] == "worst-case"}
    assert list(worst) == ["cnn", "dknn-tuned", "rails"]
    assert worst["rails"]["settings"]["net"] == worst["rails"]["settings"]["model"] == "digits"
    assert worst["rails"]["knows"] == "defence"
    assert worst["rails"]["seeds"] == [1]
    assert worst["rails"]["settings"]["voice"] == 0.25
    assert "voice" not in worst["dknn-tuned"]["settings"]
    attacks = {row["attack"] for row in record["results"] if row["defence"] == "rails"}
    assert {"transfer-1", "unrolled", "square", "hop-skip-jump"} <= attacks
    assert len({(row["defence"], row["attack"]) for row in record["results"]}) == len(record["results"])
    assert all(row["settings"]["slice"] == {"sample": [6, 360], "seed": 0} for row in record["results"])
    assert [one["defence"] for one in record["evaluations"]] == ["cnn", "dknn-tuned", "rails"]
    assert "neighbours" in worst["dknn-tuned"]["settings"]["tuning"]
    assert "plan for rails: about" in err
    assert f"{worst['rails']['accuracy']:.4f}" in out
    cnn, dknn, rails = sorted(path.name for path in Path("evaluation").glob("*.html"))
    assert cnn == "cnn.html"
    assert dknn.startswith("dknn-input-tuned-metric-cosine")
    assert rails.startswith("rails-input-population-20-generations-1-voice-0.25")

    tried = ["--dataset", "digits", "--weights", "digits.safetensors", "--split", "validation", "--n", "10"]
    assert run(*tried, "--defence", RAILS_20, "--attack", "none", "--json", "v.json", "--out", "v")[0] == 0
    robustness.main(
        ["r.json", "--choices", "v.json", "--note", "Small ones.", "--json", "all.json", "--doc", "docs/robustness.md"]
    )
    merged = json.loads(Path("all.json").read_text())
    assert merged["results"] == record["results"]
    (rails,) = (row for row in merged["choices"][0]["results"] if row["defence"] == "rails")
    document = Path("docs/robustness.md").read_text()
    assert document.startswith("# Under attacks that know the defence")
    for row in worst.values():
        assert f"**{row['accuracy']:.3f} (" in document
    assert "`immunonet evaluate --protocol quick --dataset digits" in document
    assert "digits, linf 0.2, 6 images" in document
    assert f"| RAILS, T 20, G 1 | input | euclidean | 0.25 | none | base | 10 | {rails['accuracy']:.3f} (" in document
    assert "\nSmall ones.\n" in document
    for name in ("accuracy", "abstention"):
        assert f"(figures/robustness-{name}.png)" in document
        assert Path(f"docs/figures/robustness-{name}.png").read_bytes().startswith(b"\x89PNG")
    rails = record["evaluations"][2]
    level = next(level for level in rails["abstention"] if level["level"] == 0.2)
    assert f"| 0.2 | {level['accepted']:.3f} | {level['right']:.3f} | {level['held']:.3f} |" in document
    assert f"differs from its network on {rails['disagreement']['none']:.3f}" in document
    Path("docs/robustness.md").unlink()
    monkeypatch.setattr(robustness, "figures", lambda record: {})  # what takes longest was tried above
    robustness.main(["all.json", "r.json", "--json", "twice.json", "--doc", "twice.md"])
    assert "tried on validation" not in Path("twice.md").read_text()
    twice = json.loads(Path("twice.json").read_text())
    assert twice["results"] == 2 * record["results"]
    assert [run["rows"] for run in twice["runs"]] == [
        [0, len(record["results"])],
        [len(record["results"]), 2 * len(record["results"])],
    ]
    # The same without a voice is another case.
    silent = copy.deepcopy(record)
    for row in silent["results"]:
        row["settings"].pop("voice", None)
    names = [case["title"] for case in robustness.cases(robustness.merge([record, silent, record]))]
    assert names[2:] == ["RAILS, input, T 20, G 1, voice 0.25", "RAILS, input, T 20, G 1"]
    assert "## RAILS less one of its parts" not in document
    lesser = copy.deepcopy(record)
    for one in (one for one in lesser["evaluations"] if one["defence"] == "rails"):
        one["ablations"] = [
            worst["rails"] | {"defence": "rails without mutation", "attack": attack, "accuracy": accuracy}
            for attack, accuracy in (("none", 0.75), ("worst-case", 0.25))
        ]
    lines = robustness.document(robustness.merge([lesser]), "x").split("\n")
    (line,) = (line for line in lines if "| without mutation |" in line)
    assert "| 0.750 (" in line
    assert "| 0.250 (" in line
    assert f"| whole | {cell(record, 'none')} | {cell(record, 'worst-case')} |" in "\n".join(lines)
    robustness.main(["--json", "all.json", "--doc", "again.md"])
    assert Path("again.md").read_text().replace("all.json", "") == document.replace("all.json", "")


def test_several_threats_are_told_in_table_page_record_and_document(run, undrawn, monkeypatch):
    monkeypatch.setattr(robustness, "figures", lambda record: {})
    # Here it matters only where the checks of a threat are told.
    sound = Check("sound", True, "as can be")
    monkeypatch.setattr(sanity, "_of_threat", lambda campaign, threat: ([sound], {}))
    command = [*COMMAND[:6], "--n", "5", "--threat", "linf=51/255", "--threat", "l1=2"]
    specs = ("--defence", "cnn", "--defence", "dknn input tuned metric=cosine neighbours=5")
    code, out, err = run(*command, *specs, "--json", "r.json")
    assert code == 0, err
    record = json.loads(Path("r.json").read_text())
    threats = {"linf": 0.2, "l1": 2.0}
    for name in ("cnn", "dknn-tuned"):
        rows = [row for row in record["results"] if row["defence"] == name]
        assert len({(row["norm"], row["attack"]) for row in rows}) == len(rows)
        worst = {row["norm"]: row for row in rows if row["attack"] == "worst-case"}
        assert {norm: row["eps"] for norm, row in worst.items()} == threats | {"union": 2.0}
        assert worst["union"]["settings"]["threats"] == threats
        *each, whole = (row["accuracy"] for row in worst.values())
        assert 1 - sum(1 - one for one in each) - 1e-9 <= whole <= min(each)
        (line,) = (line for line in out.splitlines() if f" {name} " in line)
        assert [f"{one:.4f}" in line for one in (*each, whole)] == [True] * 3
    head = out.splitlines()[1]
    assert head.index("linf 0.2") < head.index("l1 2") < head.index("union")
    assert "l1 pgd: " in err
    page = Path("evaluation/cnn.html").read_text()
    assert "in the worst case of 2 threats" in page
    assert "by at most 0.2 (linf) or 2 (l1)" in page
    tuned = worst["union"]["settings"]["tuning"]
    assert tuned["knowing"] is True
    # The document has a case for each threat and one for all.
    robustness.main(["r.json", "--json", "all.json", "--doc", "doc.md"])
    cases = robustness.cases(robustness.merge([record]))
    ends = ["linf 0.2", "l1 2", "linf 0.2 or l1 2"]
    assert [case["where"] for case in cases] == 2 * [f"digits, {end}, 5 images" for end in ends]
    by = {(case["kind"], case["where"]): case for case in cases}
    assert len(by) == 6
    for case in cases:
        (row,) = (
            row for row in record["results"]
            if row["attack"] == "worst-case" and row["defence"] == case["kind"] and row["norm"] == case["worst"]["norm"]
        )  # fmt: skip
        assert case["worst"] == row
        left = [image["worst"] for image in case["evaluation"]["per_example"]]
        assert sum(left) / 5 == pytest.approx(row["accuracy"])
    both = by["cnn", "digits, linf 0.2 or l1 2, 5 images"]
    pgds = [row for row in record["results"] if (row["defence"], row["attack"]) == ("cnn", "pgd")]
    assert both["paper"]["accuracy"] == min(row["accuracy"] for row in pgds)
    assert both["paper"]["attack"] == f"{both['paper']['norm']} pgd"
    names = {check["name"] for case in cases for check in case["evaluation"]["checks"]}
    assert {check["name"] for one in record["evaluations"] for check in one["checks"]} == names
    whole, _, details = Path("doc.md").read_text().partition("<summary>One threat of several</summary>")
    folded = details.split("</details>")[0]
    lines = [f"| digits, {end}, 5 images | CNN, undefended |" for end in ends]
    assert [line in whole for line in lines] == [False, False, True]
    assert [line in folded for line in lines] == [True, True, False]


def test_a_sentinel_watches_and_its_section_is_told(run, undrawn, unchecked, monkeypatch):
    monkeypatch.setattr(stream, "WAYS", {"plain": stream.WAYS["plain"]})
    watch = ("--sentinel", "input neighbours=2 window=50 false_alarm=.05", "--black-box", "1")
    code, out, err = run(*COMMAND, "--defence", "cnn", "--n", "4", *watch, "--json", "r.json")
    assert code == 0, err
    (one,) = json.loads(Path("r.json").read_text())["evaluations"]
    told = one["sentinel"]
    assert {name: told["settings"][name] for name in ("space", "neighbours", "window", "false_alarm")} == {
        "space": "input", "neighbours": 2, "window": 50, "false_alarm": 0.05,
    }  # fmt: skip
    assert {row["attack"] for row in told["attacks"]} == {"square", "nes", "hop-skip-jump"}
    assert "cnn behind the sentinel" in out
    assert "Honest queries" in out
    assert "The sentinel (input) compares a query with the last 50" in Path("evaluation/cnn.html").read_text()


@pytest.mark.parametrize(
    ("sentinel", "told"),
    [
        ("", "--sentinel must be SPACE [KEY=VALUE ...]"),
        ("window=3", "--sentinel must be SPACE"),
        ("pooled 3", "'3' must be KEY=VALUE"),
        ("pooled windows=3", "no setting 'windows'; nearest: window"),
        ("pooled window=9 window=9", "window is given twice"),
        ("pooled window=2", "window must be"),
        ("pooled neighbours=many", "neighbours must be"),
        ("pooled false_alarm=2", "false_alarm must be"),
        ("pooled log=x", "no setting 'log'"),
        ("fc7 window=50 false_alarm=.05", "'fc7' is no submodule of the model"),
        ("pooled", "clean must hold at least 10,001 inputs"),
    ],
)
def test_a_wrong_sentinel_is_told_before_any_work(run, sentinel, told):
    code, out, err = run(*COMMAND, "--defence", "cnn", "--sentinel", sentinel)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1
    assert not list(Path("evaluation").glob("*/*"))


def test_a_file_that_holds_no_evaluation_is_refused():
    with pytest.raises(ValueError, match="run 0 holds no evaluations"):
        robustness.merge([{"results": []}])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--attack", "pgd"], "--attack does not go with --protocol"),
        (["--seeds", "3"], "--seeds does not go with --protocol"),
        (["--protocol", "slow"], "--protocol must be one of 'quick', 'standard', 'full', got 'slow'"),
        (["--defence", "wall"], "there is no defence 'wall'; there are cnn, control, dknn, path, rails"),
        (["--defence", "rails conv9"], "layers='conv9' is no submodule of the model; nearest names: conv"),
        (["--defence", "dknn metric=city"], "metric must be one of"),
        (["--transfer", "digits=none.safetensors"], "none.safetensors"),
        (["--minutes", "-1"], "minutes must be"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, arguments, told):
    code, out, err = run(*COMMAND, "--defence", "cnn", *arguments)
    assert code == 2
    assert told in err
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--threat", "linf"], "--threat must be NORM=EPS, such as l2=0.5, got 'linf'"),
        (["--threat", "l7=1"], "--threat must be NORM=EPS, such as l2=0.5, got 'l7=1'; nearest: l"),
        (["--threat", "l2=much"], "--threat l2 must be a number such as 0.1 or 60/255, got 'much'"),
        (["--threat", "l2=1", "--threat", "l2=2"], "--threat l2 must be given once, got 'l2=2' as well"),
        (["--threat", "l2=1", "--eps", "0.1"], "--eps does not go with --threat"),
        (["--threat", "l2=1", "--norm", "l2"], "--norm does not go with --threat"),
        (["--threat", "l2=1", "--threat", "linf=1.5"], "threats['linf'] must be a finite number in [0, 1], got 1.5"),
        (["--threat", "l2=-1"], "must be a finite number in [0"),
        (["--norm", "l9"], "--norm must be one of 'linf', 'l2', 'l1', got 'l9'"),
    ],
)
def test_a_wrong_threat_is_told_in_one_line(run, arguments, told):
    code, out, err = run(
        *(COMMAND[:6] if "--threat" in arguments else COMMAND), "--n", "4", "--defence", "cnn", *arguments
    )
    assert code == 2
    assert told in err
    assert out == ""


@pytest.mark.parametrize(
    "option", [("--minutes", "3"), ("--black-box", "5"), ("--threat", "l2=1"), ("--sentinel", "pooled")]
)
def test_options_of_the_protocol_need_it(run, option):
    code, _, err = run("--dataset", "digits", "--weights", "digits.safetensors", *option)
    assert code == 2
    assert f"{option[0]} needs --protocol" in err


def test_those_of_one_name_have_pages_and_rows_of_their_own(run, undrawn, unchecked, monkeypatch):
    specs = ("--defence", "dknn neighbours=5", "--defence", "dknn neighbours=20 metric=euclidean")
    code, out, err = run(*COMMAND, *specs, "--json", "r.json")
    assert code == 0, err
    record = json.loads(Path("r.json").read_text())
    names = ["dknn neighbours=5", "dknn neighbours=20 metric=euclidean"]
    assert [one["defence"] for one in record["evaluations"]] == names
    for name, k in zip(names, (5, 20), strict=True):
        rows = [row for row in record["results"] if row["defence"] == name]
        assert len({row["attack"] for row in rows}) == len(rows) > 5
        assert {row["settings"]["neighbours"] for row in rows} == {k}
        assert name in out
    assert len(list(Path("evaluation").glob("*.html"))) == 2
    # The document tells them apart as well.
    titles = [case["title"] for case in robustness.cases(robustness.merge([record]))]
    assert len(set(titles)) == 2
    assert all(title.startswith("DkNN") for title in titles)
    # The same command makes no attack again.
    kept = Path("evaluation/parts.jsonl").read_text()
    monkeypatch.setattr(PGD, "__call__", None)
    assert run(*COMMAND, *specs, "--json", "again.json")[0] == 0
    assert Path("evaluation/parts.jsonl").read_text() == kept
    assert json.loads(Path("again.json").read_text())["results"] == record["results"]


def test_results_come_from_test_images(run, undrawn, unchecked):
    code, _, err = run(*COMMAND, "--defence", "cnn", "--split", "validation", "--json", "r.json")
    assert code == 0, err
    with pytest.raises(ValueError, match=r"results come from test images, got a run on others: .*--split validation"):
        robustness.main(["r.json", "--json", "all.json", "--doc", "doc.md"])
