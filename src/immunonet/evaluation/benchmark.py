"""Several defences under the same attacks, in parts that are kept, so that a long run can be continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunonet import _store
from immunonet.attacks import ASK, FGSM, PGD, SoftClones, SoftCount, SoftNeighbours
from immunonet.attacks._surrogate import fewest_examples
from immunonet.defences.dknn import DkNN
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.defences.rails import RAILS
from immunonet.evaluation.asking import (
    answers,
    describe,
    describe_attack,
    describe_surrogate,
    is_randomised,
)
from immunonet.evaluation.identity import identity
from immunonet.evaluation.journal import Journal
from immunonet.evaluation.records import VERSION, Row
from immunonet.features.names import Layer

# What the attacker differentiates, for every attack there is; without one, the least.
KNOWS = {"none": "base", "fgsm": "base", "pgd": "base", "soft-knn": "defence", "soft-clones": "defence"}
# Votes that know a defence; that of clones is only for RAILS.
SURROGATES: dict[str, Callable[[Any], nn.Module]] = {"soft-knn": SoftNeighbours, "soft-clones": SoftClones}
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 75, 200)
# Those whose soft counts are attacked when the number is chosen.
COUNTED = (5, 20, 75, 200)
METRICS: tuple[Literal["cosine", "euclidean"], ...] = ("cosine", "euclidean")
TUNING_IMAGES = 300

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Outcome:
    """A row, what it was counted from, `correct` `(R, n)` bool, and which images looked `foreign`, `(n,)` or None."""

    row: Row
    correct: Tensor
    foreign: Tensor | None


class Benchmark:
    """The same images and attacks for several defences; finished parts and adversarial examples stay in a folder.

    `folder` gets `parts.jsonl` and `adversarials/`. `settings` (JSON) go into every row, `dataset` and `model` among
    them, and must hold all that results depend on and no other argument tells. `base`: the undefended network.
    `repertoire` and `calibration`: the `(x, y)` that defences are fitted on; `test`: those that
    they are asked about. `pgd`: the attack's settings; FGSM takes its `eps`. `seeds`: the runs of a randomised
    defence. `chunk`: images per part. `advance(steps)` is called as work is done: a step per image, and one per
    candidate of a tuning.

    Raises ValueError where the folder holds results of other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        base: nn.Module,
        repertoire: Examples,
        calibration: Examples,
        test: Examples,
        pgd: PGD,
        seeds: Sequence[int],
        chunk: int = 100,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        self.folder = folder
        own = {
            "pgd": describe_attack(pgd)["attack"],
            "seeds": list(seeds),
            "chunk": chunk,
            "version": VERSION,
            "base": identity(base),
            "examples": [_store.digest(repertoire), _store.digest(calibration)],
        }
        self.journal = Journal(folder / "parts.jsonl", settings | own)
        self.base, self.repertoire, self.calibration, self.test = base, repertoire, calibration, test
        self.pgd = pgd
        self.attacks: dict[str, FGSM | PGD] = {
            "fgsm": FGSM(eps=pgd.eps, norm=pgd.norm, bounds=pgd.bounds),
            "pgd": pgd,
            **dict.fromkeys(SURROGATES, pgd),
        }
        self.seeds, self.chunk = tuple(seeds), chunk
        self.advance = advance
        self._settings = settings
        self._parts = [slice(i, min(i + chunk, len(test[1]))) for i in range(0, len(test[1]), chunk)]
        # More images may be asked for later: each part is known by its own.
        self._images = {part.start: _store.digest(values[part] for values in test)[:12] for part in self._parts}

    def run(
        self, kind: str, layer: str | None, defence: nn.Module, attacks: Sequence[str], **extra: Any
    ) -> dict[str, Outcome]:
        """Return the outcome of each attack on `defence`, which is fitted here if a part of the answer is missing.

        `kind` and `layer`, several as "fc1+fc2", name it in the rows and on disk; `extra` is added to the settings.
        """
        name = kind if layer is None else f"{kind} {layer}"
        settings = describe(defence) | {"layers": [] if layer is None else layer.split("+")} | extra
        # Layers may be functions, of which a name says little.
        self.journal.agree(f"settings of {name}", settings | {"layer": identity(getattr(defence, "_layers", ()))})
        outcomes = {}
        for attack in attacks:
            vote: nn.Module | None = None
            for part in self._parts:
                if (key := self._key(name, attack, part)) not in self.journal:
                    self._fit(defence)
                    if attack in SURROGATES and vote is None:
                        vote = SURROGATES[attack](defence)  # it refuses a defence that it does not know
                        if (told := f"{attack} of {name}") not in self.journal:
                            self.journal.add(told, describe_surrogate(vote))
                    self.journal.add(key, self._answer(defence, self._adversarials(name, attack, vote, part)))
                self.advance(part.stop - part.start)
            known = self.journal[f"{attack} of {name}"] if attack in SURROGATES else {}
            outcomes[attack] = self._outcome(kind, name, attack, is_randomised(defence), settings | known)
        return outcomes

    def tune_dknn(self, layer: str, layers: Layer | Sequence[Layer], *, knowing: bool = False) -> dict[str, Any]:
        """Return the `neighbours` and `metric` with which DkNN does best at the layers called `layer`.

        `accuracy` is the mean over the first 300 calibration images as they are and under PGD on the base; `knowing`:
        the share of images (as many as are tested, at most those 300) that are right as they are, under that PGD, and
        under PGD on ASK, on a soft vote of 20 neighbours per class, and on soft counts of 5, 20, 75 and 200. The fewest
        neighbours win a tie, then cosine.
        """
        few = min(TUNING_IMAGES, len(self.test[1])) if knowing else TUNING_IMAGES
        key = f"tuning dknn {layer} on {few}{' knowing' if knowing else ''}"
        if key in self.journal:
            self.advance(len(METRICS) * len(NEIGHBOURS))
        else:
            x, y = (values[:few].to(self.test[0].device) for values in self.calibration)
            versions = [x, self.pgd(self.base, x, y).adversarials]
            scores: dict[tuple[int, Literal["cosine", "euclidean"]], float] = {}
            for metric in METRICS:
                counts = [k for k in NEIGHBOURS if k <= len(self.repertoire[1])]
                dknn = DkNN(self.base, layers, neighbours=counts[-1], metric=metric)
                self._fit(dknn)
                votes = _votes(dknn) if knowing else []
                attacked = [*versions, *(self.pgd(vote, x, y).adversarials for vote in votes)]
                found = neighbour_scores(dknn, counts, attacked, y, worst=knowing)
                scores |= {(k, metric): score for k, score in found.items()}
                self.advance(len(NEIGHBOURS))
            (k, metric), accuracy = max(scores.items(), key=lambda item: (item[1], -item[0][0], item[0][1] == "cosine"))
            best = {"neighbours": k, "metric": metric, "accuracy": accuracy, "images": len(y), "knowing": knowing}
            self.journal.add(key, best)
        return dict(self.journal[key])

    def _fit(self, defence: nn.Module) -> None:
        if isinstance(defence, NeighbourDefence) and not defence.feature_maps:
            defence.fit(*self.repertoire, calibration=self.calibration)

    def _adversarials(self, name: str, attack: str, vote: nn.Module | None, part: slice) -> Tensor:
        x, y = self.test[0][part], self.test[1][part]
        if attack == "none":
            return x
        of = f" of {name}" if attack in SURROGATES else ""
        file = _store.slug(f"{attack}{of} {part.start}-{part.stop} {self._images[part.start]}")
        path = self.folder / "adversarials" / f"{file}.safetensors"
        if not path.exists():
            target = self.base if vote is None else vote
            found = self.attacks[attack](target, x, y)
            _store.write_tensors(path, {"x": found.adversarials})
        return _store.read_tensors(path)["x"].to(x.device)

    def _answer(self, defence: nn.Module, x: Tensor) -> dict[str, Any]:
        labels, seconds = answers(defence, x, self.seeds if is_randomised(defence) else ())
        foreign = None
        if isinstance(defence, RAILS | DkNN):
            foreign = defence.foreign(x).tolist()
        return {"labels": labels.tolist(), "foreign": foreign, "seconds": seconds}

    def _key(self, name: str, attack: str, part: slice) -> str:
        return f"{name} / {attack} / {part.start}-{part.stop} / {self._images[part.start]}"

    def _outcome(self, kind: str, name: str, attack: str, randomised: bool, settings: dict[str, Any]) -> Outcome:
        parts = [self.journal[self._key(name, attack, part)] for part in self._parts]
        labels = torch.cat([torch.tensor(part["labels"]) for part in parts], 1)
        correct = labels == self.test[1].cpu()
        foreign = None if parts[0]["foreign"] is None else torch.tensor([f for part in parts for f in part["foreign"]])
        method, n = self.attacks.get(attack), correct.shape[1]
        row = Row.of(
            correct,
            dataset=self._settings["dataset"],
            defence=kind,
            attack=attack,
            knows=KNOWS[attack],
            eps=method.eps if method else 0.0,
            norm=self.pgd.norm,
            seconds_per_image=sum(part["seconds"] for part in parts) / n,
            seeds=self.seeds if randomised else (),
            settings=self._settings | {"chunk": self.chunk, "slice": [0, n]} | settings | describe_attack(method),
        )
        return Outcome(row, correct, foreign)


def neighbour_scores(
    dknn: DkNN, counts: Sequence[int], versions: Sequence[Tensor], y: Tensor, *, worst: bool = False
) -> dict[int, float]:
    """Return the accuracy of a fitted DkNN for each number of neighbours: a mean over `versions` of the inputs of `y`.

    `worst`: an input counts only if it is right in all versions. None of `counts` is above `dknn.neighbours`.
    """
    right = torch.stack([dknn.predict_each(version, counts) == y for version in versions])
    scores = (right.all(0) if worst else right.float().mean(0)).float().mean(1)
    return dict(zip(counts, scores.tolist(), strict=True))


def _votes(dknn: DkNN) -> list[nn.Module]:
    """Return differentiable votes of few to many neighbours: who knows DkNN fits the attack to its number."""
    counts = [SoftCount(dknn, neighbours=k) for k in COUNTED if k <= dknn.neighbours]
    return [ASK(dknn), SoftNeighbours(dknn, neighbours=min(20, fewest_examples(dknn))), *counts]
