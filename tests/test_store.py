import errno
import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError

from immunonet import _store


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_leaves_only_the_new_file(tmp_path):
    path = tmp_path / "deep" / "file"
    _store.write_text(path, "old")
    with _store.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert contents(path.parent) == ["file"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, failure):
    path = tmp_path / "file"
    _store.write_text(path, "old")

    def fail():
        with _store.replacing(path) as temporary:
            temporary.write_text("ne")
            raise failure

    with pytest.raises(type(failure)):
        fail()
    assert path.read_text() == "old"
    assert contents(tmp_path) == ["file"]


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        _store.write_text(tmp_path / "file", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": "ß"}
    _store.write_json(tmp_path / "a.json", value)
    assert _store.read_json(tmp_path / "a.json") == value


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        _store.write_json(tmp_path / "a.json", float("nan"))
    assert contents(tmp_path) == []


@pytest.mark.parametrize("text", [b'{"a": 1', b"", b"\xff\xfe\x00"])
def test_other_files_are_not_json(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON .*truncated or another kind of file"):
        _store.read_json(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        _store.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors does not exist"):
        _store.read_tensors(tmp_path / "a.safetensors")


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.rand(4, 3).T, "y": torch.arange(3, dtype=torch.int8)}
    checksum = _store.write_tensors(path, tensors, {"note": "n"})
    assert checksum == _store.sha256(path)
    found = _store.read_tensors(path, checksum=checksum)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    assert _store.read_metadata(path) == {"note": "n"}


def test_truncated_and_foreign_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    checksum = _store.write_tensors(path, {"x": torch.rand(100)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"a\.safetensors was truncated or edited: its sha256 is .*, recorded"):
        _store.read_tensors(path, checksum=checksum)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        _store.read_tensors(path)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        _store.read_metadata(path)


@pytest.mark.parametrize("failure", [SafetensorError("I/O error: No space left"), OSError(errno.ENOSPC, "full")])
def test_a_full_disk(tmp_path, monkeypatch, failure):
    path = tmp_path / "a.safetensors"
    _store.write_tensors(path, {"x": torch.ones(1)})

    def full(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(_store, "save_file", full)
    with pytest.raises(OSError, match=r"No space left|full"):
        _store.write_tensors(path, {"x": torch.zeros(1)})
    assert contents(tmp_path) == ["a.safetensors"]
    assert _store.read_tensors(path)["x"].item() == 1


def test_fingerprints_ignore_order_and_see_every_value():
    value = {"a": 1, "b": [1.5, None]}
    assert _store.fingerprint(value) == _store.fingerprint({"b": [1.5, None], "a": 1})
    assert _store.fingerprint(value) == _store.fingerprint(json.loads(json.dumps(value)))
    assert _store.fingerprint(value) != _store.fingerprint({"a": 1, "b": [1.5, 0]})


def test_names_of_files_are_kept_apart():
    assert _store.slug("rails-fc1+fc2") == "rails-fc1+fc2"
    names = ["block2:4", "block2-4", "block2/4", "block2 4", "a b", "a  b"]
    slugs = {_store.slug(name) for name in names}
    assert len(slugs) == len(names)
    assert not any(set(slug) & set(":/ ") for slug in slugs)
