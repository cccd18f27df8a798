"""A campaign against one defence: attacks, what came of each, and the worst case of all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _store
from immunonet.attacks._base import Attack
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.bench import Bench, Part, Value, chunks
from immunonet.evaluation.draws import Draws, share
from immunonet.evaluation.records import VERSION
from immunonet.evaluation.suite import Budget, Planned
from immunonet.evaluation.threats import UNION, Threat
from immunonet.memory.sentinel import Sentinel

CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is evaluated, under which names and against which attackers; `told`: the caller's settings for the rows.

    `threats`: one or several, each of another norm. `order`: the place, among the images that the caller gave, of each
    one as it is attacked.
    """

    name: str
    base_name: str
    dataset: str
    protocol: str
    threats: tuple[Threat, ...]
    told: dict[str, Any]
    order: tuple[int, ...]

    @property
    def several(self) -> bool:
        """Whether there are several threats, so that their union counts."""
        return len(self.threats) > 1

    @property
    def norm(self) -> str:
        """The norm of the threat, or what stands for the union of several."""
        return UNION if self.several else self.threats[0].norm

    def meant(self, norm: str) -> tuple[Threat, ...]:
        """Return the threats that a norm, or the union, stands for."""
        return tuple(threat for threat in self.threats if norm in (threat.norm, UNION))

    @property
    def radii(self) -> dict[str, float]:
        """How far each threat goes, by norm."""
        return {threat.norm: threat.eps for threat in self.threats}

    def titled(self, text: str, threat: Threat, between: str = " ") -> str:
        """Return a text, the norm of its threat before it where there are several."""
        return f"{threat.norm}{between}{text}" if self.several else text


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Who is asked, the defence and the undefended network, about images `x` `(N, *S)` labelled `y`; and the attacks.

    `plan`: by name. `seeds`: those that every candidate is looked at on. `sentinel`: who watches what is asked, if any.
    """

    subject: Subject
    base: Subject
    x: Tensor
    y: Tensor
    plan: dict[str, Planned]
    seeds: tuple[int, ...]
    sentinel: Sentinel | None = None

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.x.device

    @property
    def network(self) -> nn.Module:
        """The undefended network."""
        network: nn.Module = self.base.defence.model  # type: ignore[attr-defined]
        return network


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What an attack found and what came of it, for the first n images.

    `adversarials` `(n, *S)`: the candidates; an image that was not `attempted` `(n,)` keeps itself. `labels`, `correct`
    `(R, n)`: the defence's answers, and whether they were right, one run per seed of the draws; of the undefended
    network, `base_labels`, `base_correct` `(1, n)`. `familiarity`, `foreign` `(n,)`: the p-value of what the defence
    senses, and whether it flags it, or None. `outside`: how many candidates broke the threat model and were left out.
    `losses`: the mean loss curve of the first part. `faults`: what went wrong with answers, and how often. `seconds`,
    `base_seconds`: of one answer.
    """

    attack: Planned
    adversarials: Tensor
    attempted: Tensor
    labels: Tensor
    correct: Tensor
    base_labels: Tensor
    base_correct: Tensor
    familiarity: Tensor | None
    foreign: Tensor | None
    outside: int
    losses: list[float]
    faults: Counter[str]
    seconds: float
    base_seconds: float

    @property
    def n(self) -> int:
        """How many images it covers."""
        return self.correct.shape[1]

    def of_base(self) -> Trial:
        """Return what came of it at the undefended network."""
        return dataclasses.replace(
            self, labels=self.base_labels, correct=self.base_correct, seconds=self.base_seconds,
            familiarity=None, foreign=None,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """What is left when every image meets the trial that did best against it.

    `chosen` `(N,)`: the place of that trial. `adversarials` `(N, *S)`: its candidates. `labels`, `correct` `(R, N)`:
    the defence's answers to them, and whether they were right, one run per seed in `seeds` (none without randomness).
    `before` `(N,)` float64: the share of right answers on the seeds that it was chosen on.
    """

    chosen: Tensor
    adversarials: Tensor
    labels: Tensor
    correct: Tensor
    seeds: tuple[int, ...]
    before: Tensor


class Campaign:
    """A claim, its bench, plan and draws, and the trials so far.

    `known`: what results depend on, as JSON; parts are kept under its fingerprint. `wanted`: the plan before a budget
    in minutes cut it. `say(text)` hears of every finished attack.
    """

    def __init__(
        self, claim: Claim, bench: Bench, known: dict[str, Any], budget: Budget, draws: Draws,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.claim, self.bench, self.budget, self.draws, self.say = claim, bench, budget, draws, say
        self.known, self.key = known, _store.fingerprint(known)[:16]
        self.scene: Scene = bench.scene
        self.plan = self.wanted = list(self.scene.plan.values())
        self.trials: list[Trial] = []
        # What went wrong with answers outside of trials, and how often.
        self.faults: Counter[str] = Counter()

    @property
    def y(self) -> Tensor:
        """The labels `(N,)` of the images that the trials cover, on the CPU: all unless the plan was cut."""
        return self.scene.y[: self.trials[0].n].cpu()

    def under(self, *threats: Threat) -> list[Trial]:
        """Return the trials under any of some threats, the clean images first."""
        return [trial for trial in self.trials if any(map(trial.attack.within, threats))]

    def strongest(self, threat: Threat) -> Trial | None:
        """Return the trial of an attack of many steps that left the fewest right under a threat; None without any."""
        iterative = [t for t in self.under(threat) if t.attack.iterative and "doubled" not in t.attack.roles]
        return min(iterative, key=lambda t: share(self.draws.chosen(t.correct)), default=None)

    def once(self, key: str, run: Callable[..., Value], *args: Any) -> Value:
        """Return what `run(scene, *args)` gives, kept under `key`."""
        return self.bench.once(f"{self.key} {key}", run, *args)

    def run(self, most: int) -> None:
        """Make all attacks: with gradients first, each threat's strongest with twice the steps, then what only asks.

        `most`: images of the doubled ones. What only asks passes over images that are broken under the same threat.
        """
        gradient, asks = ([attack for attack in self.plan if attack.asks is asking] for asking in (False, True))
        alive = torch.ones(len(self.scene.y), dtype=torch.bool)
        self.bench.ahead([part for attack in gradient for part in self._parts(attack, alive)])
        self.trials = [self._try(attack, alive) for attack in gradient]
        for threat in self.claim.threats:
            if (strongest := self.strongest(threat)) is not None and strongest.attack.method is not None:
                once, twice = strongest.attack, strongest.attack.method.doubled()
                name, roles = f"{once.name} doubled", once.roles | {"doubled"}
                again = dataclasses.replace(once, name=name, roles=roles, method=twice, n=min(strongest.n, most))
                self.trials.append(self._try(again, alive, of=once.name))
        before = {threat: self.under(threat) for threat in self.claim.threats}
        standing = {threat: self._standing(threat) for threat in self.claim.threats}
        asking = [(attack, attack.threat or self.claim.threats[0]) for attack in asks]
        self.bench.ahead([part for attack, threat in asking for part in self._parts(attack, standing[threat])])
        for attack, threat in asking:
            self.trials.append(completed(self._try(attack, standing[threat]), before[threat], self.draws))
        # The clean images first, then threat by threat.
        self.trials.sort(key=lambda trial: trial.attack.threat is not None and self._place(trial.attack.threat))

    def labels(self, key: str, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the defence's answers `(R, n)` to other inputs under other seeds, part by part kept under `key`."""
        keyed = {f"{self.key} {key} / {i * CHUNK}": part for i, part in enumerate(x.split(CHUNK))}
        values = self.bench.get([Part(key=key, run=_labels, args=(part, tuple(seeds))) for key, part in keyed.items()])
        for value in values:
            self.faults.update(value["faults"])
        return torch.cat([torch.tensor(value["labels"]) for value in values], 1)

    def worst_cases(self) -> dict[str, WorstCase]:
        """Return the worst case of every threat by its norm, and of several threats their `union` as the last."""
        found = {threat.norm: self.worst_case(threat) for threat in self.claim.threats}
        return found | ({UNION: union(list(found.values()))} if self.claim.several else {})

    def worst_case(self, threat: Threat) -> WorstCase:
        """Return the worst case of the trials under a threat, of which the first covers all images.

        Without randomness it is the trials' own. Else the best few of every image on the draws of the trials are
        compared on all seeds that choose, and the one with the fewest right answers is asked under those that count.
        """
        draws, trials, y = self.draws, self.under(threat), self.y
        places = ranked(trials, draws)[: self.budget.finalists]
        chosen = places[0]
        before = picked([draws.chosen(trial.correct) for trial in trials], chosen).double().mean(0)
        if draws.choose and len(places) > 1:
            finals = [candidates(trials, place) for place in places]
            answers = [self._told(f"finalist {i}", threat, final, draws.choose) for i, final in enumerate(finals)]
            shares = torch.stack([(labels == y).double().mean(0) for labels in answers])
            shares, order = shares.sort(dim=0, stable=True)
            chosen, before = places.gather(0, order[:1])[0], shares[0]
        worst = candidates(trials, chosen)
        labels = picked([trial.labels for trial in trials], chosen)
        if draws.count:
            labels = self._told("worst case", threat, worst, draws.count)
        own = torch.tensor([i for i, trial in enumerate(self.trials) if trial.attack.within(threat)])
        return WorstCase(
            chosen=own[chosen], adversarials=worst, labels=labels, correct=labels == y, seeds=draws.count, before=before
        )

    def _told(self, key: str, threat: Threat, x: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.labels(self.claim.titled(key, threat), x, seeds)

    def _place(self, threat: Threat) -> int:
        return 1 + self.claim.threats.index(threat)

    def _standing(self, threat: Threat) -> Tensor:
        """Return `(N,)` bool: the images that no trial under a threat has broken in all draws that choose."""
        trials, y = self.under(threat), self.y
        alive = torch.ones(len(y), dtype=torch.bool)
        for trial in trials:
            alive[: trial.n] &= self.draws.chosen(trial.correct).any(0)
        fallen = (~alive).nonzero()[:, 0]
        # Only those that fell in all of the trials' own draws are asked about again.
        if self.draws.choose and len(fallen):
            again = candidates(trials, ranked(trials, self.draws)[0])[fallen.to(self.scene.device)]
            alive[fallen] = (self._told("fallen", threat, again, self.draws.choose) == y[fallen]).any(0)
        return alive

    def _parts(self, attack: Planned, standing: Tensor, of: str | None = None) -> list[Part]:
        """Return for every chunk of an attack's images what makes the candidates and what asks about them."""
        assert self.scene.seeds == self.draws.seeds
        # What was made on a network alone serves every defence of it.
        shared = {"images": self.known["images"], "base": self.known["networks"], "version": VERSION}
        whose, parts = shared if "transfer" in attack.roles else self.known, []
        for part in chunks(attack.n, CHUNK):
            rows = standing[part]
            key = _store.fingerprint([whose, attack.short, attack.told(), part.start, rows.tolist()])
            args, cost = (of or attack.name, attack.method, part, rows), float(attack.calls() * int(rows.sum()))
            made = Part(key=key, run=_attacked, args=args, about=attack.short, cost=cost)
            asked = Part(key=f"{self.key} {attack.name} / {part.start} / {key[:16]}", run=_asked, after=(made,))
            parts += [made, asked]
        return parts

    def _try(self, attack: Planned, standing: Tensor, of: str | None = None) -> Trial:
        """Run an attack on those of its first n images that are `standing` `(N,)`, and test what it finds."""
        values = self.bench.get(self._parts(attack, standing, of))
        made, asked = values[::2], values[1::2]

        def column(name: str) -> Tensor:
            return torch.cat([torch.tensor(value[name]) for value in asked], -1)

        labels, base_labels, y = column("labels"), column("base"), self.scene.y[: attack.n].cpu()
        senses = asked[0]["familiarity"] is not None
        trial = Trial(
            attack=attack, labels=labels, correct=labels == y, base_labels=base_labels, base_correct=base_labels == y,
            adversarials=torch.cat([value["x"].to(self.scene.x) for value in made]), attempted=standing[: attack.n],
            familiarity=column("familiarity") if senses else None, foreign=column("foreign") if senses else None,
            outside=sum(int(value["outside"]) for value in made), losses=made[0]["losses"].tolist(),
            faults=sum((Counter(value["faults"]) for value in asked), Counter()),
            seconds=sum(value["seconds"] for value in asked) / attack.n,
            base_seconds=sum(value["base_seconds"] for value in asked) / attack.n,
        )  # fmt: skip
        mine = trial.correct[:, trial.attempted]
        told = f"{share(mine):.3f} right of {mine.shape[1]}" if mine.numel() else "no image still stands"
        self.say(f"{attack.name}: {told}")
        return trial


def _attacked(scene: Scene, name: str, method: Attack | None, part: slice, rows: Tensor) -> Value:
    """Return what an attack of the plan finds for a part of the images, made on its `rows` `(n,)` bool alone."""
    x, y = scene.x[part], scene.y[part]
    points, losses, outside = x.clone(), torch.zeros(1, dtype=torch.float64), 0
    if method is not None and bool(rows.any()):
        at = rows.to(x.device)
        points[at], curves, outside = scene.plan[name].by(method)(x[at], y[at])
        losses = torch.nan_to_num(curves.double().cpu(), posinf=0.0, neginf=0.0).mean(1)
    return {"x": points, "losses": losses, "outside": torch.tensor(outside)}


def _asked(scene: Scene, made: Value) -> Value:
    """Return what the defence and its base answer to candidates."""
    subject, x = scene.subject, made["x"].to(scene.x)
    before = subject.faults.copy()
    labels, seconds = subject.labels(x, scene.seeds)
    base_labels, base_seconds = scene.base.labels(x)
    sense = subject.sense(x)
    return {
        "labels": labels.tolist(), "base": base_labels.tolist(), "seconds": seconds, "base_seconds": base_seconds,
        "familiarity": None if sense is None else sense.p_value.tolist(),
        "foreign": None if sense is None else sense.foreign.tolist(), "faults": dict(subject.faults - before),
    }  # fmt: skip


def _labels(scene: Scene, x: Tensor, seeds: tuple[int, ...]) -> Value:
    before = scene.subject.faults.copy()
    labels = scene.subject.labels(x.to(scene.x), seeds)[0].tolist()
    return {"labels": labels, "faults": dict(scene.subject.faults - before)}


def union(cases: Sequence[WorstCase]) -> WorstCase:
    """Return the worst of the worst cases of several threats: per image that with the fewest right answers.

    Of a randomised defence they are compared on the draws that count. Only so no image's union is above what any threat
    leaves of it, nor below what all of them take together; it leans low, by as much as the choice is made by chance. Of
    equals, the fewest right on the draws that choose, then over all images, then the first.
    """
    right = torch.stack([case.correct.double().mean(0) for case in cases])
    # Less than any difference of shares over draws, and again less.
    chosen = (right + 1e-4 * torch.stack([case.before for case in cases]) + 1e-8 * right.mean(1)[:, None]).argmin(0)
    return WorstCase(
        chosen=_picked([case.chosen for case in cases], chosen),
        adversarials=_picked([case.adversarials for case in cases], chosen),
        labels=picked([case.labels for case in cases], chosen),
        correct=picked([case.correct for case in cases], chosen),
        seeds=cases[0].seeds,
        before=_picked([case.before for case in cases], chosen),
    )


def ranked(trials: Sequence[Trial], draws: Draws) -> Tensor:
    """Return `(len(trials), N)` the places of trials, per image the one with the fewest right answers first.

    Of equals, one that leaves fewer right over all images, then the last; a trial that did not attempt an image comes
    last.
    """
    shares = torch.full((len(trials), trials[0].n), torch.inf, dtype=torch.float64)
    for row, trial in zip(shares, trials, strict=True):
        mean = draws.chosen(trial.correct).double().mean(0)
        # Less than any difference of shares over draws.
        row[: trial.n] = torch.where(trial.attempted, mean + 1e-6 * mean.mean(), torch.inf)
    least, order = shares.flip(0).sort(dim=0, stable=True)
    # Where few attacks attempted an image, the best of them stands in for those that did not.
    order = torch.where(least.isinf(), order[:1], order)
    return len(trials) - 1 - order


def worst(trials: Sequence[Trial], draws: Draws) -> Tensor:
    """Return `(R, N)` bool, whether the defence was right under the worst trial for each image."""
    return picked([trial.correct for trial in trials], ranked(trials, draws)[0])


def picked(values: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Return `(R, N)` from `values`, each `(R, n)`: column i is that of `values[chosen[i]]`."""
    return _picked([value.T for value in values], chosen).T


def candidates(trials: Sequence[Trial], chosen: Tensor) -> Tensor:
    """Return `(N, *S)`, the adversarial example of the trial `chosen` `(N,)` for each image."""
    return _picked([trial.adversarials for trial in trials], chosen)


def _picked(values: Sequence[Tensor], chosen: Tensor) -> Tensor:
    out = values[0].clone()
    for i, value in enumerate(values):
        mine = (chosen == i).nonzero()[:, 0].to(out.device)
        out[mine] = value[mine]
    return out


def completed(trial: Trial, before: Sequence[Trial], draws: Draws) -> Trial:
    """Return a trial whose images that were passed over count as under the worst of the trials `before`."""
    known = worst(before, draws)[:, : trial.n]
    return dataclasses.replace(trial, correct=torch.where(trial.attempted, trial.correct, known))
