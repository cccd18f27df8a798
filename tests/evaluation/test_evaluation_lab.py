"""Several defences under the same attacks, in parts that are kept: what a lab fits, what tables measure and tune."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from trials import bands

from immunonet.attacks import ASK, FGSM, PGD, SoftCount, SoftNeighbours
from immunonet.data import Images
from immunonet.defences import base as defences
from immunonet.defences.answers import Answer
from immunonet.defences.base import Defence, register
from immunonet.defences.dknn import CHOSEN_METRICS, NEIGHBOURS, DkNN
from immunonet.defences.rails import RAILS
from immunonet.defences.spec import Spec
from immunonet.evaluation.bench import Bench
from immunonet.evaluation.lab import KEPT, Lab, Measurement, Tables, Tuning
from immunonet.immune.settings import Maturation

SMALL = {"population": 20, "neighbours": 2, "generations": 1}
RAILS_SPEC = Spec(kind="rails", layers=("input",), settings=SMALL)
DKNN_SPEC = Spec(kind="dknn", layers=("input",), settings={"neighbours": 3, "metric": "cosine"})
CNN = Spec(kind="cnn")
PGD_4 = PGD(eps=0.2, step=0.1, iterations=4, random_start=False)
WEAK = PGD(eps=0.05, step=0.02, iterations=4, random_start=False)


@pytest.fixture(scope="module")
def problem():
    return bands(120)


@pytest.fixture
def make(problem):
    """The function that makes tables, on all there is or with some of it changed."""
    net, x, y = problem
    images = Images(x, y, ("0", "1"))

    def make(folder=None, chunk=20, senses=True, advance=lambda part: None, **changes):
        nets = {"linear": net} | changes.pop("nets", {})
        splits = {"training": images[:60], "validation": images[60:80], "test": images[80:]} | changes.pop("splits", {})
        given = {
            "resolve": lambda name, net: name, "told": {"dataset": "bands", "model": "linear"},
            "where": lambda split, n: [0, n], "senses": senses,
        }  # fmt: skip
        return Tables(Bench(Lab(nets, splits, **given | changes), folder, advance=advance), chunk)

    return make


def asked(spec, attack="none", method=None, through="", **changes):
    return Measurement(spec=spec, base="linear", attack=attack, method=method, through=through, images=40, **changes)


def rows(tables, *measurements):
    return [one.row for one in tables.measure(measurements)]


def timeless(found):
    return [(dataclasses.replace(one.row, seconds_per_image=0), one.correct.tolist()) for one in found]


def test_the_undefended_network_is_right_as_far_as_the_boundary_is(problem, make):
    _, x, _ = problem
    fgsm = FGSM(eps=0.2)
    none, one, many = make().measure([asked(CNN), asked(CNN, "fgsm", fgsm), asked(CNN, "pgd", PGD_4)])
    safe = float(((x[80:, 0] - 0.5).abs() > 0.2).float().mean())
    assert [found.row.accuracy for found in (none, one, many)] == pytest.approx([1, safe, safe])
    row = many.row
    assert (row.dataset, row.defence, row.knows, row.eps, row.norm, row.n) == ("bands", "cnn", "base", 0.2, "linf", 40)
    assert row.seeds == ()
    assert row.settings["layers"] == []
    assert row.settings["slice"] == [0, 40]
    assert row.settings["attack"]["iterations"] == 4
    assert (none.row.knows, none.row.eps, none.row.norm) == ("base", 0.0, "linf")
    assert none.foreign is None
    assert rows(make(), asked(CNN, norm="l2"))[0].norm == "l2"


def test_defences_answer_as_they_do_outside(problem, make):
    net, x, y = problem
    tables = make(chunk=40)
    seeds = (0, 1, 2)
    ways = {
        "none": (None, ""),
        "pgd": (PGD_4, ""),
        "soft-knn": (PGD_4, "soft-knn"),
        "soft-clones": (PGD_4, "soft-clones"),
    }
    found = dict(
        zip(ways, tables.measure([asked(RAILS_SPEC, k, *way, seeds=seeds) for k, way in ways.items()]), strict=True)
    )
    rails = RAILS(net, "input", maturation=Maturation(**SMALL)).fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
    pgd = PGD_4(net, x[80:], y[80:]).adversarials
    soft = PGD_4(SoftNeighbours(rails), x[80:], y[80:]).adversarials
    for attack, z in (("none", x[80:]), ("pgd", pgd), ("soft-knn", soft)):
        expected = torch.stack([rails.predict(z, seed=seed) == y[80:] for seed in seeds])
        assert torch.equal(found[attack].correct, expected)
        assert torch.equal(found[attack].foreign, rails.respond(z, seed=1).foreign)
    row = found["pgd"].row
    assert row.seeds == (0, 1, 2)
    assert row.foreign == pytest.approx(float(found["pgd"].foreign.float().mean()))
    assert (row.settings["maturation"][0]["population"], row.settings["repertoire"]) == (20, 60)
    assert "surrogate" not in row.settings
    assert row.seconds_per_image > 0
    assert found["soft-knn"].row.knows == "defence"
    assert found["soft-knn"].row.settings["surrogate"]["neighbours"] == 20
    assert found["soft-clones"].row.settings["surrogate"]["model"] == "SoftClones"
    json.dumps(found["soft-knn"].row.to_json())


def test_a_defence_without_randomness_runs_once_whatever_seeds_there_are(make):
    row, one = rows(make(), asked(DKNN_SPEC, seeds=(0, 1)), asked(DKNN_SPEC))
    assert row.seeds == one.seeds == ()
    assert row.correct == one.correct


def test_what_is_done_is_not_done_again(make, tmp_path, monkeypatch):
    heard = []
    wanted = [asked(DKNN_SPEC), asked(DKNN_SPEC, "soft-knn", PGD_4, "soft-knn")]
    before = make(tmp_path, advance=lambda part: heard.append(part.about)).measure(wanted)
    assert heard == ["linear dknn input none"] * 2 + ["linear dknn input soft-knn"] * 2
    assert len(list((tmp_path / "tensors").iterdir())) == 2
    monkeypatch.setattr(DkNN, "fit", None)
    monkeypatch.setattr(PGD, "__call__", None)
    after = make(tmp_path, advance=lambda part: heard.append(part.about)).measure(wanted)
    assert [one.row for one in after] == [one.row for one in before]
    assert len(heard) == 8


def test_an_interrupted_run_continues_to_the_same_rows(make, tmp_path):
    wanted = [asked(RAILS_SPEC, seeds=(0, 1)), asked(RAILS_SPEC, "soft-knn", PGD_4, "soft-knn", seeds=(0, 1))]

    def stop(part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, advance=stop).measure(wanted)
    journal = tmp_path / "parts.jsonl"
    assert journal.read_text().count("\n") == 1
    continued = make(tmp_path).measure(wanted)
    assert journal.read_text().count("\n") == 4
    assert timeless(continued) == timeless(make().measure(wanted))


def other_labels(problem):
    _, x, y = problem
    return {"training": Images(x[:60], 1 - y[:60], ("0", "1"))}


CHANGES = {
    "settings of the defence": {"m": asked(DKNN_SPEC.changed(neighbours=51))},
    "the attack": {"m": asked(DKNN_SPEC, "pgd", dataclasses.replace(PGD_4, eps=0.35))},
    "the surrogate": {"m": asked(DKNN_SPEC, "pgd", PGD_4, "ask")},
    "the repertoire's labels": {"splits": other_labels},
    "the repertoire's size": {"m": asked(DKNN_SPEC, "pgd", PGD_4, repertoire=8)},
    "the images": {"splits": lambda problem: {"test": Images(1 - problem[1][80:], problem[2][80:], ("0", "1"))}},
    "the network": {"nets": lambda problem: {"linear": turned(problem[0])}},
}


def turned(net):
    other = nn.Linear(2, 2)
    with torch.no_grad():
        other.weight.copy_(-net.weight)
        other.bias.copy_(-net.bias)
    return other


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_done_anew_in_the_same_folder(change, problem, make, tmp_path):
    old = asked(DKNN_SPEC, "pgd", PGD_4)
    first = make(tmp_path).measure([old])
    changes = dict(CHANGES[change])
    new = changes.pop("m", old)
    changes = {name: made(problem) for name, made in changes.items()}
    assert timeless(make(tmp_path, **changes).measure([new])) == timeless(make(**changes).measure([new]))
    assert timeless(make(tmp_path, **changes).measure([new])) != timeless(first)
    assert [one.row for one in make(tmp_path).measure([old])] == [one.row for one in first]


def test_more_images_continue_from_the_parts_there_are(make, tmp_path):
    few = dataclasses.replace(asked(DKNN_SPEC), images=20)
    make(tmp_path).measure([few])
    heard = []
    tables = make(tmp_path)
    tables.bench.workers = type("Workers", (), {"run": lambda self, scene, parts, *rest: heard.extend(parts)})()
    with pytest.raises(KeyError):  # nobody does them
        tables.measure([asked(DKNN_SPEC)])
    assert [part.args[1] for part in heard] == [slice(20, 40)]


@pytest.mark.parametrize(
    ("spec", "through", "match"),
    [
        (CNN, "soft-knn", "cnn has no surrogate 'soft-knn' to attack it through; it has none"),
        (DKNN_SPEC, "unrolled", "dknn has no surrogate 'unrolled' .* it has soft-count, adv-knn, ask, soft-knn"),
    ],
)
def test_a_surrogate_that_a_defence_lacks_is_refused_by_name(spec, through, match, make):
    with pytest.raises(ValueError, match=match):
        make().measure([asked(spec, through, PGD_4, through)])


def same(one, other, x):
    seeds = (3, 4)
    labels = all(torch.equal(one.predict(x, seed), other.predict(x, seed)) for seed in seeds)
    return labels and torch.equal(one.familiarity(x), other.familiarity(x)) and torch.equal(one(x, 3), other(x, 3))


@pytest.mark.parametrize("senses", [True, False])
def test_what_was_fitted_alike_is_used_again_and_answers_as_one_fitted_anew(senses, problem, make, monkeypatch):
    _, x, _ = problem
    fits = []
    fit = defences.REGISTRY["rails"].fit

    def counting(self, *args, **how):
        fits.append(type(self).kind)
        return fit(self, *args, **how)

    monkeypatch.setattr(RAILS, "fit", counting)
    lab = make(senses=senses).lab
    first = lab.fitted(RAILS_SPEC, "linear")
    other = RAILS_SPEC.changed(population=40, neighbours=4, generations=0, voice=0.25)
    twin = lab.fitted(other, "linear")
    assert fits == ["rails"]
    assert twin.repertoire is first.repertoire
    assert lab.fitted(other, "linear") is twin
    assert lab.fitted(RAILS_SPEC, "linear") is first
    anew = make(senses=senses).lab.fitted(other, "linear")
    assert same(twin, anew, x[80:]) if senses else torch.equal(twin.predict(x[80:], 3), anew.predict(x[80:], 3))
    lab.fitted(RAILS_SPEC.changed(metric="cosine"), "linear")
    lab.fitted(RAILS_SPEC, "linear", 30)
    assert len(fits) == 4  # the one of another lab among them
    assert len(lab._fitted) == KEPT


def test_a_sample_of_the_repertoire_is_fixed_and_in_its_order(problem, make):
    _, x, y = problem
    lab = make().lab
    some, labels = lab.examples(20)
    places = [int((x[:60] == one).all(1).nonzero()[0, 0]) for one in some]
    assert places == sorted(set(places))
    assert labels.equal(y[:60][places])
    assert torch.equal(some, make().lab.examples(20)[0])
    assert lab.examples(None)[0].equal(x[:60])
    settings = rows(make(), asked(DKNN_SPEC, repertoire=20))[0].settings
    assert (settings["repertoire"], settings["repertoire_slice"]) == (20, {"sample": [20, 60], "seed": 0})


class Turning(Defence):
    """A kind of a user's own, one of whose attributes no setting tells."""

    kind, title = "turning", "Turning"
    gain = 1.0

    def fit(self, x=None, y=None, calibration=0.05):
        return self

    def answer(self, x, seed=None):
        return Answer.of(self.gain * self.model(x))


def turning(net, gain):
    found = Turning(net)
    found.gain = gain
    return found


def test_defences_of_ones_own_are_told_apart_by_all_that_can_be_read_of_them(make, tmp_path):
    specs = [Spec(kind="test_evaluation_lab:turning", settings={"gain": gain}) for gain in (1.0, -1.0)]
    tables = make(tmp_path)
    assert [row.accuracy for row in rows(tables, *map(asked, specs))] == [1.0, 0.0]
    assert [row.accuracy for row in rows(make(tmp_path), *map(asked, specs[::-1]))] == [0.0, 1.0]


def test_a_kind_whose_code_changes_is_done_anew(make, tmp_path, monkeypatch):
    monkeypatch.setattr(defences, "REGISTRY", dict(defences.REGISTRY))
    register(Turning)
    assert rows(make(tmp_path), asked(Spec(kind="turning")))[0].accuracy == 1.0
    monkeypatch.setattr(Turning, "answer", lambda self, x, seed=None: Answer.of(-self.model(x)))
    assert rows(make(tmp_path), asked(Spec(kind="turning")))[0].accuracy == 0.0


TUNED = Spec(kind="dknn", layers=("input",), words=("tuned",))
TRANSFER = Tuning(attacks={"none": None, "pgd": WEAK})


def tuned(tables, spec, tuning, layers=()):
    m = tables.settled(Measurement(spec=spec, base="linear", among=tuple(map(tuple, layers))), tuning)
    return m.spec, m.tuning


def test_tuning_finds_the_best_and_keeps_it(problem, make, tmp_path, monkeypatch):
    """Labels depend on the first coordinate: euclidean neighbours in the input see it, directions see less of it."""
    net, x, y = problem
    heard = []
    best, told = tuned(make(tmp_path, advance=heard.append), TUNED, TRANSFER)
    assert len(heard) == len(CHOSEN_METRICS)
    versions = [x[60:80], WEAK(net, x[60:80], y[60:80]).adversarials]

    def accuracy(k, metric):
        dknn = DkNN(net, "input", neighbours=k, metric=metric).fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
        return sum(float((dknn.predict(z) == y[60:80]).float().mean()) for z in versions) / 2

    scores = {(k, m): accuracy(k, m) for k in NEIGHBOURS if k <= 60 for m in CHOSEN_METRICS}
    highest = max(scores.values())
    assert highest > scores[50, "cosine"]
    assert told["accuracy"] == pytest.approx(highest)
    ties = sorted((k, m) for (k, m), score in scores.items() if score == pytest.approx(highest))
    assert (best.settings["neighbours"], best.settings["metric"]) == ties[0] == (told["neighbours"], told["metric"])
    assert told["images"] == 20
    monkeypatch.setattr(DkNN, "fit", None)
    assert tuned(make(tmp_path, advance=heard.append), TUNED, TRANSFER) == (best, told)
    assert len(heard) == 2 * len(CHOSEN_METRICS)
    monkeypatch.undo()
    # Without the clean images among them it is another question.
    assert tuned(make(tmp_path), TUNED, Tuning(attacks={"pgd": WEAK})) == tuned(
        make(), TUNED, Tuning(attacks={"pgd": WEAK})
    )


def test_settings_that_are_given_are_not_tuned(make):
    best, _ = tuned(make(), TUNED.changed(metric="cosine"), TRANSFER)
    assert best.settings["metric"] == "cosine"
    best, _ = tuned(make(), TUNED, dataclasses.replace(TRANSFER, choices={"neighbours": (20,)}))
    assert best.settings["neighbours"] == 20


def test_of_several_layers_the_best_is_chosen_and_the_first_of_equals(make):
    def useless(z):
        return torch.zeros(len(z), 1)

    resolve = lambda name, net: useless if name == "useless" else name  # noqa: E731
    for layers in ([("useless",), ("input",)], [("input",), ("input", "input")]):
        best, told = tuned(make(resolve=resolve), TUNED, TRANSFER, layers=layers)
        assert best.layers == ("input",)
        assert told["candidates"] == [list(one) for one in layers]


def test_tuning_by_attacks_that_know_the_neighbours_counts_inputs_right_in_all_versions(problem, make):
    net, x, y = problem
    spec = Spec(kind="dknn", layers=("input", "input"), words=("tuned",))
    best, told = tuned(make(), spec, dataclasses.replace(TRANSFER, images=15, knowing=True))
    dknn = DkNN(net, ["input", "input"], neighbours=told["neighbours"], metric=told["metric"])
    dknn.fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
    right = dknn.predict(x[60:75]) == y[60:75]
    fewest = int(torch.bincount(y[:60]).min())
    # Two layers of 60 examples: of 75 and 200 neighbours there is nothing to count.
    counts = [SoftCount(dknn, neighbours=k) for k in (5, 20)]
    for target in (net, ASK(dknn), SoftNeighbours(dknn, neighbours=min(20, fewest)), *counts):
        right &= dknn.predict(WEAK(target, x[60:75], y[60:75]).adversarials) == y[60:75]
    assert told["accuracy"] == pytest.approx(float(right.float().mean()))
    assert (told["knowing"], told["images"]) == (True, 15)
    assert best.settings == {"neighbours": told["neighbours"], "metric": told["metric"]}


def test_tuning_against_several_norms_counts_inputs_right_in_all_of_them(problem, make):
    net, x, y = problem
    other = dataclasses.replace(WEAK, eps=0.3, step=0.1, norm="l2")
    tuning = Tuning(attacks={"none": None, "pgd": WEAK, "pgd l2": other}, images=15, knowing=True)
    _, told = tuned(make(), TUNED.changed(neighbours=5, metric="euclidean"), tuning)
    dknn = DkNN(net, "input", neighbours=5, metric="euclidean")
    dknn.fit(x[:60], y[:60], calibration=(x[60:80], y[60:80]))
    right = dknn.predict(x[60:75]) == y[60:75]
    shares = [float(right.float().mean())]
    for attack in (WEAK, other):
        for target in (net, *dknn.challengers()):
            right &= dknn.predict(attack(target, x[60:75], y[60:75]).adversarials) == y[60:75]
        shares.append(float(right.float().mean()))
    assert told["accuracy"] == pytest.approx(shares[-1])
    assert shares[-1] < shares[1]
