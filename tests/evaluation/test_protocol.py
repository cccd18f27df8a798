"""The quick protocol on small problems where the right figures are known."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from immunonet.dknn import DkNN
from immunonet.evaluation import evaluate, protocol
from immunonet.rails import RAILS, Maturation


@pytest.fixture(scope="module")
def problem():
    """Two bands of the unit square, apart by .2, and a network that separates them exactly in the middle."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(160, 2, generator=generator)
    y = torch.arange(160) % 2
    x[:, 0] = torch.where(y == 0, 0.4 * x[:, 0], 0.6 + 0.4 * x[:, 0])
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[-20.0, 0.0], [20.0, 0.0]]))
        base.bias.copy_(torch.tensor([10.0, -10.0]))
    return base, x, y


class Noisy(nn.Module):
    """Right with seed 0, wrong with every other; its log-probabilities are even."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return torch.full((len(x), 2), 0.5).log()

    def predict(self, x, seed=None):
        labels = self.base(x).argmax(1)
        return labels if seed == 0 else 1 - labels


class Sure(nn.Module):
    """The base network behind a log-softmax."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x).log_softmax(1)


def by_attack(result, defence):
    return {row.attack: row for row in result.rows if row.defence == defence}


def test_figures_follow_from_the_distance_to_the_boundary(problem):
    base, x, y = problem
    eps = 0.3
    result = evaluate(Sure(base), x, y, base=base, eps=eps, dataset="bands")
    safe = float(((x[:, 0] - 0.5).abs() > eps).float().mean())
    assert 0 < safe < 1
    for name in ("base", "sure"):
        rows = by_attack(result, name)
        assert list(rows) == ["none", "fgsm", "pgd"]
        assert rows["none"].accuracy == 1.0
        assert rows["fgsm"].accuracy == rows["pgd"].accuracy == pytest.approx(safe)
    assert result.verdict.accuracy == pytest.approx(safe)
    assert result.verdict.knows == "base"
    assert [check.passed for check in result.checks] == [True, True, True]
    clean, pgd = (by_attack(result, "sure")[attack] for attack in ("none", "pgd"))
    assert (clean.knows, clean.eps, pgd.knows, pgd.eps, pgd.norm) == ("base", 0.0, "base", eps, "linf")
    assert pgd.settings["slice"] == [0, 160]
    assert pgd.settings["attack"]["iterations"] == 20
    assert pgd.dataset == "bands"


def test_the_worst_case_is_taken_per_image(problem):
    base, x, y = problem

    class Gullible(nn.Module):
        """Wrong about points of class 0 as given, and about points of class 1 once they are moved."""

        def forward(self, z):
            known = (z[:, 1, None] == x[:, 1]).long().argmax(1)  # attacks on base leave this coordinate alone
            wrong = torch.where(z[:, 0] == x[known, 0], 0, 1) == y[known]
            return nn.functional.one_hot(torch.where(wrong, 1 - y[known], y[known]), 2).mul(9.0).log_softmax(1)

    result = evaluate(Gullible(), x, y, base=base, eps=0.05)
    rows = by_attack(result, "gullible")
    assert rows["none"].accuracy == rows["pgd"].accuracy == 0.5
    assert result.verdict.accuracy == 0.0


def test_a_randomised_defence_is_asked_under_five_seeds(problem):
    base, x, y = problem
    result = evaluate(Noisy(base), x, y, base=base, eps=0.05)
    row = by_attack(result, "noisy")["none"]
    assert row.seeds == (0, 1, 2, 3, 4)
    assert (row.correct, row.accuracy) == (32.0, 0.2)
    assert result.verdict.seeds == (0, 1, 2, 3, 4)
    assert evaluate(Noisy(base), x, y, base=base, eps=0.05, seed=1).verdict.accuracy == 0.0


@pytest.mark.parametrize("kind", ["rails", "dknn"])
def test_defences_also_meet_an_attack_that_knows_them(problem, kind, tmp_path):
    base, x, y = problem
    if kind == "rails":
        defence = RAILS(base, "input", maturation=Maturation(population=20, neighbours=2, generations=1))
    else:
        defence = DkNN(base, "input", neighbours=3, metric="euclidean")
    defence.fit(x, y, calibration=0.2)
    result = evaluate(defence, x[:40], y[:40], base=base, eps=0.05, norm="l2")
    rows = by_attack(result, kind)
    assert list(rows) == ["none", "fgsm", "pgd", "soft-knn"]
    assert rows["soft-knn"].knows == result.verdict.knows == "defence"
    assert rows["none"].accuracy > 0.9
    assert rows["none"].seeds == ((0, 1, 2, 3, 4) if kind == "rails" else ())
    assert all(check.passed for check in result.checks)
    assert rows["pgd"].settings["layers"] == ["input"]
    assert result.verdict.accuracy <= min(row.accuracy for row in rows.values()) + 1e-9
    result.to_json(tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["attack"] for row in record["results"]][-1] == "worst"
    assert len(record["results"]) == 2 * 4 + 1
    assert record["checks"][0]["passed"] is True


def test_time_that_runs_out_is_said_and_the_rows_count_what_was_done(problem, monkeypatch):
    base, x, y = problem
    monkeypatch.setattr(protocol, "CHUNK", 50)
    result = evaluate(Sure(base), x, y, base=base, eps=0.1, minutes=1e-9)
    assert {row.n for row in (*result.rows, result.verdict)} == {50}
    assert result.verdict.settings["slice"] == [0, 50]
    assert result.checks[-1] == protocol.Check("all images were evaluated", False, "50 of 160")
    whole = evaluate(Sure(base), x, y, base=base, eps=0.1, minutes=10)
    assert whole.verdict.n == 160


def test_checks_fail_when_what_they_guard_fails(problem):
    base, x, y = problem

    class Forgetful(nn.Module):
        """Gives another answer every time it is asked."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, z):
            self.calls += 1
            return nn.functional.one_hot(torch.full((len(z),), self.calls % 2), 2).mul(9.0).log_softmax(1)

    result = evaluate(Forgetful(), x, y, base=base, eps=0.1)
    assert not result.checks[0].passed
    right = torch.ones(1, 10, dtype=torch.bool)
    assert protocol._iterative(right, ~right).passed
    assert not protocol._iterative(~right, right).passed


def test_the_page_gives_the_verdict_first_and_escapes_names(problem, tmp_path):
    base, x, y = problem
    result = evaluate(Sure(base), x, y, base=base, eps=0.3, dataset="<b>")
    failed = dataclasses.replace(result, checks=(dataclasses.replace(result.checks[0], passed=False),))
    failed.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert f"{result.verdict.accuracy:.1%} right" in page
    assert page.index("in the worst case") < page.index("Sanity checks") < page.index("<table>")
    assert "&lt;b&gt;" in page
    assert "FAIL" in page
    assert page.count("<tr>") == 1 + 7


def test_networks_in_training_mode_are_measured_in_eval_mode_and_left_as_found(problem):
    base, x, y = problem
    model = nn.Sequential(base, nn.Dropout(0.9), nn.LogSoftmax(1)).train()
    result = evaluate(model, x, y, base=model, eps=0.01)
    assert result.rows[0].accuracy == 1.0
    assert model[1].training


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"protocol": "standard"}, ValueError, "protocol='standard' is not built yet: use 'quick'"),
        ({"protocol": "full"}, ValueError, "not built yet"),
        ({"protocol": "best"}, ValueError, "protocol must be one of"),
        ({"minutes": 0}, ValueError, "minutes must be"),
        ({"eps": -1}, ValueError, "eps must be"),
        ({"norm": "l0"}, ValueError, "norm must be one of"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"x": torch.full((4, 2), 2.0)}, ValueError, "x must lie within bounds"),
        ({"x": torch.empty(0, 2), "y": torch.empty(0, dtype=torch.long)}, ValueError, "x must hold at least one"),
        ({"y": torch.tensor([0, 1, 2, 0])}, ValueError, "y must be in 0 to 1"),
        ({"y": torch.tensor([0, 1])}, ValueError, "y must have shape"),
        ({"defence": nn.Linear(2, 2)}, ValueError, "defence must return finite log-probabilities.*log_softmax"),
        ({"defence": nn.Linear(2, 3)}, ValueError, r"defence must return log-probabilities \(2, 2\) like base"),
        ({"base": nn.Flatten(0)}, ValueError, "model must return logits"),
    ],
)
def test_bad_input_is_named_before_any_work(problem, change, error, match):
    base, x, y = problem
    arguments = {"defence": Sure(base), "x": x[:4], "y": y[:4], "base": base, "eps": 0.1} | change
    with pytest.raises(error, match=match):
        evaluate(arguments.pop("defence"), arguments.pop("x"), arguments.pop("y"), **arguments)
