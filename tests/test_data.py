import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sklearn.datasets import load_digits

from immunonet import data


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, cells, labels, *, image="image", struct=True, metadata=None, label_type=None):
    cells = [{"bytes": cell, "path": None} for cell in cells] if struct else cells
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    table = pa.table({image: pa.array(cells, kind), "label": pa.array(labels, label_type or pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def pixels(n=3, size=(4, 5), channels=None, seed=0):
    shape = (n, *size) if channels is None else (n, *size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def parquet(tmp_path):
    return write(tmp_path / "toy.parquet", [png(p) for p in pixels()], [0, 1, 1])


@pytest.fixture
def folder(tmp_path):
    for name, image in zip(("a/1.png", "a/2.png", "b/1.png"), pixels(), strict=True):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(image))
    return tmp_path / "images"


@settings(max_examples=20, deadline=None)
@given(
    images=arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)) | st.just((2, 3, 4, 3))
    ),
    struct=st.booleans(),
    image=st.sampled_from(["image", "img"]),
    label_type=st.sampled_from([pa.int64(), pa.int8(), pa.uint16()]),
)
def test_parquet_round_trip(tmp_path_factory, images, struct, image, label_type):
    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    labels = list(range(len(images)))
    write(path, [png(p) for p in images], labels, image=image, struct=struct, label_type=label_type)
    found = data.read_parquet(path)
    expected = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    assert found.x.dtype == torch.float32
    assert found.x.is_contiguous()
    np.testing.assert_array_equal(found.x.numpy(), expected.astype(np.float32) / np.float32(255))
    assert found.y.dtype == torch.int64
    assert found.y.tolist() == labels
    assert found.classes == tuple(map(str, labels))


def test_images_are_indexed_like_tensors(parquet):
    images = data.read_parquet(parquet)
    assert len(images) == 3
    for index in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True]), [1]):
        part = images[index]
        assert torch.equal(part.x, images.x[index])
        assert torch.equal(part.y, images.y[index])
        assert part.classes == images.classes


HUGGINGFACE = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


@pytest.mark.parametrize(
    ("metadata", "classes"),
    [
        ({"huggingface": json.dumps(HUGGINGFACE)}, ("cat", "dog")),
        ({"classes": '["frog", "ship", "truck"]'}, ("frog", "ship", "truck")),
        (
            {
                "huggingface": '{"info": {"features": {"label": {"_type": "Value"}}}}',
                "classes": '["x", "y"]',
            },
            ("x", "y"),
        ),
        (None, ("0", "1")),
    ],
)
def test_class_names(tmp_path, metadata, classes):
    path = write(tmp_path / "x.parquet", [png(p) for p in pixels()], [0, 1, 1], metadata=metadata)
    assert data.read_parquet(path).classes == classes


def test_grey_images_among_colour_become_colour(tmp_path):
    grey, colour = pixels(1)[0], pixels(1, channels=3)[0]
    found = data.read_parquet(write(tmp_path / "x.parquet", [png(grey), png(colour)], [0, 1]))
    np.testing.assert_array_equal(found.x[0].numpy() * 255, np.stack([grey] * 3))
    np.testing.assert_array_equal(found.x[1].numpy() * 255, colour.transpose(2, 0, 1))


@pytest.mark.parametrize("keep", [0, 10, 0.5, -10])
def test_truncated_parquet(parquet, keep):
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"toy\.parquet is not a readable Parquet file"):
        data.read_parquet(parquet)


def test_corrupt_parquet(parquet):
    whole = bytearray(parquet.read_bytes())
    whole[4:200] = bytes(196)
    parquet.write_bytes(whole)
    with pytest.raises(ValueError, match=r"toy\.parquet"):
        data.read_parquet(parquet)


def test_missing_and_foreign_parquet(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.parquet does not exist"):
        data.read_parquet(tmp_path / "none.parquet")
    (tmp_path / "x.parquet").write_text("not at all Parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is not a readable Parquet file"):
        data.read_parquet(tmp_path / "x.parquet")
    pq.write_table(pa.table({"picture": [b""], "label": [1]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet must have the columns image .* found \['picture', 'label'\]"):
        data.read_parquet(tmp_path / "y.parquet")
    pq.write_table(pa.table({"image": ["text"], "label": [1]}), tmp_path / "z.parquet")
    with pytest.raises(ValueError, match=r"z\.parquet: image must be binary .* got string"):
        data.read_parquet(tmp_path / "z.parquet")


SIXTEEN_BIT = np.arange(20, dtype=np.uint16).reshape(4, 5) * 1000


@pytest.mark.parametrize(
    ("cells", "labels", "options", "message"),
    [
        ([], [], {}, "has no images"),
        ([b"junk"], [0], {}, "row 0 is not a readable image"),
        ([png(pixels(1)[0]), png(pixels(1)[0])[:40]], [0, 1], {}, "row 1 is not a readable image"),
        ([png(pixels(1)[0]), None], [0, 1], {}, "row 1 has no image bytes"),
        ([png(pixels(1)[0]), png(pixels(1, (5, 5))[0])], [0, 1], {}, "row 1 is 5x5, .* before it are 5x4"),
        ([png(SIXTEEN_BIT)], [0], {}, "row 0 is not a readable image .mode I;16"),
        ([png(pixels(1)[0])], [None], {}, "label must be integers without nulls, got int64, 1 nulls"),
        ([png(pixels(1)[0])], [0.5], {"label_type": pa.float64()}, "label must be integers .* got double"),
        ([png(pixels(1)[0])], [-1], {"metadata": {"classes": '["a"]'}}, "labels must be in 0 to 0, got"),
        ([png(pixels(1)[0])], [1], {"metadata": {"classes": '["a"]'}}, "labels must be in 0 to 0, got"),
        ([png(pixels(1)[0])], [0], {"metadata": {"classes": "["}}, "class names in its metadata"),
        ([png(pixels(1)[0])], [0], {"metadata": {"huggingface": "{}"}}, "class names in its metadata"),
    ],
)
def test_bad_parquet_content(tmp_path, cells, labels, options, message):
    path = write(tmp_path / "bad.parquet", cells, labels, **options)
    with pytest.raises(ValueError, match=rf"bad\.parquet.*{message}"):
        data.read_parquet(path)


def test_read_folder(folder):
    (folder / ".hidden").write_text("")
    (folder / "a" / ".hidden").write_text("")
    (folder / "notes.txt").write_text("beside the class folders")
    found = data.read_folder(folder)
    assert found.classes == ("a", "b")
    assert found.y.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(found.x.numpy()[:, 0] * 255, pixels())


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        data.read_folder(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare has no class folders"):
        data.read_folder(tmp_path / "bare")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        data.read_folder(folder)
    (folder / "empty" / "1.png").write_bytes(png(pixels(1, (7, 5))[0]))
    with pytest.raises(ValueError, match=r"empty/1\.png is 5x7, .* before it are 5x4"):
        data.read_folder(folder)
    (folder / "empty" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"empty/1\.png is not a readable image"):
        data.read_folder(folder)


def test_load_from_a_directory_and_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "svhn-sample-train.parquet", [png(p) for p in pixels()], [0, 1, 1])
    monkeypatch.delenv("IMMUNONET_DATA", raising=False)
    direct = data.load("svhn-sample", "train", directory=tmp_path)
    monkeypatch.setenv("IMMUNONET_DATA", str(tmp_path))
    assert torch.equal(direct.x, data.load("svhn-sample", "train").x)
    with pytest.raises(FileNotFoundError, match=r"svhn-sample-test\.parquet is not in .* not on the Hugging Face hub"):
        data.load("svhn-sample", "test")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mnist", ("ylecun/mnist", "mnist/test-00000-of-00001.parquet")),
        ("cifar10", ("uoft-cs/cifar10", "plain_text/test-00000-of-00001.parquet")),
        ("svhn", ("ufldl-stanford/svhn", "cropped_digits/test-00000-of-00001.parquet")),
    ],
)
def test_load_from_the_hub(parquet, monkeypatch, name, asked):
    calls = []

    def download(repository, file, *, repo_type):
        calls.append((repository, file))
        assert repo_type == "dataset"
        return str(parquet)

    monkeypatch.delenv("IMMUNONET_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert data.load(name, "test").y.tolist() == [0, 1, 1]
    assert calls == [asked]


def test_unreachable_hub(tmp_path, monkeypatch):
    def download(*_, **__):
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.delenv("IMMUNONET_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    advice = r"could not be fetched .*\(ConnectionError: Name or service not known\).*--data DIR or \$IMMUNO"
    with pytest.raises(FileNotFoundError, match=rf"no folder was given for mnist-train\.parquet.*{advice}"):
        data.load("mnist", "train")
    with pytest.raises(FileNotFoundError, match=rf"mnist-train\.parquet is not in {tmp_path}.*{advice}"):
        data.load("mnist", "train", directory=tmp_path)


def test_load_refuses_other_names():
    with pytest.raises(ValueError, match=r"name must be one of 'mnist', .* got 'imagenet'"):
        data.load("imagenet", "train")
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'validation'"):
        data.load("digits", "validation")


def test_a_missing_dependency_names_its_extra():
    with pytest.raises(ImportError, match=r"this needs nothing_such: pip install 'immunonet\[data\]'"):
        data.require("nothing_such.part", "data")


def test_digits_are_those_of_scikit_learn():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.x.shape == (1437, 1, 8, 8)
    assert test.x.shape == (360, 1, 8, 8)
    rows = torch.cat([torch.cat([part.x.flatten(1) * 16, part.y[:, None]], 1) for part in (train, test)])
    bunch = load_digits()
    expected = np.column_stack([bunch.data, bunch.target])
    np.testing.assert_array_equal(sorted(rows.tolist()), sorted(expected.tolist()))
    assert torch.equal(test.x, data.load("digits", "test").x)


@given(n=st.integers(2, 500), part=st.floats(0, 1))
@settings(deadline=None)
def test_split_is_a_partition(n, part):
    validation = max(1, min(n - 1, int(n * part)))
    train, held = data.split(n, validation)
    assert len(held) == validation
    assert sorted(train.tolist() + held.tolist()) == list(range(n))
    assert torch.equal(held, held.sort().values)
    assert torch.equal(held, data.split(n, validation)[1])


@pytest.mark.parametrize(("n", "held"), [(60_000, 3000), (50_000, 3000), (29_999, 2999), (1437, 143), (2, 1)])
def test_split_sizes(n, held):
    assert len(data.split(n)[1]) == held


def test_split_refuses_what_leaves_nothing():
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        data.split(1)
    with pytest.raises(ValueError, match="validation must be at least 1 and at most 9, got 10"):
        data.split(10, 10)


@pytest.mark.skipif(
    not (Path(os.environ.get("IMMUNONET_DATA", "")) / "mnist-test.parquet").is_file(), reason="no MNIST here"
)
def test_mnist_is_mnist():
    images = data.load("mnist", "test")
    assert images.x.shape == (10_000, 1, 28, 28)
    assert images.classes == tuple("0123456789")
    assert images.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(images.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
