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
from immunonet.cli import common, main


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
    assert envelope["command"].startswith(f"immunonet train {digits} --epochs 3")
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
        (["digits", "--model", "my_networks:pair"], r"logits of shape \(2, 10\) .* got tuple"),
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
    assert len(common.resolve_dataset(str(folder / "train"), None)) == 6


def test_a_folder_without_a_split_is_split(folder):
    parts = [common.resolve_dataset(str(folder / "train"), split) for split in data.SPLITS]
    assert [len(part) for part in parts] == [5, 1]
    whole = data.read_folder(folder / "train")
    rows = torch.cat([part.x.flatten(1) + part.y[:, None] for part in parts])
    assert sorted(rows.tolist()) == sorted((whole.x.flatten(1) + whole.y[:, None]).tolist())


def test_a_named_dataset_needs_a_split():
    assert len(common.resolve_dataset("digits", "test")) == 360
    with pytest.raises(ValueError, match="digits has two splits"):
        common.resolve_dataset("digits", None)


def test_load_model_needs_weights_for_the_zoo():
    with pytest.raises(ValueError, match=r"--model digits needs --weights FILE\.safetensors"):
        common.load_model("digits", None)
    assert not common.load_model("immunonet.zoo:DigitsNet", None, "cpu").training
