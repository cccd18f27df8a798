"""Whether the attacks of an evaluation were sound: checks that must hold, and flags that a reader should know of.

After Carlini et al. (2019), Athalye et al. (2018), Croce & Hein (2020, AutoAttack's flags) and Croce et al. (2022).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check, models
from immunonet.attacks import FGSM, NORMS
from immunonet.attacks._losses import log_odds
from immunonet.evaluation import statistics
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.records import Check, Flag
from immunonet.evaluation.runner import Runner, Trial
from immunonet.evaluation.suite import Budget, Model, Planned
from immunonet.evaluation.verdict import choose, worst

DOUBLED = " doubled"
# Factors of a network's logits, which change no label.
SCALES = (0.01, 1.0, 100.0)
MULTIPLES = (0.0, 0.25, 0.5, 1.0, 2.0)
_FEW = 5


def checks(
    runner: Runner,
    planned: Sequence[Planned],
    wanted: Sequence[Planned],
    trials: Sequence[Trial],
    strongest: Trial | None,
    budget: Budget,
    select: slice,
    report: slice,
    reach: float,
) -> tuple[list[Check], dict[str, Any]]:
    """Return every check of an evaluation, and the accuracy under growing eps of PGD and the strongest attack.

    `wanted`: the attacks `planned` as they were before a budget in minutes cut them.
    """
    seeds, n = runner.seeds[report], min(budget.checks, len(runner.x))
    found, curves = [eps_zero(runner, planned, seeds[:1]), *scale(runner, planned, n)], {}
    if strongest is not None and strongest.attack.method.eps > 0:
        name = strongest.attack.name
        shown = {attack.name: attack for attack in planned if attack.name in ("pgd", name)}
        curves = {key: curve(runner, attack, n, reach, seeds) for key, attack in shown.items()}
        twice = next(trial for trial in trials if trial.attack.name == name + DOUBLED)
        found += [
            grows(curves[name], name, runner.subject.classes),
            iterative(runner, strongest.attack, n, seeds),
            doubled(strongest, twice, report),
        ]

    def case(kinds: tuple[str, ...], n: int) -> Tensor:
        mine = [trial for trial in trials if trial.attack.kind in kinds]
        return worst(mine, choose(mine, select))[report, :n]

    asked = min((trial.n for trial in trials if trial.attack.standing), default=0)
    if any(trial.attack.kind == "adaptive" for trial in trials):
        alone = case(("none", "adaptive"), len(runner.x))
        together = case(("none", "adaptive", "transfer"), len(runner.x))
        found.append(compared("transfer is no stronger than attacks that know", "transfer", alone, together))
    if asked:
        alone = case(("none", "adaptive", "transfer"), asked)
        together = case(("none", "adaptive", "transfer", "black box"), asked)
        found.append(compared("asking alone is no stronger than gradients", "attacks that ask", alone, together))
    short = [f"{cut.name} {cut.n} of {a.n}" for cut, a in zip(planned, wanted, strict=True) if cut.n < a.n]
    found.append(Check("all planned images were attacked", not short, ", ".join(short) or f"{len(runner.x)} images"))
    return found, curves


def flags(
    runner: Runner,
    planned: Sequence[Planned],
    trials: Sequence[Trial],
    x: Tensor,
    *,
    randomised: bool,
    repeatable: bool,
) -> list[Flag]:
    """Return every flag of an evaluation; `x`: the first of its inputs, on which gradients and logits are looked at."""
    y = runner.y[: len(x)]
    targets = {a.name: a.target for a in planned if not a.standing and a.target is not None}
    distinct = {id(target): name for name, target in targets.items()}
    faults = sum((trial.faults for trial in trials), runner.faults)

    def measure() -> list[dict[str, Any]]:
        found = [
            is_randomised(randomised),
            probabilities(runner.network, x),
            zero_gradients({name: targets[name] for name in distinct.values()}, x, y),
            batch(runner.subject, runner.x, runner.seeds, repeatable),
            steady(runner.network, x),
            agreement(runner.subject, x, runner.seeds, repeatable),
        ]
        return [dataclasses.asdict(flag) for flag in found]

    return [*(Flag(**flag) for flag in runner.once("flags", measure)), failed(faults), outside(trials)]


def eps_zero(runner: Runner, planned: Sequence[Planned], seeds: Sequence[int]) -> Check:
    """Without room to move, every attack must leave the answers as they were."""
    x, y = runner.x[:_FEW], runner.y[:_FEW]

    def measure() -> list[str]:
        clean = runner.subject.labels(x, seeds)[0]
        cheap = {"eps": 0.0, "step": 0.0, "iterations": 2, "restarts": 1, "queries": 5, "points": 1, "evaluations": 2}
        changed = []
        for attack in planned:
            has = {k: v for k, v in cheap.items() if k in vars(attack.method or object)}
            found = attack.with_method(**has)(x, y).adversarials
            if bool((runner.subject.labels(found, seeds)[0] != clean).any()):
                changed.append(attack.name)
        return changed

    changed = runner.once("check eps 0", measure)
    detail = f"{len(planned)} attacks, {len(x)} images" + (f"; changed under {', '.join(changed)}" if changed else "")
    return Check("eps 0 gives the clean answers", not changed, detail)


class _Scaled(models.Asking):
    """A network whose logits are multiplied by a number."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        return models.logits(self.network, x).double() * self.factor


def scale(runner: Runner, planned: Sequence[Planned], n: int) -> list[Check]:
    """An attack must find as much however large the network's logits are: where they stop it, it only looks robust.

    Checked for PGD, if it is planned, on the first n images.
    """
    x, y = runner.x[:n], runner.y[:n]
    attack = next((a for a in planned if a.name == "pgd"), None)
    if attack is None:
        return []

    def measure() -> list[list[bool]]:
        found = [dataclasses.replace(attack, target=_Scaled(runner.network, f))(x, y).adversarials for f in SCALES]
        return [(runner.base.labels(points)[0][0] == y.cpu()).tolist() for points in found]

    right = torch.tensor(runner.once("check scale", measure))
    means = right.double().mean(1).tolist()
    low, high = statistics.interval(right[SCALES.index(1.0)][None])
    points = ", ".join(f"x {factor:g}: {mean:.3f}" for factor, mean in zip(SCALES, means, strict=True))
    detail = f"accuracy of the network under pgd with its logits {points}, {len(x)} images"
    return [Check("the scale of the logits does not matter", all(low <= mean <= high for mean in means), detail)]


def curve(runner: Runner, attack: Planned, n: int, reach: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the defence's accuracy under an attack at growing eps, on the first n images, up to `reach`."""
    x, y = runner.x[:n], runner.y[:n]

    def measure() -> dict[str, Any]:
        eps = sorted({min(attack.method.eps * m, reach) for m in MULTIPLES} | {reach})
        steps = [{"step": e * attack.method.step / attack.method.eps} if _steps(attack) else {} for e in eps]
        right = [
            runner.correct(attack.with_method(eps=e, **step)(x, y).adversarials, y, seeds)
            for e, step in zip(eps, steps, strict=True)
        ]
        return {
            "eps": eps,
            "accuracy": [float(part.double().mean()) for part in right],
            "ci95": [list(statistics.interval(part)) for part in right],
            "n": len(x),
        }

    found: dict[str, Any] = runner.once(f"curve {attack.name}", measure)
    return found


def grows(found: dict[str, Any], attack: str, classes: int) -> Check:
    """The accuracy must fall to chance as eps grows, and never rise by more than its interval."""
    accuracy, intervals = found["accuracy"], found["ci95"]
    rises = [i for i in range(1, len(accuracy)) if accuracy[i] > intervals[i - 1][1]]
    chance = intervals[-1][0] <= 1 / classes
    points = ", ".join(f"{e:.3g}: {a:.3f}" for e, a in zip(found["eps"], accuracy, strict=True))
    detail = f"{attack} on {found['n']} images, accuracy at eps {points}"
    return Check("accuracy falls to chance as eps grows, without rising", chance and not rises, detail)


def iterative(runner: Runner, attack: Planned, n: int, seeds: Sequence[int]) -> Check:
    """An attack of many steps must not do worse than one step on the same model, within the interval."""
    x, y = runner.x[:n], runner.y[:n]
    method = attack.method
    single = FGSM(eps=method.eps, norm=method.norm, bounds=method.bounds)

    def measure() -> list[list[list[bool]]]:
        one = single(attack.target, x, y).adversarials  # type: ignore[arg-type]
        return [runner.correct(found, y, seeds).tolist() for found in (one, attack(x, y).adversarials)]

    one, many = (torch.tensor(part) for part in runner.once(f"check steps {attack.name}", measure))
    passed = float(many.double().mean()) <= statistics.interval(one)[1]
    means = [float(part.double().mean()) for part in (many, one)]
    detail = f"accuracy {means[0]:.3f} under {attack.name}, {means[1]:.3f} under one step, {len(x)} images"
    return Check("many steps are at least as strong as one", passed, detail)


def doubled(once: Trial, twice: Trial, part: slice) -> Check:
    """Twice the iterations must not move the accuracy out of its interval, on the same images."""
    n = min(once.n, twice.n)
    before, after = once.correct[part, :n], twice.correct[part, :n]
    low, high = statistics.interval(before)
    mean = float(after.double().mean())
    p = statistics.mcnemar(before[0], after[0])
    detail = (
        f"{once.attack.name} on {n} images: {float(before.double().mean()):.3f} ({low:.3f} to {high:.3f}), "
        f"with twice the iterations {mean:.3f}; McNemar p = {p:.2g}; the lower one counts"
    )
    return Check("twice the iterations change nothing beyond the interval", low <= mean <= high, detail)


def compared(name: str, weaker: str, alone: Tensor, together: Tensor) -> Check:
    """What should be the weaker attacks must not lower the worst case of the stronger ones beyond its interval.

    `alone`, `together` `(R, n)`: right in the worst case of the stronger ones, and of both.
    """
    _, high = statistics.interval(together)
    mean, both = (float(part.double().mean()) for part in (alone, together))
    detail = f"worst case {mean:.3f} without {weaker}, {both:.3f} with them, {alone.shape[1]} images"
    return Check(name, mean <= high, detail)


def is_randomised(found: bool) -> Flag:
    """Say whether answers are random."""
    return Flag("randomised", found, "answers depend on a seed" if found else "the same answers each time", False)


def probabilities(base: nn.Module, x: Tensor) -> Flag:
    """Losses on probabilities instead of logits have vanishing gradients."""
    with torch.no_grad():
        found = models.are_probabilities(models.logits(base, x[:_FEW]))
    return Flag("probabilities for logits", found, "the base network's outputs sum to 1" if found else "logits")


def zero_gradients(targets: dict[str, Model], x: Tensor, y: Tensor) -> Flag:
    """A gradient of exactly zero leaves nothing to climb: robustness would be an illusion."""
    zero: dict[str, int] = {}
    for name, target in targets.items():
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_odds(models.logits(target, point), y).sum(), point)
        zero[name] = int((gradient.flatten(1) == 0).all(1).sum())
    bad = [f"{name}: {count} of {len(x)}" for name, count in zero.items() if count]
    return Flag("zero gradients", bool(bad), "; ".join(bad) or f"none in {len(x)} images on {', '.join(zero)}")


def batch(subject: Subject, x: Tensor, seeds: Sequence[int], repeatable: bool) -> Flag:
    """An answer must not depend on what else is in the batch."""
    name = "depends on the batch"
    if not repeatable:
        return Flag(name, False, "not tested: the answers are random and take no seed")
    x = x[:16]
    together = subject.labels(x, seeds[:1])[0][0]
    backwards = subject.labels(x.flip(0), seeds[:1])[0][0].flip(0)
    alone = torch.cat([subject.labels(part, seeds[:1])[0][0] for part in x.split(1)])
    differing = int(((together != alone) | (together != backwards)).sum())
    # A sum that is computed in another order may tip an answer on the edge, no more.
    return Flag(name, differing > max(1, len(x) // 16), f"{differing} of {len(x)} answers differ alone or in reverse")


def steady(base: nn.Module, x: Tensor) -> Flag:
    """A network whose answers change by themselves, or with the batch, cannot be attacked by what it said before."""
    wrong = models.unsteady(functools.partial(models.logits, base), x)
    return Flag("the network is unsteady", wrong is not None, f"it {wrong}" if wrong else "the same answers each time")


def agreement(subject: Subject, x: Tensor, seeds: Sequence[int], repeatable: bool) -> Flag:
    """Attacks follow the log-probabilities, and labels are counted: where they differ attacks aim beside the mark."""
    name = "labels are not those of the log-probabilities"
    if not repeatable:
        return Flag(name, False, "not tested: the answers are random and take no seed")
    asked = Subject(subject.defence, classes=subject.classes, fixed=seeds[0] if seeds else 0)
    with torch.no_grad():
        differing = int((asked(x).argmax(1).cpu() != asked.labels(x, seeds[:1])[0][0]).sum())
    return Flag(name, differing > len(x) // 8, f"{differing} of {len(x)} answers differ")


def failed(faults: Counter[str]) -> Flag:
    """Inputs without an answer count as wrong, which is not what was to be measured."""
    detail = "; ".join(f"{count} times {what}" for what, count in faults.most_common(3))
    return Flag("inputs without an answer", bool(faults), detail or "none")


def outside(trials: Sequence[Trial]) -> Flag:
    """An attack that leaves the threat model tests something else; such points were left out."""
    bad = [f"{t.attack.name}: {t.outside}" for t in trials if t.outside and "hop" not in t.attack.name]
    return Flag("points outside the threat model", bool(bad), "; ".join(bad) or "none")


def reach_of(bounds: _check.Bounds, x: Tensor, norm: str) -> float:
    """Return the size of the largest perturbation that the bounds have room for."""
    low, high = bounds.tensors(x, x.shape[1:])
    return NORMS[norm].reach((high - low).double().expand(x.shape[1:]))


def _steps(attack: Planned) -> bool:
    return hasattr(attack.method, "step") and attack.method.eps > 0
