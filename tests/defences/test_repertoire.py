import pytest
import torch
from torch import nn
from torch.testing import assert_close

from immunonet import DkNN
from immunonet.defences.repertoire import Calibration, Repertoire, check_classes, hold_out

X, Y = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2


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
    calibration = Calibration.scored(torch.tensor([2, 0, 1]), far)
    assert calibration.label_scores.tolist() == [0, 1, 2]
    assert_close(calibration.scales, torch.tensor([2.0, 200.0]))
    assert_close(calibration.strangeness, torch.tensor([1.0, 2.5, 2.5]))
    # p-values (how many of the 3 are at least as strange, plus 1) / 4: 1/4, 3/4, 1.
    queries = torch.tensor([[3.0, 300.0], [2.0, 200.0], [0.0, 0.0]])
    assert calibration.familiarity(queries).le(0.25).tolist() == [True, False, False]
    assert calibration.familiarity(queries).le(0.75).tolist() == [True, True, False]


def test_identical_calibration_examples_have_no_scale():
    calibration = Calibration.scored(torch.zeros(2), torch.zeros(2, 1))
    assert torch.isfinite(calibration.strangeness).all()
    assert calibration.familiarity(torch.tensor([[0.0], [1e-3]])).le(0.4).tolist() == [False, True]
