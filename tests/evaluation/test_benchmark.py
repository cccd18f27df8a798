"""Several defences under the same attacks, in parts that are kept."""

import json

import pytest
import torch
from torch import nn

from immunonet.attacks import ASK, PGD, SoftCount, SoftNeighbours
from immunonet.defences.dknn import DkNN
from immunonet.defences.rails import RAILS, Maturation
from immunonet.evaluation import benchmark
from immunonet.evaluation.benchmark import Benchmark

SETTINGS = {"dataset": "bands", "model": "linear"}
MATURATION = Maturation(population=20, neighbours=2, generations=1)


@pytest.fixture(scope="module")
def problem():
    """Two bands of the unit square, apart by .2, and a network that separates them exactly in the middle."""
    x = torch.rand(120, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(120) % 2
    x[:, 0] = torch.where(y == 0, 0.4 * x[:, 0], 0.6 + 0.4 * x[:, 0])
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[-20.0, 0.0], [20.0, 0.0]]))
        base.bias.copy_(torch.tensor([10.0, -10.0]))
    return base, x, y


@pytest.fixture
def make(problem, tmp_path):
    base, x, y = problem

    def make(settings=None, chunk=20, **changes):
        arguments = {
            "base": base,
            "repertoire": (x[:60], y[:60]),
            "calibration": (x[60:80], y[60:80]),
            "test": (x[80:], y[80:]),
            "pgd": PGD(eps=0.2, step=0.1, iterations=4, random_start=False),
            "seeds": range(3),
            "chunk": chunk,
        }
        return Benchmark(tmp_path / "run", settings or SETTINGS, **arguments | changes)

    return make


def test_the_undefended_network_is_right_as_far_as_the_boundary_is(problem, make):
    base, x, _ = problem
    found = make().run("cnn", None, base, ["none", "fgsm", "pgd"])
    safe = float(((x[80:, 0] - 0.5).abs() > 0.2).float().mean())
    assert [found[a].row.accuracy for a in ("none", "fgsm", "pgd")] == pytest.approx([1, safe, safe])
    row = found["pgd"].row
    assert (row.dataset, row.defence, row.knows, row.eps, row.norm, row.n) == ("bands", "cnn", "base", 0.2, "linf", 40)
    assert row.seeds == ()
    assert row.settings["layers"] == []
    assert row.settings["slice"] == [0, 40]
    assert row.settings["attack"]["iterations"] == 4
    assert (found["none"].row.knows, found["none"].row.eps) == ("base", 0.0)
    assert found["none"].foreign is None


def test_defences_answer_as_they_do_outside(problem, make):
    base, x, y = problem
    bench = make(chunk=40)
    found = bench.run("rails", "input", RAILS(base, "input", maturation=MATURATION), list(benchmark.KNOWS))
    rails = RAILS(base, "input", maturation=MATURATION).fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
    pgd = bench.pgd(base, x[80:], y[80:]).adversarials
    for attack, z in (("none", x[80:]), ("pgd", pgd)):
        expected = torch.stack([rails.predict(z, seed=seed) == y[80:] for seed in range(3)])
        assert torch.equal(found[attack].correct, expected)
        assert torch.equal(found[attack].foreign, rails.respond(z, seed=1).foreign)
    assert found["pgd"].row.seeds == (0, 1, 2)
    assert found["pgd"].row.settings["maturation"][0]["population"] == 20
    assert found["soft-knn"].row.knows == "defence"
    assert found["soft-knn"].row.settings["surrogate"]["neighbours"] == 20
    assert "surrogate" not in found["pgd"].row.settings
    assert found["pgd"].row.seconds_per_image > 0
    json.dumps(found["soft-knn"].row.to_json())


def test_what_is_done_is_not_done_again(problem, make, monkeypatch):
    base, _, _ = problem
    steps = []
    first = make(advance=steps.append)
    before = first.run("dknn", "input", DkNN(base, "input", neighbours=3), ["none", "soft-knn"])
    assert sum(steps) == 2 * 40
    files = sorted((first.folder / "adversarials").iterdir())
    assert [file.name[:26] for file in files] == ["soft-knn-of-dknn-input-0-2", "soft-knn-of-dknn-input-20-"]
    monkeypatch.setattr(DkNN, "fit", None)
    monkeypatch.setattr(PGD, "__call__", None)
    after = make(advance=steps.append).run("dknn", "input", DkNN(base, "input", neighbours=3), ["none", "soft-knn"])
    assert [after[a].row for a in after] == [before[a].row for a in before]
    assert sum(steps) == 4 * 40


def test_an_interrupted_run_continues_to_the_same_rows(problem, make):
    base, _, _ = problem

    class Stop(Exception):
        pass

    def stop(steps):
        raise Stop

    def run(bench):
        return bench.run("rails", "input", RAILS(base, "input", maturation=MATURATION), ["none", "soft-knn"])

    with pytest.raises(Stop):
        run(make(advance=stop))
    lines = (make().folder / "parts.jsonl").read_text().count("\n")
    continued = run(make())
    assert (make().folder / "parts.jsonl").read_text().count("\n") == lines + 4
    (make().folder / "parts.jsonl").unlink()
    for file in (make().folder / "adversarials").iterdir():
        file.unlink()
    whole = run(make())
    for attack in whole:
        assert torch.equal(whole[attack].correct, continued[attack].correct)


def test_other_settings_are_refused(problem, make):
    base, _, _ = problem
    make().run("dknn", "input", DkNN(base, "input", neighbours=3), ["none"])
    with pytest.raises(ValueError, match="dataset was bands, now other"):
        make({"dataset": "other", "model": "linear"})
    with pytest.raises(ValueError, match=r"pgd.eps was 0.2, now 0.3"):
        make(pgd=PGD(eps=0.3, step=0.1, iterations=4, random_start=False))
    with pytest.raises(ValueError, match="settings of dknn input neighbours was 3, now 5"):
        make().run("dknn", "input", DkNN(base, "input", neighbours=5), ["none"])


def test_only_defences_with_neighbours_have_an_attack_that_knows_them(problem, make):
    with pytest.raises(TypeError, match="defence must be a RAILS or a DkNN"):
        make().run("cnn", None, problem[0], ["soft-knn"])


def test_tuning_finds_the_best_and_keeps_it(problem, make, monkeypatch):
    """Labels depend on the first coordinate: euclidean neighbours in the input see it, directions see less of it."""
    base, x, y = problem
    steps = []
    bench = make(pgd=PGD(eps=0.05, step=0.02, iterations=4, random_start=False), advance=steps.append)
    found = bench.tune_dknn("input", "input")
    assert sum(steps) == 2 * len(benchmark.NEIGHBOURS)
    versions = [x[60:80], bench.pgd(base, x[60:80], y[60:80]).adversarials]

    def accuracy(k, metric):
        dknn = DkNN(base, "input", neighbours=k, metric=metric).fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
        return sum(float((dknn.predict(z) == y[60:80]).float().mean()) for z in versions) / 2

    scores = {(k, m): accuracy(k, m) for k in benchmark.NEIGHBOURS if k <= 60 for m in benchmark.METRICS}
    best = max(scores.values())
    assert best > scores[50, "cosine"]
    assert found["accuracy"] == pytest.approx(best)
    ties = sorted((k, m) for (k, m), score in scores.items() if score == pytest.approx(best))
    assert (found["neighbours"], found["metric"]) == ties[0]
    assert found["images"] == 20
    monkeypatch.setattr(DkNN, "fit", None)
    again = make(pgd=bench.pgd, advance=steps.append)
    assert again.tune_dknn("input", "input") == found
    assert sum(steps) == 4 * len(benchmark.NEIGHBOURS)


def test_tuning_by_attacks_that_know_the_neighbours_counts_inputs_right_in_all_versions(problem, make):
    base, x, y = problem
    pgd = PGD(eps=0.05, step=0.02, iterations=4, random_start=False)
    bench = make(pgd=pgd, test=(x[80:95], y[80:95]))
    found = bench.tune_dknn("input+input", ["input", "input"], knowing=True)
    dknn = DkNN(base, ["input", "input"], neighbours=found["neighbours"], metric=found["metric"])
    dknn.fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
    right = dknn.predict(x[60:75]) == y[60:75]
    fewest = int(torch.bincount(y[:60]).min())
    # Two layers of 60 examples: of 75 and 200 neighbours there is nothing to count.
    counts = [SoftCount(dknn, neighbours=k) for k in (5, 20)]
    for target in (base, ASK(dknn), SoftNeighbours(dknn, neighbours=min(20, fewest)), *counts):
        right &= dknn.predict(bench.pgd(target, x[60:75], y[60:75]).adversarials) == y[60:75]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))
    assert (found["knowing"], found["images"]) == (True, 15)
