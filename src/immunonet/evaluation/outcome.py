"""What an evaluation found: rows, verdicts, record and gallery, put together from a campaign."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunonet import _store, models
from immunonet.defences.base import Defence
from immunonet.evaluation.abstention import abstention
from immunonet.evaluation.asking import Subject, describe
from immunonet.evaluation.bench import Value
from immunonet.evaluation.campaign import Campaign, Scene, Trial, WorstCase, picked, worst
from immunonet.evaluation.draws import Draws, share
from immunonet.evaluation.records import Check, Flag, Row, envelope

# Images of the gallery.
_SHOWN = 12
# Inputs that are asked about alone, and sizes of batches, where costs are measured.
_SINGLE, _BATCHES = 5, (8, 32, 128)


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
    raised the figures are `unreliable`. `ablations`: rows of the defence less one of its parts, on the same candidates.
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
        from immunonet.report.evaluation import page

        _store.write_text(path, page(self.to_dict(), self.gallery))


def outcome(
    campaign: Campaign, worst_case: WorstCase, checks: list[Check], flags: list[Flag], record: dict[str, Any]
) -> Evaluation:
    """Return the evaluation that a campaign's trials, checks and flags make; `record`: what its JSON holds besides."""
    scene, draws, claim, trials = campaign.scene, campaign.draws, campaign.claim, campaign.trials
    threat, network, cost = claim.threat, type(scene.network).__name__, campaign.once("cost", _cost)
    on_base = [trial.of_base() for trial in trials if trial.attack.knows == "base"]
    whole = {
        "model": network, "layers": [], "protocol": claim.protocol, "protocol_seed": threat.seed,
        "slice": [0, len(scene.y)],
    }  # fmt: skip
    own = whole | describe(scene.subject.defence) | claim.told
    whole |= {key: value for key, value in claim.told.items() if key != "layers"}
    of_base, of_defence = (
        functools.partial(Row.of, dataset=claim.dataset, defence=name, norm=threat.norm)
        for name in (claim.base_name, claim.name)
    )
    base_verdict = of_base(
        worst(on_base, Draws()), attack="worst-case", eps=threat.eps, knows="base",
        seconds_per_image=on_base[0].seconds, settings=whole | {"attacks": [trial.attack.name for trial in on_base]},
    )  # fmt: skip
    knows = "defence" if any(trial.attack.knows == "defence" for trial in trials) else "base"
    names = [trial.attack.name for trial in trials]
    readings = {"selected_on": list(draws.choose), "draws": summary(worst_case.correct)}
    foreign = [trial.foreign[None] for trial in trials if trial.foreign is not None]
    verdict = of_defence(
        worst_case.correct, attack="worst-case", eps=threat.eps, knows=knows, seconds_per_image=trials[0].seconds,
        seeds=worst_case.seeds, foreign=share(picked(foreign, worst_case.chosen)) if foreign else None,
        settings=own | {"attacks": names} | readings,
    )  # fmt: skip
    rows = [_row(of_base, trial, Draws(), whole) for trial in on_base]
    rows += [_row(of_defence, trial, draws, own) for trial in trials]
    record = record | {
        "cost": cost,
        "model_info": _model_info(campaign, network, cost["forward_passes"], verdict),
        "optimization_loop": getattr(scene.subject.defence, "optimizes", None),
        "seeds": {"selection": list(draws.choose), "report": list(worst_case.seeds)},
        "row_seeds": {"selection": list(draws.choose[: draws.few]), "report": list(draws.counting)},
        "threat_model": {"eps": threat.eps, "norm": threat.norm, "bounds": threat.bounds.pairs()},
        "attacks": {trial.attack.name: _told(trial) for trial in trials},
        "per_example": _per_example(campaign, worst_case),
        "abstention": abstention(trials, draws),
        "disagreement": {
            "none": share(draws.counted(trials[0].labels) != trials[0].base_labels),
            "worst-case": share(worst_case.labels != picked([t.base_labels for t in trials], worst_case.chosen)),
        },
    }
    ablations = _ablations(campaign, worst_case, of_defence, own) if campaign.budget.ablations else []
    return Evaluation(
        rows=tuple(rows), verdict=verdict, base_verdict=base_verdict, checks=tuple(checks), flags=tuple(flags),
        ablations=tuple(ablations), record=record, gallery=_gallery(campaign, worst_case),
    )  # fmt: skip


def summary(correct: Tensor) -> dict[str, float]:
    """Return the three readings of runs `(R, n)`: `mean`, right by `majority`, and `always` right: no run broke it."""
    majority = correct.double().mean(0) > 0.5
    return {"mean": share(correct), "majority": share(majority), "always": share(correct.all(0))}


def _cost(scene: Scene) -> Value:
    """Return seconds per image at batch 1 (the median of a few) and at the best batch, and forward passes per image.

    A forward pass is one input that enters the base, wherever the pass ends; 0 where a defence has no need of it.
    """
    subject, x, seeds = scene.subject, scene.x, scene.seeds[:1]
    single = sorted(subject.labels(part, seeds)[1] for part in x[:_SINGLE].split(1))
    sizes = sorted({min(size, len(x)) for size in _BATCHES})
    batches = {size: subject.labels(x[:size], seeds)[1] / size for size in sizes}
    best = min(batches, key=lambda size: batches[size])
    with models.counted(scene.network) as entered:
        subject.labels(x[:best], seeds)
    return {
        "seconds_batch_1": single[len(single) // 2], "seconds_best_batch": batches[best], "best_batch": best,
        "forward_passes": entered() / best,
    }  # fmt: skip


def _told(trial: Trial) -> dict[str, Any]:
    attack = trial.attack
    known = {"knows": attack.knows, "kind": attack.kind, "roles": sorted(attack.roles)}
    return {"n": trial.n, "attempted": int(trial.attempted.sum()), **known, "losses": trial.losses, **attack.told()}


def _per_example(campaign: Campaign, worst_case: WorstCase) -> list[dict[str, Any]]:
    """Return per image its label, the share of right answers without an attack and in the worst case, and by what."""
    trials, order = campaign.trials, campaign.claim.order
    before = campaign.draws.counted(trials[0].correct).double().mean(0)
    after = worst_case.correct.double().mean(0)
    columns = [values.tolist() for values in (campaign.y, before, after, worst_case.chosen)]
    told = [
        {"image": image, "label": label, "clean": clean, "worst": left, "attack": trials[place].attack.name}
        for image, label, clean, left, place in zip(order, *columns, strict=False)
    ]
    return sorted(told, key=lambda one: one["image"])


def _model_info(campaign: Campaign, network: str, passes: float, verdict: Row) -> dict[str, Any]:
    """Return the keys of RobustBench's `model_info`."""
    claim, clean = campaign.claim, share(campaign.draws.counted(campaign.trials[0].correct))
    return {
        "link": "", "name": claim.name, "authors": "", "additional_data": False, "number_forward_passes": passes,
        "dataset": claim.dataset, "venue": "", "architecture": network, "eps": f"{claim.threat.eps:.6g}",
        "clean_acc": f"{100 * clean:.2f}", "reported": f"{100 * verdict.accuracy:.2f}", "autoattack_acc": "",
        "external": "", "footnote": f"protocol {claim.protocol}, {len(campaign.scene.y)} images",
    }  # fmt: skip


def _row(of: Callable[..., Row], trial: Trial, draws: Draws, settings: dict[str, Any]) -> Row:
    attack = trial.attack
    done = {"sample": trial.n, "attempted": int(trial.attempted.sum())}
    return of(
        draws.counted(trial.correct), seeds=draws.counting, attack=attack.name, knows=attack.knows,
        eps=0.0 if attack.method is None else attack.method.eps, seconds_per_image=trial.seconds,
        foreign=None if trial.foreign is None else share(trial.foreign), settings=settings | done | attack.told(),
    )  # fmt: skip


def _ablations(
    campaign: Campaign, worst_case: WorstCase, of: Callable[..., Row], settings: dict[str, Any]
) -> list[Row]:
    """Return rows of the defence less one of its parts: on clean images, and on the whole one's worst candidates."""
    claim, defence, seeds, rows = campaign.claim, campaign.scene.subject.defence, worst_case.seeds, []
    attacked = {
        "none": (campaign.trials[0].adversarials, "base", 0.0),
        "worst-case": (worst_case.adversarials, "defence", claim.threat.eps),
    }
    for part, variant in (defence.ablations() if isinstance(defence, Defence) else {}).items():
        for attack, (x, knows, eps) in attacked.items():
            labels, seconds = campaign.once(f"without {part} / {attack}", _without, part, x, seeds)
            row = of(
                torch.tensor(labels) == campaign.y, seeds=seeds, defence=f"{claim.name} without {part}",
                attack=attack, knows=knows, eps=eps, seconds_per_image=seconds / len(x),
                settings=settings | describe(variant),
            )  # fmt: skip
            rows.append(row)
    return rows


def _without(scene: Scene, part: str, x: Tensor, seeds: tuple[int, ...]) -> Value:
    subject = scene.subject
    assert isinstance(subject.defence, Defence)
    variant = Subject(subject.defence.ablations()[part], classes=subject.classes)
    labels, seconds = variant.labels(x.to(scene.x), seeds)
    return [labels.tolist(), seconds]


def _gallery(campaign: Campaign, worst_case: WorstCase) -> tuple[Specimen, ...]:
    """Return images that were right without an attack and wrong in most runs of their worst case, the first ones."""
    scene, trials, points, shown = campaign.scene, campaign.trials, worst_case.adversarials, []
    clean = campaign.draws.counted(trials[0].correct).double().mean(0) > 0.5
    broken = worst_case.correct.double().mean(0) <= 0.5
    for i in (clean & broken).nonzero()[:_SHOWN, 0].tolist():
        truth, answer = int(scene.y[i]), int(worst_case.labels[:, i].mode().values)
        clean_x, x, attack = scene.x[i].cpu(), points[i].cpu(), trials[int(worst_case.chosen[i])].attack
        shown.append(Specimen(clean=clean_x, adversarial=x, truth=truth, answer=answer, attack=attack.name))
    return tuple(shown)
