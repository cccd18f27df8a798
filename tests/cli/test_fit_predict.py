from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from immunonet import RAILS, DkNN, data, zoo
from immunonet.cli import common
from immunonet.cli import predict as predict_module

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Write the weights of an untrained network; what it answers does not matter here."""
    zoo.save_weights(zoo.build("digits", seed=3), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


FIT = ("fit", "--dataset", "digits", "--weights", "net.safetensors", "--population", 100, "--neighbours", 2)


def test_fit_saves_what_predict_answers_with(command: Run, weights: Path) -> None:
    code, out, err = command(*FIT, "--layer", "conv1", "--out", "fitted", "--json", "fit.json")
    assert (code, err) == (0, "")
    assert out == "rails on 1,294 images, calibrated on 143: fitted\n"
    record = json.loads(Path("fit.json").read_text())["results"][0]
    assert record["defence"] == "rails"
    assert record["settings"]["layers"] == ["conv1"]
    assert record["settings"]["maturation"][0]["population"] == 100

    code, out, err = command(
        *("predict", "digits", "--defence", "fitted", "--weights", weights, "--chunk", 200, "--seed", 7),
        *("--json", "predicted.json"),
    )
    assert (code, err) == (0, "")
    net = common.load_model("digits", weights)
    test = data.load("digits", "test")
    rails = RAILS.load("fitted", net)
    responses = [rails.respond(part, seed=7) for part in test.x.split(200)]
    labels, votes, credibility, foreign = (
        torch.cat([getattr(response, name) for response in responses])
        for name in ("labels", "votes", "credibility", "foreign")
    )
    rows = json.loads(Path("predicted.json").read_text())["results"]
    assert [row["label"] for row in rows] == labels.tolist()
    assert [row["name"] for row in rows] == [str(label) for label in labels.tolist()]
    assert [row["share"] for row in rows] == pytest.approx(votes.amax(1).tolist(), abs=1e-6)
    assert [row["credibility"] for row in rows] == pytest.approx(credibility.tolist(), abs=1e-6)
    assert [row["foreign"] for row in rows] == foreign.tolist()
    lines = out.splitlines()
    assert lines[0].split("\t") == ["input", "label", "share", "credibility", "foreign"]
    assert len(lines) == 1 + len(test)
    first = rows[0]
    expected = ["digits:0", first["name"], f"{first['share']:.3f}", f"{first['credibility']:.3f}"]
    assert lines[1].split("\t") == [*expected, "foreign" if first["foreign"] else ""]


def test_the_models_own_voice_is_kept(command: Run, weights: Path) -> None:
    assert command(*FIT, "--voice", "0.3", "--out", "fitted", "--json", "fit.json")[0] == 0
    assert json.loads(Path("fit.json").read_text())["results"][0]["settings"]["voice"] == 0.3
    assert RAILS.load("fitted", common.load_model("digits", weights)).voice == 0.3
    code, out, err = command(*FIT, "--voice", "-1")
    assert (code, out) == (2, "")
    assert "--voice must be a finite number in [0, 1), got -1" in err


def test_dknn_of_several_layers(command: Run, weights: Path) -> None:
    assert command(*FIT, "--defence", "dknn", "--layer", "input", "--layer", "conv1", "--metric", "euclidean")[0] == 0
    assert command("predict", "digits", "--weights", weights, "--json", "predicted.json")[0] == 0
    dknn = DkNN.load("defence", common.load_model("digits", weights))
    assert (dknn.layers, dknn.neighbours, dknn.metric) == (("input", "conv1"), 2, "euclidean")
    test = data.load("digits", "test")
    rows = json.loads(Path("predicted.json").read_text())["results"]
    assert [row["label"] for row in rows] == dknn.predict(test.x).tolist()
    assert {row["share"] for row in rows} <= {0.25, 0.5, 0.75, 1.0}
    assert [row["foreign"] for row in rows] == dknn.foreign(test.x).tolist()
    assert [row["credibility"] for row in rows] == pytest.approx(dknn.credibility(test.x).tolist(), abs=1e-6)


def test_fit_does_not_repeat_itself(command: Run, weights: Path) -> None:
    command(*FIT)
    before = {file.name: file.stat().st_mtime_ns for file in Path("defence").iterdir()}
    code, out, _ = command(*FIT)
    assert (code, out) == (0, "defence holds this defence already\n")
    assert {file.name: file.stat().st_mtime_ns for file in Path("defence").iterdir()} == before
    # Other settings, or a damaged file, are fitted anew.
    assert "rails on 1,294" in command(*FIT, "--generations", 3)[1]
    file = next(Path("defence").glob("tensors-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    assert "rails on 1,294" in command(*FIT, "--generations", 3)[1]
    assert "holds this defence already" in command(*FIT, "--generations", 3)[1]


def test_predict_continues_from_finished_parts(command: Run, weights: Path, monkeypatch: Any) -> None:
    command(*FIT)
    words = ("predict", "digits", "--weights", weights, "--chunk", 90, "--json", "predicted.json")
    assert command(*words)[0] == 0
    whole = json.loads(Path("predicted.json").read_text())["results"]
    shutil.rmtree("predictions")
    Path("predicted.json").unlink()

    asked: list[int] = []
    answers = predict_module.answers

    def interrupted(*arguments: Any) -> Any:
        asked.append(len(arguments[1]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answers(*arguments)

    monkeypatch.setattr(predict_module, "answers", interrupted)
    assert command(*words)[0] == 130
    assert not Path("predicted.json").exists()
    assert command(*words)[0] == 0
    assert asked == [90] * 5  # two parts, one interrupted, the remaining two
    assert json.loads(Path("predicted.json").read_text())["results"] == whole
    assert len(list(Path("predictions").iterdir())) == 1
    assert command(*words, "--seed", 1)[0] == 0  # another seed is another answer, kept beside the first
    assert len(list(Path("predictions").iterdir())) == 2


def test_predict_reads_files_and_folders(command: Run, weights: Path, tmp_path: Path) -> None:
    command(*FIT, "--defence", "dknn")
    images = (data.load("digits", "test").x[:3, 0].numpy() * 255).astype(np.uint8)
    (tmp_path / "shots" / "deep").mkdir(parents=True)
    files = ["shots/a.png", "shots/deep/b.PNG", "one.png"]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    Path("shots/notes.txt").write_text("not an image")
    code, out, _ = command("predict", "shots", "one.png", "--weights", weights)
    assert code == 0
    assert [line.split("\t")[0] for line in out.splitlines()[1:]] == files
    dknn = DkNN.load("defence", common.load_model("digits", weights))
    expected = dknn.predict(torch.from_numpy(images).float().div(255)[:, None]).tolist()
    assert [int(line.split("\t")[1]) for line in out.splitlines()[1:]] == expected


def test_predict_needs_no_labels(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(file, "PNG")
    rows = [{"bytes": file.getvalue(), "path": None}] * 3
    for labels in ({}, {"label": [-1] * 3}, {"label": ["a", "b", "a"]}, {"label": [0.5, 1.5, 2.5]}):
        pq.write_table(pa.table({"image": rows} | labels), tmp_path / "f.parquet")
        names, x = predict_module.read([str(tmp_path / "f.parquet")], "test", None, (1, 8, 8))
        assert names == [f"{tmp_path / 'f.parquet'}:{i}" for i in range(3)]
        assert torch.equal(x, torch.full((3, 1, 8, 8), 51 / 255))


def test_predict_reads_a_folder_called_like_a_dataset(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("digits/1.png")
    assert predict_module.read(["digits"], "test", None, (1, 8, 8))[0] == ["digits/1.png"]
    Path("digits/1.png").unlink()
    pq.write_table(pa.table({"image": [b"?"]}), "digits/test.parquet")
    with pytest.raises(ValueError, match=r"digits/test\.parquet, row 0 is not a readable image"):
        predict_module.read(["digits"], "test", None, (1, 8, 8))
    with pytest.raises(ValueError, match="digits has no split 'train', it has test"):
        predict_module.read(["digits"], "train", None, (1, 8, 8))


class Third(nn.Module):
    """A kind of defence that predict has never heard of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[0.25, 0.75]]).log().expand(len(x), 2)

    def foreign(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1) > 0.5


def test_a_third_kind_of_defence_answers() -> None:
    x = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    defence: Any = Third()
    expected = {"label": 1, "share": 0.75, "credibility": None}
    assert predict_module.answers(defence, x, 0) == [expected | {"foreign": False}, expected | {"foreign": True}]


def test_grey_images_become_colour_for_a_colour_defence(tmp_path: Path) -> None:
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "grey.png")
    names, x = predict_module.read([str(tmp_path / "grey.png")], "test", None, (3, 4, 4))
    assert names == [str(tmp_path / "grey.png")]
    assert torch.equal(x[0, 2], torch.arange(16).reshape(4, 4) / 255)


def test_a_feature_map_of_ones_own(command: Run, weights: Path) -> None:
    Path("mine.py").write_text("def halves(net):\n    return lambda x: x.flatten(1)[:, :32] + 0 * net(x)[:, :1]\n")
    sys.modules.pop("mine", None)
    assert command(*FIT, "--layer", "mine:halves", "--defence", "dknn")[0] == 0
    assert "already" in command(*FIT, "--layer", "mine:halves", "--defence", "dknn")[1]
    assert command("predict", "digits", "--weights", weights)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--defence", "svm"), "--defence must be one of 'rails', 'dknn', got 'svm'"),
        (("--layer", "conv9"), "conv9.*conv"),
        (("--layer", "mine:nothing"), "--layer mine:nothing cannot be imported"),
        (("--layer", "builtins:len"), "has no len"),
        (("--layer", "builtins:id"), "--layer builtins:id must return a feature map, got int"),
        (("--layer", "mnist_affine"), "net must be a MnistNet, got DigitsNet"),
        (("--defence", "dknn", "--metric", "taxicab"), "--metric must be one of 'cosine', 'euclidean'"),
        (("--false-alarm", "2"), "false_alarm must be a finite number"),
        (("--validation", "1400"), r"neighbours=2 is more than the \d examples of class|no example of class"),
        (("--device", "abacus"), "--device must be one of cpu"),
    ],
)
def test_a_mistake_in_fit_is_one_line(command: Run, weights: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = command(*FIT, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err)
    assert not Path("defence/fit.json").exists()


def test_a_mistake_in_predict_is_one_line(command: Run, weights: Path, tmp_path: Path) -> None:
    def said(*arguments: Any) -> str:
        code, out, err = command("predict", *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err

    assert "--defence defence has no fit.json: give the folder that immunonet fit wrote" in said("digits")
    command(*FIT)
    good = ("--weights", weights)
    assert "needs --weights" in said("digits")
    assert "there is no 'nowhere'" in said("nowhere", *good)
    (tmp_path / "empty").mkdir()
    assert "empty has no images (.png, " in said("empty", *good)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("tall.png")
    assert "tall.png has images of shape (1, 9, 8), but the defence takes (1, 8, 8)" in said("tall.png", *good)
    Path("broken.png").write_bytes(b"\x89PNG....")
    assert "broken.png is not a readable image" in said("broken.png", *good)
    zoo.save_weights(zoo.build("digits", seed=4), tmp_path / "other.safetensors")
    assert "are not those that defence was fitted with" in said("digits", "--weights", "other.safetensors")
    Path("defence/fit.json").write_text("{}")
    assert "was edited: it lacks 'settings'" in said("digits", *good)
