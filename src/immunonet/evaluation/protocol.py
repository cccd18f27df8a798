"""The evaluation of a defence: what it claims, attacked by who knows it, with checks of the attacks themselves."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check, _store, incoming, models
from immunonet.attacks import NORMS
from immunonet.evaluation import sanity
from immunonet.evaluation.asking import Subject, describe
from immunonet.evaluation.cost import measure
from immunonet.evaluation.identity import identity
from immunonet.evaluation.outcome import Claim, Evaluation, outcome
from immunonet.evaluation.records import VERSION
from immunonet.evaluation.runner import Runner, Trial
from immunonet.evaluation.runner import describe as describe_planned
from immunonet.evaluation.suite import PROTOCOLS, Budget, Planned, afford, seconds_per_call, suite
from immunonet.evaluation.verdict import completed, standing, worst_case

_PROBED = 8
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
    base: nn.Module,
    eps: float,
    norm: str = "linf",
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
    on_progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Attack a defence by all that is known to work, and return its worst case and whether the attacks were sound.

    Attacks transfer from `base` (and `transfer`); know the defence, through surrogates of RAILS and DkNN, through BPDA,
    or through its own gradient; and only ask (noise, Square, HopSkipJump, on a light twin of RAILS). The candidates are
    tested on the defence itself. Of a randomised one, an image's few worst candidates are compared on some draws (10
    in "quick", else 20), and the worst case comes from as many others; rows of single attacks take fewer, except in
    "full". Attacks that only ask pass over images that are broken in all draws for selection already. "quick" is a
    first measurement; "standard" and "full" spend more, and add targeted attacks, EOT and ablations of RAILS.

    Args:
        defence: maps inputs `(B, *S)` to log-probabilities `(B, C)`, a module or any callable; its `predict`, if any,
            gives the labels, a `seed` argument of `predict` or of itself its randomness, and its `bounds`, if
            any, the valid range of inputs, [0, 1] otherwise.
        x: inputs `(n, *S)` within the bounds. y: labels `(n,)`.
        base: the undefended network, inputs to logits `(B, C)`.
        eps: size of the perturbation, >= 0 and at most what the bounds have room for, in units of the input.
        norm: "linf" or "l2".
        protocol: "quick", "standard" or "full".
        minutes: what the evaluation may take. A few answers are timed, and the plan is cut beforehand to fit; None: all
            images.
        black_box: so many images, a random sample, are those of attacks that only ask; None: the protocol's number.
        seed: same seed, same result.
        transfer: further networks like `base`, trained independently.
        dataset, name, base_name: names for the rows; None: the defence's own.
        settings: more of them for the rows (JSON), among them what results depend on and no other argument tells.
        folder: finished attacks are kept there, and the same call continues from them; None: nothing is kept. What is
            kept is keyed by the images, the attacks, and all that can be read of networks and defence (weights,
            settings, repertoire, code); a defence that answers otherwise all the same is a ValueError.
        on_progress: hears of the plan and of every attack.

    Raises:
        ValueError or TypeError that names the argument; also for a defence whose answers are not log-probabilities, or
        that answers none of the first images. OSError where the folder cannot be written to; what was
        finished before is kept.
    """
    transfer = tuple(transfer)
    budget = PROTOCOLS[_check.choice("protocol", protocol, tuple(PROTOCOLS))]
    if minutes is not None:
        minutes = _check.number("minutes", minutes, least=0, above=True)
    if black_box is not None:
        budget = dataclasses.replace(budget, black_box=_check.integer("black_box", black_box))
    seed = _check.integer("seed", seed, least=0, most=2**31)
    norm = _check.choice("norm", norm, tuple(NORMS))
    if not callable(defence):
        raise TypeError(f"defence must be a module or a function of inputs, got {type(defence).__name__}")
    for network in (base, *transfer):
        if not isinstance(network, nn.Module):
            raise TypeError(f"base and transfer must be torch.nn.Modules, got {type(network).__name__}")
    bounds = _bounds(defence)
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    x = incoming.inputs("x", x, bounds=bounds, own=True).to(device)
    y = incoming.labels("y", y, n=len(x), own=True).to(device)
    if not len(x):
        raise ValueError("x must hold at least one input")
    # Where only some images are attacked they are a random sample, whatever order they were given in.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order.to(device)], y[order.to(device)]
    reach = sanity.reach_of(bounds, x, norm)
    eps = _check.number("eps", eps, least=0, most=reach)
    with torch.no_grad():
        classes = models.logits(base, x[:1]).shape[1]
    incoming.labels("y", y, n=len(x), classes=classes)
    subject = Subject(defence, classes=classes)
    subject.check(x)
    varies = subject.varies(x[:_PROBED])
    randomised = subject.seeded or varies
    selection, counted = (tuple(range(i, i + budget.seeds)) if randomised else () for i in (seed, seed + budget.seeds))
    few = min(budget.row_seeds, budget.seeds)
    select, report = (slice(0, few), slice(few, None)) if randomised else (slice(0, 1), slice(0, 1))
    wanted = suite(
        subject, base, transfer, x,
        eps=eps, norm=norm, bounds=bounds, budget=budget, seed=seed, randomised=randomised,
    )  # fmt: skip
    claim = Claim(
        name=name or _name(defence), base_name=base_name, dataset=dataset, protocol=protocol, seed=seed,
        eps=eps, norm=norm, bounds=bounds, told=copy.deepcopy(settings or {}), order=tuple(order.tolist()),
    )  # fmt: skip
    known = {
        "name": claim.name,
        "dataset": dataset,
        "told": claim.told,
        "protocol": protocol,
        "seed": seed,
        "budget": dataclasses.asdict(budget),
        "minutes": minutes,
        "version": VERSION,
        "images": _store.digest([x, y]),
        "networks": [identity(network) for network in (base, *transfer)],
        "defence": {"type": type(defence).__name__, "identity": identity(defence)} | describe(defence),
        "attacks": {attack.name: describe_planned(attack) for attack in wanted},
    }
    path = None if folder is None else Path(folder)
    seeds = (*selection[:few], *counted[:few])
    runner = Runner(subject, base, x, y, seeds=seeds, settings=known, folder=path, told=on_progress)
    _same_answers(runner, x[:_PROBED])
    planned, plan = _afford(wanted, runner, budget, minutes)
    trials = _attack(runner, planned, select, selection)
    found = worst_case(runner, trials, select, finalists=budget.finalists, selection=selection, report=counted)
    strongest = _strongest(trials, select)
    checks, curves = sanity.checks(runner, planned, wanted, trials, strongest, budget, select, report, reach)
    flags = sanity.flags(
        runner, planned, trials, x[:_PROBED], randomised=randomised, repeatable=subject.seeded or not varies
    )
    costs = runner.once("cost", lambda: measure(subject, base, x, seeds))

    return outcome(
        claim, runner, trials, found, checks=checks, flags=flags, select=select, report=report,
        ablations=budget.ablations, record={"randomized": randomised, "plan": plan, "curves": curves, "cost": costs},
    )  # fmt: skip


def _same_answers(runner: Runner, x: Tensor) -> None:
    """Keep the defence's answers to a few inputs, or raise ValueError where others are kept: it changed unseen."""
    if runner.journal is None:
        return

    def ask() -> Tensor:
        runner.subject.rewind()
        with torch.no_grad():
            answer: Tensor = runner.subject(x).exp().cpu()
        return answer

    found = ask()
    if not torch.allclose(found, ask(), atol=_STEADY):
        raise ValueError(
            "folder must be left out: the defence answers at random even under one seed of torch, so that what is kept "
            "there could not be told from the results of another one. Give it an argument `seed`"
        )
    kept = torch.tensor(runner.once("answers to a few inputs", found.tolist), dtype=found.dtype)
    moved = (kept - found).abs().amax(1) > _STEADY
    # A sum in another order may tip a tie.
    if int(moved.sum()) > max(1, len(x) // 8):
        raise ValueError(
            f"{runner.journal.path} holds results of a defence that answered {int(moved.sum())} of {len(x)} inputs "
            "otherwise, though nothing else about it looks changed: give another folder, or remove that file"
        )


def _afford(
    planned: list[Planned], runner: Runner, budget: Budget, minutes: float | None
) -> tuple[list[Planned], dict[str, Any]]:
    """Time a few answers, tell what everything will take, and cut the plan where that is more than allowed."""

    def estimate() -> dict[str, Any]:
        x = runner.x[:_PROBED]
        runner.subject.labels(x[:1], runner.seeds[:1])  # the first call may compile or fill caches
        begun = time.perf_counter()
        alone = runner.subject.labels(x, runner.seeds)[1] / len(x)
        asking = (time.perf_counter() - begun) / len(x)
        timed: dict[int, float] = {}
        seconds = {}
        # Draws for the finalists, for what has fallen, and for the worst case.
        finals = (budget.finalists + 2) * budget.seeds / len(runner.seeds) * asking if runner.seeds else 0.0
        for attack in planned:
            one = finals if attack.method is None else 0.0
            if attack.target is not None:
                if id(attack.target) not in timed:
                    timed[id(attack.target)] = seconds_per_call(attack.target, x, gradient=attack.kind != "black box")
                one = timed[id(attack.target)]
            seconds[attack.name] = one * attack.calls()
        cut = planned if minutes is None else afford(planned, seconds, asking, 60 * minutes / _SLACK)
        return {
            "minutes": minutes,
            "seconds_per_answer": alone,
            "attacks": {
                a.name: {"n": a.n, "calls": a.calls(), "seconds": a.n * (seconds[a.name] + asking)} for a in cut
            },
        }

    plan = runner.once("plan", estimate)
    expected = _SLACK * sum(attack["seconds"] for attack in plan["attacks"].values()) / 60
    runner.told(f"plan for {runner.settings['name']}: about {expected:.1f} minutes")
    for name, attack in plan["attacks"].items():
        runner.told(f"  {name}: {attack['n']} images, {attack['calls']} calls each, about {attack['seconds']:.0f} s")
    return [dataclasses.replace(a, n=plan["attacks"][a.name]["n"]) for a in planned], plan


def _attack(runner: Runner, planned: Sequence[Planned], select: slice, selection: Sequence[int]) -> list[Trial]:
    """Run all attacks: with gradients first, the strongest of them once more with twice the steps, then the others."""
    trials = [runner.run(attack) for attack in planned if not attack.standing]
    strongest = _strongest(trials, select)
    if strongest is not None:
        twice = strongest.attack.with_method(iterations=2 * strongest.attack.method.iterations)
        most = min(strongest.n, _PAIRED)
        trials.append(runner.run(dataclasses.replace(twice, name=strongest.attack.name + sanity.DOUBLED, n=most)))
    alive = standing(runner, trials, select, selection)
    asked = [runner.run(attack, alive) for attack in planned if attack.standing]
    return [*trials, *(completed(trial, trials, select) for trial in asked)]


def _strongest(trials: Sequence[Trial], select: slice) -> Trial | None:
    """Return the iterative attack that left the fewest right; None where there is none."""
    gradient = [trial for trial in trials if not trial.attack.standing and sanity.DOUBLED not in trial.attack.name]
    found = [trial for trial in gradient if hasattr(trial.attack.method, "iterations")]
    return min(found, key=lambda trial: float(trial.correct[select].double().mean()), default=None)


def _bounds(defence: Any) -> _check.Bounds:
    """Return the valid range of a defence's inputs: its own `bounds`, whatever form they have, or [0, 1]."""
    found = getattr(defence, "bounds", None)
    if isinstance(found, _check.Bounds):
        return found
    return incoming.bounds("defence.bounds", (0.0, 1.0) if found is None else found)


def _name(defence: Any) -> str:
    found = getattr(defence, "__name__", None) or type(defence).__name__
    return str(found).strip("<>").lower()
