import math

import numpy as np
import pytest
import torch

from immunonet import _check
from immunonet._check import Bounds

UNIT = Bounds.of("bounds", (0.0, 1.0))


@pytest.mark.parametrize(("value", "limits"), [(1, {}), (0, {"least": 0}), (5, {"most": 5}), (-3, {"least": -3})])
def test_integer_in_range(value, limits):
    assert _check.integer("n", value, **limits) == value


@pytest.mark.parametrize(
    ("value", "limits", "error", "message"),
    [
        (0, {}, ValueError, "n must be at least 1, got 0"),
        (6, {"most": 5}, ValueError, "n must be at least 1 and at most 5, got 6"),
        (1.0, {}, TypeError, "n must be an integer, got 1.0"),
        (True, {}, TypeError, "n must be an integer, got True"),
        ("1", {}, TypeError, "n must be an integer, got '1'"),
        (None, {}, TypeError, "n must be an integer, got None"),
    ],
)
def test_bad_integer(value, limits, error, message):
    with pytest.raises(error, match=message):
        _check.integer("n", value, **limits)


def test_number_is_a_float():
    assert isinstance(_check.number("t", 2), float)
    assert _check.number("t", 0, least=0, most=1) == 0
    assert _check.number("t", 1, least=0, most=1, above=True) == 1
    assert _check.number("t", 0, least=0, most=1, below=True) == 0


@pytest.mark.parametrize(
    ("value", "limits", "error", "message"),
    [
        (0, {"least": 0, "above": True}, ValueError, r"t must be a finite number in \(0, inf\], got 0"),
        (1, {"least": 0, "most": 1, "below": True}, ValueError, r"t must be a finite number in \[0, 1\), got 1"),
        (1.5, {"least": 0, "most": 1}, ValueError, r"t must be a finite number in \[0, 1\], got 1.5"),
        (-0.1, {"least": 0}, ValueError, "got -0.1"),
        (math.nan, {}, ValueError, "t must be a finite number in .*, got nan"),
        (math.inf, {}, ValueError, "got inf"),
        (-math.inf, {}, ValueError, "got -inf"),
        (False, {}, TypeError, "t must be a number, got False"),
        ("0", {}, TypeError, "t must be a number, got '0'"),
    ],
)
def test_bad_number(value, limits, error, message):
    with pytest.raises(error, match=message):
        _check.number("t", value, **limits)


def test_choice_and_boolean():
    assert _check.choice("metric", "cosine", ("cosine", "euclidean")) == "cosine"
    assert _check.boolean("flag", False) is False
    with pytest.raises(ValueError, match="metric must be one of 'cosine', 'euclidean', got 'l2'"):
        _check.choice("metric", "l2", ("cosine", "euclidean"))
    with pytest.raises(TypeError, match="flag must be True or False, got 1"):
        _check.boolean("flag", 1)


def test_seed():
    assert _check.seed("seed", None) is None
    assert _check.seed("seed", 2**63 - 1) == 2**63 - 1
    with pytest.raises(ValueError, match="seed must be at least 0"):
        _check.seed("seed", -1)
    with pytest.raises(ValueError, match="seed must be"):
        _check.seed("seed", 2**63)


@pytest.mark.parametrize(
    ("value", "pairs"),
    [
        ((0, 1), [[0, 1]]),
        ([(-1, 1), (0, 5)], [[-1, 1], [0, 5]]),
        (np.array([[0.0, 2.0]]), [[0, 2]]),
        (torch.tensor([[0.0, 2.0], [1.0, 3.0]]), [[0, 2], [1, 3]]),
    ],
)
def test_bounds_read_and_write_pairs(value, pairs):
    bounds = Bounds.of("bounds", value)
    assert bounds.pairs() == pairs
    assert Bounds.of("bounds", bounds.pairs()) == bounds


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ab", TypeError, r"bounds must be \(low, high\) or one such pair per channel, got 'ab'"),
        (None, TypeError, "bounds must be"),
        ((0, 1, 2), ValueError, "bounds must be .low, high. or one such pair"),
        (1.0, ValueError, "bounds must be"),
        ([], ValueError, "bounds must be"),
        (torch.zeros(0, 2), ValueError, "bounds must be"),
        ((1, 0), ValueError, r"bounds must be finite with low < high, got \(1, 0\)"),
        ((0, 0), ValueError, "low < high"),
        ((0, math.inf), ValueError, "finite"),
        ((math.nan, 1), ValueError, "finite"),
    ],
)
def test_bad_bounds(value, error, message):
    with pytest.raises(error, match=message):
        Bounds.of("bounds", value)


def test_bounds_broadcast_over_the_first_axis_of_a_sample():
    low, high = Bounds.of("bounds", [(0, 1), (-2, 2)]).tensors(torch.zeros(1), (2, 3, 3))
    assert low.shape == high.shape == (2, 1, 1)
    assert high.flatten().tolist() == [1, 2]
    low, _ = UNIT.tensors(torch.zeros(1, dtype=torch.float64), (2, 3))
    assert low.shape == (1, 1)
    assert low.dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_bounds_of_another_number_of_channels(shape):
    with pytest.raises(ValueError, match="cell_bounds has 2 pairs, but samples have shape"):
        Bounds.of("cell_bounds", [(0, 1), (0, 1)]).tensors(torch.zeros(1), shape, name="cell_bounds")


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
    found = _check.inputs("x", value, bounds=UNIT, shape=(2,))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.as_tensor(value).float())


def test_inputs_are_cut_off_the_graph():
    assert not _check.inputs("x", torch.rand(1, 2, requires_grad=True), bounds=UNIT).requires_grad


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor([[1.1, 0.0]]), ValueError, r"x must lie within bounds=\(0.0, 1.0\), got values in \[0, 1.1\]"),
        (torch.tensor([[-0.1, 0.0]]), ValueError, r"wrap it: immunonet.Normalised\(model, mean, std\)"),
        (torch.tensor([[1 + 1e-5, 0.0]]), ValueError, "x must lie within bounds"),
        (torch.tensor([[math.nan, 0.0]]), ValueError, "x must be finite, got 1 NaN or infinite values"),
        (torch.tensor([[math.inf, math.nan]]), ValueError, "x must be finite, got 2"),
        (torch.zeros(1, 3), ValueError, r"x must have shape \(B, 2\), got \(1, 3\)"),
        (torch.zeros(2), ValueError, r"x must have shape \(B, \*S\) with no empty axis, got \(2,\)"),
        (torch.zeros(1, 0), ValueError, "no empty axis"),
        (torch.zeros(1, 2, dtype=torch.uint8), TypeError, r"floating dtype, got torch.uint8.*x.float\(\) / 255"),
        (torch.zeros(1, 2, dtype=torch.bool), TypeError, "floating dtype, got torch.bool"),
        ("image", TypeError, "x must be a tensor or an array of numbers, got str"),
        ([[0.0], [0.0, 1.0]], TypeError, "x must be a tensor or an array of numbers, got list"),
        (np.array([None, "a"]), TypeError, "x must be a tensor or an array of numbers, got ndarray"),
    ],
)
def test_bad_inputs(value, error, message):
    with pytest.raises(error, match=message):
        _check.inputs("x", value, bounds=UNIT, shape=(2,))


def test_inputs_out_of_the_bounds_of_one_channel():
    bounds = Bounds.of("bounds", [(0, 1), (0, 100)])
    _check.inputs("x", torch.tensor([[1.0, 99.0]]), bounds=bounds)
    with pytest.raises(ValueError, match="x must lie within bounds=2 pairs"):
        _check.inputs("x", torch.tensor([[2.0, 99.0]]), bounds=bounds)
    with pytest.raises(ValueError, match="bounds has 2 pairs, but samples have shape"):
        _check.inputs("x", torch.zeros(1, 3), bounds=bounds)


@pytest.mark.parametrize("value", [[0, 2], np.array([0, 2], dtype=np.uint8), torch.tensor([0, 2], dtype=torch.int32)])
def test_labels_come_back_as_int64(value):
    found = _check.labels("y", value, n=2, classes=3)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 2]


def test_no_labels_for_no_inputs():
    assert _check.labels("y", torch.zeros(0, dtype=torch.long), n=0).tolist() == []


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "y must have an integer dtype, got torch.float32"),
        ([True, False], TypeError, "y must have an integer dtype, got torch.bool"),
        ([0], ValueError, r"y must have shape \(2,\), one label per input, got \(1,\)"),
        ([[0, 1]], ValueError, r"y must have shape \(2,\)"),
        ([0, 3], ValueError, r"y must be in 0 to 2, the model's 3 classes, got values in \[0, 3\]"),
        ([-1, 0], ValueError, r"y must be in 0 to 2.*got values in \[-1, 0\]"),
        (["cat", "dog"], TypeError, "y must be a tensor or an array of numbers, got list"),
    ],
)
def test_bad_labels(value, error, message):
    with pytest.raises(error, match=message):
        _check.labels("y", value, n=2, classes=3)


def test_labels_below_zero_of_unknown_classes():
    with pytest.raises(ValueError, match=r"y must be in 0, got values in \[-2, 0\]"):
        _check.labels("y", [0, -2], n=2)
