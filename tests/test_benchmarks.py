"""Every benchmark runs at a tiny size, and the report tells what was measured from what was not."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from immunonet import RAILS, Maturation, data, zoo
from immunonet.features import build
from immunonet.features.affine import AffineMap, affine
from immunonet.features.maps import FeatureMap

# The affine maps that were found, by the names of layers: all is about one network.
FOUND: dict[str, AffineMap | None] = {}
HERE = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))

    def find(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield find
    for name in ("common", "loop", "engine", "flocking", "cost", "memory", "innate", "larger", "scaling", "report"):
        sys.modules.pop(name, None)


def narrow(name: str) -> zoo.MnistNet:
    """Return an untrained network of MNIST with a sixteenth of its channels."""
    assert name == "mnist"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = zoo.MnistNet()
        net.conv1, net.conv2, net.conv3, net.conv4 = (
            nn.Conv2d(inner, outer, 3, padding=1) for inner, outer in ((1, 4), (4, 4), (4, 8), (8, 8))
        )
        net.fc1, net.fc2, net.fc3 = nn.Linear(8 * 7 * 7, 16), nn.Linear(16, 16), nn.Linear(16, 10)
    return net.eval()


@pytest.fixture
def digits(monkeypatch, tmp_path):
    """Stand in for MNIST: 200 noisy images of ten classes, and the weights of a narrow network."""
    y = torch.arange(200) % 10
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(10, 1, 28, 28, generator=generator)
    x = (centre[y] + 0.1 * torch.randn(200, 1, 28, 28, generator=generator)).clamp(0, 1)
    images = data.Images(x, y, tuple("0123456789"))
    monkeypatch.setattr(data, "load", lambda *_args, **_options: images)

    def found(function: FeatureMap, cells: torch.Tensor) -> AffineMap | None:
        if function.name not in FOUND:
            FOUND[function.name] = affine(function, cells)
        return FOUND[function.name]

    monkeypatch.setattr(build, "affine", found)
    weights = tmp_path / "weights.safetensors"
    zoo.save_weights(narrow("mnist"), weights)
    monkeypatch.setattr(zoo, "build", narrow)
    return ["--weights", str(weights), "--out", str(tmp_path)]


@pytest.fixture
def memory(load, digits, monkeypatch):
    """The benchmark of memories, whose RAILS evolve few cells."""
    module = load("memory")
    few = Maturation(population=20, generations=1)
    monkeypatch.setattr(module, "RAILS", functools.partial(RAILS, maturation=few))
    return module


def run(module, monkeypatch, tmp_path, *arguments):
    target = tmp_path / "found.json"
    options = [*arguments, "--json", str(target), "--threads", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    module.main()
    return json.loads(target.read_text())["tables"]


def test_engine(load, digits, monkeypatch, tmp_path):
    sizes = [
        "--examples",
        "200",
        "--population",
        "100",
        "--generations",
        "1",
        "--images",
        "5",
        "--timed-images",
        "1",
        "--loop-images",
        "1",
    ]
    only = ["--only", "affine", "agreement", "latency"]
    tables = run(load("engine"), monkeypatch, tmp_path, *digits, *sizes, *only)
    assert tables["affine"]["rows"][0]["what"] == "the loop"
    assert all(row["seconds_per_image"] > 0 for row in tables["affine"]["rows"])
    assert [row["images"] for row in tables["agreement"]["rows"]] == [10] * 7 + [2]
    assert tables["agreement"]["rows"][0]["agreement"] == 1
    assert [row["batch"] for row in tables["latency"]["rows"]] == [1, 8, 21, 64, 256]


def test_stages_add_up(load, digits, monkeypatch, tmp_path):
    engine = load("engine")
    sizes = [
        "--examples",
        "200",
        "--population",
        "100",
        "--generations",
        "1",
        "--images",
        "1",
        "--timed-images",
        "1",
        "--loop-images",
        "1",
    ]
    for row in run(engine, monkeypatch, tmp_path, *digits, *sizes, "--only", "profile")["profile"]["rows"]:
        shares = [v for k, v in row.items() if k not in ("layer", "settings", "seconds_per_image")]
        assert sum(shares) == pytest.approx(1)
        assert all(share >= 0 for share in shares)


def test_rows(load, digits, monkeypatch, tmp_path):
    found = run(
        load("flocking"),
        monkeypatch,
        tmp_path,
        *digits,
        *["--rows", "2000", "--width", "32", "--batch", "8", "--only", "rows"],
    )
    recalls = {row["search"]: row.get("recall_clean") for row in found["rows"]["rows"]}
    assert recalls["immunonet"] == recalls["scikit-learn brute"] == 1


def test_recall_counts_what_is_as_near_as_the_exact_kth(load):
    exact = torch.tensor([[[1.0, 2.0]]])
    assert load("flocking").recall(torch.tensor([[[1.0, 3.0]]]), exact).tolist() == [0.5]


def test_cost(load, monkeypatch, tmp_path):
    found = run(load("cost"), monkeypatch, tmp_path, "--classes", "20", "--only", "classes")
    assert [row["candidates"] for row in found["classes"]["rows"]] == ["1", "None"]


def test_larger(load, monkeypatch, tmp_path):
    sizes = ["--examples", "200", "--side", "24", "--images", "2", "--part", "150", "--generations", "1"]
    found = run(load("larger"), monkeypatch, tmp_path, *sizes, "--out", str(tmp_path), "--calibration", ".1")
    (row,) = found["larger"]["rows"]
    assert row["same_answers"]
    assert row["float32_GiB"] == pytest.approx(200 * 3 * 24 * 24 * 4 / 2**30)
    assert row["peak_GiB"] >= row["before_GiB"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_scaling(load, monkeypatch, tmp_path):
    sizes = ["--examples", "400", "4000", "--classes", "3", "150", "--width", "8", "--batch", "4"]
    sizes += ["--only", "searches", "answers", "model"]
    found = run(load("scaling"), monkeypatch, tmp_path, *sizes)
    assert [(row["examples"], row["classes"]) for row in found["searches"]["rows"]] == [
        (400, 3),
        (4000, 3),
        (4000, 150),
    ]
    assert [row["with_cells"] for row in found["answers"]["rows"]] == [3, 50]
    assert all(row["search_ms"] > 0 for row in found["model"]["rows"])
    assert len(found["model"]["rows"]) == 22


def test_the_model_of_a_search_is_found_again(load):
    known = [
        {"examples": n, "features": 10, "classes": c, "ms_per_antigen": 0.5 * n / 1e5 + 0.01 * c}
        for n in (1000, 100_000)
        for c in (10, 300)
    ]
    assert load("scaling").fitted(known) == pytest.approx((0.5, 0.01))


def test_memory(memory, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "WRITES", 3)
    sizes = ["--examples", "200", "--entries", "500", "--images", "20", "--only", "writes", "lookup"]
    tables = run(memory, monkeypatch, tmp_path, *digits, *sizes)
    assert [row["together"] for row in tables["writes"]["rows"]] == [1, 100, 1000]
    assert [row["entries"] for row in tables["lookup"]["rows"]] == [500, 500]


def test_latency_and_what_joins(memory, digits, monkeypatch, tmp_path):
    sizes = ["--examples", "200", "--images", "8", "--only", "latency", "joining"]
    tables = run(memory, monkeypatch, tmp_path, *digits, *sizes)
    assert [row["queries"] for row in tables["latency"]["rows"]] == ["batch 1", "batch 100"]
    assert all(row["times"] > 0 for row in tables["latency"]["rows"])
    rows = tables["joining"]["rows"]
    assert [row["cells"] for row in rows[:6]] == [0, 0, 4, 4, 4, 4]
    assert rows[0]["true_near"] == rows[0]["other_near"] == 0
    assert all(0 <= row["true_near"] <= 1 for row in rows)


def test_hardening_and_poison(memory, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SHARES", (0.2,))  # of five images, any share is one
    sizes = ["--examples", "200", "--images", "10", "--drift", "50"]
    only = ["--only", "hardening", "poisoning", "drift"]
    tables = {name: table["rows"] for name, table in run(memory, monkeypatch, tmp_path, *digits, *sizes,
                                                          *only).items()}  # fmt: skip
    assert len(tables["hardening"]) == 30
    assert all(0 <= row["correct"] <= row["n"] == 5 for row in tables["hardening"])
    assert [row.get("wrong") for row in tables["poisoning"]] == [None, 0, *[1] * 6]
    assert all(row["undone"] for row in tables["poisoning"][1:4])
    assert [row["written"] for row in tables["drift"]] == [0, 10, 20, 30, 40, 50]
    assert all(row["held"] <= 10 for row in tables["drift"])


def test_innate(load, digits, monkeypatch, tmp_path):
    module = load("innate")
    few = {"maturation": Maturation(population=60, generations=1)}
    place = module.PLACES["MNIST, input"]._replace(settings=few, attack=module.attack(60 / 255, 2))
    monkeypatch.setattr(module, "PLACES", {"MNIST, input": place})
    sizes = ["--examples", "150", "--images", "6", "--attacked", "2"]
    tables = run(module, monkeypatch, tmp_path, *digits, *sizes)
    rows = tables["MNIST, input"]["rows"]
    assert [row["innate"] for row in rows[:-2]] == ["none", *module.LEVELS]
    assert sum(row.get("chosen", False) for row in rows) == 1
    assert all(0 <= row["clean"] <= 1 for row in rows)
    assert [row["attack"] for row in tables["attackers"]["rows"]][::7] == ["none", "worst case"]
    monkeypatch.setattr(sys, "argv", ["innate.py", "--json", str(tmp_path / "found.json"), "--draw", str(tmp_path)])
    module.main()
    assert (tmp_path / "innate-curves.png").stat().st_size > 1000


def test_slope_of_a_power(load):
    assert load("cost").slope([1.0, 10.0, 100.0], [3.0, 300.0, 30000.0]) == pytest.approx(2)


def test_an_unknown_part_is_refused(load, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="growth, classes, got speed"):
        run(load("cost"), monkeypatch, tmp_path, "--only", "speed")


def test_report_says_what_was_not_measured(load):
    report = load("report")
    tables = {"wide": {"rows": [{"features": "recomputed", "fit_peak_GiB": 2.5}], "command": "c"}}
    rows = {row["line"]: row for row in report.targets(tables)}
    assert rows["50,176-wide fit of 60,000: peak memory"]["reached"] == "not reached"
    assert rows["50,176-wide fit of 60,000: peak memory"]["figure"] == "2.5"
    assert rows["block 1, ten generations, against the loop"]["reached"] == "not measured"
    assert rows["VGG16 setting on a GPU: 10,000 images"]["figure"] == "not measured"


def test_floors_stand_beside_what_was_measured(load):
    report = load("report")
    rates = {"rows": [{"matrix_product_FLOPS": 1e12, "copy_bytes_per_second": 1e6}]}
    shares = {row["stage"]: 0.25 for row in report.affine()}
    profile = {"rows": [{"layer": "affine", "settings": report.FULL, "seconds_per_image": 2.0} | shares]}
    flocking = report.floors({"rates": rates, "profile": profile}, "affine", report.affine())[0]
    assert flocking["measured_ms"] == pytest.approx(500)
    assert flocking["floor_ms"] == pytest.approx(1e3 * 4 * 20_000 * 784 / 21 / 1e6)
    assert report.floors({}, "pool1", report.block1())[-1]["measured_over_floor"] is None


def test_the_document_holds_every_table(load, tmp_path, monkeypatch):
    where = {"cpu": "a cpu", "threads": 2, "load_average": 1.0, "torch": "2", "commit": "abc"}
    table = {
        "rows": [{"size": "T", "slope": 1.0}],
        "settings": {"seed": 0, "repeats": 3},
        "environment": where,
        "command": "run me",
    }
    (tmp_path / "cost.json").write_text(json.dumps({"tables": {"growth": table}}))
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path), "--to", str(tmp_path / "out.md")])
    load("report").main()
    text = (tmp_path / "out.md").read_text()
    assert "### growth\n\n`run me`\n\n| size | slope |" in text
    assert "not measured" in text
