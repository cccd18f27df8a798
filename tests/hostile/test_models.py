from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from .acting import Answers, act, state, unchanged
from .models import ATTACKS, LAYERS, MODELS, plain


@functools.cache
def plainly(action: str) -> Answers:
    """Return what comes out of an action with the plain network."""
    return act(action, *with_layers(plain()))


def with_layers(twin: nn.Module) -> tuple[nn.Module, tuple[str, str]]:
    """Return a plain network in eval mode, and where its two layers are."""
    twin.eval()
    prefix = "net." if any(name == "net.act1" for name, _ in twin.named_modules()) else ""
    return twin, (prefix + "act1", prefix + "act2")


def compare(found: Answers, expected: Answers, close: float) -> None:
    """Labels must be equal, and all else close."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        if name in ("features", "adversarials"):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, other, rtol=0, atol=close * float(other.abs().max()), msg=name)
        else:
            assert torch.equal(value, other), name


def cells() -> Iterator[tuple[str, str]]:
    """Yield models and actions: all that must fail or warn, and of what must come out right a part, in turn.

    All attacks ask through one door, DkNN and RAILS through another, and what is right without a twin is a plain
    network in other clothes.
    """
    for turn, (name, case) in enumerate(MODELS.items()):
        left = {ATTACKS[turn // 2 % 2], ATTACKS[2 + turn // 4 % 2], ATTACKS[4 + turn % 2]}
        left |= {*(("rails", "soft neighbours"), ("dknn",))[turn % 2]}
        if case.twin is None and turn % 2:
            left.add("rails in a space")
        if name == "plain" or case.may or len(case.actions) < len(LAYERS):
            left = set()
        yield from ((name, a) for a in case.actions if a not in left or a in case.fails or a in case.warns)


CELLS = list(cells())


@pytest.mark.parametrize(("name", "action"), CELLS, ids=[f"{name}-{action}" for name, action in CELLS])
def test_a_model_is_answered_for_as_a_plain_one_or_refused(name: str, action: str) -> None:
    case, net = MODELS[name], plain()
    torch.manual_seed(0)
    with case.around(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = case.make(net)
        if isinstance(model, nn.Module):
            model.train()
        before = state(model)
        try:
            found = act(action, model, case.layers)
        except (TypeError, ValueError, RuntimeError) as error:
            said = "\n".join([str(error), *getattr(error, "__notes__", ())])
            assert re.search(case.fails.get(action, case.may or "^$"), said), said
            found = None
        else:
            assert action not in case.fails
        assert unchanged(before, state(model))
        told = "\n".join(text for warning in heard if (text := str(warning.message)).startswith("model "))
        if told or action in case.warns:
            assert re.match(case.warns.get(action, case.may or "^$"), told), told
        elif found is not None:
            same = "rails in a space, unsaved" if action == "rails in a space" else action
            expected = plainly(same) if case.twin is None else act(same, *with_layers(case.twin(model)))
            compare(found, expected, case.close)
