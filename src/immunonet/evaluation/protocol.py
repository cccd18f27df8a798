"""The evaluation of a defence: what it claims, attacked by who knows it, with checks of the attacks themselves."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check, _store
from immunonet.attacks._base import logits_of
from immunonet.attacks._norms import NORMS
from immunonet.evaluation import sanity
from immunonet.evaluation.asking import (
    Subject,
    answers,
    describe,
    describe_attack,
    describe_surrogate,
    is_randomised,
)
from immunonet.evaluation.cost import measure, without
from immunonet.evaluation.records import Check, Flag, Row, envelope
from immunonet.evaluation.runner import Runner, Trial
from immunonet.evaluation.runner import describe as describe_planned
from immunonet.evaluation.suite import PROTOCOLS, Budget, Planned, afford, seconds_per_call, suite
from immunonet.evaluation.verdict import candidates, choose, completed, per_example, standing, summary, worst
from immunonet.features import evaluating
from immunonet.rails import RAILS

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "answers",
    "describe",
    "describe_attack",
    "describe_surrogate",
    "evaluate",
    "is_randomised",
]

DOUBLED = " doubled"
_SHOWN = 12
_PROBED = 8
# Images on which an attack is compared with itself at twice the steps.
_PAIRED = 100
# An evaluation takes longer than its attacks and answers alone: checks, curves, costs.
_SLACK = 1.5


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """An image that an attack broke: `clean` and `adversarial` `(*S)`, labels `truth` and `answer`, the `attack`."""

    clean: Tensor
    adversarial: Tensor
    truth: int
    answer: int
    attack: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of `evaluate`.

    `rows`: the base network (`defence` is `base_name`) and the defence under every attack. `verdict`, `base_verdict`:
    their rows of `attack` "worst-case": per image the worst of all attacks, chosen on selection draws and counted on
    others. `checks`: what must hold of sound attacks; `flags`: what to know. If a check failed or a serious flag was
    raised the figures are `unreliable`. `ablations`: rows of RAILS less one of its parts, on the same candidates.
    `record`: what else stands in the JSON. `gallery`: some images that were broken.
    """

    rows: tuple[Row, ...]
    verdict: Row
    base_verdict: Row
    checks: tuple[Check, ...]
    flags: tuple[Flag, ...]
    ablations: tuple[Row, ...]
    record: dict[str, Any]
    gallery: tuple[Specimen, ...] = ()

    @property
    def unreliable(self) -> bool:
        """Whether a check failed or a serious flag was raised."""
        return not all(check.passed for check in self.checks) or any(f.raised and f.serious for f in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: results (verdicts last), environment, command, checks, flags, and the record."""
        rows = [row.to_json() for row in (*self.rows, self.base_verdict, self.verdict)]
        return envelope(rows) | {
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "flags": [dataclasses.asdict(flag) for flag in self.flags],
            "unreliable": self.unreliable,
            "ablations": [row.to_json() for row in self.ablations],
            **self.record,
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` to `path`, whole or not at all."""
        _store.write_json(path, self.to_dict())

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page, verdict first, to `path`, whole or not at all. Needs `immunonet[report]`."""
        from immunonet.evaluation.page import page

        _store.write_text(path, page(self))


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
    tested on the defence itself: those of each image are compared on some draws of a randomised defence (5 in
    "quick", else 20), and what is reported comes from as many others. Attacks that only ask pass over images that
    are broken in all selection draws already. "quick" is a first measurement; "standard" and "full" spend more, and
    add targeted attacks, EOT and ablations of RAILS.

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
        seed: same seed, same result.
        transfer: further networks like `base`, trained independently.
        dataset, name, base_name: names for the rows; None: the defence's own.
        settings: more of them for the rows (JSON), among them what results depend on and no other argument tells.
        folder: finished attacks are kept there, and the same call continues from them; None: nothing is kept.
        on_progress: hears of the plan and of every attack.

    Raises:
        ValueError or TypeError that names the argument; also for a defence whose answers are not log-probabilities, or
        that answers none of the first images. OSError where the folder cannot be written to; what was
        finished before is kept.
    """
    budget = PROTOCOLS[_check.choice("protocol", protocol, tuple(PROTOCOLS))]
    if minutes is not None:
        _check.number("minutes", minutes, least=0, above=True)
    _check.integer("seed", seed, least=0, most=2**31)
    _check.choice("norm", norm, NORMS)
    if not callable(defence):
        raise TypeError(f"defence must be a module or a function of inputs, got {type(defence).__name__}")
    for network in (base, *transfer):
        if not isinstance(network, nn.Module):
            raise TypeError(f"base and transfer must be torch.nn.Modules, got {type(network).__name__}")
    bounds = getattr(defence, "bounds", None) or _check.Bounds.of("bounds", (0.0, 1.0))
    device = next((parameter.device for parameter in base.parameters()), torch.device("cpu"))
    x = _check.inputs("x", x, bounds=bounds).to(device)
    y = _check.labels("y", y, n=len(x)).to(device)
    if not len(x):
        raise ValueError("x must hold at least one input")
    reach = sanity.reach_of(bounds, x, norm)
    _check.number("eps", eps, least=0, most=reach)
    with torch.no_grad(), evaluating(base):
        classes = logits_of(base, x[:1]).shape[1]
    _check.labels("y", y, n=len(x), classes=classes)
    subject = Subject(defence, classes=classes)
    subject.check(x)
    varies = subject.varies(x[:_PROBED])
    randomised = subject.seeded or varies
    seeds = tuple(range(seed, seed + 2 * budget.seeds)) if randomised else ()
    select, report = (slice(0, budget.seeds), slice(budget.seeds, None)) if randomised else (slice(0, 1), slice(0, 1))
    planned = suite(
        subject, base, transfer, x,
        eps=float(eps), norm=norm, bounds=bounds, budget=budget, seed=seed, randomised=randomised,
    )  # fmt: skip
    name = name or _name(defence)
    told = settings or {}
    known = {
        "name": name,
        "dataset": dataset,
        "told": told,
        "protocol": protocol,
        "seed": seed,
        "minutes": minutes,
        "images": _store.digest([x, y]),
        "weights": [_store.digest(network.state_dict().values()) for network in (base, *transfer)],
        "defence": {"type": type(defence).__name__} | describe(defence),
        "attacks": {attack.name: describe_planned(attack) for attack in planned},
    }
    path = None if folder is None else Path(folder)
    runner = Runner(subject, base, x, y, seeds=seeds, settings=known, folder=path, told=on_progress)
    planned, plan = _afford(planned, runner, budget, minutes)
    trials = _attack(runner, planned, select)
    strongest = _strongest(trials, select)
    checks, curves = _checks(runner, planned, trials, strongest, budget, select, report, reach)
    flags = _flags(runner, planned, trials, randomised, repeatable=subject.seeded or not varies)
    costs = runner.once("cost", lambda: measure(subject, base, x, seeds))

    chosen = choose(trials, select)
    right = worst(trials, chosen)[report]
    on_base = [trial.of_base() for trial in trials if trial.attack.knows == "base"]
    base_right = worst(on_base, choose(on_base, slice(0, 1)))
    fields = {"dataset": dataset, "norm": norm}
    whole = {
        "model": type(base).__name__,
        "layers": [],
        "protocol": protocol,
        "protocol_seed": seed,
        "slice": [0, len(x)],
    }
    of_base = fields | {"defence": base_name, "seeds": ()}
    of_defence = fields | {"defence": name, "seeds": seeds[report]}
    own = whole | describe(defence) | told
    whole |= {key: value for key, value in told.items() if key != "layers"}
    rows = [_row(trial, slice(0, 1), whole, of_base) for trial in on_base]
    rows += [_row(trial, report, own, of_defence) for trial in trials]
    final: dict[str, Any] = {"attack": "worst-case", "eps": float(eps)}
    base_verdict = Row.of(
        base_right,
        **of_base | final,
        knows="base",
        seconds_per_image=on_base[0].seconds,
        settings=whole | {"attacks": [trial.attack.name for trial in on_base]},
    )
    names = [trial.attack.name for trial in trials]
    verdict = Row.of(
        right,
        **of_defence | final,
        knows="defence" if any(trial.attack.knows == "defence" for trial in trials) else "base",
        seconds_per_image=trials[0].seconds,
        foreign=_flagged(trials, chosen),
        settings=own | {"attacks": names, "selected_on": list(seeds[select]), "draws": summary(right)},
    )
    record = {
        "model_info": {
            "link": "",
            "name": name,
            "authors": "",
            "additional_data": False,
            "number_forward_passes": costs["forward_passes"],
            "dataset": dataset,
            "venue": "",
            "architecture": type(base).__name__,
            "eps": f"{eps:.6g}",
            "clean_acc": f"{100 * float(trials[0].correct[report].double().mean()):.2f}",
            "reported": f"{100 * verdict.accuracy:.2f}",
            "autoattack_acc": "",
            "external": "",
            "footnote": f"protocol {protocol}, {len(x)} images",
        },
        "randomized": randomised,
        # RAILS searches at trial time; of another defence that is not known.
        "optimization_loop": True if isinstance(defence, RAILS) else None,
        "seeds": {"selection": list(seeds[select]), "report": list(seeds[report])},
        "threat_model": {"eps": float(eps), "norm": norm, "bounds": bounds.pairs()},
        "attacks": {
            trial.attack.name: {
                "n": trial.n,
                "attempted": int(trial.attempted.sum()),
                "knows": trial.attack.knows,
                "kind": trial.attack.kind,
                "losses": trial.losses,
                **describe_planned(trial.attack),
            }
            for trial in trials
        },
        "plan": plan,
        "curves": curves,
        "cost": costs,
        "per_example": per_example(trials, chosen, y, report),
    }
    return Evaluation(
        rows=tuple(rows),
        verdict=verdict,
        base_verdict=base_verdict,
        checks=tuple(checks),
        flags=tuple(flags),
        ablations=tuple(_ablations(runner, trials, chosen, budget, seeds[report], own, of_defence | final)),
        record=record,
        gallery=_gallery(trials, chosen, report, x, y),
    )


def _afford(
    planned: list[Planned], runner: Runner, budget: Budget, minutes: float | None
) -> tuple[list[Planned], dict[str, Any]]:
    """Time a few answers, tell what everything will take, and cut the plan where that is more than allowed."""

    def estimate() -> dict[str, Any]:
        x = runner.x[:_PROBED]
        runner.subject.labels(x[:1], runner.seeds[:1])  # the first call may compile or fill caches
        asking = runner.subject.labels(x, runner.seeds[:1])[1] / len(x) * max(1, len(runner.seeds))
        timed: dict[int, float] = {}
        seconds = {}
        for attack in planned:
            one = 0.0
            if attack.target is not None:
                if id(attack.target) not in timed:
                    timed[id(attack.target)] = seconds_per_call(attack.target, x, gradient=attack.kind != "black box")
                one = timed[id(attack.target)]
            seconds[attack.name] = one * attack.calls()
        cut = planned if minutes is None else afford(planned, seconds, asking, 60 * minutes / _SLACK)
        return {
            "minutes": minutes,
            "seconds_per_answer": asking / max(1, len(runner.seeds)),
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


def _attack(runner: Runner, planned: Sequence[Planned], select: slice) -> list[Trial]:
    """Run all attacks: with gradients first, the strongest of them once more with twice the steps, then the others."""
    trials = [runner.run(attack) for attack in planned if not attack.standing]
    strongest = _strongest(trials, select)
    if strongest is not None:
        twice = strongest.attack.with_method(iterations=2 * strongest.attack.method.iterations)
        most = min(strongest.n, _PAIRED)
        trials.append(runner.run(dataclasses.replace(twice, name=strongest.attack.name + DOUBLED, n=most)))
    for attack in planned:
        if attack.standing:
            trial = runner.run(attack, standing(trials, select))
            trials.append(completed(trial, trials, select))
    return trials


def _strongest(trials: Sequence[Trial], select: slice) -> Trial | None:
    """Return the iterative attack that left the fewest right; None where there is none."""
    found = [
        trial
        for trial in trials
        if hasattr(trial.attack.method, "iterations") and not trial.attack.standing and DOUBLED not in trial.attack.name
    ]
    return min(found, key=lambda trial: float(trial.correct[select].double().mean()), default=None)


def _checks(
    runner: Runner,
    planned: Sequence[Planned],
    trials: Sequence[Trial],
    strongest: Trial | None,
    budget: Budget,
    select: slice,
    report: slice,
    reach: float,
) -> tuple[list[Check], dict[str, Any]]:
    seeds, n = runner.seeds[report], min(budget.checks, len(runner.x))
    checks, curves = [sanity.eps_zero(runner, planned, seeds[:1])], {}
    if strongest is not None and strongest.attack.method.eps > 0:
        name = strongest.attack.name
        shown = {attack.name: attack for attack in planned if attack.name in ("pgd", name)}
        curves = {key: sanity.curve(runner, attack, n, reach, seeds) for key, attack in shown.items()}
        twice = next(trial for trial in trials if trial.attack.name == name + DOUBLED)
        checks += [
            sanity.grows(curves[name], name, runner.subject.classes),
            sanity.iterative(runner, strongest.attack, n, seeds),
            sanity.doubled(strongest, twice, report),
        ]

    def case(kinds: tuple[str, ...], n: int) -> torch.Tensor:
        mine = [trial for trial in trials if trial.attack.kind in kinds]
        return worst(mine, choose(mine, select))[report, :n]

    asked = min((trial.n for trial in trials if trial.attack.standing), default=0)
    if any(trial.attack.kind == "adaptive" for trial in trials):
        alone = case(("none", "adaptive"), len(runner.x))
        together = case(("none", "adaptive", "transfer"), len(runner.x))
        checks.append(sanity.compared("transfer is no stronger than attacks that know", "transfer", alone, together))
    if asked:
        alone = case(("none", "adaptive", "transfer"), asked)
        together = case(("none", "adaptive", "transfer", "black box"), asked)
        checks.append(
            sanity.compared("asking alone is no stronger than gradients", "attacks that ask", alone, together)
        )
    full = {a.name: min(len(runner.x), budget.black_box if a.standing else len(runner.x)) for a in planned}
    short = [f"{attack.name} {attack.n} of {full[attack.name]}" for attack in planned if attack.n < full[attack.name]]
    checks.append(Check("all planned images were attacked", not short, ", ".join(short) or f"{len(runner.x)} images"))
    return checks, curves


def _flags(
    runner: Runner, planned: Sequence[Planned], trials: Sequence[Trial], randomised: bool, *, repeatable: bool
) -> list[Flag]:
    x, y = runner.x[:_PROBED], runner.y[:_PROBED]
    targets = {a.name: a.target for a in planned if not a.standing and a.target is not None}
    distinct = {id(target): name for name, target in targets.items()}
    faults = sum((trial.faults for trial in trials), Counter(runner.subject.faults if not runner.journal else {}))

    def flags() -> list[dict[str, Any]]:
        found = [
            sanity.randomised(randomised),
            sanity.probabilities(runner.network, x),
            sanity.zero_gradients({name: targets[name] for name in distinct.values()}, x, y),
            sanity.batch(runner.subject, runner.x, runner.seeds, repeatable),
        ]
        return [dataclasses.asdict(flag) for flag in found]

    return [*(Flag(**flag) for flag in runner.once("flags", flags)), sanity.failed(faults), sanity.outside(trials)]


def _row(trial: Trial, runs: slice, settings: dict[str, Any], fields: dict[str, Any]) -> Row:
    attack = trial.attack
    done = {"slice": [0, trial.n], "attempted": int(trial.attempted.sum())}
    return Row.of(
        trial.correct[runs],
        **fields,
        attack=attack.name,
        knows=attack.knows,
        eps=0.0 if attack.method is None else attack.method.eps,
        seconds_per_image=trial.seconds,
        foreign=None if trial.foreign is None else float(trial.foreign.double().mean()),
        settings=settings | done | describe_planned(attack),
    )


def _flagged(trials: Sequence[Trial], chosen: Tensor) -> float | None:
    """Return the share of worst cases that looked foreign; None for a defence that flags nothing."""
    if trials[0].foreign is None:
        return None
    flags = [bool(trials[int(trial)].foreign[i]) for i, trial in enumerate(chosen)]  # type: ignore[index]
    return sum(flags) / len(flags)


def _ablations(
    runner: Runner,
    trials: Sequence[Trial],
    chosen: Tensor,
    budget: Budget,
    seeds: tuple[int, ...],
    settings: dict[str, Any],
    fields: dict[str, Any],
) -> list[Row]:
    """Return rows of RAILS less one of its parts: on clean images, and on the whole one's worst candidates."""
    rails = runner.subject.defence
    if not budget.ablations or not isinstance(rails, RAILS):
        return []
    rows = []
    attacked = {"none": trials[0].adversarials, "worst-case": candidates(trials, chosen)}
    for part, variant in without(rails).items():
        subject = Subject(variant, classes=runner.subject.classes)
        for attack, x in attacked.items():
            labels, seconds = runner.once(
                f"without {part} / {attack}",
                functools.partial(_asked, subject, x, seeds),
            )
            row = fields | {"defence": f"{fields['defence']} without {part}", "attack": attack}
            rows.append(
                Row.of(
                    torch.tensor(labels) == runner.y.cpu(),
                    **row | {"eps": 0.0 if attack == "none" else fields["eps"]},
                    knows="base" if attack == "none" else "defence",
                    seconds_per_image=seconds / len(x),
                    settings=settings | describe(variant),
                )
            )
    return rows


def _asked(subject: Subject, x: Tensor, seeds: tuple[int, ...]) -> list[Any]:
    labels, seconds = subject.labels(x, seeds)
    return [labels.tolist(), seconds]


def _gallery(trials: Sequence[Trial], chosen: Tensor, report: slice, x: Tensor, y: Tensor) -> tuple[Specimen, ...]:
    """Return images that were right without an attack and wrong in most runs of their worst case, the first ones."""
    clean = trials[0].correct[report].double().mean(0) > 0.5
    broken = worst(trials, chosen)[report].double().mean(0) <= 0.5
    found = []
    for i in (clean & broken).nonzero()[:_SHOWN, 0].tolist():
        trial = trials[int(chosen[i])]
        found.append(
            Specimen(
                clean=x[i].cpu(),
                adversarial=trial.adversarials[i].cpu(),
                truth=int(y[i]),
                answer=int(trial.labels[report, i].mode().values),
                attack=trial.attack.name,
            )
        )
    return tuple(found)


def _name(defence: Any) -> str:
    found = getattr(defence, "__name__", None) or type(defence).__name__
    return str(found).strip("<>").lower()
