from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
from acting import ATTACKS, Answers, act, state, unchanged
from models import MODELS, plain
from torch import nn

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
        if value.is_floating_point() and name != "familiarity":
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, other, rtol=0, atol=close * float(other.abs().max()), msg=name)
        else:
            assert torch.equal(value, other), name


CELLS = [(name, action) for name, case in MODELS.items() for action in case.actions]


@pytest.mark.parametrize(("name", "action"), CELLS, ids=[f"{name}-{action}" for name, action in CELLS])
def test_a_model_is_answered_for_as_a_plain_one_or_refused(name: str, action: str) -> None:
    case = MODELS[name]
    torch.manual_seed(0)
    with case.around():
        model = case.make(plain())
        if isinstance(model, nn.Module):
            model.train()
        before = state(model)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if action in case.fails:
                with pytest.raises((TypeError, ValueError, RuntimeError), match=case.fails[action]):
                    act(action, model, case.layers)
            else:
                found = act(action, model, case.layers)
        assert unchanged(before, state(model))
        if action in case.fails:
            return
        said = [str(warning.message) for warning in heard if issubclass(warning.category, UserWarning)]
        if action in case.warns:
            assert [text for text in said if re.match(case.warns[action], text)], said
            return
        assert not said
        make = case.attacked if action in ATTACKS and case.attacked else case.twin
        expected = plainly(action) if make is None else act(action, *with_layers(make(model)))
    compare(found, expected, case.close)
