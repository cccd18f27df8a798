from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunonet import RAILS, DkNN, Maturation, attacks

from .acting import Answers, evaluated_rows
from .models import images, plain
from .sources import ACTIONS, SOURCES, Source, bits

SMALL = Maturation(population=18, neighbours=3, generations=1)


def net(source: Source) -> nn.Module:
    """Return a network on inputs `(B, 36)` in the units of a source."""
    scale = Units(source.times, source.plus)
    return nn.Sequential(scale, nn.Unflatten(1, (1, 6, 6)), plain()).eval()


class Units(nn.Module):
    def __init__(self, times: float, plus: float) -> None:
        super().__init__()
        self.times, self.plus = times, plus

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.plus) / self.times


def examples(source: Source, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = images(n, seed)
    return (x.flatten(1) * 64).round() / 64 * source.times + source.plus, y


@functools.cache
def fitted(times: float, plus: float, bounds: Any) -> tuple[DkNN, RAILS]:
    """Return defences fitted with plain tensors."""
    source = Source(lambda x, y: (x, y), times=times, plus=plus, bounds=bounds)
    return defences(source, *[examples(source, 30, 0)] * 2)


def defences(source: Source, given: tuple[Any, ...], again: tuple[Any, ...]) -> tuple[DkNN, RAILS]:
    model = net(source)
    return (
        DkNN(model, "2.act2", neighbours=3, bounds=source.bounds).fit(*given),
        RAILS(model, ["input", "2.act2"], maturation=SMALL, bounds=source.bounds, seed=0).fit(*again),
    )


def act(action: str, source: Source, given: tuple[Any, ...]) -> Answers:
    """Return what comes of an action with what was given for 30 examples to fit on, or for 6 inputs to ask about."""
    eps = 0.1 * source.times
    dknn, rails = fitted(source.times, source.plus, source.bounds)
    if action == "fit":
        x, _ = examples(source, 6, 1)
        # A stream is used up by the first.
        dknn, rails = defences(source, given, source.make(*examples(source, 30, 0)))
        return {
            "repertoire": dknn.repertoire.x,
            "labels": dknn.predict(x),
            "p-values": dknn.p_values(x),
            "votes": rails.predict_proba(x),
        }
    if action == "predict":
        return {"dknn": dknn(given[0]), "rails": rails(given[0]), "familiarity": rails.familiarity(given[0])}
    if action == "attack":
        attack = attacks.PGD(eps=eps, step=eps / 2, iterations=2, bounds=source.bounds)
        return {"adversarials": attack(net(source), *given).adversarials}
    if action == "ask":
        found = attacks.Square(eps=eps, queries=3, bounds=source.bounds)(net(source), *given)
        jumped = attacks.HopSkipJump(iterations=1, evaluations=3, bounds=source.bounds)(net(source), *given)
        return {"square": found.adversarials, "hopskipjump": jumped.adversarials}
    return evaluated_rows(dknn, *given, base=dknn.model, eps=eps)


def taken(source: Source) -> tuple[str, ...]:
    found = ("fit", "predict") if source.holds else tuple(a for a in ACTIONS if a != "predict" or not source.labels)
    return (*found, "evaluate") if source.evaluated else found


@functools.cache
def plainly(action: str, times: float, plus: float, bounds: Any) -> Answers:
    source = Source(lambda x, y: (x, y), times=times, plus=plus, bounds=bounds)
    return act(action, source, examples(source, *((30, 0) if action == "fit" else (6, 1))))


def cells() -> Iterator[tuple[str, str]]:
    """Yield sources and actions: what is right comes to every attack by one way, so that of two one is enough."""
    for turn, (name, source) in enumerate(SOURCES.items()):
        left = ("attack", "ask")[turn % 2] if source.fails is None else None
        yield from ((name, action) for action in taken(source) if action != left)


CELLS = list(cells())


@pytest.mark.parametrize(("name", "action"), CELLS, ids=[f"{name}-{action}" for name, action in CELLS])
def test_data_come_out_as_plain_tensors_do_or_are_refused(name: str, action: str) -> None:
    source = SOURCES[name]
    given = source.make(*examples(source, *((30, 0) if action == "fit" else (6, 1))))
    before = bits(given)
    if (failure := source.failure(action)) is not None:
        with pytest.raises((TypeError, ValueError), match=failure):
            act(action, source, given)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = act(action, source, given)
        if source.fails is None or source.holds:
            expected = plainly(action, source.times, source.plus, source.bounds)
            assert found.keys() == expected.keys()
            for key, value in found.items():
                assert torch.equal(value, expected[key]), key
    assert bits(given) == before


# --- What should not matter


def answered(x: Tensor, y: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Return labels by DkNN and by RAILS without chance, fitted with examples, calibrated on others."""
    given = {"calibration": tuple(part for part in plain_examples(18, 2))}
    still = Maturation(population=3 * neighbours, neighbours=neighbours, generations=0, mutation_rate=0.0, alignment=0)
    asked, _ = plain_examples(24, 1)
    model = net(SOURCES["float32 tensors"])
    dknn = DkNN(model, "2.act2", neighbours=neighbours).fit(x, y, **given)
    rails = RAILS(model, "2.act2", maturation=still, seed=0).fit(x, y, **given)
    return dknn.predict(asked), rails.predict(asked)


def plain_examples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return examples(SOURCES["float32 tensors"], n, seed)


@pytest.mark.parametrize(
    "order", [lambda y: y.argsort(), lambda y: y.argsort(descending=True), lambda y: torch.arange(len(y)).flip(0)]
)
def test_the_order_of_examples_does_not_matter(order: Any) -> None:
    x, y = plain_examples(30, 0)
    places = order(y)
    assert all(map(torch.equal, answered(x[places], y[places]), answered(x, y)))


def test_a_repertoire_twice_over_counts_twice_as_many_neighbours() -> None:
    x, y = plain_examples(30, 0)
    assert torch.equal(answered(torch.cat([x, x]), torch.cat([y, y]), 6)[0], answered(x, y)[0])


def test_a_single_input_is_answered_as_it_is_among_others() -> None:
    x, _ = plain_examples(6, 1)
    for defence in fitted(1.0, 0.0, (0.0, 1.0)):
        assert torch.equal(torch.cat([defence.predict(row) for row in x.split(1)]), defence.predict(x))
