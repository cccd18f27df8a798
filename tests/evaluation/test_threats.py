"""Several threats: how they are claimed, which holds which, and what their union is."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from trials import BOUNDS, bands, campaign

from immunonet import RAILS, DkNN, Maturation, attacks
from immunonet.attacks import PGD
from immunonet.defences.undefended import Undefended
from immunonet.evaluation import evaluate, protocol, sanity
from immunonet.evaluation.bench import Here
from immunonet.evaluation.campaign import WorstCase, union
from immunonet.evaluation.suite import PROTOCOLS, Planned
from immunonet.evaluation.threats import Threat, claimed, held

# PGD just crosses its ball and comes back a little.
TINY = dataclasses.replace(
    PROTOCOLS["quick"], steps=5, iterations=3, black_box=5, queries=6, decisions=1, evaluations=4, noise=2, seeds=2,
    checks=10,
)  # fmt: skip
LEAST = dataclasses.replace(
    TINY, steps=2, iterations=1, black_box=3, queries=3, evaluations=2, row_seeds=1, checks=3
)  # fmt: skip
THREE = {"linf": 0.2, "l2": 0.25, "l1": 0.3}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "quick", TINY)


@pytest.fixture
def least(monkeypatch):
    """Less still, where it does not matter what attacks find."""
    monkeypatch.setitem(PROTOCOLS, "quick", LEAST)


@pytest.fixture(scope="module")
def problem():
    return bands(160)


def threat(norm, eps):
    return Threat(eps=eps, norm=norm, bounds=BOUNDS, seed=0)


def timeless(result):
    """What an evaluation found, as JSON, without what depends on the machine."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if "seconds" not in key and key not in untold}
        return [plain(one) for one in value] if isinstance(value, list) else value

    untold = ("environment", "cost", "number_forward_passes")
    return plain(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


# What is claimed.


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({}, ValueError, r"eps or threats must be given: eps=8/255, or threats=\{'linf'"),
        ({"norm": "l2"}, ValueError, "eps or threats must be given"),
        ({"threats": {"linf": 0.1}, "eps": 0.1}, ValueError, "threats goes without eps and norm.*got eps=0.1"),
        ({"threats": {"linf": 0.1}, "norm": "l2"}, ValueError, "threats goes without eps and norm.*got norm='l2'"),
        ({"threats": {}}, ValueError, "threats must hold at least one"),
        ({"threats": [("linf", 0.1)]}, TypeError, "threats must be radii by norm"),
        ({"threats": {"l3": 0.1}}, ValueError, "threats must be by the name of a norm, got 'l3'; nearest: "),
        ({"threats": {2: 0.1}}, ValueError, "threats must be by the name of a norm, got 2"),
        (
            {"threats": {"linf": 0.1, "l1": -1}},
            ValueError,
            r"threats\['l1'\] must be a finite number in \[0, 2\], got -1",
        ),
        ({"threats": {"l2": math.nan}}, ValueError, r"threats\['l2'\] must be a finite number.*got nan"),
        ({"threats": {"l2": "0.5"}}, TypeError, r"threats\['l2'\] must be a number, got '0.5'"),
        ({"threats": {"linf": 1.5, "l1": 2}}, ValueError, r"threats\['linf'\] must be a finite number in \[0, 1\]"),
        ({"threats": {"linf": 0.1, "l2": 1.5}}, ValueError, r"threats\['l2'\] must be .* in \[0, 1.41421\]"),
        ({"threats": {"linf": 0.1, "l1": 2.1}}, ValueError, r"threats\['l1'\] must be .* in \[0, 2\]"),
    ],
)
def test_bad_threats_are_named_before_any_work(problem, change, error, match):
    base, x, y = problem
    with pytest.raises(error, match=match):
        evaluate(Undefended(base), x[:4], y[:4], base=base, **change)


def test_one_threat_is_that_of_eps_and_norm(problem, least):
    base, x, y = problem
    for norm in THREE:
        assert claimed(None, "linf", {norm: 0.2}, lambda _: 1.0) == claimed(0.2, norm, None, lambda _: 1.0)
    told = {"base": base, "dataset": "bands"}
    one = evaluate(Undefended(base), x[:30], y[:30], threats={"l2": 0.2}, **told)
    assert timeless(one) == timeless(evaluate(Undefended(base), x[:30], y[:30], eps=0.2, norm="l2", **told))
    assert list(one.verdicts) == list(one.base_verdicts) == ["l2"]
    assert {row.norm for row in one.rows} == {"l2"}
    assert one.record["threat_model"]["norm"] == "l2"


def test_attacks_of_ones_own_belong_to_the_threat_of_their_norm(problem, least, unchecked):
    base, x, y = problem
    told = {"base": base, "threats": {"linf": 0.1, "l2": 0.2}}
    own = [PGD(eps=0.15, norm="l2"), attacks.Noise(eps=0.1)]
    result = evaluate(Undefended(base), x[:8], y[:8], **told, attacks=own)
    (axes,) = result.plot().axes
    lines = [label.get_text() for label in axes.get_yticklabels()]
    assert lines[-3:] == ["linf worst-case", "l2 worst-case", "union worst-case"]
    assert {"none", "l2 pgd-1", "linf noise-2"} < set(lines)
    _, own = axes.containers
    assert own.lines[0].get_xdata()[-1] == result.verdict.accuracy
    found = {(row.norm, row.attack): row.eps for row in result.rows if row.attack in ("pgd-1", "noise-2")}
    assert found == {("l2", "pgd-1"): 0.15, ("linf", "noise-2"): 0.1}
    assert {"l2 pgd-1", "linf noise-2"} <= set(result.record["attacks"])
    for bad in (PGD(eps=0.15), PGD(eps=0.1, norm="l1")):
        with pytest.raises(ValueError, match=r"attacks\[0\] must stay within eps=0.1 in linf or eps=0.2 in l2, got"):
            evaluate(Undefended(base), x[:8], y[:8], **told, attacks=[bad])


# Which ball holds which.


@pytest.mark.parametrize(
    ("outer", "inner", "radius"),
    [
        (("linf", 0.3), "l2", 0.3), (("linf", 0.3), "l1", 0.3), (("l2", 2.0), "l1", 2.0),
        (("l2", 2.0), "linf", 0.2), (("l1", 10.0), "l2", 1.0), (("l1", 10.0), "linf", 0.1), (("l1", 10.0), "l0", 0.0),
    ],
)  # fmt: skip
def test_the_largest_ball_inside_another_is_inside_and_no_larger_one_is(outer, inner, radius):
    d = 100
    assert held(threat(*outer), inner, d) == pytest.approx(radius)
    if not radius:
        return
    size = {"linf": math.inf, "l2": 2, "l1": 1}
    # The farthest of a ball lie on an axis or a diagonal.
    for point in (torch.ones(d), torch.eye(d)[0]):
        point = radius * point / point.norm(p=size[inner])
        assert point.norm(p=size[outer[0]]) <= outer[1] * (1 + 1e-5)
    reached = [radius * p.norm(p=size[outer[0]]) / p.norm(p=size[inner]) for p in (torch.ones(d), torch.eye(d)[0])]
    assert max(reached) == pytest.approx(outer[1])


def weak_and_strong(weak, strong):
    """A campaign in the norms `weak`, whose PGD never moves, and `strong`; points lie anywhere."""
    net, _, _ = bands(2)
    x = torch.rand(60, 2, generator=torch.Generator().manual_seed(1))
    plan = [Planned(name="none", n=60)]
    for one, step in ((weak, 0.0), (strong, 0.1)):
        method = PGD(eps=one.eps, norm=one.norm, bounds=BOUNDS, step=step, iterations=5, random_start=False)
        plan.append(
            Planned(name=f"{one.norm} pgd", roles=frozenset({"adaptive"}), n=60, method=method, target=net, threat=one)
        )
    y = net(x).argmax(1)
    done = campaign(Undefended(net), x, y, base=net, attacks=plan, threats=(weak, strong), checks=50)
    done.run(60)
    return done


@pytest.mark.parametrize(
    ("outer", "inner", "told"),
    [
        (("linf", 0.3), ("l2", 0.2), "under the worst case within l2 0.2, which lies inside, 60 images"),
        (("linf", 0.2), ("l2", 0.3), "under pgd within l2 0.2, which lies inside, 50 images"),
        (("l2", 0.3), ("linf", 0.3), "under pgd within linf 0.212, which lies inside, 50 images"),
        (("l1", 0.4), ("l2", 0.3), "under pgd within l2 0.283, which lies inside, 50 images"),
    ],
)
def test_attacks_that_find_less_than_those_in_a_ball_inside_have_failed(outer, inner, told):
    outer, inner = threat(*outer), threat(*inner)
    done = weak_and_strong(outer, inner)
    failed = sanity.holds(done, outer, inner)
    assert not failed.passed
    assert failed.name == f"{outer.norm}: attacks find what those in the {inner.norm} ball inside find"
    assert failed.detail.startswith("accuracy 1.000 under")
    assert failed.detail.endswith(told)
    assert sanity.holds(weak_and_strong(inner, outer), outer, inner).passed
    checks, _ = sanity.checks(done)
    assert [check.passed for check in checks if check.name == failed.name] == [False]


def test_nothing_is_compared_where_no_ball_lies_inside():
    outer, inner = threat("linf", 0.2), threat("l2", 0.2)
    done = weak_and_strong(outer, inner)
    assert sanity.holds(done, dataclasses.replace(outer, eps=0.0), inner) is None
    assert sanity.holds(done, threat("l0", 3.0), inner) is None


# The union.


@pytest.mark.parametrize("runs", [1, 2, 5, 20])
def test_a_union_is_never_above_a_threat_nor_below_what_all_take_together(runs):
    generator = torch.Generator().manual_seed(runs)
    for count in (2, 3, 4):
        for level in (0.1, 0.5, 0.9, 0.99):
            correct = torch.rand(count, runs, 12, generator=generator) < level
            before = torch.rand(count, 12, generator=generator, dtype=torch.float64).mul(10).round() / 10
            cases = [
                WorstCase(
                    chosen=torch.full((12,), i), adversarials=torch.full((12, 1), float(i)), labels=right.long(),
                    correct=right, seeds=tuple(range(runs)), before=before[i],
                )
                for i, right in enumerate(correct)
            ]  # fmt: skip
            found, shares = union(cases), correct.double().mean(1)
            left = found.correct.double().mean(0)
            assert left.equal(shares.amin(0))
            assert (left.mean() <= shares.mean(1) + 1e-12).all()
            assert left.mean() >= 1 - (1 - shares.mean(1)).sum() - 1e-12
            # All of it is that of one threat.
            assert found.adversarials[:, 0].long().equal(found.chosen)
            assert found.labels.equal(found.correct.long())
            assert shares.gather(0, found.chosen[None])[0].equal(left)
            ties = (shares == left).double()
            assert (before.gather(0, found.chosen[None])[0] == before.where(ties.bool(), torch.inf).amin(0)).all()


def holds_together(result):
    """Whether the verdicts of several threats are those of a union, of the base too."""
    for verdicts in (result.verdicts, result.base_verdicts):
        assert list(verdicts) == [*THREE, "union"]
        *each, whole = (row.accuracy for row in verdicts.values())
        assert 1 - sum(1 - one for one in each) - 1e-12 <= whole <= min(each) + 1e-12
    assert result.verdict is result.verdicts["union"]
    assert result.base_verdict is result.base_verdicts["union"]
    for row in (result.verdict, result.base_verdict):
        assert (row.norm, row.eps, row.settings["threats"]) == ("union", max(THREE.values()), THREE)


class Noisy(nn.Module):
    """A network with noise in front."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, z, seed=None):
        return self.base(z + 0.1 * torch.randn_like(z)).log_softmax(1)


@pytest.mark.parametrize("noise", [False, True], ids=["deterministic", "randomised"])
def test_rows_worst_cases_and_record_of_three_threats(problem, noise):
    base, x, y = problem
    said = []
    defence = Noisy(base) if noise else Undefended(base)
    result = evaluate(
        defence, x[:24], y[:24], base=base, threats=THREE, name="d", dataset="bands", on_progress=said.append
    )
    holds_together(result)
    assert result.verdict.accuracy < result.verdicts["linf"].accuracy
    rows = [row for row in result.rows if row.defence == "d"]
    assert len({(row.norm, row.attack) for row in rows}) == len(rows)
    assert [(row.norm, row.eps) for row in rows if row.attack == "none"] == [("union", 0.0)]
    for norm, eps in THREE.items():
        own = {row.attack: row for row in rows if row.norm == norm}
        assert {"fgsm", "pgd", "apgd-ce", "noise"} <= set(own)
        assert any(name.endswith(" doubled") for name in own)
        assert all(row.eps == row.settings["attack"]["eps"] == eps for row in own.values())
        verdict = result.verdicts[norm]
        assert (verdict.attack, verdict.norm, verdict.eps, verdict.n) == ("worst-case", norm, eps, 24)
        assert "threats" not in verdict.settings
        assert all(name == "none" or name.startswith(f"{norm} ") for name in verdict.settings["attacks"])
        if not noise:
            assert verdict.accuracy == min(row.accuracy for row in own.values() if row.n == 24)
        assert any(line.startswith(f"{norm} pgd: ") for line in said)
        assert f"{norm}: eps 0 gives the clean answers" in {check.name for check in result.checks}
        assert f"{norm} pgd" in result.record["curves"]
    record = timeless(result)
    assert [(row["defence"], row["norm"]) for row in record["results"][-8:]] == [
        (who, norm) for norm in (*THREE, "union") for who in ("base", "d")
    ]
    assert record["threat_model"] == {
        "bounds": [[0.0, 1.0]], "threats": [{"norm": norm, "eps": eps} for norm, eps in THREE.items()]
    }  # fmt: skip
    assert record["model_info"]["eps"] == "linf 0.2, l2 0.25, l1 0.3"
    assert set(record["by_threat"]) == set(THREE)
    assert record["disagreement"].keys() == record["by_threat"]["l1"]["disagreement"].keys() == {"none", "worst-case"}
    for one in record["per_example"]:
        left = [under["worst"] for under in one["threats"].values()]
        assert one["worst"] == min(left)
        assert one["norm"] in THREE or one["attack"] == "none"
        if one["norm"] in THREE:
            assert one["threats"][one["norm"]] == {key: one[key] for key in ("worst", "attack", "norm")}
    for norm in THREE:
        mean = sum(one["threats"][norm]["worst"] for one in record["per_example"]) / 24
        assert mean == pytest.approx(result.verdicts[norm].accuracy)
    assert ("chosen_before" in result.verdict.settings["draws"]) is noise
    if noise:
        assert result.verdict.seeds == result.verdicts["l1"].seeds == (2, 3)


def test_a_linear_classifier_keeps_what_its_margins_say():
    d, generator = 6, torch.Generator().manual_seed(3)
    weight = torch.randn(d, generator=generator)
    net = nn.Linear(d, 2)
    with torch.no_grad():
        net.weight.copy_(torch.stack([-weight, weight]) / 2)
        net.bias.copy_(torch.tensor([-0.1, 0.1]))
    x = 2 * torch.rand(60, d, generator=generator) - 1
    margin = x @ weight + 0.2
    y = (margin > 0).long()

    def defence(z):
        return net(z).log_softmax(1)

    defence.bounds = (-9.0, 9.0)  # nothing is in the way
    claimed = {"linf": 0.15, "l2": 0.4, "l1": 0.7}
    result = evaluate(defence, x, y, base=net, threats=claimed)
    dual = {"linf": 1, "l2": 2, "l1": math.inf}
    safe = {norm: margin.abs() / weight.norm(p=dual[norm]) - eps for norm, eps in claimed.items()}
    assert all((room.abs() > 1e-3).all() for room in safe.values())  # no image is on the edge
    shares = {norm: float((room > 0).double().mean()) for norm, room in safe.items()}
    shares["union"] = float(torch.stack([room > 0 for room in safe.values()]).all(0).double().mean())
    assert len(set(shares.values())) > 2
    for verdicts in (result.verdicts, result.base_verdicts):
        assert {norm: row.accuracy for norm, row in verdicts.items()} == pytest.approx(shares)
    told = result.record["per_example"]
    for norm, room in safe.items():
        assert [one["threats"][norm]["worst"] for one in told] == (room > 0).double().tolist()
    assert not result.unreliable, result.checks


def test_images_that_one_threat_broke_are_attacked_under_another(problem, unchecked):
    base, x, y = problem
    result = evaluate(Undefended(base), x[:20], y[:20], base=base, threats={"linf": 0.5, "l2": 0.01}, name="d")
    rows = {(row.norm, row.attack): row for row in result.rows if row.defence == "d"}
    assert result.verdicts["linf"].accuracy == result.verdict.accuracy == 0
    assert result.verdicts["l2"].accuracy == 1
    for attack in ("noise", "square", "hop-skip-jump"):
        assert (rows["linf", attack].settings["attempted"], rows["l2", attack].settings["attempted"]) == (0, 5)
        assert (rows["linf", attack].accuracy, rows["l2", attack].accuracy) == (0, 1)


# What is kept, and for how long it runs.


def two_threats(base, noise):
    """A defence, random or not, and the arguments of its evaluation under two threats."""
    defence = Noisy(base) if noise else Undefended(base)
    return defence, {"base": base, "threats": {"linf": 0.2, "l1": 0.3}, "name": "d"}


def no_checks(campaign):
    """In place of the sanity checks: those without randomness are enough to see what becomes of them."""
    return [], {}


@pytest.fixture(scope="module")
def whole(problem):
    """Evaluations that nothing interrupted, by whether the defence is random; of a random one without checks."""
    base, x, y = problem
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "quick", LEAST)
        for noise in (False, True):
            if noise:
                patch.setattr(sanity, "checks", no_checks)
            defence, told = two_threats(base, noise)
            found[noise] = evaluate(defence, x[:12], y[:12], **told)
    return found


@pytest.mark.parametrize("noise", [False, True], ids=["deterministic", "randomised"])
def test_an_interrupted_evaluation_of_two_threats_gives_what_the_whole_one_gives(
    problem, least, whole, noise, tmp_path, monkeypatch
):
    base, x, y = problem
    defence, told = two_threats(base, noise)
    if noise:
        monkeypatch.setattr(sanity, "checks", no_checks)
    real, calls = Planned.__call__, []

    def counting(self, x, y):
        calls.append(self.name)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Planned, "__call__", counting)
        with pytest.raises(KeyboardInterrupt):
            evaluate(defence, x[:12], y[:12], **told, folder=tmp_path / "b")
        *done, stopped = calls
        calls[:] = [""] * 7
        resumed = evaluate(defence, x[:12], y[:12], **told, folder=tmp_path / "b")
    assert {name.split()[0] for name in done} == ({"linf"} if noise else {"linf", "l1"})
    assert calls[7] == stopped
    assert timeless(resumed) == timeless(whole[noise])
    with monkeypatch.context() as patch:
        patch.setattr(Planned, "__call__", None)
        again = evaluate(defence, x[:12], y[:12], **told, folder=tmp_path / "b")
    assert (again.rows, again.checks, again.verdicts) == (resumed.rows, resumed.checks, resumed.verdicts)


def test_work_that_is_done_ahead_and_elsewhere_gives_the_same(problem, least, whole, monkeypatch):
    base, x, y = problem
    monkeypatch.setattr(sanity, "checks", no_checks)
    asked = []

    class Elsewhere:
        """Does parts in another order, the last first."""

        def run(self, scene, parts, kept, done):
            asked.append(len(parts))
            Here().run(scene, parts[::-1], kept, done)

    defence, told = two_threats(base, True)
    here = whole[True]
    assert timeless(evaluate(defence, x[:12], y[:12], **told, workers=Elsewhere())) == timeless(here)
    gradient = [name for name, one in here.record["attacks"].items() if one["kind"] != "black box"]
    assert (
        2 * len([name for name in gradient if not name.endswith(" doubled")]) in asked
    )  # those of both threats at once


def test_what_was_made_on_the_network_under_one_threat_serves_several(problem, least, unchecked, tmp_path, monkeypatch):
    base, x, y = problem
    alone = evaluate(Undefended(base), x[:12], y[:12], base=base, eps=0.2, folder=tmp_path)
    real, made = Planned.__call__, []

    def counting(self, x, y):
        made.append(self.name)
        return real(self, x, y)

    monkeypatch.setattr(Planned, "__call__", counting)
    told = {"base": base, "threats": {"l2": 0.2, "linf": 0.2}, "folder": tmp_path}
    both = evaluate(Undefended(base), x[:12], y[:12], **told)
    first = made[: made.index("l2 noise")]
    assert "l2 apgd-ce" in first
    assert not [name for name in first if name.startswith("linf")]
    assert both.verdicts["linf"].accuracy == alone.verdict.accuracy


def test_minutes_are_those_of_all_threats(problem, unchecked, monkeypatch):
    base, x, y = problem

    def timed(scene):
        named = {name for name, attack in scene.plan.items() if attack.target is not None}
        return {"alone": 0.01, "asking": 0.01, "calls": dict.fromkeys(named, 0.001)}

    monkeypatch.setattr(protocol, "_timed", timed)
    said, plans = [], {}
    for threats in ({"linf": 0.2}, THREE):
        found = evaluate(Noisy(base), x[:80], y[:80], base=base, threats=threats, minutes=0.5, on_progress=said.append)
        plans[len(threats)] = {name: found.record["plan"]["attacks"][name] for name in found.record["plan"]["attacks"]}
    seconds = {count: sum(attack["seconds"] for attack in plan.values()) for count, plan in plans.items()}
    assert 0.7 * 20 < seconds[3] <= 20  # half a minute, less what comes after the attacks
    assert seconds[1] <= 20
    images = {norm: plans[3][f"{norm} pgd"]["n"] for norm in THREE}
    assert len(set(images.values())) == 1
    assert images["linf"] < plans[1]["pgd"]["n"]
    # The draws that choose are asked for under every threat.
    each = {count: plan["none"]["seconds"] / plan["none"]["n"] - 0.01 for count, plan in plans.items()}
    assert each[3] == pytest.approx(3 * each[1])
    cut = found.checks[-1]
    assert (cut.name, cut.passed) == ("all planned images were attacked", False)
    assert f"l1 pgd {images['l1']} of 80" in cut.detail
    assert {row.n for row in found.verdicts.values()} == {images["l1"]}
    holds_together(found)
    assert any(line.startswith(f"  l1 pgd: {images['l1']} images, 6 calls each") for line in said)


@pytest.mark.parametrize("kind", ["rails", "dknn"])
def test_surrogates_run_under_every_norm(problem, kind, unchecked, monkeypatch):
    base, x, y = problem
    few = {
        "steps": 1, "iterations": 1, "black_box": 1, "queries": 1, "evaluations": 1, "noise": 1, "checks": 2,
        "seeds": 1, "row_seeds": 1, "finalists": 1,
    }  # fmt: skip
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(TINY, **few))
    if kind == "rails":
        defence = RAILS(base, "input", maturation=Maturation(population=12, neighbours=2, generations=1), seed=0)
    else:
        defence = DkNN(base, "input", neighbours=3)
    result = evaluate(defence.fit(x[120:], y[120:], calibration=0.2), x[:3], y[:3], base=base, threats=THREE)
    holds_together(result)
    for norm in THREE:
        named = {row.attack for row in result.rows if row.norm == norm}
        assert {"soft-knn", "ask", "adv-knn", "stealthy", "bpda", "bpda-soft-knn"} <= named
        assert ({"soft-clones", "unrolled"} if kind == "rails" else {"soft-count"}) <= named
    flags = {flag.name: flag for flag in result.flags}
    assert not flags["points outside the threat model"].raised
    assert len(result.record["abstention"]) == len(result.record["by_threat"]["l2"]["abstention"]) == 7
    for whole, *each in zip(
        result.record["abstention"], *(one["abstention"] for one in result.record["by_threat"].values()), strict=True
    ):
        assert whole["accepted"] == each[0]["accepted"]
        if kind == "dknn":
            assert whole["held"] <= min(one["held"] for one in each)
