"""The protocol on a small problem where the right figures are known."""

import dataclasses
import errno
import json

import pytest
import torch
from torch import nn
from trials import bands

from immunonet import RAILS, ClosedLoop, DkNN, Maturation, _store
from immunonet.defences.undefended import Undefended
from immunonet.evaluation import evaluate, protocol
from immunonet.evaluation.suite import PROTOCOLS, Planned
from immunonet.report import figures

# PGD just crosses its ball and comes back a little.
TINY = dataclasses.replace(
    PROTOCOLS["quick"], steps=5, iterations=3, black_box=5, queries=6, decisions=1, evaluations=4, noise=2, seeds=2,
    checks=10,
)  # fmt: skip
LEAST = dataclasses.replace(TINY, steps=2, iterations=1, black_box=3, row_seeds=1, seeds=1, finalists=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "quick", TINY)


@pytest.fixture(scope="module")
def problem():
    return bands(160)


def drawn(n):
    """The order in which n images are attacked: a fixed random one."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def rows(result, defence):
    return {row.attack: row for row in result.rows if row.defence == defence}


def checks(result):
    return {check.name.split(" ")[0]: check for check in result.checks}


def flags(result):
    return {flag.name: flag for flag in result.flags}


def test_figures_follow_from_the_distance_to_the_boundary(problem):
    base, x, y = problem
    result = evaluate(Undefended(base), x, y, base=base, eps=0.3, dataset="bands", name="cnn")
    safe = float(((x[:, 0] - 0.5).abs() > 0.3).float().mean())
    assert 0 < safe < 1
    assert list(rows(result, "base")) == [
        "none", "fgsm", "pgd", "pgd-momentum", "apgd-ce", "pgd doubled", "noise", "square", "hop-skip-jump",
    ]  # fmt: skip
    for row in result.rows:
        if row.attack in ("fgsm", "pgd", "pgd-momentum", "apgd-ce", "pgd doubled"):
            held = (x[drawn(160)[: row.n], 0] - 0.5).abs() > 0.3
            assert row.accuracy == pytest.approx(float(held.float().mean()))
            assert row.settings["sample"] == row.n
    assert rows(result, "cnn")["none"].accuracy == 1.0
    for verdict in (result.verdict, result.base_verdict):
        assert verdict.attack == "worst-case"
        assert verdict.accuracy == pytest.approx(safe)
        assert (verdict.knows, verdict.eps, verdict.n, verdict.seeds) == ("base", 0.3, 160, ())
    assert all(check.passed for check in result.checks), result.checks
    assert not any(flag.raised for flag in result.flags), result.flags
    assert not result.unreliable
    curve = result.record["curves"]["pgd"]
    for eps, accuracy in zip(curve["eps"], curve["accuracy"], strict=True):
        assert accuracy == pytest.approx(float(((x[drawn(160)[:10], 0] - 0.5).abs() > eps).float().mean()))
    assert curve["eps"][-1] == 1.0


def test_a_users_defence_in_three_lines_is_attacked_by_its_own_gradient_or_without_one(problem, unchecked):
    base, x, y = problem
    smooth = evaluate(lambda z: base(z).log_softmax(1), x[:30], y[:30], base=base, eps=0.2, name="smooth")
    assert {"direct-pgd", "direct-apgd-ce"} <= set(rows(smooth, "smooth"))
    assert smooth.verdict.knows == "defence"

    def quantised(z):
        return base((4 * z).round() / 4).log_softmax(1)

    result = evaluate(quantised, x[:30], y[:30], base=base, eps=0.2)
    assert {"bpda", "square"} <= set(rows(result, "quantised"))
    assert rows(result, "quantised")["bpda"].knows == "defence"
    assert result.verdict.accuracy <= min(row.accuracy for row in rows(result, "quantised").values() if row.n == 30)


def test_a_randomised_defence_is_judged_on_draws_that_no_attack_was_chosen_on(problem, unchecked):
    base, x, y = problem

    class Noisy(nn.Module):
        """Right in the draws for selection, wrong in those of the report."""

        def forward(self, z, seed=None):
            return torch.zeros(len(z), 2).log_softmax(1)

        def predict(self, z, seed=None):
            labels = base(z).argmax(1)
            return labels if seed < 2 else 1 - labels

    result = evaluate(Noisy(), x[:20], y[:20], base=base, eps=0.05)
    assert result.record["seeds"] == {"selection": [0, 1], "report": [2, 3]}
    assert result.verdict.seeds == (2, 3)
    assert rows(result, "noisy")["none"].accuracy == result.verdict.accuracy == 0.0
    assert rows(result, "base")["none"].accuracy == 1.0
    assert flags(result)["randomised"].raised
    assert not flags(result)["randomised"].serious
    moved = evaluate(Noisy(), x[:20], y[:20], base=base, eps=0.05, seed=2)
    assert set(image["attack"] for image in moved.record["per_example"]) == {"none"} or moved.verdict.accuracy == 0


@pytest.mark.parametrize("kind", ["rails", "dknn"])
def test_nearest_neighbour_defences_meet_attacks_that_know_them(problem, unchecked, kind, tmp_path, monkeypatch):
    base, x, y = problem
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(TINY, steps=3, iterations=2, checks=4))
    if kind == "rails":
        defence = RAILS(base, "input", maturation=Maturation(population=12, neighbours=2, generations=1))
    else:
        defence = DkNN(base, "input", neighbours=3, metric="euclidean")
    defence.fit(x[100:], y[100:], calibration=0.2)
    result = evaluate(defence, x[:8], y[:8], base=base, transfer=[nn.Linear(2, 2)], eps=0.2, norm="l2")
    found = rows(result, kind)
    assert {"soft-knn", "ask", "adv-knn", "stealthy", "bpda", "transfer-1"} <= set(found)
    assert found["soft-knn"].knows == result.verdict.knows == "defence"
    assert found["none"].accuracy > 0.9
    assert 0 <= found["none"].foreign <= 1
    assert "foreign" in result.verdict.to_json()
    if kind == "dknn":
        assert result.verdict.accuracy <= min(row.accuracy for row in found.values() if row.n == 8)
    result.to_json(tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["attack"] for row in record["results"][-2:]] == ["worst-case", "worst-case"]
    info = record["model_info"]
    assert (info["name"], info["reported"]) == (kind, f"{100 * result.verdict.accuracy:.2f}")
    assert record["randomized"] is (kind == "rails")
    assert record["attacks"]["square"]["n"] == 5
    assert record["attacks"]["square"]["calls"] == (14 if kind == "rails" else 7)
    assert len(record["per_example"]) == 8
    assert record["unreliable"] is result.unreliable
    assert record["cost"]["seconds_batch_1"] > 0


def test_ablations_are_rows_of_their_own(problem, unchecked, monkeypatch):
    base, x, y = problem
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(LEAST, ablations=True, draws=(2,), checks=4))
    defence = RAILS(base, "input", maturation=Maturation(population=12, neighbours=2, generations=1))
    result = evaluate(defence.fit(x[100:], y[100:]), x[:6], y[:6], base=base, eps=0.1)
    assert [(row.defence, row.attack) for row in result.ablations] == [
        (f"rails without {part}", attack)
        for part in ("mutation", "crossover", "selection", "generations")
        for attack in ("none", "worst-case")
    ]
    assert rows(result, "rails")["unrolled-eot-2"].n == 4
    assert checks(result)["all"].passed  # no more were planned
    monkeypatch.setattr(figures, "svg_uri", lambda figure: "data:,")  # another test draws
    assert result.ablations[0].settings["maturation"][0]["mutation_rate"] == 0
    assert "Ablations" in _page(result)


def _page(result):
    from immunonet.report.evaluation import page

    return page(json.loads(json.dumps(result.to_dict())), result.gallery)


def test_an_interrupted_run_continues_and_gives_the_same_figures(problem, tmp_path, monkeypatch):
    base, x, y = problem
    arguments = {"base": base, "eps": 0.2, "dataset": "bands"}
    whole = evaluate(Undefended(base), x[:40], y[:40], **arguments, folder=tmp_path / "a")
    real, calls = Planned.__call__, []

    def counting(self, x, y):
        calls.append(self.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Planned, "__call__", counting)
        with pytest.raises(KeyboardInterrupt):
            evaluate(Undefended(base), x[:40], y[:40], **arguments, folder=tmp_path / "b")
        done, calls[:] = calls[:3], [""] * 4
        resumed = evaluate(Undefended(base), x[:40], y[:40], **arguments, folder=tmp_path / "b")
    assert done == ["fgsm", "pgd", "pgd-momentum"]
    assert calls[4] == "apgd-ce"
    timeless = [
        [dataclasses.replace(row, seconds_per_image=0) for row in (*found.rows, found.verdict)]
        for found in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    with monkeypatch.context() as patch:
        patch.setattr(Planned, "__call__", None)
        again = evaluate(Undefended(base), x[:40], y[:40], **arguments, folder=tmp_path / "b")
    assert again.rows == resumed.rows
    assert again.checks == resumed.checks


def test_another_budget_does_not_continue_from_what_was_kept(problem, unchecked, tmp_path, monkeypatch):
    base, x, y = problem

    class Randomised(nn.Module):
        def forward(self, z, seed=None):
            return base(z).log_softmax(1)

        def predict(self, z, seed=None):
            return self(z).argmax(1)

    defence = Randomised()
    first = evaluate(defence, x[:10], y[:10], base=base, eps=0.2, folder=tmp_path)
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(TINY, seeds=3, finalists=1))
    second = evaluate(defence, x[:10], y[:10], base=base, eps=0.2, folder=tmp_path)
    assert (len(first.verdict.seeds), len(second.verdict.seeds)) == (2, 3)


def test_a_full_disk_is_told_and_loses_nothing_that_was_kept(problem, unchecked, tmp_path, monkeypatch):
    base, x, y = problem
    real = _store.write_tensors

    def full(path, *rest, **more):
        if "apgd" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(_store, "write_tensors", full)
        with pytest.raises(OSError, match="No space left on device"):
            evaluate(Undefended(base), x[:10], y[:10], base=base, eps=0.2, folder=tmp_path)
    said = []
    evaluate(Undefended(base), x[:10], y[:10], base=base, eps=0.2, folder=tmp_path, on_progress=said.append)
    assert any(line.startswith("apgd-ce: ") for line in said)


def test_minutes_cut_the_plan_beforehand_and_the_cut_is_a_failed_check(problem, unchecked):
    base, x, y = problem
    said = []
    result = evaluate(Undefended(base), x, y, base=base, eps=0.1, minutes=1e-9, on_progress=said.append)
    assert {row.n for row in result.rows} == {10, 5}
    assert result.verdict.n == 10
    assert len(result.record["per_example"]) == 10
    assert not checks(result)["all"].passed
    assert "none 10 of 160" in checks(result)["all"].detail
    assert said[0].startswith("plan for cnn: about")
    assert any("square: 5 images, 7 calls each" in line for line in said)
    assert result.unreliable
    assert evaluate(Undefended(base), x[:30], y[:30], base=base, eps=0.1, minutes=60).verdict.n == 30


def test_a_plan_that_is_cut_is_judged_on_the_images_that_are_left(problem, unchecked, monkeypatch):
    base, x, y = problem
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(LEAST, ablations=True))
    defence = RAILS(base, "input", maturation=Maturation(population=12, neighbours=2, generations=0))
    defence.fit(x[100:], y[100:])
    result = evaluate(defence, x[:30], y[:30], base=base, eps=0.1, minutes=1e-9)
    assert {row.n for row in result.ablations} == {result.verdict.n} == {10}
    assert [one["image"] for one in result.record["per_example"]] == sorted(drawn(30)[:10].tolist())
    assert [one["label"] for one in result.record["per_example"]] == y[sorted(drawn(30)[:10].tolist())].tolist()


def test_attacks_that_only_ask_take_as_many_images_as_told(problem, unchecked):
    base, x, y = problem
    result = evaluate(Undefended(base), x[:30], y[:30], base=base, eps=0.1, black_box=7)
    assert {row.n for row in result.rows if row.attack in ("noise", "square", "hop-skip-jump")} == {7}
    assert {row.n for row in result.rows if row.attack not in ("noise", "square", "hop-skip-jump")} == {30}


def test_answers_that_fail_for_some_inputs_are_wrong_and_flagged(problem, unchecked):
    base, x, y = problem

    def picky(z):
        if (z[:, 1] > 0.9).any():
            raise RuntimeError("too bright")
        return base(z).log_softmax(1).masked_fill(z[:, 1:] < 0.05, torch.nan)

    # Three that are too bright, and as many that have no number.
    shown = [*range(20), *(x[:, 1] > 0.9).nonzero()[:3, 0].tolist(), *(x[:, 1] < 0.05).nonzero()[:3, 0].tolist()]
    x, y = x[shown], y[shown]
    result = evaluate(picky, x, y, base=base, eps=0.01)
    clean = ((x[:, 1] <= 0.9) & (x[:, 1] >= 0.05)).double().mean()
    assert rows(result, "picky")["none"].accuracy == pytest.approx(float(clean))
    assert flags(result)["inputs without an answer"].raised
    assert "too bright" in flags(result)["inputs without an answer"].detail
    assert result.unreliable


def test_answers_that_fail_in_the_worst_case_alone_are_flagged_too(problem, unchecked, monkeypatch):
    base, x, y = problem
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(TINY, row_seeds=1))

    class Late(nn.Module):
        """Has no answer in the draws that no single attack is counted on."""

        def forward(self, z, seed=None):
            return base(z).log_softmax(1)

        def predict(self, z, seed=None):
            if seed in (1, 3):
                raise RuntimeError(f"no answer in draw {seed}")
            return self(z).argmax(1)

    result = evaluate(Late(), x[:8], y[:8], base=base, eps=0.01)
    assert result.record["row_seeds"] == {"selection": [0], "report": [2]}
    detail = flags(result)["inputs without an answer"].detail
    assert "8 times RuntimeError: no answer in draw 3" in detail
    assert "16 times RuntimeError: no answer in draw 1" in detail  # of two finalists


def test_a_defence_is_called_as_it_is_and_its_bounds_may_be_missing(problem, unchecked):
    base, x, y = problem

    class Wrapped(nn.Module):
        kind, bounds = torch.zeros(2), None

        def forward(self, z):
            return base(z).log_softmax(1)

    result = evaluate(Wrapped(), x[:4], y[:4], base=base, eps=0.01)
    assert result.verdict.defence == "wrapped"
    assert result.record["threat_model"]["bounds"] == [[0.0, 1.0]]


def test_an_answer_that_depends_on_the_batch_is_flagged(problem, unchecked):
    base, x, y = problem
    result = evaluate(lambda z: (base(z - z.mean(0) + 0.5)).log_softmax(1), x[:20], y[:20], base=base, eps=0.01)
    assert flags(result)["depends on the batch"].raised
    assert result.unreliable


def test_probabilities_and_vanished_gradients_are_flagged(problem, unchecked):
    _, x, y = problem
    flat = nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))
    with torch.no_grad():
        flat[0].weight.zero_()
    with pytest.warns(UserWarning, match="returns probabilities"):
        result = evaluate(lambda z: flat(z).log(), x[:10], y[:10], base=flat, eps=0.01)
    assert flags(result)["probabilities for logits"].raised
    assert flags(result)["zero gradients"].raised


def test_an_image_that_is_wrong_already_counts_as_broken(problem):
    base, x, y = problem
    wrong = y.clone()
    wrong[0] = 1 - wrong[0]
    result = evaluate(Undefended(base), x[:10], wrong[:10], base=base, eps=0.0)
    assert result.verdict.correct == 9
    assert result.record["per_example"][0]["worst"] == 0.0
    asked = drawn(10)[:5].tolist()
    assert rows(result, "base")["square"].settings["attempted"] == 5 - (0 in asked)
    assert [image["image"] for image in result.record["per_example"]] == list(range(10))
    assert result.record["curves"] == {}


def test_networks_in_training_mode_are_measured_in_eval_mode_and_left_as_found(problem, unchecked):
    base, x, y = problem
    model = nn.Sequential(base, nn.Dropout(0.9), nn.LogSoftmax(1)).train()
    result = evaluate(model, x[:20], y[:20], base=model, eps=0.01)
    assert result.rows[0].accuracy == 1.0
    assert model[1].training


def test_the_page_gives_the_verdict_first_answers_the_checklist_and_escapes_names(tmp_path, images, conv, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(LEAST, checks=3))
    x, y = images
    result = evaluate(Undefended(conv), x[:8], y[:8], base=conv, eps=0.3, dataset="<b>", name="cnn")
    failed = dataclasses.replace(result, checks=(dataclasses.replace(result.checks[0], passed=False),))
    failed.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert f"cnn: {100 * result.verdict.accuracy:.1f} % right in the worst case" in page
    assert (
        page.index("in the worst case") < page.index("Sanity checks") < page.index("<table>") < page.index("Checklist")
    )
    assert "&lt;b&gt;" in page
    assert "FAIL" in page
    assert "Unreliable" in page
    assert page.count("data:image/svg") == 2
    assert "http://" not in page
    monkeypatch.setattr(figures, "svg_uri", lambda figure: "data:,")
    assert "No check failed" in _page(dataclasses.replace(result, checks=()))
    if result.gallery:
        assert "data:image/png" in page


def test_the_page_of_several_threats_tells_each_of_them_and_draws_them_apart(tmp_path, problem, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(LEAST, checks=3))
    monkeypatch.setattr(figures, "svg_uri", lambda figure: "data:image/svg")  # the page of one threat is drawn
    base, x, y = problem
    told = {"base": base, "name": "d", "threats": {"linf": 0.2, "l2": 0.25}}
    result = evaluate(lambda z, seed=None: base(z).log_softmax(1), x[:8], y[:8], **told)
    result.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert f"d: {100 * result.verdict.accuracy:.1f} % right in the worst case of 2 threats" in page
    assert "perturbed by at most 0.2 (linf) or 0.25 (l2)" in page
    first, *_ = page.split("Sanity checks")
    for norm, name, eps in (("linf", "linf", "0.2"), ("l2", "l2", "0.25"), ("union", "all of them", "")):
        own, bare = result.verdicts[norm], result.base_verdicts[norm]
        cells = f"<td>{name}</td><td>{eps}</td><td>{100 * own.accuracy:.1f} %</td>"
        assert cells in first
        assert f"<td>{100 * bare.accuracy:.1f} %</td>" in first[first.index(cells) + len(cells) :].split("</tr>")[0]
    assert "on the draws that count" in first
    assert page.count("data:image/svg") == 4  # curves and losses of each
    assert "<td>base</td><td>l2</td><td>0.25</td><td>pgd</td>" in page
    assert "<td>base</td><td></td><td></td><td>none</td>" in page
    assert "l2: passed: " in page
    assert "linf pgd" in page
    assert "not tested here" not in page


def wide(z):
    return z.log_softmax(1)


wide.bounds = [(0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"protocol": "best"}, ValueError, "protocol must be one of"),
        ({"minutes": 0}, ValueError, "minutes must be"),
        ({"black_box": 0}, ValueError, "black_box must be"),
        ({"eps": -1}, ValueError, "eps must be"),
        ({"eps": 1.1}, ValueError, r"eps must be a finite number in \[0, 1\]"),
        ({"eps": 2, "norm": "l2"}, ValueError, r"eps must be a finite number in \[0, 1.41421\]"),
        ({"norm": "l0"}, ValueError, "norm must be one of"),
        ({"defence": wide, "eps": 3}, ValueError, r"eps must be a finite number in \[0, 2\]"),
        ({"defence": wide, "eps": 3, "norm": "l2"}, ValueError, r"eps must be a finite number in \[0, 2.23607\]"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"x": torch.full((4, 2), 2.0)}, ValueError, "x must lie within bounds"),
        ({"x": torch.empty(0, 2), "y": torch.empty(0, dtype=torch.long)}, ValueError, "x must hold at least one"),
        ({"y": torch.tensor([0, 1, 2, 0])}, ValueError, "y must be in 0 to 1"),
        ({"y": torch.tensor([0, 1])}, ValueError, "y must have shape"),
        ({"defence": nn.Linear(2, 2)}, ValueError, "defence must return finite log-probabilities.*log_softmax"),
        ({"defence": nn.Linear(2, 3)}, ValueError, r"defence must return log-probabilities \(2, 2\) like base"),
        ({"defence": 3}, TypeError, "defence must be a module or a function"),
        ({"base": torch.argmax}, TypeError, "base and transfer must be torch.nn.Modules, got builtin"),
        ({"transfer": [None]}, TypeError, "base and transfer must be torch.nn.Modules, got NoneType"),
        ({"base": nn.Flatten(0)}, ValueError, "model must return logits"),
    ],
)
def test_bad_input_is_named_before_any_work(problem, change, error, match):
    base, x, y = problem
    arguments = {"defence": Undefended(base), "x": x[:4], "y": y[:4], "base": base, "eps": 0.1} | change
    with pytest.raises(error, match=match):
        evaluate(arguments.pop("defence"), arguments.pop("x"), arguments.pop("y"), **arguments)


class Reached(Exception):
    """What is taken for the undefended network."""


@pytest.mark.parametrize("healed", [False, True])
def test_the_network_inside_of_a_defence_is_the_base_where_none_is_given(healed, problem, monkeypatch):
    def reached(network):
        raise Reached(network)

    base, x, y = problem
    model = ClosedLoop(base, ["input"], rank=1).fit(x, y) if healed else base
    defence = DkNN(model, "input", neighbours=5).fit(x, y)
    monkeypatch.setattr(protocol, "Undefended", reached)
    with pytest.raises(Reached) as found:
        evaluate(defence, x[:4], y[:4], eps=0.3)
    assert found.value.args[0] is base


def test_what_has_no_network_inside_needs_a_base(problem):
    base, x, y = problem
    with pytest.raises(TypeError, match="base must be the undefended network"):
        evaluate(lambda inputs: base(inputs).log_softmax(1), x[:4], y[:4], eps=0.3)
