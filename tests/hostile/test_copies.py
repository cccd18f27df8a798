from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunonet import RAILS, DkNN, attacks

from .acting import ASKED, SMALL, X, Y, state, unchanged
from .models import Around, Plain, Unpicklable, hooked, normed, plain


class Body(nn.Module):
    """A network's features as a layer of one's own."""

    def __init__(self, net: Plain) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.body(x).flatten(1)


FLAVOURS: dict[str, Callable[[Plain], Any]] = {
    "rails": lambda net: RAILS(net, "act2", maturation=SMALL, seed=0),
    "rails, its own noise and voice": lambda net: RAILS(
        net, ["input", "act2:2"], maturation=SMALL, seed=0, shared_noise=False, voice=0.5
    ),
    "rails in a space": lambda net: RAILS(net, ["act1", "act2"], space="act1", maturation=SMALL, seed=0),
    "rails by signatures": lambda net: RAILS(net, "act2", maturation=SMALL, seed=0, memory_budget=12_000),
    "rails in a space, by signatures": lambda net: RAILS(
        net, "act2", space="act1", maturation=SMALL, seed=0, memory_budget=12_000
    ),
    "rails on a module": lambda net: RAILS(net, Body(net), maturation=SMALL, seed=0),
    "dknn": lambda net: DkNN(net, ["act1", "act2"], neighbours=3),
    "dknn on a module": lambda net: DkNN(net, Body(net), neighbours=3),
    "dknn by signatures": lambda net: DkNN(net, "act2", neighbours=3, memory_budget=1000),
    "dknn on the input": lambda net: DkNN(net, "input", neighbours=3),
}


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


def answers(defence: Any) -> list[Tensor]:
    found = [defence(ASKED), defence.familiarity(ASKED), *defence.features(ASKED)]
    if isinstance(defence, RAILS):
        response = defence.respond(ASKED)
        found += [response.labels, response.credibility, response.plasma.x]
    return found


# Both of the others go by way of pickle.
CELLS = [(flavour, way) for i, flavour in enumerate(FLAVOURS) for way in ("deepcopy", ("pickle", "torch.save")[i % 2])]


@pytest.mark.parametrize(("flavour", "way"), CELLS)
def test_a_copy_and_the_original_stand_by_themselves(flavour: str, way: str) -> None:
    net = plain()
    defence = FLAVOURS[flavour](net).fit(X, Y)
    assert "signatures" not in flavour or type(defence.index()).__name__ == "SignatureIndex"
    expected, before = answers(defence), state(net)
    other = WAYS[way](defence)
    assert all(map(torch.equal, answers(other), expected))
    assert unchanged(before, state(net))
    if way == "deepcopy":
        spare = copy.deepcopy(defence)
        with torch.no_grad():
            for tensor in [*spare.parameters(), *spare.buffers()]:
                tensor.zero_()
        assert all(map(torch.equal, answers(defence), expected))
    with torch.no_grad():
        for tensor in [*net.parameters(), *defence.buffers()]:
            tensor.zero_()
    assert all(map(torch.equal, answers(other), expected))
    # A copy is watched for changes as well.
    if defence.layers != ("input",):
        with pytest.raises(ValueError, match="model's weights have changed"):
            defence.predict(ASKED)
        with torch.no_grad():
            other.model.conv1.weight.add_(1)
        with pytest.raises(ValueError, match="model's weights have changed"):
            other.predict(ASKED)


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_surrogates_and_unfitted_defences(way: str) -> None:
    net = plain()
    soft = attacks.SoftNeighbours(FLAVOURS["dknn"](net).fit(X, Y), neighbours=3)
    expected = soft(ASKED)
    other = WAYS[way](soft)
    unfitted = WAYS[way](FLAVOURS["dknn"](net))
    with torch.no_grad():
        net.conv1.weight.zero_()
    assert torch.equal(other(ASKED), expected)
    assert torch.equal(unfitted.fit(X, Y)(ASKED), FLAVOURS["dknn"](plain()).fit(X, Y)(ASKED))


@pytest.mark.parametrize("make", [hooked, lambda net: normed(net), lambda net: net.bfloat16()])
def test_deep_copies_of_strange_networks(make: Callable[[Plain], Any]) -> None:
    net = make(plain())
    defence = DkNN(net, ["act1", "act2"], neighbours=3).fit(X, Y)
    expected = defence(ASKED)
    other = copy.deepcopy(defence)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(other(ASKED), expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_copied_can_be_saved(way: str, tmp_path: Any) -> None:
    net = Unpicklable(plain())
    defence = DkNN(net, "net.act2", neighbours=3).fit(X, Y)
    with pytest.raises((TypeError, pickle.PicklingError), match=r"(?i)can(not|'t) pickle"):
        WAYS[way](defence)
    defence.save(tmp_path)
    assert torch.equal(DkNN.load(tmp_path, net)(ASKED), defence(ASKED))


def test_functions_are_copied_as_they_are() -> None:
    net = plain()
    layer = Around(net, after=lambda found: found)
    defence = DkNN(net, lambda x: layer(x), neighbours=3).fit(X, Y)
    other = copy.deepcopy(defence)
    assert torch.equal(other(ASKED), defence(ASKED))
    with torch.no_grad():
        net.fc.weight.zero_()
    # The function still runs the network that it was made with.
    for thing in (defence, other):
        with pytest.raises(ValueError, match="model's weights have changed"):
            thing.predict(ASKED)
