"""`immunonet connect`: from two files of weights to a path, interrupted, used as a defence, and refused."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from immunonet import ModePath, data, zoo

THREATS = ("--threat", "linf=0.1", "--threat", "l1=1.5")
HOW = ("--epochs", 2, "--batch-size", 32, "--lr", 0.003, "--iterations", 2)


@pytest.fixture
def ends(tmp_path, monkeypatch):
    """Write a few digits and the weights of two networks into the working folder."""
    images = data.load("digits", "train")[:120]
    cells = []
    for image in images.x[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray((image * 255).astype(np.uint8)).save(file, "PNG")
        cells.append(file.getvalue())
    pq.write_table(pa.table({"image": cells, "label": images.y.numpy()}), tmp_path / "tiny.parquet")
    for i in (0, 1):
        zoo.save_weights(zoo.build("digits", seed=i), tmp_path / f"{'ab'[i]}.safetensors", half=False)
    return tmp_path


def connect(command, *words):
    return command("connect", "a.safetensors", "b.safetensors", "--dataset", "tiny.parquet", *THREATS, *HOW, *words)


def test_a_path_is_trained_measured_saved_and_used(command, ends):
    code, out, err = connect(command, "--points", 5, "--json", "rows.json")
    assert code == 0, err
    assert "epoch 2 of 2" in err
    assert out.count("<- best") == 1
    names = sorted(file.name for file in Path("path").iterdir())
    assert names[:1] + names[2:] == ["connect.json", "path.json"]
    rows = json.loads(Path("rows.json").read_text())["results"]
    assert [row["t"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert all(row["union"] <= min(row["linf"], row["l1"]) for row in rows)
    path = ModePath.load("path", zoo.build("digits"))
    assert path.settings["adversarial"]["threats"] == [["linf", 0.1], ["l1", 1.5]]
    scores = {row["t"]: (row["union"], min(row["linf"], row["l1"])) for row in rows}
    assert scores[path.settings["best"]] == max(scores.values())
    for i, end in enumerate(path.ends):
        assert torch.equal(end.fc1.weight, zoo.build("digits", seed=i).fc1.weight)

    words = ("--dataset", "tiny.parquet", "--model", "digits", "--weights", "a.safetensors", "--n", 6)
    spec = "path path=path points=0.25,0.75"
    code, out, err = command("evaluate", *words, "--defence", spec, "--attack", "pgd", "--json", "e.json")
    assert code == 0, err
    (row,) = json.loads(Path("e.json").read_text())["results"]
    assert row["defence"] == "path"
    assert row["settings"]["points"] == [0.25, 0.75]
    code, out, err = command("fit", *words[:-2], "--defence", spec)
    assert code == 0, err


def test_an_interrupted_connect_goes_on_where_it_stopped(command, ends, monkeypatch):
    few = ("--points", 2)
    assert connect(command, *few, "--out", "whole")[0] == 0
    train = zoo.connect

    def interrupted(*args, on_progress, **how):
        def stop(step, steps, history):
            if history:
                raise KeyboardInterrupt
            on_progress(step, steps, history)

        return train(*args, on_progress=stop, **how)

    monkeypatch.setattr(zoo, "connect", interrupted)
    assert connect(command, *few)[0] == 130
    assert [file.name for file in Path("path").iterdir()] == ["path.checkpoint.safetensors"]
    monkeypatch.setattr(zoo, "connect", train)
    code, _, err = connect(command, *few)
    assert code == 0
    assert "continuing from path/path.checkpoint.safetensors" in err.replace("\n", "")
    (one,), (other,) = (Path(folder).glob("path-*.safetensors") for folder in ("path", "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a.safetensors", *THREATS), "give the weights of two or more networks, got 1"),
        (("a.safetensors", "b.safetensors"), "--threat must be given, such as --threat linf=8/255"),
        (("a.safetensors", "c.safetensors", *THREATS), "c.safetensors"),
        (("a.safetensors", "b.safetensors", "--threat", "l1=65"), "threats['l1'] (images have room for 64)"),
        (("a.safetensors", "b.safetensors", *THREATS, "--combine", "sum"), "--combine must be one of 'max'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(command, ends, words, message):
    code, _, err = command("connect", *words, "--dataset", "tiny.parquet")
    assert code == 2
    assert message in " ".join(err.split())
