import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from immunonet import RAILS, DkNN, Maturation, _check, attacks, data, incoming, zoo
from immunonet._check import Bounds
from immunonet.zoo.adversarial import Adversarial


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
        (np.float64(5), {}, TypeError, r"n must be an integer, got np.float64\(5.0\)"),
        (np.bool_(True), {}, TypeError, "n must be an integer, got np.True_"),
        (np.array([5]), {}, TypeError, r"n must be an integer, got array\(\[5\]\)"),
        (torch.tensor([5]), {}, TypeError, r"n must be an integer, got tensor\(\[5\]\)"),
        (torch.tensor(5.0), {}, TypeError, "n must be an integer"),
        (np.timedelta64(5, "ns"), {}, TypeError, "n must be an integer"),
        (np.ma.masked, {}, TypeError, "n must be an integer, got masked"),
        (np.int64(0), {}, ValueError, "n must be at least 1, got 0"),
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
        (10**400, {}, ValueError, "t must be a finite number"),
        (np.float32("nan"), {}, ValueError, "got nan"),
        (np.bool_(False), {}, TypeError, "t must be a number, got np.False_"),
        (np.complex64(1), {}, TypeError, "t must be a number"),
        (np.ma.masked, {}, TypeError, "t must be a number, got masked"),
        (np.ones(1), {}, TypeError, "t must be a number"),
    ],
)
def test_bad_number(value, limits, error, message):
    with pytest.raises(error, match=message):
        _check.number("t", value, **limits)


WHOLE = [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8)]
REAL = [np.float64(0.5), np.float32(0.5), np.float16(0.5), np.longdouble(0.5), np.array(0.5), torch.tensor(0.5)]


@pytest.mark.parametrize("value", WHOLE)
def test_whole_numbers_of_other_libraries(value):
    for found in (_check.integer("n", value), _check.seed("seed", value)):
        assert type(found) is int
        assert found == 5
    assert type(_check.number("t", value)) is float


@pytest.mark.parametrize("value", [*REAL, Fraction(1, 2)])
def test_numbers_of_other_libraries(value):
    for found in (_check.number("t", value), _check.fraction("t", value)):
        assert type(found) is float
        assert found == 0.5


@pytest.mark.parametrize("value", [np.bool_(True), np.array(True), torch.tensor(True)])
def test_truth_values_of_other_libraries(value):
    assert _check.boolean("flag", value) is True


def numpys(settings):
    """Return all settings of a frozen dataclass as NumPy's scalars."""

    def convert(value):
        if isinstance(value, tuple):
            return np.array(value)
        return value if value is None else np.array(value)[()]

    # Bounds as the caller gives them.
    return {
        field.name: np.array((0.0, 1.0)) if field.name == "bounds" else convert(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
    }


@pytest.mark.parametrize(
    "settings",
    [
        attacks.FGSM(),
        attacks.PGD(norm="l2", restarts=2, targeted=True),
        attacks.APGD(loss="dlr", random_start=False),
        attacks.Square(draws=3),
        attacks.HopSkipJump(eps=0.5),
        attacks.Noise(eps=0.1, points=3),
        Adversarial(loss="trades", step=0.01, validation_eps=0.1, ramp=2),
        Maturation.paper(recombination=0.1, candidates=3, prune=0.1, early_stop=2),
        Maturation.authors("mnist"),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_settings_of_numpys_numbers_are_plain_ones(settings):
    given = numpys(settings)
    found = type(settings)(**given)
    assert found == settings
    for name, value in vars(found).items():
        assert type(value) is type(getattr(settings, name)), name
    plain = {name: value.pairs() if isinstance(value, Bounds) else value for name, value in vars(found).items()}
    wanted = {name: value.pairs() if isinstance(value, Bounds) else value for name, value in vars(settings).items()}
    assert json.dumps(plain) == json.dumps(wanted)


def test_numpys_numbers_through_the_package(mlp, examples, tmp_path):
    x, y = examples(60, (4,))
    plain = DkNN(mlp, "1", neighbours=5, false_alarm=0.25).fit(x, y, calibration=0.25)
    found = DkNN(mlp, "1", neighbours=np.int64(5), false_alarm=np.float32(0.25)).fit(x, y, calibration=np.float32(0.25))
    assert torch.equal(found.p_values(x), plain.p_values(x))
    found.save(tmp_path / "dknn")
    small = {"population": np.int64(30), "neighbours": np.int64(5), "generations": np.int64(1)}
    rails = RAILS(mlp, "1", maturation=Maturation(**small), seed=np.int64(1), voice=np.float32(0.5)).fit(x, y)
    rails.save(tmp_path / "rails")
    again = RAILS.load(tmp_path / "rails", mlp)
    assert torch.equal(again.predict(x), rails.predict(x, seed=torch.tensor(1), batch_size=np.int64(60)))
    assert torch.equal(rails.draws(x[:6], np.arange(2))[1], rails.predict(x[:6]))
    assert [len(part) for part in data.split(np.int64(50), np.array(10))] == [40, 10]
    assert zoo.build("digits", classes=np.int64(3))(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_choice_and_boolean():
    assert type(_check.choice("metric", np.str_("cosine"), ("cosine", "euclidean"))) is str
    for value in (["cosine"], np.array(["cosine"]), 1):
        with pytest.raises(ValueError, match="metric must be one of 'cosine', got"):
            _check.choice("metric", value, ("cosine",))
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
        (torch.tensor([0.0, 2.0], requires_grad=True), [[0, 2]]),
        (np.array([2.0, 0.0], ">f8")[::-1], [[0, 2]]),
        ((np.float32(0), np.int64(2)), [[0, 2]]),
        ((torch.tensor(0.0), torch.tensor(2.0)), [[0, 2]]),
        (pd.DataFrame({"low": [0.1, 1.0], "high": [0.7, 3.0]}), [[0.1, 0.7], [1, 3]]),
    ],
)
def test_bounds_read_and_write_pairs(value, pairs):
    bounds = incoming.bounds("bounds", value)
    assert bounds.pairs() == pairs
    assert incoming.bounds("bounds", bounds.pairs()) == bounds


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ab", TypeError, r"bounds must be \(low, high\) or one such pair per channel, got 'ab'"),
        (None, TypeError, "bounds must be"),
        (np.ma.masked_array([0.0, 1.0], mask=[False, True]), TypeError, "bounds must be"),
        (np.array([0, 1j]), TypeError, "bounds must be"),
        (("0", "1"), TypeError, "bounds must be"),
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
        incoming.bounds("bounds", value)


def test_bounds_broadcast_over_the_first_axis_of_a_sample():
    low, high = incoming.bounds("bounds", [(0, 1), (-2, 2)]).tensors(torch.zeros(1), (2, 3, 3))
    assert low.shape == high.shape == (2, 1, 1)
    assert high.flatten().tolist() == [1, 2]
    low, _ = incoming.bounds("bounds", (0.0, 1.0)).tensors(torch.zeros(1, dtype=torch.float64), (2, 3))
    assert low.shape == (1, 1)
    assert low.dtype == torch.float64


@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_bounds_of_another_number_of_channels(shape):
    with pytest.raises(ValueError, match="cell_bounds has 2 pairs, but samples have shape"):
        incoming.bounds("cell_bounds", [(0, 1), (0, 1)]).tensors(torch.zeros(1), shape, name="cell_bounds")
