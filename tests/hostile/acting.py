"""What is done with a model: fitting, saving, attacking and evaluating, all small; what comes out is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from immunonet import RAILS, DkNN, Maturation, attacks, evaluate
from immunonet.evaluation import sanity
from immunonet.evaluation.suite import PROTOCOLS, Budget

from .models import images

SMALL = Maturation(population=18, neighbours=3, generations=1)
TINY = Budget(
    images=6, iterations=2, restarts=1, black_box=2, queries=3, averaged=1, decisions=1, evaluations=3, noise=2,
    draws=(), row_seeds=1, seeds=1, finalists=1, checks=2, targets=0, ablations=False, steps=2,
)  # fmt: skip


X, Y = images(30)
ASKED, LABELS = images(6, seed=1)

Answers = dict[str, Tensor]


def dknn(model: Any, layers: tuple[str, str]) -> Answers:
    found = DkNN(model, list(layers), neighbours=3).fit(X, Y)
    return {
        "features": torch.cat(found.features(ASKED), 1),
        "labels": found.predict(ASKED),
        "argmax": found(ASKED).argmax(1),
        "familiarity": found.familiarity(ASKED),
    }


def responded(rails: RAILS) -> Answers:
    answer = rails.respond(ASKED)
    return {"features": torch.cat(rails.features(ASKED), 1), "labels": answer.labels, "foreign": answer.foreign}


def rails(model: Any, layers: tuple[str, str]) -> Answers:
    fitted = RAILS(model, layers[1], maturation=SMALL, seed=0).fit(X, Y)
    return responded(fitted) | {"predict": fitted.predict(ASKED)}


def unsaved(model: Any, layers: tuple[str, str]) -> Answers:
    return responded(RAILS(model, layers[1], space=layers[0], maturation=SMALL, seed=0).fit(X, Y))


def rails_in_a_space(model: Any, layers: tuple[str, str]) -> Answers:
    """Return how it responds when it is read again; the labels are those of before."""
    fitted = RAILS(model, layers[1], space=layers[0], maturation=SMALL, seed=0).fit(X, Y)
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(folder)
        loaded = RAILS.load(folder, model)
    found = responded(loaded)
    assert torch.equal(found["labels"], fitted.predict(ASKED))
    return found


def attacked(attack: Any, model: Any) -> Answers:
    found = attack(model, ASKED, LABELS)
    return {"adversarials": found.adversarials, "success": found.success}


def soft_neighbours(model: Any, layers: tuple[str, str]) -> Answers:
    fitted = DkNN(model, list(layers), neighbours=3).fit(X, Y)
    attack = attacks.PGD(eps=0.1, step=0.05, iterations=2, random_start=False)
    return attacked(attack, attacks.SoftNeighbours(fitted, neighbours=3))


def evaluated(model: Any, layers: tuple[str, str]) -> Answers:
    return evaluated_rows(DkNN(model, layers[1], neighbours=3).fit(X, Y), ASKED, LABELS, base=model, eps=0.1)


def evaluated_rows(defence: Any, x: Any, y: Any, **settings: Any) -> Answers:
    """Return how many images each row of a tiny evaluation counts as right; no answer may have failed."""
    # The checks of an evaluation make as many attacks again.
    with mock.patch.dict(PROTOCOLS, quick=TINY), mock.patch.object(sanity, "checks", return_value=([], {})):
        found = evaluate(defence, x, y, **settings)
    return {f"{row.defence} under {row.attack}": torch.tensor(row.correct, dtype=torch.float64) for row in found.rows}


ATTACKS: dict[str, Any] = {
    "fgsm": attacks.FGSM(eps=0.1),
    "pgd": attacks.PGD(eps=0.1, step=0.05, iterations=2),
    "apgd ce": attacks.APGD(eps=0.1, iterations=2, loss="ce"),
    "apgd dlr": attacks.APGD(eps=0.1, iterations=2, loss="dlr"),
    "square": attacks.Square(eps=0.2, queries=4),
    "hopskipjump": attacks.HopSkipJump(iterations=1, evaluations=4),
}
DEFENCES: dict[str, Callable[[Any, tuple[str, str]], Answers]] = {
    "dknn": dknn,
    "rails": rails,
    "rails in a space": rails_in_a_space,
    "rails in a space, unsaved": unsaved,
    "soft neighbours": soft_neighbours,
    "evaluate": evaluated,
}


def act(action: str, model: Any, layers: tuple[str, str]) -> Answers:
    """Return what comes out of an action; what it was given must be as before, bit for bit."""
    given = X.clone(), Y.clone(), ASKED.clone(), LABELS.clone()
    try:
        if action in ATTACKS:
            return attacked(ATTACKS[action], model)
        return DEFENCES[action](model, layers)
    finally:
        assert all(map(torch.equal, given, (X, Y, ASKED, LABELS)))


def networks(model: Any, *others: Any) -> Iterator[nn.Module]:
    """Yield every module there is, in models and in what they hold, looked for without the help of the package."""
    seen: set[int] = set()
    left = [model, *others]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            yield thing
            left += list(thing.children())
        left += [m for m in vars(thing).values() if isinstance(m, nn.Module)] if hasattr(thing, "__dict__") else []
        left += [*(getattr(thing, "__defaults__", None) or ()), *getattr(thing, "args", ())]
        left += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        left += [getattr(thing, "__self__", None), getattr(thing, "func", None)]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: Any) -> list[Any]:
    """Return all of a model that must be as before: modes, hooks, weights, and that there are no gradients."""
    found: list[Any] = []
    for module in networks(model):
        hooks = [list(getattr(module, name)) for name in HOOKS if not isinstance(module, torch.jit.ScriptModule)]
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        uninitialised = any(isinstance(t, nn.parameter.UninitializedParameter) for t in tensors)
        assert all(p.grad is None for p in module.parameters(recurse=False))
        values = None if uninitialised or not tensors else [(t.dtype, t.detach().clone()) for t in tensors]
        found.append((module, module.training, None if "Lazy" in type(module).__name__ else hooks, values))
    return found


def unchanged(before: list[Any], after: list[Any]) -> bool:
    """Return whether two states of a model are one; what had no values yet may have some."""
    if len(before) != len(after):
        return False
    for (module, training, hooks, values), (other, mode, others, now) in zip(before, after, strict=True):
        if module is not other or training != mode or (hooks is not None and hooks != others):
            return False
        if values is not None:
            for (dtype, value), (other_dtype, other_value) in zip(values, now, strict=True):
                if dtype != other_dtype or not torch.equal(value, other_value):
                    return False
    return True
