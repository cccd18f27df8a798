from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from torch import nn

from immunonet import DkNN, data, zoo
from immunonet.attacks import PGD, SoftNeighbours
from immunonet.cli import common
from immunonet.cli import demo as demo_module
from immunonet.defences.spec import Spec
from immunonet.evaluation.bench import Bench
from immunonet.evaluation.lab import Lab, Measurement, Tables

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command: Run, monkeypatch: Any) -> Run:
    """Return a function that runs a small version of the demo in tmp_path and returns (code, stdout, stderr)."""
    monkeypatch.setattr(demo_module, "TRAINING", {"epochs": 2, "batch_size": 64})
    tried = {"dknn": ["dknn neighbours=5", "dknn neighbours=75"], "rails": ["rails population=50 generations=1"]}
    monkeypatch.setattr(demo_module, "CANDIDATES", tried)
    monkeypatch.setattr(demo_module, "SOFTER", (0.25,))
    monkeypatch.setattr(demo_module, "PGD", lambda **how: PGD(**how | {"iterations": 10}))
    monkeypatch.setattr(demo_module, "RUNS", 2)
    monkeypatch.setattr(demo_module, "one_thread", lambda: None)  # other tests keep their threads
    monkeypatch.setattr(demo_module, "VALIDATION", 80)
    load = data.load
    monkeypatch.setattr(demo_module.data, "load", lambda name, split: load(name, split)[: 400 : SKIP[split]])

    return functools.partial(command, "demo")


SKIP = {"train": 1, "test": 10}
N = 36


def rows_of(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text())["results"]
    return rows


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds_per_image"} for row in rows]


def test_demo_keeps_the_contract_and_repeats_itself(run: Run, monkeypatch: Any) -> None:
    code, out, err = run("--out", "here", "--json", "here/results.json", "--eps", 0.2)
    assert code == 0
    assert "choosing the settings of rails on validation images" in err
    record = json.loads(Path("here/results.json").read_text())
    assert set(record) == {"results", "environment", "command"}
    assert record["command"] == "immunonet demo --out here --json here/results.json --eps 0.2"
    rows = record["results"]
    assert [(row["defence"], row["attack"], row["knows"]) for row in rows] == [
        ("cnn", "none", "base"),
        ("cnn", "pgd", "base"),
        *((kind, *attack) for kind in ("dknn", "rails") for attack in DEFENCE_ATTACKS),
    ]
    for row in rows:
        assert (row["dataset"], row["n"], row["norm"]) == ("digits", N, "linf")
        assert row["eps"] == (0.0 if row["attack"] == "none" else 0.2)
        assert row["accuracy"] == pytest.approx(row["correct"] / N)
        assert 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1
        assert row["seeds"] == ([0, 1] if row["defence"] == "rails" else [])
        assert {"model", "layers", "slice"} <= set(row["settings"])
        assert (row["foreign"] is None) == (row["defence"] == "cnn")
    assert "attack" in rows[1]["settings"]
    # What was printed and drawn is what was written.
    for row in rows:
        assert f"{row['accuracy']:.4f}" in out
    page = Path("here/report.html").read_text()
    assert page.count("<article>") == sum(demo_module.SHOWN)
    assert f"<b>{100 * rows[-1]['accuracy']:.1f}</b>" in page
    meaning = re.sub(r"\s+", " ", out).partition("knows the CNN alone, and takes it from ")[2]
    assert meaning.startswith(f"{100 * rows[0]['accuracy']:.1f} % to {100 * rows[1]['accuracy']:.1f} %")

    # Drawn again it is not.
    monkeypatch.setattr(demo_module.report, "write", lambda *_, **__: None)
    written = Path("here/digits.safetensors").stat().st_mtime_ns
    assert run("--out", "here", "--json", "again.json", "--eps", 0.2)[0] == 0
    assert Path("here/digits.safetensors").stat().st_mtime_ns == written  # the network was used again
    assert timeless(rows_of("again.json")) == timeless(rows)


DEFENCE_ATTACKS = (("none", "base"), ("pgd", "base"), ("soft-knn", "defence"))


def test_network_is_trained_anew_only_if_it_must(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo_module, "TRAINING", {"epochs": 1, "batch_size": 64})
    images = data.load("digits", "train")
    training, validation, path = images[:256], images[256:300], tmp_path / "digits.safetensors"
    net = demo_module.network(training, validation, path, 0)
    again = demo_module.network(training, validation, path, 0)
    x = validation.x
    assert torch.equal(net(x), again(x))
    trained: list[int] = []
    train = zoo.train
    monkeypatch.setattr(zoo, "train", lambda *a, **k: trained.append(k["seed"]) or train(*a, **k))
    demo_module.network(training, validation, path, 0)
    assert trained == []
    demo_module.network(training, validation, path, 5)
    assert trained == [5]
    path.write_bytes(path.read_bytes()[:-5])
    assert not torch.equal(demo_module.network(training, validation, path, 5)(x), net(x))
    assert trained == [5, 5]


@pytest.fixture
def tables(digits_net: nn.Module) -> Tables:
    """Tables of a lab as the demo's, of 60 images to choose on."""
    images = data.load("digits", "train")
    splits = {"training": images[:600], "tuning": images[600:660], "validation": images[660:700]}
    lab = Lab(
        {"digits": digits_net}, splits,
        resolve=common.resolve_layer, told={"dataset": "digits", "model": "digits"}, where=lambda split, n: [0, n],
        senses=True,
    )  # fmt: skip
    return Tables(Bench(lab, None), chunk=60)


ATTACK = PGD(eps=0.3, step=0.05, iterations=5)


def shares(tables: Tables, *texts: str, **how: Any) -> list[float]:
    specs = [Spec.parse(text) for text in texts]
    asked = [Measurement(spec=spec, base="digits", split="tuning", images=60, **how) for spec in specs]
    return [one.row.accuracy for one in tables.measure(asked)]


def test_the_best_candidate_is_the_first_of_the_most_often_right(tables: Tables, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo_module, "SOFTER", (1.0,))
    texts = [f"dknn neighbours={k}" for k in (600, 300, 5, 75)]
    texts.insert(3, "dknn neighbours=5 false_alarm=.1")  # which answers like the one before it
    clean, attacked = shares(tables, *texts), shares(tables, *texts, attack="pgd", method=ATTACK)
    means = [(a + b) / 2 for a, b in zip(clean, attacked, strict=True)]
    assert means[2] == means[3] == max(means) > means[0]
    chosen = demo_module.best(tables, [Spec.parse(text) for text in texts], ATTACK, 0)
    assert chosen.spec == Spec.parse(texts[2])
    assert chosen.tuning == {"images": 60, "candidates": 5, "accuracy": pytest.approx(max(means))}


def test_the_strongest_surrogate_hurts_most(tables: Tables, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo_module, "SOFTER", (2.0, 0.5, 8.0))
    text = "dknn neighbours=5"
    chosen = demo_module.best(tables, [Spec.parse(text)], ATTACK, 0)
    hurt = {
        softer: shares(tables, text, attack="soft-knn", method=ATTACK, through="soft-knn", softer=softer)[0]
        for softer in demo_module.SOFTER
    }
    assert len(set(hurt.values())) > 1
    assert hurt[chosen.softer] == min(hurt.values())
    # As it is by hand.
    lab = tables.lab
    dknn = DkNN(lab.nets["digits"], "input", neighbours=5)
    dknn.fit(lab.training.x, lab.training.y, calibration=lab.images("validation", slice(None)))
    soft, (x, y) = SoftNeighbours(dknn), lab.images("tuning", slice(None))
    soft.temperatures = [chosen.softer * temperature for temperature in soft.temperatures]
    right = dknn.predict(ATTACK(soft, x, y).adversarials) == y
    assert float(right.float().mean()) == pytest.approx(hurt[chosen.softer])


def test_candidates_cover_the_grids() -> None:
    dknn, rails = ([Spec.parse(text) for text in demo_module.CANDIDATES[kind]] for kind in ("dknn", "rails"))
    assert len({spec.text for spec in dknn}) == len(dknn) == 4 * 2 * 3
    assert {spec.layers for spec in dknn} > {("input",), ("conv1", "pool", "fc1")}
    expected = {((layer,), k) for layer in ("input", "conv1") for k in (5, 10, 20)}
    assert {(spec.layers, spec.settings["neighbours"]) for spec in rails} == expected
    assert len(rails) == len(expected)
    net = zoo.build("digits")
    for spec in (*dknn, *rails):
        spec.made(net, common.resolve_layer, 1000)


def test_one_thread_is_used() -> None:
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(2)
        demo_module.one_thread()
        assert (torch.get_num_threads(), numba.get_num_threads()) == (1, 1)
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def test_explore_opens_the_page_instead(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = pytest.importorskip("immunonet.explorer", exc_type=ImportError)
    built: dict[str, Any] = {}
    # Put there before they are asked for, which would import gradio, as `require` would.
    monkeypatch.setattr(demo_module, "require", lambda module, extra: None)
    parts = vars(explorer)
    monkeypatch.setitem(parts, "build", lambda defence, **how: built.update(how, defence=defence) or "page")
    monkeypatch.setitem(parts, "launch", lambda page, port, ready: ready(f"http://{page}:{port}"))
    code, out, _ = run("--explore", "--port", 7, "--out", "here")
    assert (code, out) == (0, "explorer: http://page:7 (Ctrl-C ends it)\n")
    assert not Path("here/report.html").exists()
    assert built["defence"].model is built["base"]
    assert built["sentinel"].threshold > 0
    assert len(built["images"]) == N


def test_bad_input(run: Run) -> None:
    code, out, err = run("--eps", "1.5")
    assert (code, out) == (2, "")
    assert "--eps must be a finite number in [0, 1], got 1.5" in err
    assert not Path("demo").exists()
