import importlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from immunonet import data, zoo
from immunonet.cli import common, main, reproduce


@pytest.fixture
def digits(tmp_path):
    """Write a few of scikit-learn's digits as tiny.parquet; return its path."""
    images = data.load("digits", "train")[:80]
    cells = []
    for image in images.x[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray((image * 255).astype(np.uint8)).save(file, "PNG")
        cells.append(file.getvalue())
    table = pa.table({"image": cells, "label": images.y.numpy()})
    pq.write_table(table, tmp_path / "tiny.parquet")
    return tmp_path / "tiny.parquet"


def files(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def test_train_writes_weights_that_do_what_it_prints(command, digits):
    code, out, err = command("train", digits, "--epochs", 3, "--lr", 0.01, "--json", "results/train.json")
    assert code == 0
    assert "epoch 3 of 3" in err
    assert files("weights") == ["tiny.json", "tiny.safetensors"]
    recipe = json.loads(Path("weights/tiny.json").read_text())
    envelope = json.loads(Path("results/train.json").read_text())
    assert envelope.keys() == {"results", "environment", "command"}
    assert envelope["results"] == recipe["results"]
    assert {"python", "torch", "platform", "cpu", "threads"} <= envelope["environment"].keys()
    assert envelope["command"].startswith(f"immunonet train {digits.name} --epochs 3")
    assert len(recipe["history"]) == 3

    net = common.load_model("digits", Path("weights/tiny.safetensors"))
    images = data.read_parquet(digits)
    rest, test = data.split(80, 16)
    held_out = rest[data.split(64)[1]]
    for row, part in zip(recipe["results"], (images[held_out], images[test]), strict=True):
        assert row["accuracy"] == zoo.accuracy(net, part)
        assert row["n"] == len(part)
        assert f"{row['split']} accuracy {row['accuracy']:.4f} on {len(part)} images" in out
    assert recipe["results"][0]["settings"] == {
        "epochs": 3,
        "batch_size": 128,
        "lr": 0.01,
        "patience": None,
        "augment": False,
        "bfloat16": False,
        "seed": 0,
        "start": None,
        "adversarial": None,
        "ema": None,
    }


def test_adversarial_training_goes_on_from_weights(command, digits):
    assert command("train", digits, "--epochs", 1)[0] == 0
    words = (
        "train",
        digits,
        "--epochs",
        2,
        "--lr",
        1e-9,
        "--start",
        "weights/tiny.safetensors",
        "--name",
        "hardened",
    )
    attack = (
        "--adversarial",
        "trades",
        "--eps",
        "1/10",
        "--attack-iterations",
        2,
        "--beta",
        3,
        "--validation-eps",
        0.2,
    )
    code, out, err = command(*words, *attack)
    assert code == 0
    assert re.search(r"epoch 2 of 2: .* under attack", err)
    assert files("weights") == ["hardened.json", "hardened.safetensors", "tiny.json", "tiny.safetensors"]
    recipe = json.loads(Path("weights/hardened.json").read_text())
    for row in recipe["results"]:
        assert row["settings"]["start"] == "tiny.safetensors"
        assert row["settings"]["adversarial"] == {
            "loss": "trades",
            "eps": 0.1,
            "step": None,
            "iterations": 2,
            "beta": 3,
            "ramp": 0,
            "validation_eps": 0.2,
            "threats": None,
            "combine": "max",
        }
        assert row["robust_n"] == row["n"]
        attacked = f"{row['split']} accuracy {row['robust_accuracy']:.4f} under attack (eps 0.2) on {row['n']} images"
        assert attacked in out
    plain, hardened = (
        common.load_model("digits", Path(f"weights/{name}.safetensors")) for name in ("tiny", "hardened")
    )
    for before, after in zip(plain.parameters(), hardened.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=2e-3, atol=1e-6)  # the learning rate is nearly 0
    images = data.read_parquet(digits)[data.split(80, 16)[1]]
    assert recipe["results"][1]["robust_accuracy"] == zoo.robust_accuracy(hardened, images, eps=0.2)


def test_train_against_several_threats(command, digits):
    words = ("train", digits, "--epochs", 2, "--batch-size", 16, "--adversarial", "pgd", "--ema", 0.5)
    threats = ("--threat", "linf=1/10", "--threat", "l1=1.5", "--combine", "msd", "--attack-iterations", 2)
    code, out, err = command(*words, *threats)
    assert code == 0, err
    recipe = json.loads(Path("weights/tiny.json").read_text())
    assert recipe["results"][0]["settings"]["adversarial"]["threats"] == {"linf": 0.1, "l1": 1.5}
    assert recipe["results"][0]["settings"]["ema"] == 0.5
    row = recipe["results"][1]
    assert row["robust_accuracies"].keys() == {"eps 0.1", "l1 1.5", "all of them"}
    assert row["robust_accuracy"] == row["robust_accuracies"]["all of them"] <= row["robust_accuracies"]["l1 1.5"]
    assert f"test accuracy {row['robust_accuracy']:.4f} under attack (all of them) on 16 images" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threat", "l1=2"), "--threat need --adversarial pgd or trades"),
        (("--adversarial", "pgd", "--threat", "l1"), "--threat must be NORM=EPS, such as l2=0.5, got 'l1'"),
        (("--adversarial", "pgd", "--threat", "l3=1"), "got 'l3=1'; nearest: l"),
        (("--adversarial", "pgd", "--threat", "l1=1", "--threat", "l1=2"), "--threat l1 must be given once"),
        (("--adversarial", "pgd", "--threat", "l1=100"), "threats['l1'] (images have room for 64)"),
        (("--adversarial", "pgd", "--threat", "l1=1", "--eps", "0.1"), "eps goes with one radius in linf"),
    ],
)
def test_threats_that_make_no_sense_are_refused(command, digits, words, message):
    code, _, err = command("train", digits, *words)
    assert code == 2
    assert message in " ".join(err.split())


def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_continues(command, digits, monkeypatch):
    words = ("train", digits, "--epochs", 3, "--batch-size", 16)
    assert command(*words, "--out", "whole")[0] == 0
    train = zoo.train

    def interrupted(*arguments, on_progress, **options):
        def stop(step, steps, history):
            on_progress(step, steps, history)
            if len(history) == 1 and step % (steps // 3) == 2:
                raise KeyboardInterrupt

        return train(*arguments, on_progress=stop, **options)

    monkeypatch.setattr(zoo, "train", interrupted)
    code, out, err = command(*words, "--out", "parts")
    assert code == 130
    assert out == ""
    assert "Traceback" not in err
    assert files("parts") == ["tiny.checkpoint.safetensors"]
    monkeypatch.setattr(zoo, "train", train)
    code, _, err = command(*words, "--out", "parts")
    assert code == 0
    assert "continuing from parts/tiny.checkpoint.safetensors" in err
    assert files("parts") == ["tiny.json", "tiny.safetensors"]
    assert Path("parts/tiny.safetensors").read_bytes() == Path("whole/tiny.safetensors").read_bytes()


def test_a_full_disk_is_one_line_and_nothing_half_written(command, digits, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("immunonet._store.save_file", full)
    code, out, err = command("train", digits, "--epochs", 1)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("immunonet: weights/tiny.checkpoint.safetensors could not be written")
    assert files("weights") == []


def test_a_small_dataset_gets_more_epochs(command, digits, monkeypatch):
    seen = {}

    def stop(*_, **options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "train", stop)
    assert command("train", digits, "--batch-size", 2)[0] == 130
    assert seen["epochs"] == 35  # 58 images: 29 steps an epoch, 1,000 steps
    assert command("train", digits, "--batch-size", 2, "--epochs", 1)[0] == 130
    assert seen["epochs"] == 1


USER_MODULE = """
import torch
def linear():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
def narrow():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
def pair():
    class Pair(torch.nn.Identity):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x):
            return x, x
    return Pair()
word = str
"""


def test_a_users_own_model(command, digits, monkeypatch):
    Path("my_networks.py").write_text(USER_MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert command("train", digits, "--model", "my_networks:linear", "--epochs", 1)[0] == 0
    net = common.load_model("my_networks:linear", Path("weights/tiny.safetensors"))
    assert isinstance(net[1], torch.nn.Linear)
    monkeypatch.delitem(sys.modules, "my_networks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "DATASET must be mnist, .* there is no 'nothing'"),
        (["svhn-sample"], r"no folder was given for svhn-sample-train\.parquet"),
        (["svhn-sample", "--data", "gone"], r"svhn-sample-train\.parquet is not in gone"),
        (
            ["digits", "--model", "nothing"],
            "--model must be mnist, .* or package.module:factory, got 'nothing'",
        ),
        (["digits", "--model", "nothing:at_all"], "--model nothing:at_all cannot be imported"),
        (["digits", "--model", "json:nothing"], "--model json:nothing cannot be imported"),
        (["digits", "--model", "my_networks:word"], "must return a torch.nn.Module, got str"),
        (["digits", "--model", "residual"], r"--model residual does not take images of shape \(1, 8, 8\)"),
        (["digits", "--model", "my_networks:narrow"], r"logits of shape \(2, 10\) .* got \(2, 3\)"),
        (["digits", "--model", "my_networks:pair"], r"logits of shape \(2, 10\) .* got \(2, 1, 8, 8\)"),
        (["digits", "--device", "nowhere"], "--device must be one of cpu.* got 'nowhere'"),
        (["digits", "--validation", "5000"], "validation must be at least 1 and at most 1436, got 5000"),
        (["digits", "--lr", "0"], "lr must be a finite number"),
        (["digits", "--eps", "0.1", "--beta", "2"], "--eps and --beta need --adversarial pgd or trades"),
        (["digits", "--adversarial", "fgsm"], "--adversarial must be one of 'pgd', 'trades', got 'fgsm'"),
        (["digits", "--adversarial", "pgd", "--eps", "much"], "--eps must be a number such as 0.1 .*, got 'much'"),
        (["digits", "--adversarial", "pgd", "--eps", "2"], r"eps must be a finite number in \[0, 1\], got 2"),
        (["digits", "--start", "gone.safetensors"], r"gone\.safetensors does not exist"),
        (["digits", "--json", "."], "--json must be a file, . is a folder"),
        (["digits", "--out", "my_networks.py"], "File exists: 'my_networks.py'"),
        (["digits", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["wide"], r"no network of the zoo takes images of shape \(1, 4, 5\): give --model"),
        (["broken.parquet"], r"broken\.parquet is not a readable Parquet file"),
        (["empty"], "empty has no class folders"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(command, monkeypatch, arguments, message):
    Path("my_networks.py").write_text(USER_MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    Path("broken.parquet").write_text("not Parquet")
    Path("empty").mkdir()
    for name in ("wide/a/1.png", "wide/b/1.png", "wide/b/2.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(name)
    code, out, err = command("train", *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    last = [line for line in err.splitlines() if line.startswith("immunonet: ")] or [err]
    assert len(last) == 1
    assert re.search(message, last[0])
    assert not list(Path().glob("**/*.safetensors"))


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(command, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    code, _, err = command("train", "digits")
    assert (code, err.strip()) == (2, "immunonet: --out: weights cannot be written to")


def test_debugging_keeps_the_traceback(command, monkeypatch):
    monkeypatch.setenv("IMMUNONET_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="there is no 'nothing'"):
        main(["train", "nothing"])


def test_help(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "train" in out
    assert command()[0] == 2


@pytest.fixture
def folder(tmp_path):
    for split, n in (("train", 3), ("test", 1)):
        for label in "ab":
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.full((4, 5), i, np.uint8)).save(tmp_path / "photos" / split / label / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_with_its_own_split(folder):
    assert len(common.resolve_dataset(str(folder), "train")) == 6
    assert len(common.resolve_dataset(str(folder), "test")) == 2
    assert len(data.read(str(folder / "train"))) == 6


def test_a_folder_without_a_split_is_split(folder):
    parts = [common.resolve_dataset(str(folder / "train"), split) for split in data.SPLITS]
    assert [len(part) for part in parts] == [5, 1]
    whole = data.read_folder(folder / "train")
    rows = torch.cat([part.x.flatten(1) + part.y[:, None] for part in parts])
    assert sorted(rows.tolist()) == sorted((whole.x.flatten(1) + whole.y[:, None]).tolist())


def class_folders(path, **classes):
    for name, n in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(n):
            Image.new("L", (8, 8), i).save(path / name / f"{i}.png")
    return path


def test_labels_are_those_of_the_training_classes(tmp_path):
    class_folders(tmp_path / "set" / "train", cat=1, dog=1, eel=1)
    class_folders(tmp_path / "set" / "test", dog=1, eel=2)
    test = common.resolve_dataset(str(tmp_path / "set"), "test")
    assert (test.classes, test.y.tolist()) == (("cat", "dog", "eel"), [1, 2, 2])
    class_folders(tmp_path / "set" / "test", fox=1)
    with pytest.raises(ValueError, match="has the class 'fox', which is not among the training classes, cat, dog, eel"):
        common.resolve_dataset(str(tmp_path / "set"), "test")


def test_a_validation_folder_is_the_test_split_where_there_is_no_other(tmp_path, capsys):
    for split, n in (("train", 3), ("val", 1)):
        class_folders(tmp_path / "set" / split, a=n, b=n)
    assert [len(common.resolve_dataset(str(tmp_path / "set"), split)) for split in data.SPLITS] == [6, 2]
    assert "has no test split: its validation split is taken as test" in " ".join(capsys.readouterr().err.split())
    class_folders(tmp_path / "set" / "test", a=5)
    assert len(common.resolve_dataset(str(tmp_path / "set"), "test")) == 5
    assert capsys.readouterr().err == ""


def test_a_path_that_is_there_goes_before_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "digits", cat=1, dog=1)
    assert common.resolve_dataset("digits", "train").classes == ("cat", "dog")
    assert "digits: taking what lies in" in capsys.readouterr().err
    (tmp_path / "mnist").write_text("no images")
    with pytest.raises(ValueError, match="mnist is not a readable Parquet file"):
        common.resolve_dataset("mnist", "train")
    # What the program itself means by a name stays what it means.
    assert reproduce._images("digits", "test", None).classes == tuple("0123456789")
    assert reproduce._images("digits", "train", None, given=True).classes == ("cat", "dog")


def test_a_dataset_of_one_image(tmp_path):
    path = class_folders(tmp_path / "set", a=1)
    assert len(common.resolve_dataset(str(path), "train")) == 1
    with pytest.raises(ValueError, match="has one image and no test split"):
        common.resolve_dataset(str(path), "test")


def numbered(path, labels):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    pq.write_table(pa.table({"image": [file.getvalue()] * len(labels), "label": labels}), path)
    return data.read_parquet(path)


def test_a_file_without_names_may_lack_the_highest_label(tmp_path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    for labels in ([0, 1, 2], [0, 1], [0, 2]):
        common.check_model("mine:net", net, numbered(tmp_path / "x.parquet", labels))
    with pytest.raises(ValueError, match=r"must return logits of shape \(2, 4\) .* got \(2, 3\)"):
        common.check_model("mine:net", net, numbered(tmp_path / "x.parquet", [0, 3]))
    with pytest.raises(ValueError, match=r"must return logits of shape \(2, 10\) .* got \(2, 3\)"):
        common.check_model("mine:net", net, data.load("digits", "test"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(): return {}['weights']", r"failed .*KeyError: 'weights' \(.*broken_net\.py, line 1\)"),
        ("def make(): raise SystemError('odd')", "failed .*SystemError: odd"),
        ("from torch import nn\ndef make():\n  n = nn.Linear(2, 1)\n  n.load_state_dict({})", r"failed .*line 4\)"),
        ("def make(classes): pass", r"failed .*without arguments.*missing 1 .*'classes' \(.*broken_net\.py, line 1"),
        ("def make(:", r"cannot be imported \(SyntaxError: .*broken_net\.py, line 1"),
        ("1 / 0", r"cannot be imported \(ZeroDivisionError: division by zero \(.*broken_net\.py, line 1\)\)"),
        ("import torch\nmake = torch.nn.Flatten", "has no parameters: keep its layers as attributes"),
        (
            "from torch import nn\nclass M(nn.Linear):\n  def forward(self, x): return {}['no']\n"
            "def make(): return M(2, 1)",
            r"does not take images of shape \(1, 8, 8\) \(.*broken_net\.py, line 3\)",
        ),
    ],
)
def test_a_users_factory_that_fails_is_one_line(command, monkeypatch, text, message):
    Path("broken_net.py").write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("broken_net", None)
    importlib.invalidate_caches()
    code, out, err = command("train", "digits", "--model", "broken_net:make")
    sys.modules.pop("broken_net", None)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(rf"--model broken_net:make {message}", err)


def test_columns_size_and_background_reach_the_reader(command):
    file = io.BytesIO()
    Image.new("RGBA", (10, 20), (0, 0, 0, 0)).save(file, "PNG")
    pq.write_table(pa.table({"scan": [file.getvalue()] * 20, "kind": ["b", "a"] * 10}), "x.parquet")
    Path("gather.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    sys.modules.pop("gather", None)
    words = ["x.parquet", "--model", "gather:make", "--image", "scan", "--label", "kind", "--size", 8]
    code, _, err = command("train", *words, "--background", "black", "--epochs", 1, "--json", "r.json")
    assert code == 0, err
    settings = json.loads(Path("r.json").read_text())["results"][0]["settings"]
    how = {"image": "scan", "label": "kind", "size": 8, "background": "black"}
    assert {key: settings[key] for key in how} == how
    words[0:1] = ["--dataset", "x.parquet", "--weights", "weights/x.safetensors"]
    code, _, err = command("fit", *words, "--background", "black", "--defence", "dknn neighbours=2")
    assert code == 0, err
    record = json.loads(Path("defence/fit.json").read_text())
    assert (record["classes"], record["size"], record["background"]) == (["a", "b"], 8, "black")
    # predict takes size and background from the defence.
    code, out, err = command("predict", "x.parquet", "--image", "scan", "--weights", "weights/x.safetensors")
    assert code == 0, err
    assert len(out.splitlines()) == 21
    code, _, err = command("evaluate", *words, "--attack", "none", "--defence", "dknn neighbours=2", "--json", "e.json")
    assert code == 0, err
    rows = json.loads(Path("e.json").read_text())["results"]
    assert all(row["settings"]["size"] == 8 and "background" not in row["settings"] for row in rows)
    sys.modules.pop("gather", None)


def test_a_named_dataset_has_its_own_split():
    assert len(common.resolve_dataset("digits", "test")) == 360


def test_load_model_needs_weights_for_the_zoo():
    with pytest.raises(ValueError, match=r"--model digits needs --weights FILE\.safetensors"):
        common.load_model("digits", None)
    assert not common.load_model("immunonet.zoo:DigitsNet", None, "cpu").training
