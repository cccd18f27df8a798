import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from immunonet.normalised import Normalised


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_it_normalises_each_channel(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    found = Normalised(nn.Identity(), mean, std)(x)
    for channel in range(3):
        torch.testing.assert_close(found[:, channel], (x[:, channel] - mean[channel]) / std[channel])


def test_one_number_serves_all_channels():
    x = torch.tensor([[0.5, 1.0]])
    assert Normalised(nn.Identity(), 0.5, 0.25)(x).tolist() == [[0.0, 2.0]]


def test_statistics_are_buffers_of_its_own():
    mean = torch.tensor([1.0])
    net = Normalised(nn.Linear(1, 1), mean, torch.tensor([2.0]))
    mean.zero_()
    assert net.state_dict()["mean"].tolist() == [1.0]
    assert net.double().std.dtype == torch.float64


@pytest.mark.parametrize(
    "mean",
    [np.array([2.0, 1.0])[::-1], np.array([1.0, 2.0], ">f4"), [torch.tensor(1.0), np.float64(2)], pd.Series([1, 2])],
)
def test_statistics_of_other_kinds(mean):
    assert Normalised(nn.Identity(), mean, [1.0, 1.0]).mean.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("model", "mean", "std", "error", "message"),
    [
        (len, 0.0, 1.0, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
        (nn.Identity(), "a", 1.0, TypeError, "mean must be a number or one per channel, got 'a'"),
        (
            nn.Identity(),
            np.ma.masked_array([0.0], mask=[True]),
            1.0,
            TypeError,
            "mean must be a number or one per channel",
        ),
        (nn.Identity(), [], 1.0, ValueError, r"mean must be a finite number or one per channel, got \[\]"),
        (nn.Identity(), [[0.0]], 1.0, ValueError, "mean must be a finite number"),
        (nn.Identity(), 0.0, float("nan"), ValueError, "std must be a finite number"),
        (nn.Identity(), [0.0, 0.0], [1.0], ValueError, "mean and std must have one length, got 2 and 1"),
        (nn.Identity(), 0.0, 0.0, ValueError, "std must be above 0, got 0.0"),
    ],
)
def test_bad_settings(model, mean, std, error, message):
    with pytest.raises(error, match=message):
        Normalised(model, mean, std)


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"mean and std have 3 channels, but x has shape \(1, 2\)"):
        Normalised(nn.Identity(), [0.0] * 3, [1.0] * 3)(torch.zeros(1, 2))
