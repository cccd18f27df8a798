"""What an evaluation found: rows, verdicts, record and gallery, put together from the trials of its attacks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunonet import _check, _store
from immunonet.defences.rails import RAILS
from immunonet.evaluation.abstention import abstention
from immunonet.evaluation.asking import Subject, describe
from immunonet.evaluation.cost import without
from immunonet.evaluation.records import Check, Flag, Row, envelope
from immunonet.evaluation.runner import Runner, Trial
from immunonet.evaluation.runner import describe as describe_planned
from immunonet.evaluation.verdict import WorstCase, choose, per_example, picked, summary, worst

# Images of the gallery.
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is evaluated, under which names and against which attacker; `told`: the caller's settings for the rows.

    `order`: the place, among the images that the caller gave, of each one as it is attacked.
    """

    name: str
    base_name: str
    dataset: str
    protocol: str
    seed: int
    eps: float
    norm: str
    bounds: _check.Bounds
    told: dict[str, Any]
    order: tuple[int, ...]


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


def outcome(
    claim: Claim,
    runner: Runner,
    trials: Sequence[Trial],
    found: WorstCase,
    *,
    checks: Sequence[Check],
    flags: Sequence[Flag],
    select: slice,
    report: slice,
    ablations: bool,
    record: dict[str, Any],
) -> Evaluation:
    """Return the evaluation: the worst case `found`, and the rows of trials, counted on their draws `report`.

    `select`: those that worst cases by abstention are chosen on. `record`: what the JSON holds besides, among it
    the `cost`. `ablations`: whether parts of RAILS are left out.
    """
    on_base = [trial.of_base() for trial in trials if trial.attack.knows == "base"]
    base_right = worst(on_base, choose(on_base, slice(0, 1)))
    fields = {"dataset": claim.dataset, "norm": claim.norm}
    whole = {
        "model": type(runner.network).__name__,
        "layers": [],
        "protocol": claim.protocol,
        "protocol_seed": claim.seed,
        "slice": [0, len(runner.x)],
    }
    of_base = fields | {"defence": claim.base_name, "seeds": ()}
    of_defence = fields | {"defence": claim.name}
    own = whole | describe(runner.subject.defence) | claim.told
    whole |= {key: value for key, value in claim.told.items() if key != "layers"}
    rows = [_row(trial, slice(0, 1), whole, of_base) for trial in on_base]
    rows += [_row(trial, report, own, of_defence | {"seeds": runner.seeds[report]}) for trial in trials]
    final: dict[str, Any] = {"attack": "worst-case", "eps": claim.eps}
    base_verdict = Row.of(
        base_right,
        **of_base | final,
        knows="base",
        seconds_per_image=on_base[0].seconds,
        settings=whole | {"attacks": [trial.attack.name for trial in on_base]},
    )
    names = [trial.attack.name for trial in trials]
    verdict = Row.of(
        found.correct,
        **of_defence | final,
        seeds=found.seeds,
        knows="defence" if any(trial.attack.knows == "defence" for trial in trials) else "base",
        seconds_per_image=trials[0].seconds,
        foreign=_flagged(trials, found.chosen),
        settings=own | {"attacks": names, "selected_on": list(found.selected_on), "draws": summary(found.correct)},
    )
    record = record | {
        "model_info": _model_info(claim, runner, record["cost"], trials[0].correct[report], verdict),
        # RAILS searches at trial time; of another defence that is not known.
        "optimization_loop": True if isinstance(runner.subject.defence, RAILS) else None,
        "seeds": {"selection": list(found.selected_on), "report": list(found.seeds)},
        "row_seeds": {"selection": list(runner.seeds[select]), "report": list(runner.seeds[report])},
        "threat_model": {"eps": claim.eps, "norm": claim.norm, "bounds": claim.bounds.pairs()},
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
        "per_example": [
            {"image": place} | told
            for place, told in sorted(
                zip(claim.order, per_example(trials[0], found, names, runner.y, report), strict=False),
                key=lambda item: item[0],
            )
        ],
        "abstention": abstention(trials, select, report),
        "disagreement": {
            "none": _differing(trials[0].labels[report], trials[0].base_labels),
            "worst-case": _differing(found.labels, picked([trial.base_labels for trial in trials], found.chosen)),
        },
    }
    return Evaluation(
        rows=tuple(rows),
        verdict=verdict,
        base_verdict=base_verdict,
        checks=tuple(checks),
        flags=tuple(flags),
        ablations=tuple(_ablations(runner, trials[0], found, own, of_defence | final)) if ablations else (),
        record=record,
        gallery=_gallery(trials, found, report, runner.x, runner.y),
    )


def _model_info(claim: Claim, runner: Runner, cost: dict[str, Any], clean: Tensor, verdict: Row) -> dict[str, Any]:
    """Return the keys of RobustBench's `model_info`."""
    return {
        "link": "",
        "name": claim.name,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": cost["forward_passes"],
        "dataset": claim.dataset,
        "venue": "",
        "architecture": type(runner.network).__name__,
        "eps": f"{claim.eps:.6g}",
        "clean_acc": f"{100 * float(clean.double().mean()):.2f}",
        "reported": f"{100 * verdict.accuracy:.2f}",
        "autoattack_acc": "",
        "external": "",
        "footnote": f"protocol {claim.protocol}, {len(runner.x)} images",
    }


def _row(trial: Trial, runs: slice, settings: dict[str, Any], fields: dict[str, Any]) -> Row:
    attack = trial.attack
    done = {"sample": trial.n, "attempted": int(trial.attempted.sum())}
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


def _differing(labels: Tensor, of_base: Tensor) -> float:
    """Return the share of answers `(R, n)` that differ from the undefended network's `(1, n)`."""
    return float((labels != of_base).double().mean())


def _flagged(trials: Sequence[Trial], chosen: Tensor) -> float | None:
    """Return the share of worst cases that looked foreign; None for a defence that flags nothing."""
    if trials[0].foreign is None:
        return None
    flags = [bool(trials[int(trial)].foreign[i]) for i, trial in enumerate(chosen)]  # type: ignore[index]
    return sum(flags) / len(flags)


def _ablations(
    runner: Runner,
    clean: Trial,
    found: WorstCase,
    settings: dict[str, Any],
    fields: dict[str, Any],
) -> list[Row]:
    """Return rows of RAILS less one of its parts: on clean images, and on the whole one's worst candidates."""
    rails = runner.subject.defence
    if not isinstance(rails, RAILS):
        return []
    rows = []
    attacked = {"none": clean.adversarials, "worst-case": found.adversarials}
    for part, variant in without(rails).items():
        subject = Subject(variant, classes=runner.subject.classes)
        for attack, x in attacked.items():
            labels, seconds = runner.once(
                f"without {part} / {attack}",
                functools.partial(_asked, subject, x, found.seeds),
            )
            who = f"{fields['defence']} without {part}"
            row = fields | {"defence": who, "attack": attack, "seeds": found.seeds}
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


def _gallery(trials: Sequence[Trial], found: WorstCase, report: slice, x: Tensor, y: Tensor) -> tuple[Specimen, ...]:
    """Return images that were right without an attack and wrong in most runs of their worst case, the first ones."""
    clean = trials[0].correct[report].double().mean(0) > 0.5
    broken = found.correct.double().mean(0) <= 0.5
    shown = []
    for i in (clean & broken).nonzero()[:_SHOWN, 0].tolist():
        shown.append(
            Specimen(
                clean=x[i].cpu(),
                adversarial=found.adversarials[i].cpu(),
                truth=int(y[i]),
                answer=int(found.labels[:, i].mode().values),
                attack=trials[int(found.chosen[i])].attack.name,
            )
        )
    return tuple(shown)
