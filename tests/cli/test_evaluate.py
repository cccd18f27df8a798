import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from immunonet import DkNN, data, zoo
from immunonet.attacks import PGD
from immunonet.cli import evaluate as evaluate_module

KEYS = {
    "dataset", "defence", "attack", "knows", "eps", "norm", "n", "correct", "accuracy", "ci95",
    "seconds_per_image", "seeds", "settings", "foreign",
}  # fmt: skip
SMALL = [
    "--dataset", "digits", "--n", 20, "--eps", "1/8", "--iterations", 3, "--chunk", 15, "--seeds", 2,
    "--population", 40, "--weights", "digits.safetensors",
]  # fmt: skip


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
    code, out, err = run(*SMALL, "--layer", "input", "--layer", "conv1", "--population", "conv1=20", "--json", "r.json")
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
    assert rows["rails", "input", "pgd"]["settings"]["maturation"][0]["population"] == 40
    assert pgd["settings"]["attack"]["step"] == 0.03125
    assert rows["dknn", "conv1", "none"]["settings"]["neighbours"] == 75
    assert rows["rails", "conv1", "soft-knn"]["knows"] == rows["rails", "conv1", "soft-clones"]["knows"] == "defence"
    assert rows["rails", "conv1", "soft-clones"]["settings"]["surrogate"] == {"sharpness": [0.1]}

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
    assert table.startswith("| layer | defence | attack | knows | accuracy | 95 % interval | ms/image | foreign |\n")
    assert len(re.findall(r"^\| (input|conv1) \|", table, re.M)) == 18
    assert "conv1" in out
    assert f"{rows['rails', 'input', 'pgd']['accuracy']:.4f}" in out
    assert re.search(r"input, pgd: rails alone is right on \d+, dknn alone on \d+ of 20 images, p = ", out)
    assert "rails conv1 soft-knn: " in err


def test_the_same_command_continues_and_another_is_refused(run, monkeypatch):
    assert run(*SMALL, "--attack", "none", "--json", "a.json")[0] == 0
    before = Path("evaluation/parts.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(DkNN, "fit", None)
        assert run(*SMALL, "--attack", "none", "--json", "b.json")[0] == 0
    assert Path("evaluation/parts.jsonl").read_text() == before
    assert by_key("a.json")[0]["results"] == by_key("b.json")[0]["results"]
    # More images and attacks are added to what is there.
    assert run(*SMALL, "--attack", "none", "--attack", "pgd", "--n", 40, "--json", "c.json")[0] == 0
    assert by_key("c.json")[1]["cnn", "pgd"]["n"] == 40
    assert Path("evaluation/parts.jsonl").read_text().startswith(before)
    for change, told in (
        (["--eps", "0.2"], "pgd.eps was 0.125, now 0.2"),
        (["--population", "80"], "settings of rails input maturation.0.population was 40, now 80"),
        (["--preset", "paper"], "maturation.0.early_stop was 2, now None"),
    ):
        code, _, err = run(*SMALL, "--attack", "none", *change)
        assert code == 2
        assert told in err
        assert "give another folder" in err


def test_tuning_chooses_for_dknn_on_the_validation_split(run):
    code, _, err = run(*SMALL, "--attack", "none", "--tune-dknn", "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    tuned = rows["dknn-tuned", "input", "none"]["settings"]
    assert tuned["tuning"]["images"] == 129 + 14  # a tenth of the training set is fewer than 300
    assert tuned["neighbours"] == tuned["tuning"]["neighbours"]
    assert tuned["metric"] == tuned["tuning"]["metric"]
    assert rows["dknn", "input", "none"]["settings"]["metric"] == "cosine"


def test_a_feature_map_of_ones_own_and_the_authors_settings(run, tmp_path):
    Path("mine.py").write_text("def halves(net):\n    return lambda x: x.flatten(1) / 2\n")
    code, _, err = run(*SMALL, "--attack", "none", "--layer", "mine:halves", "--preset", "authors", "--json", "r.json")
    refused = run(*SMALL, "--layer", "mine:halves", "--hidden")
    sys.modules.pop("mine", None)
    assert code == 0, err
    assert refused[0] == 2
    assert "--hidden needs submodules as layers, got --layer mine:halves" in refused[2]
    _, rows = by_key("r.json")
    assert rows["rails", "mine:halves", "none"]["settings"]["maturation"][0]["crossover"] == "authors"


def test_cells_in_the_layer_itself_with_settings_of_ones_own(run):
    given = ["--maturation", "neighbours=4", "--maturation", "recombination=0.5", "--maturation", "crossover=none"]
    code, _, err = run(*SMALL, "--attack", "none", "--layer", "conv2:2", "--hidden", *given, "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    settings = rows["rails", "conv2:2", "none"]["settings"]
    assert settings["space"] == "conv2:2"
    found = settings["maturation"][0]
    assert (found["neighbours"], found["recombination"], found["crossover"]) == (4, 0.5, None)


def test_settings_are_tried_on_validation_images_that_do_not_calibrate(run, digits_net):
    code, _, err = run(*SMALL, "--split", "validation", "--attack", "none", "--json", "r.json")
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
    short = [word for word in SMALL if word not in ("--n", 20)]
    code, _, err = run(*short, "--slice", "10:40", "--attack", "none", "--json", "r.json")
    assert code == 0, err
    rows = by_key("r.json")[1]
    test = data.load("digits", "test")[10:40]
    with torch.no_grad():
        assert rows["cnn", "none"]["correct"] == int((digits_net(test.x).argmax(1) == test.y).sum())
    assert {tuple(row["settings"]["slice"]) for row in rows.values()} == {(10, 40)}
    # The same folder goes on with neither another slice nor a sample, whose images are others.
    for other in (["--slice", "0:30"], ["--n", 30]):
        code, _, err = run(*short, *other, "--attack", "none")
        assert code == 2
        assert "results of other settings" in err
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
    words = ["evaluate", "--dataset", "set", "--model", "always_a:make", "--attack", "none", "--seeds", 1]
    few = ["--maturation", "neighbours=2"]
    shares = []
    for n in (40, 80, 200):
        code, _, err = command(*words, "--population", 50, "--n", n, "--out", n, *few, "--json", "r.json")
        assert code == 0, err
        shares.append(by_key("r.json")[1]["cnn", "none"]["accuracy"])
    assert shares[-1] == 0.2
    assert max(abs(share - 0.2) for share in shares) < 0.2  # over three standard deviations; the first 40 gave 1.0
    sys.modules.pop("always_a", None)


def test_the_networks_own_voice(run):
    code, _, err = run(*SMALL, "--attack", "pgd", "--voice", "0.999", "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    assert rows["rails", "input", "pgd"]["settings"]["voice"] == 0.999
    assert "voice" not in rows["dknn", "input", "pgd"]["settings"]
    # With nearly all the weight the network decides; the plasma cells by themselves answer otherwise.
    assert rows["rails", "input", "pgd"]["accuracy"] == rows["cnn", "pgd"]["accuracy"]
    assert run(*SMALL, "--attack", "pgd", "--json", "r.json", "--out", "silent")[0] == 0
    silent = by_key("r.json")[1]["rails", "input", "pgd"]
    assert silent["settings"]["voice"] == 0
    assert silent["accuracy"] != rows["cnn", "pgd"]["accuracy"]
    code, _, err = run(*SMALL, "--attack", "pgd", "--voice", "0.5")
    assert code == 2
    assert "settings of rails input voice was 0.999, now 0.5" in err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--voice", "1"], "--voice must be a finite number in [0, 1), got 1"),
        (["--maturation", "cells=3"], "--maturation must be KEY=VALUE with a KEY of population,"),
        (["--maturation", "neighbours=few"], "neighbours must be an integer, got 'few'"),
        (["--eps", "much"], "--eps must be a number such as 0.1 or 60/255, got 'much'"),
        (["--eps", "1/0"], "--eps must be a number"),
        (["--eps", "-0.1"], "eps must be a finite number in [0"),
        (["--step", "x"], "--step must be a number"),
        (["--slice", "0:10"], "--slice goes without --n: it says which images and how many"),
        (["--norm", "l1"], "norm must be one of 'linf', 'l2'"),
        (
            ["--attack", "magic"],
            "--attack must be one of 'none', 'fgsm', 'pgd', 'soft-knn', 'soft-clones', got 'magic'",
        ),
        (["--preset", "best"], "--preset must be one of"),
        (["--population", "many"], "--population must be a number, or LAYER=NUMBER for one of input, got 'many'"),
        (["--population", "fc1=10"], "--population must be a number, or LAYER=NUMBER"),
        (["--population", "0"], "population must be at least 1"),
        (["--layer", "conv9"], "layers='conv9' is no submodule of the model; nearest names: conv"),
        (["--layer", "mnist_affine"], "net must be a MnistNet"),
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
    code, out, err = run(*SMALL, "--layer", "conv1+input", "--attack", "none", "--tune-dknn", "--json", "r.json")
    assert code == 0, err
    _, rows = by_key("r.json")
    assert list(rows) == [
        ("cnn", "none"),
        *((kind, "conv1", "input", "none") for kind in ("dknn", "dknn-tuned", "rails")),
    ]
    assert len(rows["rails", "conv1", "input", "none"]["settings"]["maturation"]) == 2
    assert "conv1, input, none: rails alone is right on" in out
    code, _, err = run(*SMALL, "--layer", "conv1+nowhere")
    assert code == 2
    assert "layers='nowhere' is no submodule of the model" in err


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
