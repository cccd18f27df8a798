"""The evaluation of a defence: what it claims, attacked by who knows it, with checks of the attacks themselves."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check, _progress, _store, incoming, models
from immunonet._identity import identity
from immunonet.attacks._base import Attack
from immunonet.defences.base import Defence
from immunonet.defences.undefended import Undefended
from immunonet.evaluation import sanity, stream
from immunonet.evaluation.asking import Subject, describe
from immunonet.evaluation.bench import Bench, Value, Workers
from immunonet.evaluation.campaign import Campaign, Claim, Scene
from immunonet.evaluation.draws import Draws
from immunonet.evaluation.outcome import Evaluation, outcome
from immunonet.evaluation.records import VERSION
from immunonet.evaluation.suite import PROTOCOLS, Suite, afford, planned, seconds_per_call
from immunonet.evaluation.threats import Threat, claimed, room
from immunonet.memory.sentinel import Sentinel

# How far probabilities may move before a defence counts as another one.
_STEADY = 0.05
# Images on which an attack is compared with itself at twice the steps.
_PAIRED = 100
# An evaluation takes longer than its attacks and answers alone: checks, curves, costs.
_SLACK = 1.5


def evaluate(
    defence: Callable[[Tensor], Tensor],
    x: Any,
    y: Any,
    *,
    base: nn.Module | None = None,
    eps: float | None = None,
    norm: str = "linf",
    threats: Mapping[str, float] | None = None,
    protocol: str = "quick",
    minutes: float | None = None,
    black_box: int | None = None,
    seed: int = 0,
    transfer: Sequence[nn.Module] = (),
    dataset: str = "unnamed",
    name: str | None = None,
    base_name: str = "base",
    settings: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    attacks: Sequence[Attack] = (),
    sentinel: Sentinel | None = None,
    workers: Workers | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Attack a defence by all that is known to work, and return its worst case and whether the attacks were sound.

    Attacks transfer from `base` (and `transfer`); know the defence, through its surrogates, BPDA, or its own gradient;
    and only ask (noise, Square, HopSkipJump, on its light twin). The candidates are tested on the defence itself. Of a
    randomised one, an image's few worst candidates are compared on some draws (10 in "quick", else 20), and the worst
    case comes from as many others; rows of single attacks take fewer, except in "full". Attacks that only ask pass over
    images that are broken in all draws for selection already. "quick" is a first measurement; "standard" and "full"
    spend more, and add targeted attacks, EOT and ablations.

    Args:
        defence: maps inputs `(B, *S)` to log-probabilities `(B, C)`, a module or any callable; its `predict`, if any,
            gives the labels, a `seed` argument of `predict` or of itself its randomness, and its `bounds`, if any, the
            valid range of inputs, [0, 1] otherwise.
        x: inputs `(n, *S)` within the bounds.
        y: labels `(n,)`.
        base: the undefended network, inputs to logits `(B, C)`; None: the defence's own `model`.
        eps: size of the perturbation, >= 0 and at most what the bounds have room for, in units of the input.
        norm: "linf", "l2" or "l1".
        threats: instead of both, sizes by norm, such as `{"linf": .3, "l2": 2.}`: the attacks are made under each, and
            the verdict is their union, where an image is right if it is so under all.
        protocol: "quick", "standard" or "full".
        minutes: what the evaluation may take, under all threats together. A few answers are timed, and the plan is cut
            beforehand to fit; None: all images.
        black_box: so many images, a random sample, are those of attacks that only ask; None: the protocol's number.
        seed: same seed, same result.
        transfer: further networks like `base`, trained independently.
        dataset: name of the data in the rows.
        name: name of the defence in the rows; None: its own.
        base_name: name of the network in the rows.
        settings: more of them for the rows (JSON), among them what results depend on and no other argument tells.
        folder: finished attacks are kept there, and the same call continues from them; None: nothing is kept. What is
            kept is keyed by the images, the attacks, and all that can be read of networks and defence (weights,
            settings, repertoire, code); a defence that answers otherwise all the same is a ValueError.
        attacks: further attacks, untargeted, within eps of the same norm, or within one of the threats; those that only
            ask are made on the defence's light twin, others on its first surrogate, or if it has none by its own
            gradient, or by BPDA.
        sentinel: who watches what the defence is asked, fitted: the record then tells which attacks that only ask it
            stops, by which ways they pass it, and how often it takes honest queries for an attack. All other rows are
            those of the defence without it.
        workers: who does the parts of the work (see `evaluation.cluster`); None: this process.
        on_progress: hears of the plan and of every attack; None: these lines are printed in terminals and notebooks.

    Raises:
        ValueError or TypeError that names the argument; also for a defence whose answers are not log-probabilities, or
        that answers none of the first images. OSError where the folder cannot be written to; what is there is kept.
    """
    if base is None:
        if not isinstance(own := getattr(defence, "model", None), nn.Module):
            raise TypeError("base must be the undefended network, inputs to logits: the defence has no `model`")
        base = models.inside(own)
    networks, budget = (base, *transfer), PROTOCOLS[_check.choice("protocol", protocol, tuple(PROTOCOLS))]
    if minutes is not None:
        minutes = _check.number("minutes", minutes, least=0, above=True)
    if black_box is not None:
        budget = dataclasses.replace(budget, black_box=_check.integer("black_box", black_box))
    seed = _check.integer("seed", seed, least=0, most=2**31)
    if sentinel is not None and sentinel.threshold is None:
        raise ValueError("sentinel must be fitted: sentinel.fit(clean inputs)")
    if not callable(defence):
        raise TypeError(f"defence must be a module or a function of inputs, got {type(defence).__name__}")
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(f"base and transfer must be torch.nn.Modules, got {type(network).__name__}")
    own = getattr(defence, "bounds", None)
    bounds = incoming.bounds("defence.bounds", (0.0, 1.0) if own is None else own)
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    x = incoming.inputs("x", x, bounds=bounds, own=True).to(device)
    y = incoming.labels("y", y, n=len(x), own=True).to(device)
    if not len(x):
        raise ValueError("x must hold at least one input")
    # Where only some images are attacked they are a random sample, whatever order they were given in.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order.to(device)], y[order.to(device)]
    radii = claimed(eps, norm, threats, lambda name: room(name, bounds, x))
    against = tuple(Threat(eps=radius, norm=name, bounds=bounds, seed=seed) for name, radius in radii.items())
    with torch.no_grad():
        classes = models.logits(base, x[:1]).shape[1]
    incoming.labels("y", y, n=len(x), classes=classes)
    subject = Subject(defence, classes=classes)
    subject.check(x)
    varies = subject.varies(x[: sanity.PROBED])
    randomised = subject.seeded or varies
    draws = Draws.of(seed, budget.seeds, budget.row_seeds) if randomised else Draws()
    suites = [Suite(subject, networks, x, threat, budget, randomised) for threat in against]
    plan = {attack.name: attack for attack in planned(suites, attacks)}
    claim = Claim(
        name=name or _name(defence), base_name=base_name, dataset=dataset, protocol=protocol, threats=against,
        told=copy.deepcopy(settings or {}), order=tuple(order.tolist()),
    )  # fmt: skip
    known = {
        "name": claim.name, "dataset": dataset, "told": claim.told, "protocol": protocol, "seed": seed,
        "budget": dataclasses.asdict(budget), "minutes": minutes, "version": VERSION,
        "images": _store.digest([x, y]),
        "networks": [identity(network) for network in networks],
        "defence": {"type": type(defence).__name__, "identity": identity(defence)} | describe(defence),
        "attacks": {name: attack.told() for name, attack in plan.items()},
        "own": [identity(type(attack), attack) for attack in attacks],
    }  # fmt: skip
    if sentinel is not None:
        known["sentinel"] = stream.identity(sentinel)
    undefended = Subject(Undefended(base), classes=classes)
    scene = Scene(subject=subject, base=undefended, x=x, y=y, plan=plan, seeds=draws.seeds, sentinel=sentinel)
    bench = Bench(scene, None if folder is None else Path(folder), workers=workers)
    campaign = Campaign(claim, bench, known, budget, draws, on_progress or _progress.lines())
    _same_answers(campaign)
    cut = _afford(campaign, minutes)
    campaign.run(_PAIRED)
    cases = campaign.worst_cases()
    checks, curves = sanity.checks(campaign)
    flags = sanity.flags(campaign, randomised=randomised, repeatable=subject.seeded or not varies)
    told = {"randomized": randomised, "plan": cut, "curves": curves}
    if sentinel is not None:
        told["sentinel"] = stream.record(campaign)
    return outcome(campaign, cases, checks, flags, told)


def _same_answers(campaign: Campaign) -> None:
    """Keep the defence's answers to a few inputs, or raise ValueError where others are kept: it changed unseen."""
    folder = campaign.bench.folder
    if folder is None:
        return
    answers = torch.tensor(_answers(campaign.scene))
    if not torch.allclose(answers, torch.tensor(_answers(campaign.scene)), atol=_STEADY):
        raise ValueError(
            "folder must be left out: the defence answers at random even under one seed of torch, so that what is kept "
            "there could not be told from the results of another one. Give it an argument `seed`"
        )
    kept = torch.tensor(campaign.once("answers to a few inputs", _answers), dtype=answers.dtype)
    moved = int(((kept - answers).abs().amax(1) > _STEADY).sum())
    # A sum in another order may tip a tie.
    if moved > max(1, len(answers) // 8):
        raise ValueError(
            f"{folder} holds results of a defence that answered {moved} of {len(answers)} inputs otherwise, though "
            "nothing else about it looks changed: give another folder, or remove that one"
        )


@torch.no_grad()
def _answers(scene: Scene) -> Value:
    scene.subject.rewind()
    return scene.subject(scene.x[: sanity.PROBED]).exp().tolist()


def _afford(campaign: Campaign, minutes: float | None) -> dict[str, Any]:
    """Return the plan, after timing a few answers, and cut the campaign to it where it takes more than is allowed."""
    timed = campaign.once("plan", _timed)
    budget, draws, asking, calls = campaign.budget, campaign.draws, timed["asking"], timed["calls"]
    # Draws for the finalists, for what has fallen, and for the worst case, under every threat.
    further = len(campaign.claim.threats) * (budget.finalists + 2) * budget.seeds
    finals = further / len(draws.seeds) * asking if draws.seeds else 0.0
    seconds = {a.name: a.calls() * calls[a.name] if a.name in calls else finals for a in campaign.wanted}
    if minutes is not None:
        campaign.plan = afford(campaign.wanted, seconds, asking, 60 * minutes / _SLACK)
    attacks = {
        a.name: {"n": a.n, "calls": a.calls(), "seconds": a.n * (seconds[a.name] + asking)} for a in campaign.plan
    }
    expected = _SLACK * sum(attack["seconds"] for attack in attacks.values()) / 60
    campaign.say(f"plan for {campaign.claim.name}: about {expected:.1f} minutes")
    for name, attack in attacks.items():
        campaign.say(f"  {name}: {attack['n']} images, {attack['calls']} calls each, about {attack['seconds']:.0f} s")
    return {"minutes": minutes, "seconds_per_answer": timed["alone"], "attacks": attacks}


def _timed(scene: Scene) -> Value:
    """Return seconds per image: of one answer, of those to a candidate, and of a call of every attack's target."""
    x = scene.x[: sanity.PROBED]
    scene.subject.labels(x[:1], scene.seeds[:1])  # the first call may compile or fill caches
    begun = time.perf_counter()
    alone = scene.subject.labels(x, scene.seeds)[1] / len(x)
    asking = (time.perf_counter() - begun) / len(x)
    each: dict[int, float] = {}
    for attack in scene.plan.values():
        if attack.target is not None and id(attack.target) not in each:
            each[id(attack.target)] = seconds_per_call(attack.target, x, gradient=not attack.asks)
    calls = {name: each[id(a.target)] for name, a in scene.plan.items() if a.target is not None}
    return {"alone": alone, "asking": asking, "calls": calls}


def _name(defence: Any) -> str:
    named = getattr(defence, "__name__", None) or type(defence).__name__
    return defence.kind if isinstance(defence, Defence) else str(named).strip("<>").lower()
