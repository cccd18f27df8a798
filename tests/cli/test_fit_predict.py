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

from immunonet import RAILS, Answer, Defence, DkNN, Sense, Sentinel, _store, data, zoo
from immunonet.cli import common
from immunonet.cli import fit as fit_module
from immunonet.cli import predict as predict_module
from immunonet.defences import base

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Write the weights of an untrained network; what it answers does not matter here."""
    zoo.save_weights(zoo.build("digits", seed=3), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


FIT = ("fit", "--dataset", "digits", "--weights", "net.safetensors", "--defence")
SMALL = "rails input population=50 neighbours=2 generations=2"


def test_fit_saves_what_predict_answers_with(command: Run, weights: Path) -> None:
    spec = "rails conv1 population=100 neighbours=2 generations=2"
    code, out, err = command(*FIT, spec, "--seed", 5, "--out", "fitted", "--json", "fit.json")
    assert (code, err) == (0, "")
    assert out == "rails on 1,294 images, calibrated on 143: fitted\n"
    record = json.loads(Path("fit.json").read_text())["results"][0]
    assert record["defence"] == "rails"
    assert record["settings"]["layers"] == ["conv1"]
    assert record["settings"]["maturation"][0]["population"] == 100
    assert record["settings"]["seed"] == 5

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


def test_a_sentinel_is_fitted_beside_a_defence(command: Run, weights: Path) -> None:
    settings = "input neighbours=2 window=50 false_alarm=.05"
    code, _, err = command(*FIT, "cnn", "--sentinel", settings, "--out", "fitted")
    assert (code, err) == (0, "")
    net = common.load_model("digits", weights)
    watch = Sentinel.load("fitted/sentinel.json", net)
    assert (watch.space, watch.neighbours, watch.window) == ("input", 2, 50)
    test = data.load("digits", "test").x
    assert watch.watch(test[:1].repeat(4, 1, 1, 1)).flagged.tolist() == [False, False, True, True]
    # Another sentinel is another record; none leaves none behind.
    command(*FIT, "cnn", "--out", "fitted")
    assert not Path("fitted/sentinel.json").exists()


def test_the_models_own_voice_is_kept(command: Run, weights: Path) -> None:
    assert command(*FIT, f"{SMALL} voice=.3", "--out", "fitted", "--json", "fit.json")[0] == 0
    assert json.loads(Path("fit.json").read_text())["results"][0]["settings"]["voice"] == 0.3
    assert RAILS.load("fitted", common.load_model("digits", weights)).voice == 0.3


def test_cells_in_a_hidden_layer_are_fitted_and_asked(command: Run, weights: Path) -> None:
    spec = "rails conv2:2 hidden=true recombination=.5 population=100 generations=2 neighbours=2 metric=cosine"
    assert command(*FIT, spec)[0] == 0
    rails = RAILS.load("defence", common.load_model("digits", weights))
    assert (rails.space, rails.metric, rails.maturations[0].recombination) == ("conv2:2", "cosine", 0.5)
    code, _, err = command("predict", "digits", "--weights", weights, "--json", "predicted.json")
    assert code == 0, err
    rows = json.loads(Path("predicted.json").read_text())["results"]
    test = data.load("digits", "test").x
    assert [row["label"] for row in rows[:100]] == rails.predict(test[:100], seed=0).tolist()


def test_dknn_of_several_layers(command: Run, weights: Path) -> None:
    assert command(*FIT, "dknn input+conv1 neighbours=2 metric=euclidean")[0] == 0
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
    command(*FIT, SMALL)
    before = {file.name: file.stat().st_mtime_ns for file in Path("defence").iterdir()}
    code, out, _ = command(*FIT, SMALL)
    assert (code, out) == (0, "defence holds this defence already\n")
    assert {file.name: file.stat().st_mtime_ns for file in Path("defence").iterdir()} == before
    # Other settings, or a damaged file, are fitted anew.
    assert "rails on 1,294" in command(*FIT, f"{SMALL} false_alarm=.1")[1]
    file = next(Path("defence").glob("tensors-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    assert "rails on 1,294" in command(*FIT, f"{SMALL} false_alarm=.1")[1]
    assert "holds this defence already" in command(*FIT, f"{SMALL} false_alarm=.1")[1]


def test_predict_continues_from_finished_parts(command: Run, weights: Path, monkeypatch: Any) -> None:
    command(*FIT, "dknn")
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
    kept = Path("predictions/parts.jsonl").read_text()
    assert command(*words, "--seed", 1)[0] == 0  # another seed is another answer, kept beside the first
    assert asked == [90] * 9
    assert command(*words)[0] == 0
    assert asked == [90] * 9
    assert Path("predictions/parts.jsonl").read_text().startswith(kept)


def test_predict_reads_files_and_folders(command: Run, weights: Path, tmp_path: Path) -> None:
    command(*FIT, "dknn")
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


class Third(Defence):
    """A kind of defence that predict has never heard of."""

    kind, title = "third", "Third"

    def answer(self, x: Tensor, seed: int | None = None) -> Answer:
        logs = torch.tensor([[0.25, 0.75]]).log().expand(len(x), 2)
        mean = x.flatten(1).mean(1)
        return Answer(logs.argmax(1), logs, sense=Sense(distance=mean, p_value=1 - mean, foreign=mean > 0.5))


def test_a_third_kind_of_defence_answers() -> None:
    x = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    expected = {"label": 1, "share": 0.75, "credibility": None}
    answers = predict_module.answers(Third(nn.Identity()), x, 0)
    assert answers == [expected | {"foreign": False}, expected | {"foreign": True}]


def test_the_network_alone_is_fitted_and_asked_as_well(command: Run, weights: Path) -> None:
    assert command(*FIT, "cnn")[0] == 0
    assert "already" in command(*FIT, "cnn")[1]
    code, out, _ = command("predict", "digits", "--weights", weights, "--json", "predicted.json")
    assert code == 0
    rows = json.loads(Path("predicted.json").read_text())["results"]
    with torch.no_grad():
        logits = common.load_model("digits", weights)(data.load("digits", "test").x)
    assert [row["label"] for row in rows] == logits.argmax(1).tolist()
    assert {(row["credibility"], row["foreign"]) for row in rows} == {(None, None)}
    assert out.splitlines()[1].endswith("\t\t")


OWN = """
import torch
from immunonet import Answer, Defence, models, register

@register
class Rounded(Defence):
    kind, title = "rounded", "Rounded"

    def __init__(self, net, *, levels=8, bounds=(0.0, 1.0)):
        super().__init__(net, bounds=bounds)
        self.levels = levels

    def settings(self):
        return super().settings() | {"levels": self.levels}

    def answer(self, x, seed=None):
        return Answer.of(models.logits(self.model, (x * self.levels).round() / self.levels))

def plain(net):
    return lambda x: net(x).log_softmax(1)

def halves(net):
    return lambda x: x.flatten(1)[:, :32] + 0 * net(x)[:, :1]
"""


@pytest.fixture
def mine(weights: Path, monkeypatch: Any) -> Any:
    """Write a module of a user's own into the working directory; what it registers is forgotten."""
    Path(weights.parent / "mine.py").write_text(OWN)
    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))
    monkeypatch.setattr(fit_module, "REGISTRY", base.REGISTRY)
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)


def test_a_registered_kind_of_ones_own(command: Run, mine: Any, weights: Path) -> None:
    code, _, err = command(*FIT, "mine:Rounded levels=2")
    assert code == 0, err
    assert "already" in command(*FIT, "mine:Rounded levels=2")[1]
    # As in another process, which has not imported it.
    del base.REGISTRY["rounded"]
    del sys.modules["mine"]
    code, _, err = command("predict", "digits", "--weights", weights, "--json", "predicted.json")
    assert code == 0, err
    rows = json.loads(Path("predicted.json").read_text())["results"]
    x = data.load("digits", "test").x
    with torch.no_grad():
        logits = common.load_model("digits", weights)((x * 2).round() / 2)
    assert [row["label"] for row in rows] == logits.argmax(1).tolist()
    code, _, err = command(*FIT, "mine:plain")
    assert code == 2
    assert "--defence mine:plain gives no kind that is registered: immunonet.register makes it one" in err


def test_folders_that_older_versions_wrote_are_read(command: Run, weights: Path) -> None:
    """What they wrote beside the tensors: the class's name, format 1, and no metric of RAILS."""
    assert command(*FIT, SMALL, "--seed", 3)[0] == 0
    words = ("predict", "digits", "--weights", weights, "--json", "predicted.json")
    assert command(*words)[0] == 0
    rows = json.loads(Path("predicted.json").read_text())["results"]
    record = json.loads(Path("defence/defence.json").read_text())
    record.pop("checksum")
    record |= {"format": 1, "defence": {"rails": "RAILS"}[record.pop("kind")]}
    del record["settings"]["metric"]
    kept = Path("defence") / record["tensors"]["file"]
    record["tensors"]["file"] = kept.name.replace("tensors", "repertoire")
    kept.rename(kept.with_name(record["tensors"]["file"]))
    _store.write_json("defence/defence.json", record | {"checksum": _store.fingerprint(record)})
    fit = json.loads(Path("defence/fit.json").read_text())
    del fit["settings"]["metric"]
    _store.write_json("defence/fit.json", fit)
    shutil.rmtree("predictions")
    code, _, err = command(*words)
    assert code == 0, err
    assert json.loads(Path("predicted.json").read_text())["results"] == rows
    # Fitted again it is what this version writes.
    assert "rails on 1,294" in command(*FIT, SMALL, "--seed", 3)[1]
    assert json.loads(Path("defence/defence.json").read_text())["format"] == 2


def test_grey_images_become_colour_for_a_colour_defence(tmp_path: Path) -> None:
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "grey.png")
    names, x = predict_module.read([str(tmp_path / "grey.png")], "test", None, (3, 4, 4))
    assert names == [str(tmp_path / "grey.png")]
    assert torch.equal(x[0, 2], torch.arange(16).reshape(4, 4) / 255)


def test_a_feature_map_of_ones_own(command: Run, mine: Any, weights: Path) -> None:
    assert command(*FIT, "dknn mine:halves")[0] == 0
    assert "already" in command(*FIT, "dknn mine:halves")[1]
    assert command("predict", "digits", "--weights", weights)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("svm",), "there is no defence 'svm'; there are cnn, control, dknn, path, rails"),
        (("dknn conv9",), "conv9.*conv"),
        (("dknn mine:nothing",), "layer mine:nothing cannot be imported"),
        (("dknn builtins:len",), "has no len"),
        (("dknn builtins:id",), "layer builtins:id must return a feature map, got int"),
        (("dknn mnist_affine",), "net must be a MnistNet, got DigitsNet"),
        (("dknn metric=taxicab",), "metric must be one of 'euclidean', 'cosine'"),
        (("rails false_alarm=2",), "false_alarm must be a finite number"),
        (("rails voice=-1",), r"voice must be a finite number in \[0, 1\), got -1"),
        (("rails population=many",), "defence 'rails input population=many seed=0': population must be an integer"),
        (("dknn", "--sentinel", "nowhere"), "--sentinel 'nowhere': .*nowhere"),
        (("dknn", "--sentinel", "pooled windows=3"), "a sentinel has no setting 'windows'"),
        (("dknn tuned",), "--defence: tuned settings are chosen by immunonet evaluate; give those that it prints"),
        (("rails neighbours=2", "--validation", "1400"), r"neighbours=2 is more than the \d ex|no example of class"),
        (("dknn", "--device", "abacus"), "--device must be one of cpu"),
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
    command(*FIT, "dknn")
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


@pytest.mark.parametrize("before", ["rank=9", "manifold=autoencoder epochs=1 width=4 outer=0"])
def test_one_defence_behind_another_is_fitted_and_predicts(command: Run, weights: Path, before: str) -> None:
    text = f"control input {before} | dknn input neighbours=3"
    code, out, err = command(*FIT, text, "--out", "fitted", "--json", "fit.json")
    assert code == 0, err
    assert out == "control+dknn on 1,294 images, calibrated on 143: fitted\n"
    assert not Path("fitted/training").exists()
    code, out, _ = command(*FIT, text, "--out", "fitted")
    assert out == "fitted holds this defence already\n"
    code, _, err = command("predict", "digits", "--defence", "fitted", "--weights", weights, "--json", "predicted.json")
    assert code == 0, err
    found = json.loads(Path("predicted.json").read_text())["results"]
    net = common.load_model("digits", weights)
    expected = base.load("fitted", net).predict(data.load("digits", "test").x)
    assert [row["label"] for row in found] == expected.tolist()
