import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from immunonet import RAILS, DkNN, data, zoo
from immunonet.attacks import PGD
from immunonet.cli import evaluate as evaluate_module
from immunonet.defences.spec import Spec

KEYS = {
    "dataset", "defence", "attack", "knows", "eps", "norm", "n", "correct", "accuracy", "ci95",
    "seconds_per_image", "seeds", "settings", "foreign",
}  # fmt: skip
SMALL = [
    "--dataset", "digits", "--n", 20, "--eps", "1/8", "--iterations", 3, "--chunk", 15, "--seeds", 2,
    "--weights", "digits.safetensors",
]  # fmt: skip
RAILS_30 = "rails input population=30 generations=1"


def by(*specs):
    """The words of a command that describe defences."""
    return [word for spec in specs for word in ("--defence", spec)]


@pytest.fixture
def run(command, digits_net):
    """Return a function that runs `immunonet evaluate` in tmp_path and returns (code, stdout, stderr)."""
    zoo.save_weights(digits_net, "digits.safetensors", half=False)
    return functools.partial(command, "evaluate")


def by_key(path):
    record = json.loads(Path(path).read_text())
    rows = record["results"]
    return record, {(r["defence"], *r["settings"]["layers"], r["attack"]): r for r in rows}


def test_every_defence_meets_every_attack(run, digits_net):
    specs = ["cnn", "dknn input", RAILS_30, "dknn conv1", "rails conv1 population=20 generations=1"]
    code, out, err = run(*SMALL, *by(*specs), "--json", "r.json")
    assert code == 0, err
    record, rows = by_key("r.json")
    attacks = ["none", "fgsm", "pgd", "soft-knn", "soft-clones"]
    assert list(rows) == [("cnn", a) for a in attacks[:3]] + [
        (kind, at, a)
        for at in ("input", "conv1")
        for kind, its in (("dknn", attacks[:4]), ("rails", attacks))
        for a in its
    ]
    assert set(record) == {"results", "environment", "command"}
    assert all(set(row) == KEYS for row in rows.values())
    assert all(row["n"] == 20 and row["settings"]["model"] == "digits" for row in rows.values())
    assert rows["cnn", "none"]["foreign"] is None
    pgd = rows["rails", "conv1", "pgd"]
    assert (pgd["eps"], pgd["norm"], pgd["knows"], pgd["seeds"]) == (0.125, "linf", "base", [0, 1])
    assert pgd["settings"]["maturation"][0]["population"] == 20
    assert rows["rails", "input", "pgd"]["settings"]["maturation"][0]["population"] == 30
    assert pgd["settings"]["attack"]["step"] == 0.03125
    assert rows["dknn", "conv1", "none"]["settings"]["neighbours"] == 75
    assert rows["rails", "conv1", "soft-knn"]["knows"] == rows["rails", "conv1", "soft-clones"]["knows"] == "defence"
    assert rows["rails", "conv1", "soft-clones"]["settings"]["surrogate"]["sharpness"] == [0.1]

    assert all(row["settings"]["slice"] == {"sample": [20, 360], "seed": 0} for row in rows.values())
    test, train = data.load("digits", "test")[data.sample(360, 20)], data.load("digits", "train")
    moved = PGD(eps=1 / 8, step=1 / 32, iterations=3, random_start=False)(digits_net, test.x, test.y).adversarials
    with torch.no_grad():
        assert rows["cnn", "pgd"]["correct"] == int((digits_net(moved).argmax(1) == test.y).sum())
    training, held = (train[part] for part in data.split(len(train)))
    dknn = DkNN(digits_net, "conv1").fit(training.x, training.y, calibration=(held.x, held.y))
    assert rows["dknn", "conv1", "pgd"]["correct"] == int((dknn.predict(moved) == test.y).sum())
    assert rows["dknn", "conv1", "pgd"]["foreign"] == pytest.approx(float(dknn.foreign(moved).float().mean()))

    table = Path("evaluation/table.md").read_text()
    assert table.startswith(
        "| layer | defence | attack | eps | knows | accuracy | 95 % interval | ms/image | foreign |\n"
    )
    assert len(re.findall(r"^\| (input|conv1) \|", table, re.M)) == 18
    assert "conv1" in out
    assert f"{rows['rails', 'input', 'pgd']['accuracy']:.4f}" in out
    assert re.search(r"input, pgd: rails alone is right on \d+, dknn alone on \d+ of 20 images, p = ", out)
    assert "rails conv1 soft-knn: " in err


def test_by_default_the_network_stands_beside_both_defences(run, monkeypatch):
    monkeypatch.setattr(evaluate_module, "DEFAULT", (*evaluate_module.DEFAULT[:2], RAILS_30))
    assert run(*SMALL, "--attack", "none", "--json", "r.json")[0] == 0
    assert [row[0] for row in by_key("r.json")[1]] == ["cnn", "dknn", "rails"]


def test_the_same_command_continues_and_others_stand_beside_it(run, monkeypatch):
    words = [*SMALL, *by("cnn", "dknn", RAILS_30)]
    assert run(*words, "--attack", "none", "--json", "a.json")[0] == 0
    before = Path("evaluation/parts.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(DkNN, "fit", None)
        patch.setattr(RAILS, "fit", None)
        assert run(*words, "--attack", "none", "--json", "b.json")[0] == 0
    assert Path("evaluation/parts.jsonl").read_text() == before
    assert by_key("a.json")[0]["results"] == by_key("b.json")[0]["results"]
    # More images and attacks, and other settings, are added to what is there.
    assert run(*words, "--attack", "none", "--attack", "pgd", "--n", 40, "--json", "c.json")[0] == 0
    assert by_key("c.json")[1]["cnn", "pgd"]["n"] == 40
    assert Path("evaluation/parts.jsonl").read_text().startswith(before)
    dknn = [word for word in SMALL if word not in ("--n", 20)] + by("dknn")
    for other in (
        [*dknn, "--n", 20, "--eps", "0.2"],
        [*dknn, "--slice", "0:20"],
        [*SMALL, *by("rails input population=50 generations=1"), "--seed", 7],
    ):
        assert run(*other, "--attack", "pgd", "--json", "d.json")[0] == 0
        assert run(*other, "--attack", "pgd", "--out", "fresh", "--json", "e.json")[0] == 0
        assert timeless("d.json") == timeless("e.json")
    # And the first command finds its own again.
    kept = Path("evaluation/parts.jsonl").read_text()
    assert run(*words, "--attack", "none", "--json", "b.json")[0] == 0
    assert by_key("a.json")[0]["results"] == by_key("b.json")[0]["results"]
    assert Path("evaluation/parts.jsonl").read_text() == kept


def timeless(path):
    return [{k: v for k, v in row.items() if k != "seconds_per_image"} for row in by_key(path)[0]["results"]]


def test_what_was_done_before_an_interruption_is_not_done_again(run, monkeypatch):
    words = [*SMALL, *by("cnn", "dknn"), "--attack", "pgd", "--json", "r.json"]
    assert run(*words, "--out", "whole")[0] == 0
    whole = timeless("r.json")
    Path("r.json").unlink()
    made, attack = [], PGD.__call__

    def interrupted(self, model, x, y, *more, **how):
        made.append(len(x))
        if len(made) == 2:
            raise KeyboardInterrupt
        return attack(self, model, x, y, *more, **how)

    monkeypatch.setattr(PGD, "__call__", interrupted)
    assert run(*words)[0] == 130
    assert not Path("r.json").exists()
    assert run(*words)[0] == 0
    assert made == [15, 5, 5]  # a part, one interrupted, the rest
    assert timeless("r.json") == whole


def test_those_of_one_name_have_rows_and_lines_of_their_own(run):
    specs = [
        "rails input population=40",
        "rails input population=40 generations=2",
        "rails input generations=2 population=40",
    ]
    code, _, err = run(*SMALL, *by(*specs), "--attack", "none", "--json", "r.json")
    assert code == 0, err
    rows = by_key("r.json")[0]["results"]
    assert [row["defence"] for row in rows] == ["rails", "rails generations=2"]
    assert [row["settings"]["maturation"][0]["generations"] for row in rows] == [0, 2]
    assert "rails generations=2 input none: " in err
    assert "| input | rails generations=2 | none |" in Path("evaluation/table.md").read_text()


def test_tuning_chooses_for_dknn_on_the_validation_split(run):
    code, _, err = run(*SMALL, "--attack", "none", *by("dknn input", "dknn tuned"), "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    tuned = rows["dknn-tuned", "input", "none"]["settings"]
    assert tuned["tuning"]["images"] == 129 + 14  # a tenth of the training set is fewer than 300
    assert tuned["neighbours"] == tuned["tuning"]["neighbours"]
    assert tuned["metric"] == tuned["tuning"]["metric"]
    assert rows["dknn", "input", "none"]["settings"]["metric"] == "cosine"
    # What was chosen can be given to fit as it is told.
    (chosen,) = re.findall(r"^dknn-tuned input: (dknn input .*)$", err, re.M)
    assert Spec.parse(chosen).settings == {key: tuned[key] for key in ("neighbours", "metric")}
    # A setting that is given is not chosen.
    assert run(*SMALL, "--attack", "none", *by("dknn tuned metric=euclidean"), "--json", "r.json")[0] == 0
    assert by_key("r.json")[1]["dknn-tuned", "input", "none"]["settings"]["metric"] == "euclidean"


OWN = """
import torch
from immunonet import Answer, Defence, models

def halves(net):
    return lambda x: x.flatten(1) / 2

def loud(net, gain=1.0):
    return lambda x: (gain * net(x)).log_softmax(1)

def clumsy(net):
    return lambda x: x.nothing

class Shift(Defence):
    kind, title = "shift", "Shift"

    def fit(self, x=None, y=None, calibration=None):
        self.by, self.classes = self.gain * float(x.mean()), 10
        return self

    def tensors(self):
        return {"by": torch.tensor(self.by)}

    def restore(self, tensors):
        self.by = float(tensors["by"])

    def answer(self, x, seed=None):
        return Answer.of(models.logits(self.model, (x - self.by).clamp(0, 1)))

def shift(net, gain):
    made = Shift(net)
    made.gain = gain
    return made
"""


@pytest.fixture
def own(run):
    Path("mine.py").write_text(OWN)
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)


def test_a_feature_map_of_ones_own_and_the_authors_settings(run, own):
    spec = "rails mine:halves authors population=40 generations=1"
    code, _, err = run(*SMALL, "--attack", "none", *by(spec), "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    assert rows["rails-authors", "mine:halves", "none"]["settings"]["maturation"][0]["crossover"] == "authors"
    code, _, err = run(*SMALL, *by(f"{spec} hidden=true"))
    assert code == 2
    assert "hidden needs one layer, the name of a submodule" in err


def test_a_defence_of_ones_own(run, own, digits_net):
    specs = ["cnn", "mine:loud", "mine:loud gain=-1"]
    code, _, err = run(*SMALL, *by(*specs), "--json", "r.json")
    assert code == 0, err
    test = data.load("digits", "test")[data.sample(360, 20)]
    with torch.no_grad():
        logits = digits_net(test.x)
    _, rows = by_key("r.json")
    assert list(rows) == [(name, a) for name in ("cnn", "loud", "loud gain=-1") for a in ("none", "fgsm", "pgd")]
    for attack in ("none", "fgsm", "pgd"):
        assert rows["loud", attack]["correct"] == rows["cnn", attack]["correct"]
    # In the same folder the second is not taken for the first.
    assert rows["loud gain=-1", "none"]["correct"] == int((logits.argmin(1) == test.y).sum())
    assert rows["loud gain=-1", "none"]["settings"]["given"] == {"gain": -1}
    # Nor where it is fitted, and its settings do not tell what the factory was given.
    specs = by("mine:shift gain=0", "mine:shift gain=2")
    assert run(*SMALL, *specs, "--attack", "none", "--json", "s.json")[0] == 0
    mean = float(data.load("digits", "train")[data.split(len(data.load("digits", "train")))[0]].x.mean())
    for gain in (0, 2):
        with torch.no_grad():
            right = digits_net((test.x - gain * mean).clamp(0, 1)).argmax(1) == test.y
        assert by_key("s.json")[1][f"shift gain={gain}", "none"]["correct"] == int(right.sum())
    for word, told in (("mine:clumsy", "function fails: AttributeError"), ("mine:nothing", "cannot be imported")):
        code, _, err = run(*SMALL, *by(word), "--out", "other")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert told in err


def test_cells_in_the_layer_itself_with_settings_of_ones_own(run):
    spec = "rails conv2:2 hidden=true population=40 neighbours=4 recombination=0.5 crossover=none metric=cosine"
    code, _, err = run(*SMALL, "--attack", "none", *by(spec), "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    settings = rows["rails", "conv2:2", "none"]["settings"]
    assert (settings["space"], settings["metric"]) == ("conv2:2", "cosine")
    found = settings["maturation"][0]
    assert (found["neighbours"], found["recombination"], found["crossover"]) == (4, 0.5, None)


def test_settings_are_tried_on_validation_images_that_do_not_calibrate(run, digits_net):
    specs = by("cnn", "dknn")
    code, _, err = run(*SMALL, *specs, "--split", "validation", "--attack", "none", "--json", "r.json")
    assert code == 0, err
    rows = by_key("r.json")[1]
    train = data.load("digits", "train")
    held = train[data.split(len(train))[1]]
    tried = held[data.sample(len(held), 20)]
    with torch.no_grad():
        assert rows["cnn", "none"]["correct"] == int((digits_net(tried.x).argmax(1) == tried.y).sum())
    settings = rows["dknn", "input", "none"]["settings"]
    assert (settings["split"], settings["calibration"]) == ("validation", len(held) - 20)
    code, _, err = run(*SMALL[:2], "--n", len(held), *SMALL[4:], "--split", "validation")
    assert code == 2
    assert f"--n must leave some of the {len(held)} validation images, got {len(held)}" in err


def test_a_slice_is_in_the_order_of_the_file(run, digits_net):
    short = [word for word in (*SMALL, *by("cnn", "dknn")) if word not in ("--n", 20)]
    code, _, err = run(*short, "--slice", "10:40", "--attack", "none", "--json", "r.json")
    assert code == 0, err
    rows = by_key("r.json")[1]
    test = data.load("digits", "test")[10:40]
    with torch.no_grad():
        assert rows["cnn", "none"]["correct"] == int((digits_net(test.x).argmax(1) == test.y).sum())
    assert {tuple(row["settings"]["slice"]) for row in rows.values()} == {(10, 40)}
    code, _, err = run(*short, "--slice", "0:100", "--split", "validation", "--attack", "none", "--out", "v")
    assert code == 0, err
    code, _, err = run(*short, "--slice", "0:143", "--split", "validation", "--attack", "none", "--out", "v")
    assert code == 2
    assert "--slice must leave some of the 143 validation images, got 0:143" in err


def test_a_sample_of_data_in_class_order_is_of_every_class(command):
    """A network that always says "a" is right on a fifth of five classes, however few are asked about."""
    for split, n in (("train", 12), ("test", 40)):
        for label in "abcde":
            (Path("set") / split / label).mkdir(parents=True)
            for i in range(n):
                Image.new("L", (4, 4), i).save(Path("set") / split / label / f"{i:02}.png")
    Path("always_a.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))\n"
        "    net[1].weight.data.zero_()\n    net[1].bias.data = torch.tensor([5., 0, 0, 0, 0])\n    return net\n"
    )
    words = ["evaluate", "--dataset", "set", "--model", "always_a:make", "--attack", "none", *by("cnn")]
    shares = []
    for n in (40, 80, 200):
        code, _, err = command(*words, "--n", n, "--out", n, "--json", "r.json")
        assert code == 0, err
        shares.append(by_key("r.json")[1]["cnn", "none"]["accuracy"])
    assert shares[-1] == 0.2
    assert max(abs(share - 0.2) for share in shares) < 0.2  # over three standard deviations; the first 40 gave 1.0
    sys.modules.pop("always_a", None)


def test_the_networks_own_voice(run):
    specs = by("cnn", "dknn", RAILS_30, f"{RAILS_30} voice=.999")
    code, _, err = run(*SMALL, "--attack", "pgd", *specs, "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    loud, silent = rows["rails voice=0.999", "input", "pgd"], rows["rails", "input", "pgd"]
    assert (loud["settings"]["voice"], silent["settings"]["voice"]) == (0.999, 0)
    assert "voice" not in rows["dknn", "input", "pgd"]["settings"]
    # With nearly all the weight the network decides; the plasma cells by themselves answer otherwise.
    assert loud["accuracy"] == rows["cnn", "pgd"]["accuracy"] != silent["accuracy"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (by("rails input voice=1"), "voice must be a finite number in [0, 1), got 1"),
        (by("rails input cells=3"), "rails has no setting 'cells'; nearest: cell_bounds"),
        (by("rails input neighbours=few"), "neighbours must be an integer, got 'few'"),
        (by("rals"), "defence 'rals': there is no defence 'rals'; nearest: rails"),
        (["--eps", "much"], "--eps must be a number such as 0.1 or 60/255, got 'much'"),
        (["--eps", "1/0"], "--eps must be a number"),
        (["--eps", "-0.1"], "eps must be a finite number in [0"),
        (["--step", "x"], "--step must be a number"),
        (["--slice", "0:10"], "--slice goes without --n: it says which images and how many"),
        (["--norm", "l0"], "norm must be one of 'linf', 'l2'"),
        (["--attack", "soft-kn"], "--attack 'soft-kn' is neither on the network nor a surrogate; nearest: soft-knn"),
        (by("rails preset=best"), "preset must be one of"),
        (by("cnn", "rails population=0"), "population must be at least 1"),
        (by("cnn", "dknn conv9"), "layers='conv9' is no submodule of the model; nearest names: conv"),
        (by("dknn conv1+nowhere"), "layers='nowhere' is no submodule of the model"),
        (by("dknn mnist_affine"), "net must be a MnistNet"),
        (["--dataset", "nothing"], "there is no 'nothing'"),
        (["--weights", "none.safetensors"], "none.safetensors"),
        (["--device", "tpu9"], "--device must be one of"),
        (["--validation", "100000"], "validation must be at least 1 and at most"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_any_work(run, change, told):
    code, out, err = run(*SMALL, *change)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert out == ""
    assert not Path("evaluation/parts.jsonl").exists()


def test_one_defence_over_several_layers(run):
    specs = ["cnn", "dknn conv1+input", "dknn conv1+input tuned", "rails conv1+input population=40 generations=1"]
    code, out, err = run(*SMALL, *by(*specs), "--attack", "none", "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    assert list(rows) == [
        ("cnn", "none"),
        *((kind, "conv1", "input", "none") for kind in ("dknn", "dknn-tuned", "rails")),
    ]
    assert len(rows["rails", "conv1", "input", "none"]["settings"]["maturation"]) == 2
    assert "conv1, input, none: rails alone is right on" in out


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("10", "--slice must be FROM:TO, two numbers such as 0:1000, got '10'"),
        ("9:3", "--slice must be FROM:TO"),
        ("-1:3", "--slice must be FROM:TO"),
        ("0:400", "--slice must end at 360, the number of images, or before, got 0:400"),
    ],
)
def test_a_wrong_slice(run, part, told):
    code, _, err = run("--dataset", "digits", "--weights", "digits.safetensors", f"--slice={part}")
    assert code == 2
    assert told in err


def test_names_of_files_may_hold_an_equals_sign(digits_net, tmp_path):
    path = tmp_path / "epoch=9-acc=0.97.safetensors"
    zoo.save_weights(digits_net, path)
    x = torch.rand(3, 1, 8, 8)
    for text in (str(path), f"digits={path}"):
        net = evaluate_module._other(text, "digits", torch.device("cpu"), 10)
        torch.testing.assert_close(net(x), digits_net(x), atol=1e-2, rtol=1e-2)
    with pytest.raises(FileNotFoundError, match=r"lr=3-gone\.safetensors"):
        evaluate_module._other("lr=3-gone.safetensors", "digits", torch.device("cpu"), 10)
