"""One house: a kind of defence, and an attack, that the package has never heard of go through all of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from trials import bands

from immunonet import Defence, attacks, evaluate, load, models, register
from immunonet.data import Images
from immunonet.defences import base as defences
from immunonet.defences.answers import Answer
from immunonet.defences.base import REGISTRY
from immunonet.defences.spec import Spec
from immunonet.evaluation.bench import Bench
from immunonet.evaluation.lab import Lab, Measurement, Tables
from immunonet.evaluation.suite import PROTOCOLS


class Steps(Defence):
    """A quantiser before the network: inputs are rounded to one of a few evenly spaced values."""

    kind, title = "steps", "Steps"

    def __init__(self, model, *, levels=4, bounds=(0.0, 1.0)):
        super().__init__(model, bounds=bounds)
        self.levels = levels

    def answer(self, x, seed=None):
        return Answer.of(models.logits(self.model, (self.levels * x).round() / self.levels))

    def settings(self):
        return super().settings() | {"levels": self.levels}


@dataclass(frozen=True, kw_only=True)
class Corner(attacks.Attack):
    """An attack of a caller's own, which looks at nothing: every value goes down by eps, whatever the model says."""

    eps: float = 0.1
    needs = "labels"

    def calls(self):
        return 1

    def best(self, problem):
        points = (problem.x - self.eps).clamp(problem.low, problem.high)
        success = models.logits(problem.model, points).argmax(1) != problem.y
        loss = success.double()
        return attacks.Found(points, success, loss, loss[None])


@pytest.fixture(scope="module", autouse=True)
def house():
    """What is registered here is known here alone; a protocol that spends little."""
    spent = {
        "steps": 5, "iterations": 3, "black_box": 20, "queries": 6, "decisions": 1, "evaluations": 4, "noise": 2,
        "seeds": 2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defences, "REGISTRY", dict(REGISTRY))
        patch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], checks=8, **spent))
        register(Steps)
        yield


@pytest.fixture(scope="module")
def problem():
    return bands(60)


def rounded(x, levels):
    return ((levels * x[:, 0]).round() / levels > 0.5).long()


def test_it_is_fitted_saved_loaded_and_asked_like_any_other(problem, tmp_path):
    net, x, y = problem
    steps = Steps(net, levels=5).fit(x, y)
    steps.save(tmp_path)
    again = load(tmp_path, net)
    assert type(again) is Steps
    assert again.levels == 5
    assert again.predict(x).tolist() == rounded(x, 5).tolist() == again(x).argmax(1).tolist()


@pytest.fixture(scope="module")
def evaluation(problem):
    net, x, y = problem
    return evaluate(Steps(net, levels=5), x[:20], y[:20], base=net, eps=0.15, attacks=[Corner(eps=0.15)])


def test_the_protocol_attacks_it_and_describes_it(problem, evaluation):
    _, x, y = problem
    own = {row.attack: row for row in evaluation.rows if row.defence == "steps"}
    assert own["none"].accuracy == 1.0
    assert own["none"].settings["levels"] == 5
    assert {"fgsm", "pgd", "apgd-ce", "bpda", "noise", "square", "hop-skip-jump"} <= set(own)
    assert evaluation.verdict.accuracy <= min(row.accuracy for row in own.values() if row.n == 20)
    assert evaluation.verdict.defence == evaluation.record["model_info"]["name"] == "steps"
    # Who knows the network alone goes as far as it can: what is left is what is rounded back over the middle.
    away = x[:20] + torch.where(y[:20] == 0, 0.15, -0.15)[:, None]
    assert own["pgd"].accuracy == pytest.approx(float((rounded(away, 5) == y[:20]).float().mean()))


def test_an_attack_of_the_callers_own_is_in_the_rows_and_the_record(problem, evaluation):
    _, x, y = problem
    row = next(row for row in evaluation.rows if (row.defence, row.attack) == ("steps", "corner-1"))
    right = rounded((x[:20] - 0.15).clamp(0, 1), 5) == y[:20]
    assert not right.all()
    # What other attacks have broken already is passed over, and stays broken.
    others = {row.attack: row for row in evaluation.rows if row.defence == "steps"}
    assert row.correct <= int(right.sum())
    assert row.n == others["noise"].n == 20
    assert row.settings["attack"]["method"] == "Corner"
    record = evaluation.to_dict()
    assert record["attacks"]["corner-1"]["kind"] == "black box"
    assert record["attacks"]["corner-1"]["attack"]["eps"] == 0.15
    assert record["plan"]["attacks"]["corner-1"]["calls"] == 1


def test_tables_measure_it_beside_the_others(problem):
    net, x, y = problem
    images = Images(x, y, ("0", "1"))
    lab = Lab(
        {"linear": net}, {"training": images[:30], "validation": images[20:30], "test": images[30:]},
        resolve=lambda name, net: name, told={"dataset": "bands", "model": "linear"}, where=lambda split, n: [0, n],
        senses=True,
    )  # fmt: skip
    pgd = attacks.PGD(eps=0.15, step=0.05, iterations=4, random_start=False)
    specs = [Spec.parse(text) for text in ("steps levels=5", "steps levels=2", "cnn", "dknn input neighbours=3")]
    measurements = [
        Measurement(spec=spec, base="linear", attack=name, method=method, images=30)
        for spec in specs
        for name, method in (("none", None), ("pgd", pgd))
    ]
    rows = [one.row for one in Tables(Bench(lab, None), 30).measure(measurements)]
    assert [row.defence for row in rows] == [kind for kind in ("steps", "steps", "cnn", "dknn") for _ in range(2)]
    away = pgd(net, x[30:], y[30:]).adversarials
    for row, levels, points in zip(rows, (5, 5, 2, 2), (x[30:], away) * 2, strict=False):
        assert row.settings["levels"] == levels
        assert row.accuracy == pytest.approx(float((rounded(points, levels) == y[30:]).float().mean()))
        assert row.foreign is None


def test_a_random_function_of_the_users_is_judged_on_several_draws(problem):
    net, x, y = problem

    def blurred(z):
        return net(z + 0.05 * torch.randn_like(z)).log_softmax(1)

    result = evaluate(blurred, x[:12], y[:12], base=net, eps=0.05)
    assert result.verdict.defence == "blurred"
    assert result.record["randomized"]
    assert (result.verdict.seeds, result.record["seeds"]["selection"]) == ((2, 3), [0, 1])
    same = evaluate(blurred, x[:12], y[:12], base=net, eps=0.05)
    assert [row.correct for row in same.rows] == [row.correct for row in result.rows]


class Beside(Steps):
    """Says other labels than its log-probabilities."""

    def answer(self, x, seed=None):
        right = super().answer(x, seed)
        return Answer(1 - right.labels, right.log_probabilities)


class Loud(Steps):
    """Gives logits for log-probabilities."""

    def answer(self, x, seed=None):
        logits = models.logits(self.model, x)
        return Answer(logits.argmax(1), logits)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (Beside, r"defence fails on inputs .*Beside.answer must give labels that are the argmax of its log-prob"),
        (Loud, r"defence fails on inputs .*Loud.answer must give finite log-probabilities that sum to 1"),
    ],
)
def test_answers_that_break_the_contract_are_refused_before_any_work(broken, match, problem, tmp_path):
    net, x, y = problem
    said = []
    with pytest.raises(ValueError, match=match):
        evaluate(broken(net), x[:8], y[:8], base=net, eps=0.05, folder=tmp_path / "run", on_progress=said.append)
    assert said == []
    assert not (tmp_path / "run").exists()
