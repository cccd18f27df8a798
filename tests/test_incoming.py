import ast
import dataclasses
import math
import warnings
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import immunonet
from immunonet import RAILS, DkNN, Maturation, Normalised, attacks, evaluate, incoming
from immunonet.evaluation.suite import PROTOCOLS
from immunonet.incoming import examples, inputs, labels, tensor

UNIT, BYTES = incoming.bounds("bounds", (0.0, 1.0)), incoming.bounds("bounds", (0, 255))
X, Y = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
PACKAGE = Path(immunonet.__file__).parent


# --- One door ---

READ_ELSEWHERE = {
    "studies/contests.py",
    # What the program itself wrote or computed, or read from a file.
    "data.py", "features/file.py", "features/affine.py", "immune/noise.py",
    "immune/flocking.py",
    "evaluation/campaign.py", "evaluation/lab.py", "evaluation/outcome.py", "evaluation/protocol.py",
    "evaluation/sanity.py", "_pictures.py", "studies/behaviour.py", "studies/search.py", "report/robustness.py",
    "memory/entries.py", "memory/recall.py", "memory/store.py",
    "explorer/antigens.py", "explorer/panels.py", "explorer/story.py", "explorer/watching.py",
    # Digests of what came through the door.
    "indexed.py",
    # Plain numbers: bounds, and shares of draws.
    "_check.py", "statistics.py",
}  # fmt: skip


def test_nothing_else_makes_tensors_of_what_callers_give():
    makers = {"as_tensor", "from_numpy", "tensor", "asarray", "frombuffer", "from_dlpack"}
    names = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - READ_ELSEWHERE
    texts = {name: (PACKAGE / name).read_text() for name in names}
    found = {
        name
        for name, text in texts.items()
        if any(f"torch.{maker}" in text for maker in makers)  # parsing all takes seconds
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and node.attr in makers
        if isinstance(node.value, ast.Name) and node.value.id == "torch"
    }
    assert found == {"incoming.py"}


# --- Arrays ---

SAME = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SAME[:, ::-1], SAME[:, ::-1].tolist()),
        (SAME.transpose(2, 0, 1), SAME.transpose(2, 0, 1).tolist()),
        (np.broadcast_to(SAME[:1], (3, 3, 4)), [SAME[0].tolist()] * 3),
        (SAME.astype(">f4"), SAME.tolist()),
        (SAME.astype(">f8"), SAME.tolist()),
        (SAME.astype(np.float16), SAME.tolist()),
        (SAME.astype(np.longdouble), SAME.tolist()),
        (SAME.astype(">i2"), SAME.tolist()),
        (SAME.astype(np.uint16), SAME.tolist()),
        (SAME.astype(np.uint64), SAME.tolist()),
        (np.ma.masked_array(SAME), SAME.tolist()),
        (list(SAME), SAME.tolist()),
        (tuple(torch.from_numpy(SAME)), SAME.tolist()),
        ([list(torch.from_numpy(part)) for part in SAME], SAME.tolist()),
        (SAME.tolist(), SAME.tolist()),
        (range(3), [0, 1, 2]),
        ([np.float32(0.5), np.float32(1.5)], [0.5, 1.5]),
        (np.float64(2.0), 2.0),
        (memoryview(b"ab"), [97, 98]),
        (pd.Series([1, 2], index=[7, 8]), [1, 2]),
        (pd.Series([1, None], dtype="Float64"), [1, math.nan]),
        (pd.DataFrame({"b": [1.0, 2.0], "a": [3, 4]}, index=[5, 3]), [[1, 3], [2, 4]]),
        (pd.DataFrame({"b": [1.5, 2.0], "a": [True, False]}), [[1.5, 1], [2, 0]]),
        (pd.DataFrame([[1.0, 2.0]], columns=["a", "a"]), [[1, 2]]),
        (pd.Index([3, 1]), [3, 1]),
        (pd.Series([3, 1], dtype="category"), [3, 1]),
        (nn.Parameter(torch.ones(2)), [1, 1]),
        (torch.arange(6.0).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
        (torch.tensor([3, 4], dtype=torch.uint16), [3, 4]),
    ],
)
def test_values_come_as_they_are(value, expected):
    found = tensor("x", value)
    assert type(found) is torch.Tensor
    assert found.is_contiguous()
    assert not found.requires_grad
    assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), equal_nan=True)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_arrays_of_any_layout(data):
    dtype = data.draw(st.sampled_from(["?", "u1", ">i2", "<u2", ">u4", "i8", "<f2", ">f4", "f8", ">f8"]))
    value = data.draw(hnp.arrays(dtype, hnp.array_shapes(max_side=4), elements=st.integers(0, 1)))
    value = value.transpose(data.draw(st.permutations(range(value.ndim))))
    value = value[data.draw(hnp.basic_indices(value.shape, allow_newaxis=True))]
    value = np.broadcast_to(value, (2, *value.shape))
    assert tensor("x", value).tolist() == value.tolist()


def test_read_only_arrays_are_copied_without_a_warning():
    value = np.zeros((2, 2))
    value.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tensor("x", value)
    found += 1
    assert not value.any()


def test_numbers_above_int64_are_not_wrapped():
    assert tensor("x", np.array([2**63], np.uint64)).tolist() == [2.0**63]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_default_dtype_changes_nothing(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert inputs("x", [[0.1, 0.2]], bounds=UNIT).dtype == torch.float32
        assert tensor("x", [0.1]).tolist() == [0.1]
        assert labels("y", [0], n=1).dtype == torch.int64
        assert Normalised(nn.Identity(), 0.5, [2.0]).mean.dtype == torch.float32
        assert incoming.bounds("bounds", (0.1, 0.7)).pairs() == [[0.1, 0.7]]
    finally:
        torch.set_default_dtype(torch.float32)


NUMBERS = "x must be a tensor or an array of numbers, got"
MASKED = np.ma.masked_array([1.0, 2.0, 3.0], mask=[False, True, True])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("image", TypeError, f"{NUMBERS} str of dtype <U5; .*names"),
        (None, TypeError, f"{NUMBERS} NoneType"),
        (len, TypeError, f"{NUMBERS} builtin_function_or_method"),
        ({"a": 1}, TypeError, f"{NUMBERS} dict"),
        (b"ab", TypeError, f"{NUMBERS} bytes"),
        (TensorDataset(X, Y), TypeError, f"{NUMBERS} TensorDataset"),
        ([[0.0], [0.0, 1.0]], TypeError, f"{NUMBERS} list .*inhomogeneous"),
        (np.array([None, "a"]), TypeError, rf"{NUMBERS} ndarray of dtype object \(NoneType at index 0\)"),
        ([1.0, None], TypeError, rf"{NUMBERS} list of dtype object \(NoneType at index 1\)"),
        (np.array([1.0, 2.0], dtype=object), TypeError, f"{NUMBERS} ndarray of dtype object; .*astype"),
        (np.array(["a"]), TypeError, f"{NUMBERS} ndarray of dtype <U1"),
        (np.array([1j]), TypeError, f"{NUMBERS} ndarray of dtype complex128; .*real"),
        (torch.ones(1, dtype=torch.complex64), TypeError, f"{NUMBERS} Tensor of dtype torch.complex64"),
        (np.array(["2024-01-01"], "M8[s]"), TypeError, rf"{NUMBERS} ndarray of dtype datetime64\[s\]; .*date"),
        (np.array([1], "m8[s]"), TypeError, r"of dtype timedelta64\[s\]"),
        (np.zeros(1, [("a", float)]), TypeError, r"of dtype \[\('a', '<f8'\)\]"),
        (pd.Series(["a", "b"]), TypeError, f"{NUMBERS} Series of dtype"),
        (
            pd.DataFrame({"age": [1.0], "name": ["a"], "born": pd.to_datetime(["2024-01-01"])}),
            TypeError,
            r"x must have numeric columns only, got 'name' \(.*\), 'born' \(datetime64",
        ),
        (MASKED, TypeError, "x must have no masked values, got 2"),
        ([MASKED, MASKED], TypeError, r"x\[0\] must have no masked values, got 2"),
        ([[MASKED]], TypeError, r"x\[0\]\[0\] must have no masked values"),
        (torch.eye(2).to_sparse(), TypeError, r"x must be dense, got torch.sparse_coo; call .to_dense\(\)"),
        (torch.eye(2, device="meta"), TypeError, "x must hold values, got a tensor on the meta device"),
        (Image.new("L", (2, 2)), TypeError, r"x must be .* got a PIL image \(Image\); convert it with a transform"),
        ([Image.new("L", (2, 2))], TypeError, r"x\[0\] must be .* got a PIL image"),
        ([torch.ones(2), None], TypeError, r"x\[1\] must be a tensor or an array of numbers, got NoneType"),
        (
            [torch.ones(1, 6, 6), torch.ones(1, 6, 6), np.ones((1, 7, 7))],
            ValueError,
            r"x must be of one size, got \(1, 6, 6\) in x\[0\] and \(1, 7, 7\) in x\[2\]",
        ),
    ],
)
def test_what_holds_no_numbers(value, error, message):
    with pytest.raises(error, match=message):
        tensor("x", value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
            "x must have no masked values, got a MaskedTensor",
        ),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
            r"x must hold numbers as they are, got torch.quint8; call .dequantize\(\)",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "x must be of one size, got a nested"),
    ],
)
def test_tensors_of_other_kinds(make, message):
    with pytest.raises(TypeError, match=message):
        tensor("x", make())


def test_scipys_sparse_matrices():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"x must be dense, got csr_matrix; call .toarray\(\)"):
        tensor("x", sparse.csr_matrix(np.eye(2)))


# --- Inputs ---


@pytest.mark.parametrize(
    "value",
    [
        [[0.0, 1.0]],
        np.array([[0.25, 1.0]]),
        torch.tensor([[-1e-7, 1 + 1e-7]]),
        torch.tensor([[0.5, 0.5]], dtype=torch.bfloat16),
        torch.rand(0, 2),
    ],
)
def test_inputs_come_back_as_float32(value):
    found = inputs("x", value, bounds=UNIT, shape=(2,))
    assert found.dtype == torch.float32
    assert_close(found, torch.as_tensor(value).float())


def test_inputs_are_cut_off_the_graph():
    assert not inputs("x", torch.rand(1, 2, requires_grad=True), bounds=UNIT).requires_grad


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_in_other_orders_can_be_viewed(layout):
    images = torch.rand(5, 4, 4, 3).permute(0, 3, 1, 2).to(memory_format=layout)
    assert torch.equal(inputs("x", images, bounds=UNIT).view(5, 48), images.flatten(1))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint16])
def test_whole_numbers_where_bounds_are_wide(dtype):
    found = inputs("x", np.array([[0, 255]], dtype), bounds=BYTES)
    assert found.tolist() == [[0.0, 255.0]]
    columns = incoming.bounds("bounds", [(0, 120), (-5, 5)])
    assert inputs("x", np.array([[99, -5]]).astype(np.int64), bounds=columns).tolist() == [[99.0, -5.0]]
    for narrow in (UNIT, incoming.bounds("bounds", [(0, 255), (0, 1)])):
        with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.*x.float\(\) / 255.*\(0, 255\)"):
            inputs("x", np.array([[0, 1]], dtype), bounds=narrow)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor([[1.1, 0.0]]), ValueError, r"x must lie within bounds=\(0.0, 1.0\), got values in \[0, 1.1\]"),
        (torch.tensor([[-0.1, 0.0]]), ValueError, r"wrap it: immunonet.Normalised\(model, mean, std\)"),
        (torch.tensor([[1 + 1e-5, 0.0]]), ValueError, "x must lie within bounds"),
        (torch.tensor([[math.nan, 0.0]]), ValueError, "x must be finite, got 1 NaN or infinite values"),
        (torch.tensor([[math.inf, math.nan]]), ValueError, "x must be finite, got 2"),
        (np.array([[1e300, 0.0]]), ValueError, "x must be finite, got 1 too large for float32 values"),
        (pd.DataFrame({"a": [0.5], "b": [None]}, dtype="Float64"), ValueError, "x must be finite, got 1 NaN"),
        (torch.zeros(1, 3), ValueError, r"x must have shape \(B, 2\), got \(1, 3\)"),
        (torch.zeros(2), ValueError, r"x must have shape \(B, \*S\) with no empty axis, got \(2,\)"),
        (torch.zeros(1, 0), ValueError, "no empty axis"),
        (torch.zeros(1, 2, dtype=torch.uint8), TypeError, r"floating dtype, got torch.uint8.*x.float\(\) / 255"),
        (torch.zeros(1, 2, dtype=torch.bool), TypeError, "floating dtype, got torch.bool"),
    ],
)
def test_bad_inputs(value, error, message):
    with pytest.raises(error, match=message):
        inputs("x", value, bounds=UNIT, shape=(2,))


def test_truth_values_are_no_inputs_whatever_the_bounds():
    with pytest.raises(TypeError, match=r"floating dtype, got torch\.bool"):
        inputs("x", np.ones((1, 2), bool), bounds=BYTES)


def test_inputs_out_of_the_bounds_of_one_channel():
    bounds = incoming.bounds("bounds", [(0, 1), (0, 100)])
    inputs("x", torch.tensor([[1.0, 99.0]]), bounds=bounds)
    with pytest.raises(ValueError, match="x must lie within bounds=2 pairs"):
        inputs("x", torch.tensor([[2.0, 99.0]]), bounds=bounds)
    with pytest.raises(ValueError, match="bounds has 2 pairs, but samples have shape"):
        inputs("x", torch.zeros(1, 3), bounds=bounds)


# --- Columns that float32 would round away ---

WIDE = incoming.bounds("bounds", (-1e12, 1e12))


def columns(offset, width, n=200):
    """Two columns: one that float32 can hold, and one that lies `width` around `offset`."""
    unit = np.random.default_rng(0).uniform(-1, 1, (n, 2))
    return unit * [1, width] + [0, offset]


@pytest.mark.parametrize(
    ("value", "lost"),
    [
        (columns(1.7e9, 10), True),  # steps of 128: seconds since 1970
        (columns(5e6, 1), True),  # steps of 1/2: metres of a map's northing, within a garden
        (columns(1e9, 1e6), False),
        (columns(1.7e9, 10).astype(np.float32), False),  # already rounded: what was lost cannot be seen
        (columns(1.7e9, 0), False),  # a constant tells nothing apart
        (columns(0.1, 0), False),
        (columns(1.7e9, 1000).astype(np.int64), True),
        (columns(100, 100).astype(np.int64), False),
        (np.zeros((0, 2)), False),
    ],
)
def test_rounding_of_columns(value, lost):
    if lost:
        with pytest.raises(ValueError, match=r"float32, which rounds feature 1 by up to .*: subtract the offset, from"):
            inputs("x", value, bounds=WIDE, fitted=True)
    else:
        inputs("x", value, bounds=WIDE, fitted=True)
    inputs("x", value, bounds=WIDE)


def test_rounding_of_channels():
    images = np.random.default_rng(0).random((4, 3, 5, 5)) + np.array([0, 0, 1e7])[:, None, None]
    with pytest.raises(
        ValueError, match=r"feature 2 by up to 0\.[45].*offset of 1e\+07 and a standard deviation of 0\.2[89]"
    ):
        inputs("x", images, bounds=WIDE, fitted=True)
    with pytest.raises(ValueError, match=r"feature 0 \(and 2 other features\)"):
        inputs("x", images + 1e7, bounds=WIDE, fitted=True)


def test_fit_says_what_it_would_round():
    rng, y = np.random.default_rng(0), np.arange(120) % 2
    x = (1.7e9 + 20.0 * y + rng.uniform(0, 10, 120))[:, None]
    with pytest.raises(ValueError, match=r"x .* feature 0 .* offset of 1\.7e\+09 .* subtract the offset"):
        DkNN(nn.Linear(1, 2), "input", neighbours=5, bounds=(1.6e9, 1.8e9)).fit(x, y)
    near = x - 1.7e9
    defence = DkNN(nn.Linear(1, 2), "input", neighbours=5, metric="euclidean", bounds=(-1e8, 1e8)).fit(near, y)
    assert defence.predict(near).tolist() == y.tolist()


# --- Labels ---


@pytest.mark.parametrize(
    "value",
    [
        [0, 2],
        (np.int64(0), np.int64(2)),
        [torch.tensor(0), torch.tensor(2)],
        np.array([0, 2], dtype=np.uint8),
        np.array([0, 2], dtype=np.uint32),
        np.array([0, 2], dtype=">i8"),
        np.array([2, 0])[::-1],
        torch.tensor([0, 2], dtype=torch.int32),
        pd.Series([0, 2], index=[40, 41]),
    ],
)
def test_labels_come_back_as_int64(value):
    found = labels("y", value, n=2, classes=3)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 2]


def test_no_labels_for_no_inputs():
    assert labels("y", torch.zeros(0, dtype=torch.long), n=0).tolist() == []


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0.0, 1.0], TypeError, r"y must have an integer dtype, got torch.float64; .* y.long\(\)"),
        ([True, False], TypeError, r"y must have an integer dtype, got torch.bool; for two classes give y.long\(\)"),
        ([0], ValueError, r"y must have shape \(2,\), one label per input, got \(1,\)"),
        ([[0, 1]], ValueError, r"y must have shape \(2,\)"),
        ([[0], [1]], ValueError, r"y must have shape \(2,\), .* got \(2, 1\); give y.squeeze\(1\)"),
        ([[0, 1, 0], [1, 0, 0]], ValueError, r"got \(2, 3\); of one-hot rows give y.argmax\(1\)"),
        (torch.eye(2), ValueError, r"got \(2, 2\); of one-hot rows give y.argmax\(1\)"),
        ([0, 3], ValueError, r"y must be in 0 to 2, the model's 3 classes, got values in \[0, 3\]: 1 of 2 .* from 0$"),
        ([-1, 0], ValueError, r"y must be in 0 to 2.*got values in \[-1, 0\].* index 0 \(-1\). Leave out"),
        ([0, -1], ValueError, r"1 of 2 are outside, the first at index 1 \(-1\)"),
        (["cat", "dog"], TypeError, r"y must be a tensor or an array of numbers, got list.*classes.index\(name\)"),
        (np.array([0, 2**63], np.uint64), TypeError, "integer dtype, got torch.float64"),
    ],
)
def test_bad_labels(value, error, message):
    with pytest.raises(error, match=message):
        labels("y", value, n=2, classes=3)


def test_labels_below_zero_of_unknown_classes():
    with pytest.raises(ValueError, match=r"y must be in 0 or more, got values in \[-2, 0\]: 1 of 2"):
        labels("y", [0, -2], n=2)


# --- Datasets and loaders ---


class Rows(Dataset):
    """A data set of what `item` gives for an index."""

    def __init__(self, item, n=10):
        self.item, self.n = item, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.item(i)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Endless(Dataset):
    def __getitem__(self, i):
        return X[i % 10], Y[i % 10]


class Reused(Dataset):
    """A data set that gives the same array every time, with other content."""

    def __init__(self):
        self.buffer = np.zeros(3, np.float32)

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.buffer[:] = X[i].numpy()
        return self.buffer, int(Y[i])


def batches():
    yield X[:4], Y[:4]
    yield X[4:], Y[4:]


PAIRS = list(zip(X, Y, strict=True))
DICTS = [{"pixel_values": a, "labels": b, "id": 3} for a, b in PAIRS]


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (TensorDataset(X, Y),),
        (Rows(lambda i: (X[i].numpy(), int(Y[i]))),),
        (Rows(lambda i: [X[i].tolist(), np.int64(Y[i])]),),
        (Rows(lambda i: {"image": X[i], "label": int(Y[i])}),),
        (Rows(lambda i: {"img": X[i].numpy(), "target": Y[i], "path": "a.png"}),),
        (Reused(),),
        (DataLoader(Reused(), batch_size=None),),
        (Stream(PAIRS),),
        (Stream(DICTS),),
        (Stream([(X[:4], Y[:4]), (X[4:], Y[4:])]),),
        (PAIRS,),
        (tuple((x.numpy(), int(y)) for x, y in PAIRS),),
        (DICTS,),
        (batches(),),
        (DataLoader(TensorDataset(X, Y), batch_size=3),),
        (DataLoader(TensorDataset(X, Y), batch_size=None),),
        (DataLoader(DICTS, batch_size=4),),
        (DataLoader(TensorDataset(X, Y), batch_sampler=[range(4), range(4, 10)]),),
    ],
)
def test_examples_come_in_order(data):
    x, y = examples(*data)
    assert torch.equal(torch.as_tensor(x).float(), X)
    assert torch.equal(y, Y)


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})
    for data in ((table,), (table.with_format("torch"),), (table["x"], table["label"])):
        x, y = examples(*data)
        assert torch.equal(inputs("x", x, bounds=UNIT), X)
        assert torch.equal(labels("y", y, n=10), Y)


def test_shuffled_loaders():
    x, y = examples(DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True))
    rows = {tuple(a): b for a, b in zip(X.tolist(), Y.tolist(), strict=True)}
    assert sorted(x.tolist()) == sorted(X.tolist())
    assert [rows[tuple(a)] for a in x.tolist()] == y.tolist()


def test_reading_a_dataset_draws_no_random_number():
    before = torch.get_rng_state()
    examples(TensorDataset(X, Y))
    assert torch.equal(torch.get_rng_state(), before)


def fails(i):
    if i == 3:
        raise OSError("truncated file")
    return X[i], Y[i]


SIZES = r"\(1, 6, 6\) in {} and \(1, 7, 7\) in {}"


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, None, TypeError, "y is missing: give labels, or a Dataset or DataLoader"),
        (X.tolist(), None, TypeError, "y is missing"),
        ([[0.1, 0.2], [0.3, 0.4]], None, TypeError, "y is missing"),
        ({"x": X, "y": Y}, None, TypeError, "y is missing"),
        ([], None, TypeError, "y is missing"),
        (TensorDataset(X, Y), Y, TypeError, "y must be left out when x is a TensorDataset, which holds the labels"),
        (TensorDataset(X), None, TypeError, r"x must yield pairs \(x, y\), got tuple of 1 \(x\[0\]\)"),
        (Rows(lambda i: X[i]), None, TypeError, r"x must yield pairs \(x, y\), got Tensor"),
        (TensorDataset(X, Y, Y), None, TypeError, r"x must yield pairs \(x, y\), got tuple of 3"),
        (DataLoader(TensorDataset(X, Y, Y)), None, TypeError, r"got list of 3 \(item 0 of x\)"),
        (TensorDataset(X[:0], Y[:0]), None, ValueError, "x is empty: it must hold examples of every class"),
        (Rows(lambda i: (X[i], "ab"[Y[i]])), None, TypeError, r"the label of x\[0\] .* got str .*classes.index"),
        (Rows(lambda i: (X[i], None if i == 2 else 0)), None, TypeError, r"the label of x\[2\] .* got NoneType"),
        (Rows(lambda i: (Image.new("L", (2, 2)), 0)), None, TypeError, r"the input of x\[0\] .* PIL image .*transform"),
        (Rows(fails), None, ValueError, r"x\[3\] cannot be read: OSError: truncated file"),
        (DataLoader(Rows(fails), batch_size=2), None, ValueError, "item 1 of x cannot be read: OSError: truncated"),
        (
            Rows(lambda i: (torch.zeros(1, 6 + (i > 4), 6 + (i > 4)), 0)),
            None,
            ValueError,
            "the inputs of x must be of one size, got " + SIZES.format(r"x\[0\]", r"x\[5\]"),
        ),
        (
            DataLoader(Rows(lambda i: (torch.zeros(1, 6 + (i > 4), 6 + (i > 4)), 0)), batch_size=5),
            None,
            ValueError,
            "the inputs of x must be of one size, got " + SIZES.format("item 0 of x", "item 1 of x"),
        ),
        (
            DataLoader(Rows(lambda i: (torch.zeros(1, 6 + i % 2), 0)), batch_size=5),
            None,
            ValueError,
            r"item 0 of x cannot be read: RuntimeError: .*\[1, 6\] at entry 0 and \[1, 7\]",
        ),
        (Rows(lambda i: {"image": X[i], "x": X[i], "y": 0}), None, TypeError, r"x\[0\] must have exactly one of the"),
        (Rows(lambda i: {"image": X[i], "fine_label": 0}), None, TypeError, "one of label, .* got image, fine_label"),
        (Endless(), None, TypeError, "x must have a length, got a Endless without __len__"),
        (Stream([(X[:4], Y[:3])]), None, ValueError, r"as many inputs as labels, got shapes \(4, 3\) and \(3,\)"),
    ],
)
def test_bad_examples(x, y, error, message):
    with pytest.raises(error, match=message):
        examples(x, y)


def test_labels_of_another_shape_in_a_dataset(mlp):
    x = torch.rand(12, 4)
    hot, single = nn.functional.one_hot(torch.arange(12) % 3), (torch.arange(12) % 3)[:, None]
    for y, message in ((hot, r"y.argmax\(1\)"), (single, r"y.squeeze\(1\)")):
        with pytest.raises(ValueError, match=message):
            DkNN(mlp, "1", neighbours=2).fit(TensorDataset(x, y))


@pytest.mark.parametrize(
    "held",
    [
        lambda x, y: TensorDataset(x, y),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
        lambda x, y: list(zip(x, y, strict=True)),
        lambda x, y: (pd.DataFrame(x.numpy()), pd.Series(y.numpy(), index=range(5, 5 + len(y)))),
        lambda x, y: [list(x), y.tolist()],
    ],
    ids=["dataset", "loader", "pairs", "frame", "lists"],
)
def test_calibration_by_other_examples(held, mlp, examples):
    x, y = examples(60, (4,))
    expected = DkNN(mlp, "1", neighbours=5).fit(x[:40], y[:40], calibration=(x[40:], y[40:]))
    found = DkNN(mlp, "1", neighbours=5).fit(x[:40], y[:40], calibration=held(x[40:], y[40:]))
    assert torch.equal(found.p_values(x), expected.p_values(x))


def test_a_pair_of_a_list_is_no_list_of_pairs():
    x, y = incoming.calibration(([X[0], X[1]], [0, 1]))
    assert len(x) == 2
    assert y == [0, 1]


@pytest.mark.parametrize("value", ["0.1", None, X, len, {"x": X}])
def test_bad_calibration(value):
    with pytest.raises(TypeError, match=r"calibration must be a fraction or a pair \(x_cal, y_cal\), got"):
        incoming.calibration(value)


# --- Through the package ---


def test_frames_through_a_defence(mlp, examples):
    x, y = examples(60, (4,))
    frame, series = pd.DataFrame(x.numpy(), index=range(60, 0, -1)), pd.Series(y.numpy(), index=range(100, 160))
    expected = DkNN(mlp, "1", neighbours=5).fit(x[20:], y[20:])
    found = DkNN(mlp, "1", neighbours=5).fit(frame[20:], series[20:])
    assert torch.equal(found.p_values(frame), expected.p_values(x))


def test_arrays(mlp):
    x, y = np.random.default_rng(0).random((30, 4)), np.arange(30) % 3
    defence = DkNN(mlp, "1", neighbours=5).fit(x, y)
    again = DkNN(mlp, "1", neighbours=5).fit(torch.from_numpy(x).float(), torch.from_numpy(y))
    assert torch.equal(defence.predict(x), again.predict(x.tolist()))


def test_bytes_through_a_defence(mlp, examples):
    x, y = examples(60, (4,))
    pixels = x.mul(255).round().to(torch.uint8)
    defence = DkNN(mlp, "1", neighbours=5, bounds=(0, 255)).fit(pixels, y)
    assert defence.repertoire.x.dtype == torch.float32
    assert torch.equal(defence.predict(pixels), defence.predict(pixels.float()))


SMALL = Maturation(population=30, neighbours=5, generations=1)


@pytest.mark.parametrize(
    "make", [lambda net: DkNN(net, "1", neighbours=5), lambda net: RAILS(net, "1", maturation=SMALL, seed=0)]
)
@pytest.mark.parametrize("calibration", [0.1, "pair"])
@pytest.mark.parametrize("as_array", [True, False])
def test_what_is_fitted_is_its_own(make, calibration, as_array, mlp, examples):
    x, y = examples(60, (4,))
    given = [x[:40].clone(), y[:40].clone(), x[40:].clone(), y[40:].clone()]
    if as_array:
        given = [part.numpy() for part in given]
    defence = make(mlp).fit(*given[:2], calibration=tuple(given[2:]) if calibration == "pair" else calibration)
    before = defence.predict(x), defence.familiarity(x), defence.repertoire.x.clone(), defence.repertoire.y.clone()
    for part in given:
        part[:] = 0
    after = defence.predict(x), defence.familiarity(x), defence.repertoire.x, defence.repertoire.y
    assert all(map(torch.equal, before, after))


def test_own_copies_are_made_once():
    x, y = torch.rand(2, 3), torch.zeros(2, dtype=torch.long)
    assert inputs("x", x, bounds=UNIT).data_ptr() == x.data_ptr()
    assert inputs("x", x, bounds=UNIT, own=True).data_ptr() != x.data_ptr()
    assert labels("y", y, n=2, own=True).data_ptr() != y.data_ptr()


def test_settings_given_as_lists_and_arrays_are_copied(mlp):
    layers, maturations = ["1"], [SMALL]
    bounds, mean = np.array([[0.0, 1.0]] * 4), np.zeros(4)
    rails, wrapped = RAILS(mlp, layers, bounds=bounds, maturation=maturations), Normalised(mlp, mean, mean + 1)
    attack = attacks.PGD(bounds=bounds)
    layers[0], maturations[0] = "2", Maturation()
    bounds[:], mean[:] = 7, 7
    assert rails.layers == ("1",)
    assert rails.maturations == (SMALL,)
    assert rails.bounds.pairs() == attack.bounds.pairs() == [[0.0, 1.0]] * 4
    assert wrapped.mean.tolist() == [0.0] * 4


def test_an_evaluation_keeps_its_own_images(mlp, examples, monkeypatch):
    spent = {"steps": 2, "iterations": 2, "noise": 2, "queries": 5, "decisions": 1, "evaluations": 2, "checks": 2}
    monkeypatch.setitem(PROTOCOLS, "quick", dataclasses.replace(PROTOCOLS["quick"], **spent))
    x, y = (part[:6].numpy() for part in examples(6, (4,)))
    log = nn.Sequential(mlp, nn.LogSoftmax(1))
    expected = evaluate(log, x.copy(), y.copy(), base=mlp, eps=0.05, black_box=1).rows

    def spoil(text):
        x[:], y[:] = 0, 0

    found = evaluate(log, x, y, base=mlp, eps=0.05, black_box=1, on_progress=spoil).rows
    assert [row.correct for row in found] == [row.correct for row in expected]


def test_attacks_take_arrays_as_they_come(mlp):
    x, y = np.random.default_rng(0).random((3, 4)).astype(np.float32), np.array([0, 1, 2])
    expected = attacks.PGD(iterations=2)(mlp, x, y).adversarials
    for other, wanted in (
        (x[:, ::-1][:, ::-1], y[::-1][::-1]),
        (x.astype(">f4"), y.astype(">i8")),
        (list(x), pd.Series(y)),
    ):
        assert torch.equal(attacks.PGD(iterations=2)(mlp, other, wanted).adversarials, expected)
    starts = np.random.default_rng(1).random((3, 4)).astype(np.float32)
    jump = attacks.HopSkipJump(iterations=1, evaluations=3)
    assert torch.equal(
        jump(mlp, x, y, starts=starts[::-1]).adversarials,
        jump(mlp, x, y, starts=torch.from_numpy(starts[::-1].copy())).adversarials,
    )


class Views(nn.Module):
    """A network that flattens by `view`, which needs contiguous inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 3)

    def forward(self, x):
        return self.fc(x.view(len(x), -1))


@pytest.mark.parametrize(
    "attack",
    [
        attacks.FGSM(),
        attacks.PGD(iterations=1),
        attacks.Square(queries=2),
        attacks.HopSkipJump(iterations=1, evaluations=2),
    ],
)
def test_permuted_images_and_networks_that_view(attack):
    x, y = torch.rand(12, 4, 4, 3).permute(0, 3, 1, 2), torch.arange(12) % 3
    net = Views()
    attack(net, x, y)
    DkNN(net, "fc", neighbours=2).fit(x, y).predict(x)
