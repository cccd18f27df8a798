import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from immunonet import data, zoo
from immunonet.zoo import weights


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("half", [True, False])
def test_round_trip(tmp_path, half):
    net, other = zoo.ResidualNet(width=4), zoo.ResidualNet(width=4)
    net.norm.num_batches_tracked += 70_000
    path = tmp_path / "net.safetensors"
    recipe = zoo.save_weights(net, path, half=half, recipe={"seed": 3})
    assert recipe == tmp_path / "net.json"
    assert json.loads(recipe.read_text()) == {
        "seed": 3,
        "format": 1,
        "files": [{"file": "net.safetensors", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}],
    }
    assert zoo.load_weights(other, path)["seed"] == 3
    assert same(other.state_dict(), net.half().float().state_dict() if half else net.state_dict())
    assert load_file(path)["stem.weight"].dtype == (torch.float16 if half else torch.float32)
    recipe.unlink()
    assert zoo.load_weights(other, path) == {}


def test_large_weights_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PART_BYTES", 3000)
    net, other = zoo.build("digits"), zoo.build("digits", seed=1)
    path = tmp_path / "net.safetensors"
    zoo.save_weights(net, path, half=False)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 2
    assert [part.name for part in parts] == [f"net-{i + 1}-of-{len(parts)}.safetensors" for i in range(len(parts))]
    stored = [load_file(part) for part in parts]
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 3000 for part in stored)
    zoo.load_weights(other, path)
    assert same(net.state_dict(), other.state_dict())
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{parts[1].name} does not exist"):
        zoo.load_weights(other, path)


def test_bad_files(tmp_path):
    net = zoo.build("digits")
    path, recipe = tmp_path / "net.safetensors", tmp_path / "net.json"
    with pytest.raises(FileNotFoundError, match=r"net\.safetensors does not exist"):
        zoo.load_weights(net, path)
    zoo.save_weights(net, path)
    whole, good = path.read_bytes(), recipe.read_text()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"net\.safetensors was truncated or edited"):
        zoo.load_weights(net, path)
    recipe.unlink()
    with pytest.raises(ValueError, match=r"net\.safetensors is not a readable safetensors file"):
        zoo.load_weights(net, path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"net\.safetensors does not fit DigitsNet: \d+ of \d+ keys missing: .*; 1 .* unexpected: a"
    ):
        zoo.load_weights(net, path)
    path.write_bytes(whole)
    for text, message in (
        (good[:-10], "is not valid JSON"),
        ('{"files": []}', "is not a recipe of weights .'format'"),
        ('{"format": 1, "files": [{"file": "net.safetensors"}]}', "is not a recipe of weights .'sha256'"),
        (
            good.replace('"format": 1', '"format": 9'),
            "is not a recipe of weights .format 9, this version reads 1",
        ),
    ):
        recipe.write_text(text)
        with pytest.raises(ValueError, match=rf"net\.json {message}"):
            zoo.load_weights(net, path)
    recipe.write_text(good)
    with pytest.raises(ValueError, match=r"net\.safetensors does not fit MnistNet"):
        zoo.load_weights(zoo.build("mnist"), path)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*net\.pt"):
        zoo.load_weights(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        zoo.save_weights(net, tmp_path / "net.pt")


@pytest.mark.parametrize("text", ['{"lr": 0.1}', "[]", '{"format": "pt"}'])
def test_a_json_file_of_the_users_own_is_left_alone(tmp_path, text):
    net, other = zoo.build("digits"), zoo.build("digits", seed=1)
    save_file(net.state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "mine.json").write_text(text)
    assert zoo.load_weights(other, tmp_path / "mine.safetensors") == {}
    assert same(net.state_dict(), other.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_of_a_wrapped_network(tmp_path, prefix):
    net, other, path = zoo.build("digits"), zoo.build("digits", seed=1), tmp_path / "net.safetensors"
    save_file({prefix + key: value for key, value in net.state_dict().items()}, path)
    zoo.load_weights(other, path)
    assert same(net.state_dict(), other.state_dict())
    wrapped = nn.DataParallel(zoo.build("digits", seed=1))
    save_file({f"module.{key}": value for key, value in net.state_dict().items()}, path)
    zoo.load_weights(wrapped, path)
    assert same(net.state_dict(), wrapped.module.state_dict())


def test_what_does_not_fit_is_told_shortly(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({f"blocks.{i}.weight": torch.zeros(1) for i in range(40)}, path)
    with pytest.raises(ValueError, match=r"40 .* unexpected: blocks\.0\.weight, [^,]*, [^,]*, \.\.\.") as raised:
        zoo.load_weights(zoo.build("digits"), path)
    assert len(str(raised.value)) < 500
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"2 of 2 keys of another shape: weight \(3, 2\) for \(4, 2\), bias"):
        zoo.load_weights(nn.Linear(2, 4), path)


def test_half_precision_is_refused_where_it_overflows(tmp_path):
    net = nn.Linear(1, 1)
    nn.init.constant_(net.weight, 1e6)
    with pytest.raises(ValueError, match="weight does not fit float16: save with half=False"):
        zoo.save_weights(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_weights(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    path = tmp_path / "net.safetensors"
    zoo.save_weights(zoo.build("digits"), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("immunonet._store.save_file", full)
    with pytest.raises(OSError, match=r"net\.safetensors could not be written .*No space left"):
        zoo.save_weights(zoo.build("digits", seed=1), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


RECIPES = sorted((Path(__file__).parents[2] / "weights").glob("*.json"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_stored_weights_are_those_of_their_recipe(recipe):
    found = json.loads(recipe.read_text())
    rows = {row["split"]: row for row in found["results"]}
    net = zoo.build(rows["test"]["model"])
    assert zoo.load_weights(net, recipe.with_suffix(".safetensors")) == found
    assert found["command"].startswith(f"immunonet train {rows['test']['dataset']} ")
    assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())
    file = f"{rows['test']['dataset']}-test.parquet"
    if not (Path(os.environ.get("IMMUNONET_DATA", "")) / file).is_file():
        pytest.skip(f"no {file} here")
    n, expected = 500, rows["test"]["accuracy"]
    error = (expected * (1 - expected) / n) ** 0.5
    assert abs(zoo.accuracy(net, data.load(rows["test"]["dataset"], "test")[:n]) - expected) < 4 * error
