"""What an evaluation found: rows, verdicts, record and gallery, put together from a campaign."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from immunonet import _looks, _store, models
from immunonet.defences.base import Defence
from immunonet.evaluation.abstention import abstention
from immunonet.evaluation.asking import Subject, describe
from immunonet.evaluation.bench import Value
from immunonet.evaluation.campaign import Campaign, Claim, Scene, Trial, WorstCase, picked, worst
from immunonet.evaluation.draws import Draws, share
from immunonet.evaluation.records import Check, Flag, Row, envelope
from immunonet.evaluation.threats import UNION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """The outcome of `evaluate`.

    `rows`: the base network (`defence` is `base_name`) and the defence under every attack. `verdicts`, `base_verdicts`:
    their rows of `attack` "worst-case" by norm: per image the worst of all attacks under a threat, chosen on selection
    draws and counted on others. Of several threats the last is the "union": per image the worst of all threats, an
    image being right if it is so under all of them; its `eps` is the largest radius, and its settings tell all
    `threats`. Rows of clean images, which are common to all threats, have the norm "union" then. `checks`: what must
    hold of sound attacks; `flags`: what to know. If a check failed or a serious flag was raised the figures are
    `unreliable`. `ablations`: rows of the defence less one of its parts, on the same candidates. `record`: what else
    stands in the JSON. `gallery`: some images that were broken.
    """

    rows: tuple[Row, ...]
    verdicts: dict[str, Row]
    base_verdicts: dict[str, Row]
    checks: tuple[Check, ...]
    flags: tuple[Flag, ...]
    ablations: tuple[Row, ...]
    record: dict[str, Any]
    gallery: tuple[Specimen, ...] = ()

    @property
    def verdict(self) -> Row:
        """The defence's worst case: of several threats that of their union."""
        return list(self.verdicts.values())[-1]

    @property
    def base_verdict(self) -> Row:
        """That of the undefended network."""
        return list(self.base_verdicts.values())[-1]

    @property
    def unreliable(self) -> bool:
        """Whether a check failed or a serious flag was raised."""
        return not all(check.passed for check in self.checks) or any(f.raised and f.serious for f in self.flags)

    def __repr__(self) -> str:
        worst, doubts = self.verdict, ", unreliable" if self.unreliable else ""
        low, high = worst.ci95
        told = f"worst case {worst.accuracy:.3f} ({low:.3f} to {high:.3f}) of {worst.n} images, {len(self.rows)} rows"
        return f"Evaluation({worst.defence}: {told}{doubts})"

    def __str__(self) -> str:
        return _looks.text(self._table(), *self._doubts())

    def _repr_html_(self) -> str:
        return _looks.markup("Evaluation", self._table(), *self._doubts())

    def _table(self) -> list[Sequence[str]]:
        lines: list[Sequence[str]] = [("defence", "attack", "knows", "norm", "eps", "n", "accuracy", "95 % interval")]
        for row in (*self.rows, *self.base_verdicts.values(), *self.verdicts.values()):
            told = (row.norm, f"{row.eps:.4g}") if row.eps else ("", "")
            figures = str(row.n), f"{row.accuracy:.3f}", "{:.3f} to {:.3f}".format(*row.ci95)
            lines.append((row.defence, row.attack, row.knows, *told, *figures))
        return lines

    def _doubts(self) -> list[str]:
        """Return a sentence for every check that failed and every flag that was raised."""
        failed = [f"Check failed: {check.name}: {check.detail}" for check in self.checks if not check.passed]
        raised = [
            f"{'Flag' if flag.serious else 'Note'}: {flag.name}: {flag.detail}" for flag in self.flags if flag.raised
        ]
        return [*failed, *raised]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: results, environment, command, checks, flags, and the record.

        The results end with the verdicts, base and defence in turn, threat by threat, those of a union last.
        """
        verdicts = [row for norm, own in self.verdicts.items() for row in (self.base_verdicts[norm], own)]
        rows = [row.to_json() for row in (*self.rows, *verdicts)]
        return envelope(rows) | {
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "flags": [dataclasses.asdict(flag) for flag in self.flags],
            "unreliable": self.unreliable,
            "ablations": [row.to_json() for row in self.ablations],
            **self.record,
        }

    def plot(self) -> Figure:
        """Return a figure of the accuracy that each attack leaves, of the network and of the defence, with intervals.

        Notebooks show it, `.savefig("evaluation.png")` writes it. Needs `immunonet[report]`.
        """
        from immunonet.report.evaluation import figure

        return figure(self.to_dict())

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` to `path`, whole or not at all."""
        _store.write_json(path, self.to_dict())

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page, verdict first, to `path`, whole or not at all. Needs `immunonet[report]`."""
        from immunonet.report.evaluation import page

        _store.write_text(path, page(self.to_dict(), self.gallery))


def outcome(
    campaign: Campaign, cases: dict[str, WorstCase], checks: list[Check], flags: list[Flag], record: dict[str, Any]
) -> Evaluation:
    """Return the evaluation that a campaign's trials, worst cases by norm, checks and flags make.

    The last of the worst cases is the one that counts; `record`: what the JSON holds besides.
    """
    scene, draws, claim, trials = campaign.scene, campaign.draws, campaign.claim, campaign.trials
    network, cost, worst_case = type(scene.network).__name__, campaign.once("cost", _cost), cases[claim.norm]
    whole = {
        "model": network, "layers": [], "protocol": claim.protocol, "protocol_seed": claim.threats[0].seed,
        "slice": [0, len(scene.y)],
    }  # fmt: skip
    own = whole | describe(scene.subject.defence) | claim.told
    whole |= {key: value for key, value in claim.told.items() if key != "layers"}
    of_base, of_defence = (
        functools.partial(Row.of, dataset=claim.dataset, defence=name) for name in (claim.base_name, claim.name)
    )
    base_verdicts = {norm: _base_verdict(of_base, campaign, norm, whole) for norm in cases}
    verdicts = {norm: _verdict(of_defence, campaign, norm, cases, own) for norm in cases}
    rows = [_row(of_base, claim, trial.of_base(), Draws(), whole) for trial in _on_base(trials)]
    rows += [_row(of_defence, claim, trial, draws, own | _explained(scene, trial)) for trial in trials]
    apart = {norm: _apart(campaign, norm, case) for norm, case in cases.items()}
    record = record | {
        "cost": cost,
        "model_info": _model_info(campaign, network, cost["forward_passes"], verdicts[claim.norm]),
        "optimization_loop": getattr(scene.subject.defence, "optimizes", None),
        "seeds": {"selection": list(draws.choose), "report": list(worst_case.seeds)},
        "row_seeds": {"selection": list(draws.choose[: draws.few]), "report": list(draws.counting)},
        "threat_model": _threat_model(claim),
        "attacks": {trial.attack.name: _told(trial) for trial in trials},
        "per_example": _per_example(campaign, cases),
        **apart.pop(claim.norm),
    } | ({"by_threat": apart} if claim.several else {})  # fmt: skip
    ablations = _ablations(campaign, worst_case, of_defence, own) if campaign.budget.ablations else []
    return Evaluation(
        rows=tuple(rows), verdicts=verdicts, base_verdicts=base_verdicts, checks=tuple(checks), flags=tuple(flags),
        ablations=tuple(ablations), record=record, gallery=_gallery(campaign, worst_case),
    )  # fmt: skip


def _on_base(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.attack.knows == "base"]


def _aim(claim: Claim, norm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a row says of the threats whose worst case it is: `attack`, `norm`, `eps`, and its settings."""
    settings = settings | ({"threats": claim.radii} if norm == UNION else {})
    return {
        "attack": "worst-case", "norm": norm, "eps": max(threat.eps for threat in claim.meant(norm)),
        "settings": settings,
    }  # fmt: skip


def _base_verdict(of: Callable[..., Row], campaign: Campaign, norm: str, settings: dict[str, Any]) -> Row:
    """Return the row of the undefended network's worst case under a norm's threat, or the union's."""
    trials = [trial.of_base() for trial in _on_base(campaign.under(*campaign.claim.meant(norm)))]
    settings = settings | {"attacks": [trial.attack.name for trial in trials]}
    return of(
        worst(trials, Draws()), knows="base", seconds_per_image=trials[0].seconds,
        **_aim(campaign.claim, norm, settings),
    )  # fmt: skip


def _verdict(
    of: Callable[..., Row], campaign: Campaign, norm: str, cases: dict[str, WorstCase], settings: dict[str, Any]
) -> Row:
    """Return the row of the defence's worst case under a norm's threat, or the union's."""
    case, trials = cases[norm], campaign.under(*campaign.claim.meant(norm))
    knows = "defence" if any(trial.attack.knows == "defence" for trial in trials) else "base"
    names = [trial.attack.name for trial in trials]
    readings = summary(case.correct)
    if norm == UNION and case.seeds:
        readings["chosen_before"] = _chosen_before([cases[norm] for norm in campaign.claim.radii])
    foreign = [trial.foreign[None] for trial in campaign.trials if trial.foreign is not None]
    settings = settings | {"attacks": names, "selected_on": list(campaign.draws.choose), "draws": readings}
    return of(
        case.correct, knows=knows, seconds_per_image=trials[0].seconds, seeds=case.seeds,
        foreign=share(picked(foreign, case.chosen)) if foreign else None,
        **_aim(campaign.claim, norm, settings),
    )  # fmt: skip


def _chosen_before(cases: Sequence[WorstCase]) -> float:
    """Return the accuracy of a union whose threat is chosen per image on the draws that choose."""
    before = torch.stack([case.before for case in cases])
    chosen = (before + 1e-6 * before.mean(1)[:, None]).argmin(0)
    return share(picked([case.correct for case in cases], chosen))


def _apart(campaign: Campaign, norm: str, case: WorstCase) -> dict[str, Any]:
    """Return what a defence keeps under a norm's threat if it may decline, and how often it leaves its network."""
    trials, draws = campaign.trials, campaign.draws
    return {
        "abstention": abstention(campaign.under(*campaign.claim.meant(norm)), draws),
        "disagreement": {
            "none": share(draws.counted(trials[0].labels) != trials[0].base_labels),
            "worst-case": share(case.labels != picked([t.base_labels for t in trials], case.chosen)),
        },
    }


def _threat_model(claim: Claim) -> dict[str, Any]:
    first = claim.threats[0]
    one = {} if claim.several else {"eps": first.eps, "norm": first.norm}
    threats = [{"norm": norm, "eps": eps} for norm, eps in claim.radii.items()]
    return one | {"bounds": first.bounds.pairs(), "threats": threats}


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


def _per_example(campaign: Campaign, cases: dict[str, WorstCase]) -> list[dict[str, Any]]:
    """Return per image its label, the share of right answers without an attack and in the worst case, and by what.

    Of several threats it also holds the `norm` of that attack, and `worst` and `attack` of each threat.
    """
    claim, y = campaign.claim, campaign.y.tolist()
    clean = campaign.draws.counted(campaign.trials[0].correct).double().mean(0).tolist()
    left = {norm: _left(campaign, case) for norm, case in cases.items()}
    counts = left.pop(claim.norm)
    told = [
        {"image": image, "label": y[i], "clean": clean[i], **counts[i]}
        | ({"threats": {norm: one[i] for norm, one in left.items()}} if claim.several else {})
        for i, image in enumerate(claim.order[: len(y)])
    ]
    return sorted(told, key=lambda one: one["image"])


def _left(campaign: Campaign, case: WorstCase) -> list[dict[str, Any]]:
    """Return per image what a worst case leaves, and by which attack."""
    attacks = [campaign.trials[place].attack for place in case.chosen.tolist()]
    norms = [attack.threat.norm if attack.threat is not None else UNION for attack in attacks]
    return [
        {"worst": left, "attack": attack.short} | ({"norm": norm} if campaign.claim.several else {})
        for left, attack, norm in zip(case.correct.double().mean(0).tolist(), attacks, norms, strict=True)
    ]


def _model_info(campaign: Campaign, network: str, passes: float, verdict: Row) -> dict[str, Any]:
    """Return the keys of RobustBench's `model_info`."""
    claim, clean = campaign.claim, share(campaign.draws.counted(campaign.trials[0].correct))
    return {
        "link": "", "name": claim.name, "authors": "", "additional_data": False, "number_forward_passes": passes,
        "dataset": claim.dataset, "venue": "", "architecture": network, "eps": _radii(claim),
        "clean_acc": f"{100 * clean:.2f}", "reported": f"{100 * verdict.accuracy:.2f}", "autoattack_acc": "",
        "external": "", "footnote": f"protocol {claim.protocol}, {len(campaign.scene.y)} images",
    }  # fmt: skip


def _radii(claim: Claim) -> str:
    each = [f"{norm} {eps:.6g}" for norm, eps in claim.radii.items()]
    return ", ".join(each) if claim.several else f"{claim.threats[0].eps:.6g}"


def _row(of: Callable[..., Row], claim: Claim, trial: Trial, draws: Draws, settings: dict[str, Any]) -> Row:
    attack = trial.attack
    done = {"sample": trial.n, "attempted": int(trial.attempted.sum())}
    return of(
        draws.counted(trial.correct), seeds=draws.counting, attack=attack.short, knows=attack.knows,
        norm=claim.norm if attack.threat is None else attack.threat.norm,
        eps=0.0 if attack.method is None else attack.method.eps, seconds_per_image=trial.seconds,
        foreign=None if trial.foreign is None else share(trial.foreign), settings=settings | done | attack.told(),
    )  # fmt: skip


def _explained(scene: Scene, trial: Trial) -> dict[str, float]:
    """Return what the defence says of the candidates of a trial, as a share or another figure by name."""
    defence = scene.subject.defence
    return dict(defence.explained(scene.x[: trial.n], trial.adversarials)) if isinstance(defence, Defence) else {}


def _ablations(
    campaign: Campaign, worst_case: WorstCase, of: Callable[..., Row], settings: dict[str, Any]
) -> list[Row]:
    """Return rows of the defence less one of its parts: on clean images, and on the whole one's worst candidates."""
    claim, defence, seeds, rows = campaign.claim, campaign.scene.subject.defence, worst_case.seeds, []
    attacked = {
        "none": (campaign.trials[0].adversarials, "base", {"attack": "none", "norm": claim.norm, "eps": 0.0}),
        "worst-case": (worst_case.adversarials, "defence", _aim(claim, claim.norm, {})),
    }
    for part, variant in (defence.ablations() if isinstance(defence, Defence) else {}).items():
        for attack, (x, knows, aim) in attacked.items():
            labels, seconds = campaign.once(f"without {part} / {attack}", _without, part, x, seeds)
            row = of(
                torch.tensor(labels) == campaign.y, seeds=seeds, defence=f"{claim.name} without {part}",
                knows=knows, seconds_per_image=seconds / len(x),
                **aim | {"settings": settings | describe(variant) | aim.get("settings", {})},
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
