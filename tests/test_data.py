import io
import json
import os
from pathlib import Path

import datasets
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
    pq.write_table(pa.table({"scan": [b""], "label": [1]}), tmp_path / "y.parquet")
    with pytest.raises(
        ValueError, match=r"y\.parquet must have a column of images, .* found \['scan', 'label'\].*--image"
    ):
        data.read_parquet(tmp_path / "y.parquet")
    pq.write_table(pa.table({"image": ["text"], "label": [1]}), tmp_path / "z.parquet")
    with pytest.raises(ValueError, match=r"z\.parquet: image must be binary .* got string"):
        data.read_parquet(tmp_path / "z.parquet")


@pytest.mark.parametrize(
    ("cells", "labels", "options", "message"),
    [
        ([], [], {}, "has no images"),
        ([b"junk"], [0], {}, "row 0 is not a readable image"),
        ([png(pixels(1)[0]), png(pixels(1)[0])[:40]], [0, 1], {}, "row 1 is not a readable image"),
        ([png(pixels(1)[0]), None], [0, 1], {}, "row 1 has no image bytes"),
        ([png(pixels(1)[0]), png(pixels(1, (5, 5))[0])], [0, 1], {}, "row 1 is 5x5, .* before it are 5x4"),
        ([png(pixels(1)[0])], [None], {}, r"label is missing \(-1 or null\) in 1 of 1 rows, first in row 0"),
        ([png(pixels(1)[0])] * 3, [0, -1, -1], {}, r"label is missing .* in 2 of 3 rows, first in row 1: .*--label"),
        ([png(pixels(1)[0])], [0.5], {"label_type": pa.float64()}, "label must be integers or strings, got double"),
        ([png(pixels(1)[0])], [10**9], {}, "label 1000000000 is no class"),
        ([png(pixels(1)[0])], [1], {"metadata": {"classes": '["a"]'}}, "labels must be in 0 to 0, got"),
        ([png(pixels(1)[0])], [0], {"metadata": {"classes": "["}}, "class names in its metadata"),
        ([png(pixels(1)[0])], [0], {"metadata": {"classes": '"a"'}}, "must be a list of names, got 'a'"),
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


@pytest.fixture
def hub(parquet, tmp_path, monkeypatch):
    """A hub that gives this one file as the test split of whatever is asked for; returns what was asked."""
    asked = []
    build = datasets.load_dataset_builder

    def load_dataset_builder(*name):
        asked.append(name)
        return build("parquet", data_files={"test": str(parquet)}, cache_dir=str(tmp_path / "cache"))

    monkeypatch.delenv("IMMUNONET_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mnist", ("ylecun/mnist", "mnist")),
        ("fashion_mnist", ("zalando-datasets/fashion_mnist", "fashion_mnist")),
        ("cifar10", ("uoft-cs/cifar10", "plain_text")),
        ("cifar100", ("uoft-cs/cifar100", "cifar100")),
        ("svhn", ("ufldl-stanford/svhn", "cropped_digits")),
    ],
)
def test_load_from_the_hub(hub, parquet, name, asked):
    found, here = data.load(name, "test"), data.read_parquet(parquet)
    assert found.y.tolist() == [0, 1, 1]
    assert torch.equal(found.x, here.x)
    assert hub == [asked]


def test_a_dataset_of_the_hub(hub, tmp_path, monkeypatch):
    assert data.splits("hf:some/thing") == ("test",)
    assert len(data.read("hf:some/thing:large", "test")) == 3
    assert hub == [("some/thing", None), ("some/thing", "large")]
    with pytest.raises(ValueError, match="hf:some/thing has no split 'train', it has test"):
        data.read("hf:some/thing", "train")
    # The library would take a folder of that name for it.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "thing").mkdir(parents=True)
    with pytest.raises(ValueError, match="hf:some/thing is of the hub, but some/thing lies here too"):
        data.read("hf:some/thing", "test")
    (tmp_path / "some" / "thing").rmdir()
    # Nothing else is looked for there: a wrong path is no name of a stranger's dataset.
    hub.clear()
    with pytest.raises(FileNotFoundError, match="there is no 'some/thing'"):
        data.read("some/thing", "test")
    assert hub == []


def test_unreachable_hub(tmp_path, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.delenv("IMMUNONET_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
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


@given(n=st.integers(1, 300), count=st.integers(1, 400), more=st.integers(0, 100))
@settings(deadline=None)
def test_a_sample_is_fixed_and_starts_like_a_larger_one(n, count, more):
    found = data.sample(n, count)
    assert len(found) == len(set(found.tolist())) == min(n, count)
    assert set(found.tolist()) <= set(range(n))
    assert torch.equal(found, data.sample(n, count + more)[:count])
    assert sorted(data.sample(n).tolist()) == list(range(n))


def test_a_sample_of_ordered_data_has_all_classes():
    y = torch.arange(10).repeat_interleave(100)  # the first 100 are of one class
    counts = torch.bincount(y[data.sample(1000, 200)], minlength=10)
    assert counts.min() >= 8  # hypergeometric, mean 20, standard deviation 3.8: three of these below
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        data.sample(10, 0)


def labelled(path, labels, names=None, label="label", **options):
    metadata = names and {"classes": json.dumps(names)}
    cells = [png(np.full((2, 2), i, np.uint8)) for i in range(len(labels))]
    table = pa.table({"image": cells, label: pa.array(labels)})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return data.read_parquet(path, **options)


@pytest.mark.parametrize(
    ("labels", "names", "classes", "expected"),
    [
        # Names rule, wherever their number is another in the file.
        (["dog", "eel"], None, ("cat", "dog", "eel"), [1, 2]),
        ([0, 1, 0], ["dog", "cat"], ("cat", "dog", "eel"), [1, 0, 1]),
        ([0], ["dog", "an unknown one that does not occur"], ("cat", "dog"), [1]),
        # Numbers without names are places in names, and names among numbers.
        ([0, 2], None, ("cat", "dog", "eel"), [0, 2]),
        ([0, 1], None, ("0", "1", "2"), [0, 1]),
        ([2, 10], None, ("10", "2"), [1, 0]),
        ([True, False], None, ("no", "yes"), [1, 0]),
    ],
)
def test_the_training_classes_rule(tmp_path, labels, names, classes, expected):
    found = labelled(tmp_path / "test.parquet", labels, names, classes=classes)
    assert found.y.tolist() == expected
    assert found.classes == classes


@pytest.mark.parametrize(
    ("labels", "names", "classes", "message"),
    [
        (
            ["dog", "fox"],
            None,
            ("cat", "dog"),
            "has the class 'fox', which is not among the training classes, cat, dog",
        ),
        ([0, 1], ["dog", "fox"], ("cat", "dog"), "has the class 'fox'"),
        ([0, 2], None, ("cat", "dog"), "label 2 is not among the 2 training classes"),
        ([0, 2], None, ("0", "1"), "has the class '2'"),
        ([0, 1], None, ("1", "2"), "has the class '0'"),  # from 0 or from 1 on?
    ],
)
def test_an_unknown_class_is_named(tmp_path, labels, names, classes, message):
    with pytest.raises(ValueError, match=rf"test\.parquet.*{message}"):
        labelled(tmp_path / "test.parquet", labels, names, classes=classes)


def test_string_labels_are_classes_by_name(tmp_path):
    labels = ["b", "a", "c", "b"]
    for column in (labels, pa.array(labels).dictionary_encode(), pa.array(labels, pa.large_string())):
        found = labelled(tmp_path / "x.parquet", column)
        assert (found.classes, found.y.tolist(), found.named) == (("a", "b", "c"), [1, 0, 2, 1], True)
    assert data.classes_of(tmp_path / "x.parquet") == ("a", "b", "c")
    assert not labelled(tmp_path / "x.parquet", [0, 1]).named


@pytest.mark.parametrize("labels", [[-1, -1], ["a", "b"], [0.5, 1.5], [None, None], None])
def test_labels_are_not_looked_at_where_they_are_not_wanted(tmp_path, labels):
    columns = {"image": [png(image) for image in pixels(2)]} | ({} if labels is None else {"label": labels})
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    found = data.read_parquet(tmp_path / "x.parquet", labelled=False)
    np.testing.assert_array_equal(found.x[:, 0].numpy() * 255, pixels(2))
    assert (found.y.tolist(), found.classes) == ([-1, -1], ())


def test_columns_by_name(tmp_path):
    for label in ("labels", "fine_label", "target"):
        assert labelled(tmp_path / "x.parquet", [1, 0], label=label).y.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"must have a column of labels, .* found \['image', 'kind'\].*--label"):
        labelled(tmp_path / "x.parquet", [1, 0], label="kind")
    assert data.read_parquet(tmp_path / "x.parquet", label="kind").y.tolist() == [1, 0]
    with pytest.raises(ValueError, match="must have the column scan, found"):
        data.read_parquet(tmp_path / "x.parquet", label="kind", image="scan")
    fine = {"img": [png(pixels(1)[0])], "coarse_label": [7], "fine_label": [3]}
    pq.write_table(pa.table(fine), tmp_path / "x.parquet")
    assert data.read_parquet(tmp_path / "x.parquet").y.tolist() == [3]
    assert data.read_parquet(tmp_path / "x.parquet", label="coarse_label").y.tolist() == [7]


def test_class_folders_have_no_columns(folder):
    with pytest.raises(ValueError, match="label='kind' must be left out with class folders"):
        data.read_folder(folder, label="kind")
    with pytest.raises(ValueError, match="image='kind' must be left out with class folders"):
        data.read_folder(folder, image="kind")


def test_digits_have_no_size():
    with pytest.raises(ValueError, match="size must be left out with digits, which are 8x8 numbers"):
        data.load("digits", "test", size=16)
    with pytest.raises(ValueError, match="label must be left out with digits"):
        data.load("digits", "test", label="kind")


def test_files_of_images_and_parquet_come_through_the_same_door(folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    whole = data.read(folder, size=3)
    assert torch.equal(data.read_images(files, size=3), whole.x)
    path = write(tmp_path / "x.parquet", [file.read_bytes() for file in files], [0, 0, 1])
    assert torch.equal(data.read(path, size=3).x, whole.x)
    assert whole.x.shape == (3, 1, 3, 3)


HERE = Path(os.environ.get("IMMUNONET_DATA", ""))


@pytest.mark.parametrize("name", ["mnist-test", "cifar10-test", "svhn-sample-test"])
def test_the_benchmark_files_give_what_pillow_gives(name, tmp_path):
    """An oracle of four lines: pyarrow and Pillow, no option of ours."""
    if not (HERE / f"{name}.parquet").is_file():
        pytest.skip(f"no {name}.parquet here")
    table = pq.read_table(HERE / f"{name}.parquet").slice(0, 200)
    column = table.column("image" if "image" in table.column_names else "img").to_pylist()
    images = [Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)) for cell in column]
    expected = np.stack([np.asarray(image, dtype=np.float32) / np.float32(255) for image in images])
    pq.write_table(table, tmp_path / "few.parquet")
    found = data.read_parquet(tmp_path / "few.parquet")
    np.testing.assert_array_equal(found.x.permute(0, 2, 3, 1).numpy().reshape(expected.shape), expected)
    assert found.y.tolist() == table.column("label").to_pylist()


@pytest.mark.skipif(not (HERE / "mnist-test.parquet").is_file(), reason="no MNIST here")
def test_mnist_is_mnist():
    images = data.load("mnist", "test")
    assert images.x.shape == (10_000, 1, 28, 28)
    assert images.classes == tuple("0123456789")
    assert images.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(images.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_images_are_short_in_print():
    assert repr(data.load("digits", "train")[:12]) == "Images(12 of (1, 8, 8), 10 classes)"
