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
from torch import Tensor, nn

from immunonet import RAILS, DkNN, Maturation, data, zoo
from immunonet.attacks import PGD
from immunonet.cli import demo as demo_module

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command: Run, monkeypatch: Any) -> Run:
    """Return a function that runs a small version of the demo in tmp_path and returns (code, stdout, stderr)."""
    monkeypatch.setattr(demo_module, "TRAINING", {"epochs": 2, "batch_size": 64})
    monkeypatch.setattr(demo_module, "DKNN_LAYERS", ("input",))
    monkeypatch.setattr(demo_module, "DKNN_NEIGHBOURS", (5, 75))
    monkeypatch.setattr(demo_module, "RAILS_LAYERS", ("input",))
    monkeypatch.setattr(demo_module, "RAILS_NEIGHBOURS", (1,))
    monkeypatch.setattr(demo_module, "SOFT_TEMPERATURES", (0.25,))
    monkeypatch.setattr(demo_module, "Maturation", lambda **given: Maturation(**given, population=100, generations=2))
    monkeypatch.setattr(demo_module, "RUNS", 2)
    monkeypatch.setattr(demo_module, "one_thread", lambda: None)  # other tests keep their threads
    monkeypatch.setattr(demo_module, "VALIDATION", 100)
    load = data.load
    monkeypatch.setattr(demo_module.data, "load", lambda name, split: load(name, split)[: 600 : SKIP[split]])

    return functools.partial(command, "demo")


SKIP = {"train": 1, "test": 6}
N = 60


def rows_of(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text())["results"]
    return rows


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds_per_image"} for row in rows]


def test_demo_keeps_the_contract_and_repeats_itself(run: Run) -> None:
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
        assert f"{100 * row['accuracy']:.1f} %" in out
    page = Path("here/report.html").read_text()
    assert page.count("<article>") == sum(demo_module.SHOWN)
    assert f"<b>{100 * rows[-1]['accuracy']:.1f}</b>" in page
    meaning = re.sub(r"\s+", " ", out).partition("knows the CNN alone, and takes it from ")[2]
    assert meaning.startswith(f"{100 * rows[0]['accuracy']:.1f} % to {100 * rows[1]['accuracy']:.1f} %")

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


class Says(nn.Module):
    """A stand-in for a defence that always gives the same labels."""

    def __init__(self, *labels: int) -> None:
        super().__init__()
        self.labels = torch.tensor(labels)

    def predict(self, x: Tensor) -> Tensor:
        return self.labels


def test_the_best_candidate_is_the_first_of_the_most_often_right() -> None:
    x, y = torch.zeros(4, 1), torch.tensor([0, 1, 2, 3])
    candidates: list[Any] = [Says(0, 1, 0, 0), Says(0, 1, 2, 0), Says(1, 1, 2, 3)]
    chosen, notes = demo_module.best(iter(candidates), [x, x], y, 0)
    assert chosen is candidates[1]
    assert notes == {"tuning": {"images": 4, "candidates": 3, "accuracy": 0.75}}


def test_the_strongest_surrogate_hurts_most(monkeypatch: Any) -> None:
    monkeypatch.setattr(demo_module, "SOFT_TEMPERATURES", (2.0, 0.5))
    images = data.load("digits", "train")[:400]
    net = zoo.build("digits")
    dknn = DkNN(net, "input", neighbours=5).fit(images.x, images.y)
    examples, pgd = (images.x[:40], images.y[:40]), PGD(eps=0.3, step=0.05, iterations=10)
    soft, notes = demo_module.strongest(dknn, pgd, examples, 0)
    hurt = float((dknn.predict(pgd(soft, *examples).adversarials) == examples[1]).float().mean())
    assert notes["accuracy"] == pytest.approx(hurt)
    assert notes["temperatures"] == soft.temperatures
    automatic = demo_module.SoftNeighbours(dknn).temperatures[0]
    others = [0.5 * automatic, 2 * automatic]
    assert soft.temperatures[0] in others
    for temperature in others:
        other = demo_module.SoftNeighbours(dknn, temperature=temperature)
        attacked = pgd(other, *examples).adversarials
        assert notes["accuracy"] <= demo_module.accuracy(dknn, [attacked], examples[1], 0)


def test_candidates_cover_the_grids() -> None:
    net = zoo.build("digits")
    found = list(demo_module.dknn_candidates(net))
    assert len(found) == len({(d.layers, d.neighbours, d.metric) for d in found if isinstance(d, DkNN)})
    assert len(found) == 2 * len(demo_module.DKNN_LAYERS) * len(demo_module.DKNN_NEIGHBOURS)
    rails = list(demo_module.rails_candidates(net, 4))
    expected = [(layer, k) for layer in demo_module.RAILS_LAYERS for k in demo_module.RAILS_NEIGHBOURS]
    assert [(d.layers[0], d.maturations[0].neighbours) for d in rails if isinstance(d, RAILS)] == expected


def test_one_thread_is_used() -> None:
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(2)
        demo_module.one_thread()
        assert (torch.get_num_threads(), numba.get_num_threads()) == (1, 1)
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def test_bad_input(run: Run) -> None:
    code, out, err = run("--eps", "1.5")
    assert (code, out) == (2, "")
    assert "--eps must be a finite number in [0, 1], got 1.5" in err
    assert not Path("demo").exists()
