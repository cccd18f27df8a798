"""The evaluation of a defence: attacks, sanity checks, and the worst case as verdict."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check, _store
from immunonet.attacks import FGSM, PGD, SoftNeighbours
from immunonet.attacks._base import logits_of
from immunonet.defence import Defence
from immunonet.evaluation.page import page
from immunonet.evaluation.records import Check, Row, envelope
from immunonet.features import evaluating

PROTOCOLS = ("quick", "standard", "full")
RUNS = 5
CHUNK = 100

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`.

    `rows`: the base network (`defence` "base") and the defence under every attack. `verdict`: the defence's
    row of `attack` "worst": in each run an image counts as right only if it was right under all attacks and
    without any. `checks`: if one failed, the figures say nothing about robustness.
    """

    rows: tuple[Row, ...]
    verdict: Row
    checks: tuple[Check, ...]

    def to_json(self, path: str | Path) -> None:
        """Write rows, the verdict as the last of them, and the checks to `path`, whole or not at all."""
        record = envelope([row.to_json() for row in (*self.rows, self.verdict)])
        _store.write_json(path, record | {"checks": [dataclasses.asdict(check) for check in self.checks]})

    def to_html(self, path: str | Path) -> None:
        """Write a plain page, verdict first, to `path`, whole or not at all."""
        _store.write_text(path, page(self.rows, self.verdict, self.checks))


@dataclass(frozen=True)
class _Attack:
    """An attack by name, what it knows, and the model it runs on (None: it leaves inputs as they are)."""

    name: str
    knows: str
    method: FGSM | PGD | None = None
    target: Model | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return x if self.method is None or self.target is None else self.method(self.target, x, y).adversarials

    def describe(self) -> dict[str, Any]:
        return describe_attack(self.method) | describe_surrogate(self.target)

    def at(self, eps: float) -> _Attack:
        return (
            self if self.method is None else dataclasses.replace(self, method=dataclasses.replace(self.method, eps=eps))
        )


def evaluate(
    defence: nn.Module,
    x: Any,
    y: Any,
    *,
    base: nn.Module,
    eps: float,
    norm: str = "linf",
    protocol: str = "quick",
    minutes: float | None = None,
    seed: int = 0,
    dataset: str = "unnamed",
) -> Evaluation:
    """Attack a defence, and return how often it was right, its worst case, and whether the attacks were sound.

    "quick" (a first measurement, not a claim of robustness): clean; FGSM and PGD (20 steps of eps / 4, no random
    start) transferred from `base`; for RAILS and DkNN, PGD on `SoftNeighbours` at their layers. A defence with
    `predict(x, seed=...)` is asked under five seeds, from `seed` on.

    Args:
        defence: maps inputs `(B, *S)` to log-probabilities `(B, C)`; its `predict`, if any, gives the labels, and
            its `bounds`, if any, are the valid range of inputs, [0, 1] otherwise.
        x: inputs `(n, *S)` within the bounds. y: labels `(n,)`.
        base: the undefended network, inputs to logits `(B, C)`.
        eps: size of the perturbation, >= 0, in units of the input and of `norm` ("linf" or "l2").
        minutes: after so long no further images are begun; None: all. At least 100 are evaluated, or all.
        dataset: a name for the rows.

    Raises:
        ValueError or TypeError that names the argument; also for the protocols "standard" and "full", which are
        not built yet, and for a defence whose answers are not log-probabilities.
    """
    _check.choice("protocol", protocol, PROTOCOLS)
    if protocol != "quick":
        raise ValueError(f"protocol={protocol!r} is not built yet: use 'quick'")
    if minutes is not None:
        _check.number("minutes", minutes, least=0, above=True)
    _check.integer("seed", seed, least=0)
    bounds = getattr(defence, "bounds", None) or _check.Bounds.of("bounds", (0.0, 1.0))
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    x = _check.inputs("x", x, bounds=bounds).to(device)
    y = _check.labels("y", y, n=len(x)).to(device)
    if not len(x):
        raise ValueError("x must hold at least one input")
    with torch.no_grad(), evaluating(base):
        classes = logits_of(base, x[:1]).shape[1]
    _check.labels("y", y, n=len(x), classes=classes)
    _check_answers(defence, x[:2], classes)
    attacks = _quick(defence, base, eps, norm, bounds)
    seeds = tuple(range(seed, seed + RUNS)) if is_randomised(defence) else ()

    tally: dict[tuple[str, str], list[Tensor]] = {}
    seconds: dict[tuple[str, str], float] = dict.fromkeys(
        ((d, a.name) for d in ("base", "defence") for a in attacks), 0.0
    )
    begun, done = time.perf_counter(), 0
    while done < len(x) and not (done and minutes and time.perf_counter() - begun > 60 * minutes):
        part = slice(done, done + CHUNK)
        for attack in attacks:
            adversarials = attack(x[part], y[part])
            for name, model, under in (("base", base, ()), ("defence", defence, seeds)):
                labels, taken = answers(model, adversarials, under)
                tally.setdefault((name, attack.name), []).append(labels == y[part].cpu())
                seconds[name, attack.name] += taken
        done += len(x[part])

    correct = {key: torch.cat(parts, 1) for key, parts in tally.items()}
    whole = {"model": type(base).__name__, "slice": [0, done], "protocol": protocol, "seed": seed}
    fields: dict[str, Any] = {"dataset": dataset, "norm": norm}
    own: dict[str, dict[str, Any]] = {
        "base": {"defence": "base", "seeds": (), "settings": whole | {"layers": []}},
        "defence": {"defence": type(defence).__name__.lower(), "seeds": seeds, "settings": whole | describe(defence)},
    }
    rows = [
        Row.of(
            correct[who, attack.name],
            **fields | own[who] | {"settings": own[who]["settings"] | attack.describe()},
            attack=attack.name,
            knows=attack.knows,
            eps=eps if attack.method else 0.0,
            seconds_per_image=seconds[who, attack.name] / done,
        )
        for who in own
        for attack in attacks
    ]
    verdict = Row.of(
        torch.stack([correct["defence", attack.name] for attack in attacks]).all(0),
        **fields | own["defence"] | {"settings": own["defence"]["settings"] | {"attacks": [a.name for a in attacks]}},
        attack="worst",
        knows=attacks[-1].knows,
        eps=eps,
        seconds_per_image=sum(seconds["defence", attack.name] for attack in attacks) / done / len(attacks),
    )
    checks = [
        _eps_zero(defence, x[:CHUNK], y[:CHUNK], attacks, seeds[:1]),
        _iterative(correct["base", "fgsm"], correct["base", "pgd"]),
        Check("all images were evaluated", done == len(x), f"{done} of {len(x)}"),
    ]
    return Evaluation(tuple(rows), verdict, tuple(checks))


def is_randomised(defence: nn.Module) -> bool:
    """Return whether `defence` has a `predict` that takes a seed."""
    predict = getattr(defence, "predict", None)
    return predict is not None and "seed" in inspect.signature(predict).parameters


@torch.no_grad()
def answers(model: nn.Module, x: Tensor, seeds: Sequence[int] = ()) -> tuple[Tensor, float]:
    """Return labels `(R, B)` on the CPU, one run per seed or one in all, and the seconds that a run took.

    They come from `model.predict`, or else are the largest of what it returns in eval mode.
    """
    begun = time.perf_counter()
    with evaluating(model):
        if seeds:
            runs = [model.predict(x, seed=seed).cpu() for seed in seeds]  # type: ignore[operator]
        else:
            runs = [(model.predict(x) if hasattr(model, "predict") else model(x).argmax(1)).cpu()]  # type: ignore[operator]
    return torch.stack(runs), (time.perf_counter() - begun) / len(runs)


def describe(defence: nn.Module) -> dict[str, Any]:
    """Return a defence's hyper-parameters, `layers` among them, for the settings of a row."""
    if not isinstance(defence, Defence):
        return {"layers": []}
    return {"layers": list(defence.layers), "false_alarm": defence.false_alarm} | defence._settings()


def describe_attack(attack: FGSM | PGD | None) -> dict[str, Any]:
    """Return an attack's hyper-parameters for the settings of a row."""
    return {} if attack is None else {"attack": vars(attack) | {"bounds": attack.bounds.pairs()}}


def describe_surrogate(target: object) -> dict[str, Any]:
    """Return the hyper-parameters of `SoftNeighbours` for the settings of a row; none of another model."""
    if not isinstance(target, SoftNeighbours):
        return {}
    return {"surrogate": {"neighbours": target.neighbours, "temperatures": target.temperatures}}


def _quick(defence: nn.Module, base: nn.Module, eps: float, norm: str, bounds: _check.Bounds) -> list[_Attack]:
    pgd = PGD(eps=eps, step=eps / 4, iterations=20, norm=norm, bounds=bounds, random_start=False)
    attacks = [
        _Attack("none", "base"),
        _Attack("fgsm", "base", FGSM(eps=eps, norm=norm, bounds=bounds), base),
        _Attack("pgd", "base", pgd, base),
    ]
    if isinstance(defence, Defence):
        attacks.append(_Attack("soft-knn", "defence", pgd, SoftNeighbours(defence)))
    return attacks


@torch.no_grad()
def _check_answers(defence: nn.Module, x: Tensor, classes: int) -> None:
    with evaluating(defence):
        found = defence(x)
    if not isinstance(found, Tensor) or tuple(found.shape) != (len(x), classes):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"defence must return log-probabilities ({len(x)}, {classes}) like base, got {shape}")
    total = found.double().exp().sum(1)
    if not bool(torch.isfinite(found).all()) or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ValueError(
            f"defence must return finite log-probabilities, got sums {total.tolist()}: end a network with log_softmax"
        )


def _eps_zero(defence: nn.Module, x: Tensor, y: Tensor, attacks: list[_Attack], seeds: Sequence[int]) -> Check:
    clean, _ = answers(defence, x, seeds)
    changed = sum(int((answers(defence, attack.at(0.0)(x, y), seeds)[0] != clean).sum()) for attack in attacks)
    return Check("eps 0 gives the clean answers", changed == 0, f"{changed} of {len(x) * len(attacks)} answers changed")


def _iterative(single: Tensor, iterated: Tensor) -> Check:
    one, many = (float(part.double().mean()) for part in (single, iterated))
    return Check("PGD is at least as strong as FGSM on base", many <= one, f"accuracy {many:.3f} and {one:.3f}")
