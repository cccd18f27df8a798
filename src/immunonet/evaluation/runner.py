"""Attacks run one after the other, part by part; what is done is kept, so that it can be continued."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _check, _store
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.evaluation.asking import LogProbabilities, Subject
from immunonet.evaluation.journal import Journal
from immunonet.evaluation.records import VERSION
from immunonet.evaluation.suite import Planned

CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What an attack found and what came of it, for the first n images.

    `adversarials` `(n, *S)`: the candidates; an image that was not `attempted` `(n,)` keeps itself. `correct`
    `(R, n)`: whether the defence was right, one run per seed (selection first, then report; one run in all without
    randomness). `base_labels`, `base_correct` `(1, n)`: the same of the undefended network. `familiarity` `(n,)`: the
    p-value of the candidate's distance to its neighbours, or None; `foreign` `(n,)`: whether it is too small, or None.
    `outside`: how many candidates were left out because they broke the threat model. `losses`: the mean loss curve of
    the first part. `faults`: what went wrong with answers, and how often. `seconds`, `base_seconds`: of one answer.
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
            self,
            labels=self.base_labels,
            correct=self.base_correct,
            seconds=self.base_seconds,
            familiarity=None,
            foreign=None,
        )


class Runner:
    """Attacks images, asks the defence and its base about what comes out, and keeps all that in a folder.

    `subject`, `base`: who is asked, the former under `seeds`. `x`, `y`: the images. `settings` (JSON) must hold what
    the results depend on; without a `folder` nothing is kept. `told(text)` hears of every finished attack.
    """

    def __init__(
        self,
        subject: Subject,
        base: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        seeds: Sequence[int],
        settings: dict[str, Any],
        folder: Path | None,
        told: Callable[[str], None],
    ) -> None:
        self.subject, self.base, self.x, self.y = (
            subject,
            Subject(LogProbabilities(base), classes=subject.classes),
            x,
            y,
        )
        self.network = base
        self.seeds, self.settings, self.folder, self.told = tuple(seeds), settings, folder, told
        name = f"{settings['name']}-{_store.fingerprint(settings)[:12]}.jsonl"
        self.journal = Journal(folder / name, settings) if folder else None
        # What went wrong with answers outside of trials, and how often.
        self.faults: Counter[str] = Counter()

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the JSON value kept under `key`, made now if there is none."""
        if self.journal is None:
            return make()
        if key not in self.journal:
            self.journal.add(key, make())
        return self.journal[key]

    def run(self, attack: Planned, standing: Tensor | None = None) -> Trial:
        """Run an attack on its first n images, or on the `standing` `(N,)` among them, and test what it finds."""
        parts = [self._part(attack, slice(i, min(i + CHUNK, attack.n)), standing) for i in range(0, attack.n, CHUNK)]
        labels = torch.cat([torch.tensor(kept["labels"]) for kept, _ in parts], 1)
        base_labels = torch.cat([torch.tensor(kept["base"]) for kept, _ in parts], 1)
        y = self.y[: attack.n].cpu()
        defence = self.subject.defence
        familiarity = foreign = None
        if isinstance(defence, NeighbourDefence):
            familiarity = torch.tensor([p for kept, _ in parts for p in kept["familiarity"]])
            foreign = familiarity.le(defence.false_alarm)
        tested = Trial(
            attack=attack,
            adversarials=torch.cat([found for _, found in parts]),
            attempted=torch.tensor([flag for kept, _ in parts for flag in kept["attempted"]]),
            labels=labels,
            correct=labels == y,
            base_labels=base_labels,
            base_correct=base_labels == y,
            familiarity=familiarity,
            foreign=foreign,
            outside=sum(kept["outside"] for kept, _ in parts),
            losses=parts[0][0]["losses"],
            faults=sum((Counter(kept["faults"]) for kept, _ in parts), Counter()),
            seconds=sum(kept["seconds"] for kept, _ in parts) / attack.n,
            base_seconds=sum(kept["base_seconds"] for kept, _ in parts) / attack.n,
        )
        mine = tested.correct[:, tested.attempted].double()
        share = f"{float(mine.mean()):.3f} right of {mine.shape[1]}" if mine.numel() else "no image still stands"
        self.told(f"{attack.name}: {share}")
        return tested

    def labels(self, key: str, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the defence's answers `(R, n)` to other inputs under other seeds, part by part kept under `key`."""
        parts = [
            self.once(f"{key} / {i * CHUNK}", functools.partial(self._asked, part, seeds))
            for i, part in enumerate(x.split(CHUNK))
        ]
        for part in parts:
            self.faults.update(part["faults"])
        return torch.cat([torch.tensor(part["labels"]) for part in parts], 1)

    def _asked(self, x: Tensor, seeds: Sequence[int]) -> dict[str, Any]:
        before = self.subject.faults.copy()
        labels = self.subject.labels(x, seeds)[0].tolist()
        return {"labels": labels, "faults": dict(self.subject.faults - before)}

    def correct(self, x: Tensor, y: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return whether the defence is right about other inputs, `(R, n)`."""
        return self.subject.labels(x, seeds)[0] == y.cpu()

    def _part(self, attack: Planned, part: slice, standing: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        x, y = self.x[part], self.y[part]
        chosen = torch.ones(len(x), dtype=torch.bool) if standing is None else standing[part]
        key = f"{attack.name} / {part.start}"
        found, losses, outside = self._adversarials(attack, x, y, chosen, key)

        def ask() -> dict[str, Any]:
            before = self.subject.faults.copy()
            labels, seconds = self.subject.labels(found, self.seeds)
            base_labels, base_seconds = self.base.labels(found)
            defence = self.subject.defence
            return {
                "labels": labels.tolist(),
                "base": base_labels.tolist(),
                "familiarity": defence.familiarity(found).tolist() if isinstance(defence, NeighbourDefence) else None,
                "attempted": chosen.tolist(),
                "outside": outside,
                "losses": losses,
                "seconds": seconds,
                "base_seconds": base_seconds,
                "faults": dict(self.subject.faults - before),
            }

        return self.once(key, ask), found

    def _adversarials(
        self, attack: Planned, x: Tensor, y: Tensor, chosen: Tensor, key: str
    ) -> tuple[Tensor, list[float], int]:
        """Return candidates like `x`, the mean loss curve, and how many candidates broke the threat model."""
        path = None
        if attack.method is None:
            return x, [0.0], 0
        if self.folder is not None:
            # What was made on a network alone serves every defence of it.
            whose = (
                self.settings
                if attack.kind != "transfer"
                else {"images": self.settings["images"], "base": self.settings["networks"], "version": VERSION}
            )
            known = _store.fingerprint([whose, key, describe(attack), chosen.tolist()])
            path = self.folder / "adversarials" / f"{attack.name}-{known[:16]}.safetensors"
            if path.exists():
                kept = _store.read_tensors(path)
                return kept["x"].to(x), kept["losses"].tolist(), int(kept["outside"])
        found, losses, outside = x.clone(), [0.0], 0
        if bool(chosen.any()):
            found[chosen], curves, outside = attack(x[chosen], y[chosen])
            losses = torch.nan_to_num(curves.double().cpu(), posinf=0.0, neginf=0.0).mean(1).tolist()
        if path is not None:
            _store.write_tensors(
                path,
                {"x": found, "losses": torch.tensor(losses, dtype=torch.float64), "outside": torch.tensor(outside)},
            )
        return found, losses, outside


def describe(attack: Planned) -> dict[str, Any]:
    """Return what a record says about an attack: method, settings, target, and its budget per image."""
    if attack.method is None:
        return {}
    settings = {k: v.pairs() if isinstance(v, _check.Bounds) else v for k, v in vars(attack.method).items()}
    return {
        "attack": {"method": type(attack.method).__name__, **settings},
        "target": describe_target(attack.target),
        "calls": attack.calls(),
    }


def describe_target(target: object) -> dict[str, Any]:
    """Return the names, and what numbers there are, of the model that an attack runs on."""
    known = {
        key: value
        for key, value in (vars(target).items() if isinstance(target, nn.Module) else ())
        if not key.startswith("_") and key != "training" and _plain(value)
    }
    return {"model": type(target).__name__} | known


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
