"""Whether the attacks of a campaign were sound: checks that must hold, and flags that a reader should know of.

After Carlini et al. (2019), Athalye et al. (2018), Croce & Hein (2020, AutoAttack's flags) and Croce et al. (2022).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import models, statistics
from immunonet.attacks import FGSM
from immunonet.attacks._base import Attack
from immunonet.attacks._losses import log_odds
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.bench import Value
from immunonet.evaluation.campaign import Campaign, Scene, Trial, worst
from immunonet.evaluation.draws import share
from immunonet.evaluation.records import Check, Flag
from immunonet.evaluation.threats import Threat, held

# Factors of a network's logits, which change no label.
SCALES = (0.01, 1.0, 100.0)
MULTIPLES = (0.0, 0.25, 0.5, 1.0, 2.0)
# Inputs on which gradients, logits and answers are looked at.
PROBED = 8
_FEW = 5
_UNTESTED = "not tested: the answers are random and take no seed"


def checks(campaign: Campaign) -> tuple[list[Check], dict[str, Any]]:
    """Return every check of a campaign, and the accuracy under growing eps of PGD and the strongest attack.

    Those under one of several threats have its norm before their names.
    """
    claim, found = campaign.claim, list[Check]()
    curves: dict[str, Any] = {}
    for threat in claim.threats:
        own, drawn = _of_threat(campaign, threat)
        found += [dataclasses.replace(check, name=claim.titled(check.name, threat, ": ")) for check in own]
        curves |= drawn
    found += filter(None, (holds(campaign, *pair) for pair in itertools.permutations(claim.threats, 2)))
    pairs = zip(campaign.plan, campaign.wanted, strict=True)
    short = [f"{cut.name} {cut.n} of {whole.n}" for cut, whole in pairs if cut.n < whole.n]
    told = ", ".join(short) or f"{len(campaign.scene.y)} images"
    return [*found, Check("all planned images were attacked", not short, told)], curves


def _of_threat(campaign: Campaign, threat: Threat) -> tuple[list[Check], dict[str, Any]]:
    """Return the checks of the attacks under one threat, and their curves."""
    trials, draws, strongest = campaign.under(threat), campaign.draws, campaign.strongest(threat)
    found, curves = [eps_zero(campaign, threat), *scale(campaign, threat)], dict[str, Any]()
    if strongest is not None and strongest.attack.method is not None and strongest.attack.method.eps:
        name, mine = strongest.attack.name, (a for a in campaign.plan if a.within(threat))
        curves = {a.name: curve(campaign, a.name, threat) for a in mine if a.short == "pgd" or a.name == name}
        twice = next(trial for trial in trials if "doubled" in trial.attack.roles)
        found += [grows(curves[name], name, campaign.scene.subject.classes), iterative(campaign, strongest)]
        found.append(doubled(strongest, twice, draws.counted))

    def case(roles: set[str], n: int) -> Tensor:
        mine = [trial for trial in trials if not trial.attack.roles or trial.attack.roles & roles]
        return draws.counted(worst(mine, draws))[:, :n]

    knowing, gradient = {"adaptive"}, {"adaptive", "transfer"}
    if any("adaptive" in trial.attack.roles for trial in trials):
        alone, both = (case(roles, len(campaign.scene.y)) for roles in (knowing, gradient))
        found.append(compared("transfer is no stronger than attacks that know", "transfer", alone, both))
    if asked := min((trial.n for trial in trials if trial.attack.asks), default=0):
        alone, both = (case(roles, asked) for roles in (gradient, gradient | {"asks"}))
        found.append(compared("asking alone is no stronger than gradients", "attacks that ask", alone, both))
    return found, curves


def flags(campaign: Campaign, *, randomised: bool, repeatable: bool) -> list[Flag]:
    """Return every flag of a campaign; `repeatable`: whether its defence answers alike under one seed."""
    measured = [Flag(**flag) for flag in campaign.once("flags", _flags, repeatable)]
    told = "answers depend on a seed" if randomised else "the same answers each time"
    faults = sum((trial.faults for trial in campaign.trials), campaign.faults)
    return [Flag("randomised", randomised, told, serious=False), *measured, failed(faults), outside(campaign.trials)]


def _flags(scene: Scene, repeatable: bool) -> Value:
    x = scene.x[:PROBED]
    # Of attacks on the same target, the last one names it.
    named = {id(a.target): a for a in scene.plan.values() if not a.asks and a.target is not None}
    found = [
        probabilities(scene.network, x),
        zero_gradients({attack.short: attack.target for attack in named.values()}, x, scene.y[:PROBED]),
        batch(scene.subject, scene.x, scene.seeds, repeatable),
        steady(scene.network, x),
        agreement(scene.subject, x, scene.seeds, repeatable),
    ]
    return [dataclasses.asdict(flag) for flag in found]


def eps_zero(campaign: Campaign, threat: Threat) -> Check:
    """Without room to move, every attack under a threat must leave the answers as they were."""
    names = [attack.name for attack in campaign.wanted if attack.within(threat)]
    key = campaign.claim.titled("check eps 0", threat)
    changed = campaign.once(key, _eps_zero, names, campaign.draws.counting[:1])
    told = f"{len(names)} attacks, {min(_FEW, len(campaign.scene.y))} images"
    told += f"; changed under {', '.join(changed)}" if changed else ""
    return Check("eps 0 gives the clean answers", not changed, told)


def _eps_zero(scene: Scene, names: list[str], seeds: tuple[int, ...]) -> Value:
    x, y = scene.x[:_FEW], scene.y[:_FEW]
    clean, changed = scene.subject.labels(x, seeds)[0], []
    for attack in map(scene.plan.__getitem__, names):
        still = attack.by(None if attack.method is None else attack.method.cheapest().resized(0.0))
        if not torch.equal(scene.subject.labels(still(x, y).adversarials, seeds)[0], clean):
            changed.append(attack.name)
    return changed


def _scaled(network: nn.Module, factor: float, x: Tensor) -> Tensor:
    return models.logits(network, x).double() * factor


def scale(campaign: Campaign, threat: Threat) -> list[Check]:
    """An attack must find as much however large the network's logits are: where they stop it, it only looks robust.

    Checked for PGD, if it is planned.
    """
    pgd = next((a.name for a in campaign.wanted if a.short == "pgd" and a.within(threat)), None)
    if pgd is None:
        return []
    key = campaign.claim.titled("check scale", threat)
    right = torch.tensor(campaign.once(key, _scale, pgd, campaign.budget.checks))
    means = right.double().mean(1).tolist()
    low, high = statistics.interval(right[SCALES.index(1.0)][None])
    points = ", ".join(f"x {factor:g}: {mean:.3f}" for factor, mean in zip(SCALES, means, strict=True))
    detail = f"accuracy of the network under pgd with its logits {points}, {right.shape[1]} images"
    return [Check("the scale of the logits does not matter", all(low <= mean <= high for mean in means), detail)]


def _scale(scene: Scene, name: str, n: int) -> Value:
    x, y, attack = scene.x[:n], scene.y[:n], scene.plan[name]
    targets = [functools.partial(_scaled, scene.network, factor) for factor in SCALES]
    points = [dataclasses.replace(attack, target=target)(x, y).adversarials for target in targets]
    return [(scene.base.labels(one)[0][0] == y.cpu()).tolist() for one in points]


def curve(campaign: Campaign, name: str, threat: Threat) -> dict[str, Any]:
    """Return the defence's accuracy under an attack at growing eps, on a few images, up to what the bounds allow."""
    reach = threat.reach(campaign.scene.x)
    eps = sorted({min(threat.eps * m, reach) for m in MULTIPLES} | {reach})
    method = campaign.scene.plan[name].method
    assert method is not None
    right = _right(campaign, f"curve {name} {eps}", name, [method.resized(e) for e in eps])
    intervals = [list(statistics.interval(part)) for part in right]
    return {"eps": eps, "accuracy": [share(part) for part in right], "ci95": intervals, "n": right.shape[2]}


def _right(campaign: Campaign, key: str, name: str, methods: list[Attack]) -> Tensor:
    """Return whether the defence is right under a planned attack by each of some methods, `(methods, R, n)`."""
    budget, draws = campaign.budget, campaign.draws
    return torch.tensor(campaign.once(key, _under, name, methods, budget.checks, draws.counting))


def _under(scene: Scene, name: str, methods: list[Attack], n: int, seeds: tuple[int, ...]) -> Value:
    x, y, attack = scene.x[:n], scene.y[:n], scene.plan[name]
    points = [attack.by(method)(x, y).adversarials for method in methods]
    return [(scene.subject.labels(one, seeds)[0] == y.cpu()).tolist() for one in points]


def grows(found: dict[str, Any], attack: str, classes: int) -> Check:
    """The accuracy must fall to chance as eps grows, and never rise by more than its interval."""
    accuracy, intervals = found["accuracy"], found["ci95"]
    rises = [i for i in range(1, len(accuracy)) if accuracy[i] > intervals[i - 1][1]]
    chance = intervals[-1][0] <= 1 / classes
    points = ", ".join(f"{e:.3g}: {a:.3f}" for e, a in zip(found["eps"], accuracy, strict=True))
    detail = f"{attack} on {found['n']} images, accuracy at eps {points}"
    return Check("accuracy falls to chance as eps grows, without rising", chance and not rises, detail)


def iterative(campaign: Campaign, strongest: Trial) -> Check:
    """An attack of many steps must not do worse than one step on the same model, within the interval."""
    name, method = strongest.attack.name, strongest.attack.method
    assert method is not None
    assert method.eps is not None
    single = FGSM(eps=method.eps, norm=method.norm, bounds=method.bounds)
    one, many = _right(campaign, f"check steps {name}", name, [single, method])
    detail = f"accuracy {share(many):.3f} under {name}, {share(one):.3f} under one step, {one.shape[1]} images"
    return Check("many steps are at least as strong as one", share(many) <= statistics.interval(one)[1], detail)


def doubled(once: Trial, twice: Trial, counted: Any) -> Check:
    """Twice the iterations must not move the accuracy out of its interval, on the same images."""
    n = min(once.n, twice.n)
    before, after = (counted(trial.correct)[:, :n] for trial in (once, twice))
    low, high = statistics.interval(before)
    p = statistics.mcnemar(before[0], after[0])
    detail = (
        f"{once.attack.name} on {n} images: {share(before):.3f} ({low:.3f} to {high:.3f}), "
        f"with twice the iterations {share(after):.3f}; McNemar p = {p:.2g}; the lower one counts"
    )
    return Check("twice the iterations change nothing beyond the interval", low <= share(after) <= high, detail)


def holds(campaign: Campaign, outer: Threat, inner: Threat) -> Check | None:
    """Attacks in a ball must find what those in any ball inside of it do, within the interval; None if none is there.

    Where the ball of `outer` holds that of `inner`, their worst cases are compared. Else the strongest attack of
    `inner` is made again, on a few images, in the largest ball of its norm that the other holds, and compared with the
    strongest of `outer` on the same images.
    """
    strongest, other = campaign.strongest(outer), campaign.strongest(inner)
    radius = held(outer, inner.norm, campaign.scene.x[0].numel())
    if strongest is None or other is None or other.attack.method is None or not (radius and inner.eps):
        return None
    if radius >= inner.eps:
        radius, draws = inner.eps, campaign.draws
        mine, theirs = (draws.counted(worst(campaign.under(threat), draws)) for threat in (outer, inner))
        who = "the worst case", "the worst case"
    else:
        name, key = other.attack.name, f"check {outer.norm} holds {inner.norm}"
        (theirs,) = _right(campaign, f"{key} {name} {radius}", name, [other.attack.method.resized(radius)])
        mine, who = campaign.draws.counted(strongest.correct), (strongest.attack.short, other.attack.short)
    n = min(mine.shape[1], theirs.shape[1])
    mine, theirs = mine[:, :n], theirs[:, :n]
    detail = (
        f"accuracy {share(mine):.3f} under {who[0]} within {outer.norm} {outer.eps:.3g}, {share(theirs):.3f} under "
        f"{who[1]} within {inner.norm} {radius:.3g}, which lies inside, {n} images"
    )
    name = f"{outer.norm}: attacks find what those in the {inner.norm} ball inside find"
    return Check(name, share(mine) <= statistics.interval(theirs)[1], detail)


def compared(name: str, weaker: str, alone: Tensor, together: Tensor) -> Check:
    """What should be the weaker attacks must not lower the worst case of the stronger ones beyond its interval.

    `alone`, `together` `(R, n)`: right in the worst case of the stronger ones, and of both.
    """
    detail = f"worst case {share(alone):.3f} without {weaker}, {share(together):.3f} with them, {alone.shape[1]} images"
    return Check(name, share(alone) <= statistics.interval(together)[1], detail)


def probabilities(base: nn.Module, x: Tensor) -> Flag:
    """Losses on probabilities instead of logits have vanishing gradients."""
    with torch.no_grad():
        found = models.are_probabilities(models.logits(base, x[:_FEW]))
    return Flag("probabilities for logits", found, "the base network's outputs sum to 1" if found else "logits")


def zero_gradients(targets: dict[str, Any], x: Tensor, y: Tensor) -> Flag:
    """A gradient of exactly zero leaves nothing to climb: robustness would be an illusion."""
    bad = []
    for name, target in targets.items():
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_odds(models.logits(target, point), y).sum(), point)
        if count := int((gradient.flatten(1) == 0).all(1).sum()):
            bad.append(f"{name}: {count} of {len(x)}")
    return Flag("zero gradients", bool(bad), "; ".join(bad) or f"none in {len(x)} images on {', '.join(targets)}")


def batch(subject: Subject, x: Tensor, seeds: Sequence[int], repeatable: bool) -> Flag:
    """An answer must not depend on what else is in the batch."""
    name, x = "depends on the batch", x[:16]
    if not repeatable:
        return Flag(name, False, _UNTESTED)
    together, backwards, *alone = (subject.labels(part, seeds[:1])[0][0] for part in (x, x.flip(0), *x.split(1)))
    differing = int(((together != torch.cat(alone)) | (together != backwards.flip(0))).sum())
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
        return Flag(name, False, _UNTESTED)
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
    bounded = [trial for trial in trials if trial.attack.method is not None and trial.attack.method.bounded]
    bad = [f"{trial.attack.name}: {trial.outside}" for trial in bounded if trial.outside]
    return Flag("points outside the threat model", bool(bad), "; ".join(bad) or "none")
