import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from immunonet import DkNN
from immunonet.repertoire import Calibration, Repertoire, check_classes, hold_out

X, Y = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2


class Rows(Dataset):
    """A data set of arrays and plain integers."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return X[i].numpy(), int(Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (TensorDataset(X, Y),),
        (Rows(),),
        (Stream(),),
        (DataLoader(TensorDataset(X, Y), batch_size=3),),
        ([(X[:4], Y[:4]), (X[4:], Y[4:])],),
    ],
    ids=["tensors", "dataset", "arrays", "stream", "loader", "list"],
)
def test_examples_come_in_order(data):
    if isinstance(data[0], list):
        data = (DataLoader(TensorDataset(X, Y), batch_sampler=[range(4), range(4, 10)]),)
    x, y = gather(*data)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


class Pictures(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return X[i]


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, None, TypeError, "y is missing: give labels, or a Dataset or DataLoader"),
        (TensorDataset(X, Y), Y, TypeError, "y must be left out when x is a TensorDataset, which holds the labels"),
        (Pictures(), None, TypeError, r"x must yield pairs \(x, y\), got Tensor"),
        (TensorDataset(X, Y, Y), None, TypeError, r"x must yield pairs \(x, y\), got list of 3"),
        (TensorDataset(X[:0], Y[:0]), None, ValueError, "x is empty: a repertoire needs examples of every class"),
    ],
)
def test_bad_examples(x, y, error, message):
    with pytest.raises(error, match=message):
        gather(x, y)


def test_holding_out():
    y = torch.arange(40)
    keep, held = hold_out(y, 0.25, seed=0)
    assert len(held) == 10
    assert sorted(torch.cat([keep, held]).tolist()) == list(range(40))
    assert keep.tolist() == sorted(keep.tolist())
    assert torch.equal(hold_out(y, 0.25, seed=0)[1], held)
    assert not torch.equal(hold_out(y, 0.25, seed=1)[1], held)


@pytest.mark.parametrize(("fraction", "n"), [(0.01, 0), (1.0, 10)])
def test_holding_out_nothing_or_all(fraction, n):
    message = f"calibration={fraction:g} holds out {n} of 10 examples; at least 1 must be held out, and 1 kept"
    with pytest.raises(ValueError, match=message):
        hold_out(Y, fraction, seed=0)


def test_every_class_needs_enough_examples():
    y = torch.tensor([0, 0, 0, 1, 1])
    check_classes(y, 2, 2)
    with pytest.raises(ValueError, match=r"neighbours=3 is more than the 2 examples of class 1 .*use neighbours=2"):
        check_classes(y, 2, 3)
    with pytest.raises(ValueError, match=r"y has no example of class 2 .*each of the model's 3 classes needs 2"):
        check_classes(y, 3, 2)


def test_casts_are_for_the_model():
    kept = Repertoire(X.clone(), Y.clone()).bfloat16().half().to(torch.float64).to("cpu")
    assert torch.equal(kept.x, X)
    assert kept.y.dtype == torch.int64
    assert len(kept) == 10


def test_a_cast_defence_still_answers():
    defence = DkNN(nn.Linear(3, 2), "input", neighbours=3).fit(X, Y, calibration=(X, Y))
    expected = defence.p_values(X)
    defence.bfloat16()
    assert defence.model.weight.dtype == torch.bfloat16
    assert torch.equal(defence.p_values(X), expected)


def test_strangeness_counts_layers_in_their_own_units():
    far = torch.tensor([[1.0, 100.0], [2.0, 300.0], [3.0, 200.0]])
    calibration = Calibration.of(torch.tensor([2, 0, 1]), far)
    assert calibration.label_scores.tolist() == [0, 1, 2]
    assert_close(calibration.scales, torch.tensor([2.0, 200.0]))
    assert_close(calibration.strangeness, torch.tensor([1.0, 2.5, 2.5]))
    # p-values (how many of the 3 are at least as strange, plus 1) / 4: 1/4, 3/4, 1.
    queries = torch.tensor([[3.0, 300.0], [2.0, 200.0], [0.0, 0.0]])
    assert calibration.familiarity(queries).le(0.25).tolist() == [True, False, False]
    assert calibration.familiarity(queries).le(0.75).tolist() == [True, True, False]


def test_identical_calibration_examples_have_no_scale():
    calibration = Calibration.of(torch.zeros(2), torch.zeros(2, 1))
    assert torch.isfinite(calibration.strangeness).all()
    assert calibration.familiarity(torch.tensor([[0.0], [1e-3]])).le(0.4).tolist() == [False, True]


def test_arrays(mlp):
    x, y = np.random.default_rng(0).random((30, 4)), np.arange(30) % 3
    defence = DkNN(mlp, "1", neighbours=5).fit(x, y)
    again = DkNN(mlp, "1", neighbours=5).fit(torch.from_numpy(x).float(), torch.from_numpy(y))
    assert torch.equal(defence.predict(x), again.predict(x.tolist()))
