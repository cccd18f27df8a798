"""Where images lie: Parquet files of any writer, folders of them, folders of class folders."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from immunonet import data


def png(value: int, side: int = 2) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((side, side), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def folder_of(path: Path, **classes: int) -> Path:
    """Write so many images of each class."""
    for name, n in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(n):
            (path / name / f"{i}.png").write_bytes(png(i))
    return path


def parquet(path: Path, values: list[int], labels: Any, metadata: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [{"bytes": png(value), "path": None} for value in values], "label": labels})
    pq.write_table(table.replace_schema_metadata(metadata and {"huggingface": json.dumps(metadata)}), path)
    return path


def values(images: data.Images) -> list[int]:
    return (images.x[:, 0, 0, 0] * 255).round().int().tolist()


ROWS = [{"bytes": png(value), "path": None} for value in (5, 6)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
        pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
    ],
    ids=str,
)
def test_parquet_of_any_writer(tmp_path: Path, kind: pa.DataType) -> None:
    cells = ROWS if pa.types.is_struct(kind) else [row["bytes"] for row in ROWS]
    pq.write_table(pa.table({"image": pa.array(cells, kind), "label": [1, 0]}), tmp_path / "x.parquet")
    found = data.read_parquet(tmp_path / "x.parquet")
    assert (values(found), found.y.tolist()) == ([5, 6], [1, 0])


@pytest.mark.parametrize(
    "metadata",
    [{"info": {"features": {"target": {"names": ["a", "b"]}}}}, {"fingerprint": "x"}, {}, {"info": None}],
)
def test_metadata_of_other_columns(tmp_path: Path, metadata: dict[str, Any]) -> None:
    found = data.read_parquet(parquet(tmp_path / "x.parquet", [5, 6], [1, 0], metadata))
    assert (found.classes, found.named) == (("0", "1"), False)


def test_an_image_beside_the_file_is_read_and_a_lost_one_named(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(png(9))
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("there.png", "gone.png")]
    pq.write_table(pa.table({"image": cells[:1], "label": [0]}), tmp_path / "x.parquet")
    assert values(data.read(tmp_path / "x.parquet")) == [9]
    pq.write_table(pa.table({"image": cells, "label": [0, 0]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet, row 1 has no image bytes"):
        data.read(tmp_path / "x.parquet")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A copy of a hub dataset: shards, a test split, a card."""
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    path = tmp_path / "snap [1]"
    parquet(path / "data" / "train-00000-of-00002.parquet", [0, 1, 2], [0, 1, 0], names)
    parquet(path / "data" / "train-00001-of-00002.parquet", [3, 4], [1, 1], names)
    parquet(path / "data" / "test-00000-of-00001.parquet", [7], [1], names)
    (path / "README.md").write_text("# A dataset\n")
    return path


def test_shards_of_a_hub_snapshot(snapshot: Path) -> None:
    assert data.splits(snapshot) == ("train", "test")
    train, test = data.read(snapshot, "train"), data.read(snapshot, "test")
    assert (values(train), train.y.tolist(), train.classes) == ([0, 1, 2, 3, 4], [0, 1, 0, 1, 1], ("cat", "dog"))
    assert (values(test), test.y.tolist()) == ([7], [1])
    with pytest.raises(ValueError, match="has the splits train, test: name one of them"):
        data.read(snapshot)
    with pytest.raises(ValueError, match="has no split 'validation', it has train, test"):
        data.read(snapshot, "validation")
    broken = snapshot / "data" / "train-00001-of-00002.parquet"
    pq.write_table(pa.table({"image": [b"junk"], "label": [0]}), broken)
    with pytest.raises(ValueError, match="name different classes in label"):
        data.read(snapshot, "train")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet, row 0 is not a readable image"):
        data.read(snapshot, "train", labelled=False)


def test_a_snapshot_is_read_without_network_and_without_a_cache(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("local data asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, str(tmp_path / "cache"))
    before = sorted(snapshot.rglob("*"))
    assert len(data.read(snapshot, "train")) == 5
    assert not (tmp_path / "cache").exists()
    assert sorted(snapshot.rglob("*")) == before


def test_names_of_classes_in_a_snapshots_card(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [1, 2], [1, 0])
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': cat\n          '1': dog\n---\n"
    )
    found = data.read(tmp_path, "train")
    assert (found.classes, found.y.tolist()) == (("cat", "dog"), [1, 0])


def test_no_file_of_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [1], [0])
    parquet(tmp_path / "extra.parquet", [2], [0])
    with pytest.raises(ValueError, match=r"1 Parquet files are called after no split, such as .*extra\.parquet"):
        data.read(tmp_path, "train")
    (tmp_path / "train.parquet").rename(tmp_path / "more.parquet")
    assert values(data.read(tmp_path, "train")) == [2, 1]  # no names of splits: all of them train
    (tmp_path / "README.md").write_text("---\nconfigs: 3\n---\n")
    with pytest.raises(ValueError, match="cannot be read as a dataset"):
        data.read(tmp_path, "train")


def test_scripts_are_not_run(tmp_path: Path) -> None:
    parquet(tmp_path / "it" / "train.parquet", [1], [0])
    (tmp_path / "it" / "it.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert values(data.read(tmp_path / "it", "train")) == [1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "test"), ("train", "test")),
        (("Training", "val"), ("train", "validation")),
        (("train", "dev", "testing"), ("train", "validation", "test")),
        (("train",), ("train",)),
    ],
)
def test_a_folder_per_split(tmp_path: Path, names: tuple[str, ...], splits: tuple[str, ...]) -> None:
    for name in names:
        folder_of(tmp_path / name, a=1, b=2)
    assert data.splits(tmp_path) == splits
    for split in splits:
        assert data.read(tmp_path, split).y.tolist() == [0, 1, 1]
        assert data.classes_of(tmp_path, split) == ("a", "b")


def test_classes_and_files_called_like_splits_are_classes_and_files(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "vehicles", bus=1, test=1, train=2)
    (path / "bus" / "validation-7.png").write_bytes(png(7))
    (path / "bus" / "Thumbs.db").write_text("not an image")
    assert data.splits(path) == ()
    found = data.read(path)
    assert (found.classes, found.y.tolist()) == (("bus", "test", "train"), [0, 0, 1, 2, 2])


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        folder_of(tmp_path / name, a=1)
    with pytest.raises(ValueError, match="has two folders for validation, val and valid: move one away"):
        data.splits(tmp_path)


def test_a_folder_in_a_class_folder_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "set", a=1)
    folder_of(tmp_path / "set" / "big", b=1)
    with pytest.raises(ValueError, match=r"big/b is a folder in a class folder: put the images of big in .*big itself"):
        data.read(tmp_path / "set")
