"""A model whose weights change after fit is found, whatever way they were changed; what changes no answer is not."""

import copy

import pytest
import torch
from torch import nn

from immunonet import RAILS, DkNN, Maturation, attacks

MATURATION = Maturation(population=60, neighbours=5, generations=1)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
        ).eval()


def other_state(net):
    g = torch.Generator().manual_seed(3)
    return {k: torch.rand(v.shape, generator=g) if v.is_floating_point() else v for k, v in net.state_dict().items()}


def through_data(net):
    for parameter in net.parameters():
        parameter.data.copy_(torch.ones_like(parameter) * 0.3)


def trained_on(net):
    x, y = torch.rand(64, 1, 6, 6), torch.arange(64) % 3
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(5):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()


CHANGES = {
    "load_state_dict": lambda net: net.load_state_dict(other_state(net)),
    "assigned": lambda net: net.load_state_dict(other_state(net), assign=True),
    "through .data": through_data,
    ".data replaced": lambda net: setattr(net[1].weight, "data", torch.ones(16, 36)),
    "another parameter": lambda net: setattr(net[1], "weight", nn.Parameter(torch.ones(16, 36))),
    "trained on": trained_on,
    "running statistics": lambda net: net[2].running_mean.fill_(5.0),
    "a layer replaced": lambda net: net.__setitem__(1, nn.Linear(36, 16)),
}


KINDS = ("dknn", "rails", "hidden")
# Every change for every kind, and for both layers ("2" is affine); every kind on both.
CELLS = [(change, kind, "24"[(i + j) % 2]) for i, change in enumerate(CHANGES) for j, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("change", "kind", "layer"), CELLS)
def test_changed_weights_are_an_error_that_says_fit_again(change, kind, layer, images):
    net = network()
    make = {
        "dknn": lambda: DkNN(net, layer, neighbours=5),
        "rails": lambda: RAILS(net, layer, maturation=MATURATION, seed=0),
        "hidden": lambda: RAILS(net, layer, space="1", maturation=MATURATION, seed=0),
    }[kind]
    defence = make().fit(*images)
    before = defence.predict(images[0])
    CHANGES[change](net)
    net.eval()
    with pytest.raises(ValueError, match=r"weights have changed since this defence was fitted.*Call fit again"):
        defence.predict(images[0])
    with pytest.raises(ValueError, match="Call fit again"):
        attacks.SoftNeighbours(defence)
    again = defence.fit(*images)
    assert torch.equal(again.predict(images[0]), make().fit(*images).predict(images[0]))
    assert before.shape == (90,)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net[6].weight.data.zero_(),  # after the layer that is looked at
        lambda net: net.requires_grad_(False),
        lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
        lambda net: net.train(),
        lambda net: net(torch.rand(4, 1, 6, 6)).sum().backward(),
        lambda net: net.double(),
    ],
)
def test_what_changes_no_answer_is_no_error(change, images):
    net = network()
    defence = DkNN(net, "4", neighbours=5).fit(*images)
    before = defence.predict(images[0])
    change(net)
    assert torch.equal(defence.predict(images[0]), before)


def test_a_voice_is_part_of_the_answer(images):
    net = network()
    defence = RAILS(net, "4", maturation=MATURATION, voice=0.5, seed=0).fit(*images)
    net[6].weight.data.mul_(-3)
    with pytest.raises(ValueError, match="Call fit again"):
        defence.predict(images[0])


def test_networks_inside_callable_layers_count(images):
    net, other = network(), network()
    defence = DkNN(net, lambda x: other[:4](x), neighbours=5).fit(*images)
    through_data(other)
    with pytest.raises(ValueError, match="Call fit again"):
        defence.predict(images[0])


def test_the_old_weights_may_come_back(images):
    net = network()
    defence = DkNN(net, "4", neighbours=5).fit(*images)
    before, state = defence.predict(images[0]), copy.deepcopy(net.state_dict())
    through_data(net)
    with pytest.raises(ValueError, match="load the old weights"):
        defence.predict(images[0])
    net.load_state_dict(state)
    assert torch.equal(defence.predict(images[0]), before)
