"""Attacks that only ask, behind a sentinel: what it stops, what it costs honest users, and ways around it."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from immunonet import _store, attacks, models
from immunonet.attacks._base import Attack, Refusing
from immunonet.attacks.norms import NORMS
from immunonet.evaluation.bench import Part, Value
from immunonet.evaluation.campaign import Campaign, Scene
from immunonet.evaluation.suite import light
from immunonet.evaluation.threats import Threat
from immunonet.memory.sentinel import Sentinel
from immunonet.statistics import wilson

# Near copies of every clean image that honest users send; how far these are turned, in degrees, and moved, in pixels.
COPIES, TURNED, MOVED = 10, 10.0, 3


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an attacker asks: from so many `sources`, with `between` clean queries of others before each of its own.

    `tries`: how often a refused proposal is drawn anew (OARS). `copies`: disguised copies that each query is asked by;
    0: the query itself.
    """

    tries: int = 1
    copies: int = 0
    sources: int = 1
    between: int = 0


Asker = Literal["hop-skip-jump", "nes", "square"]
Asking = Literal["plain", "oars", "blinding", "sources", "slow"]

WAYS: Mapping[Asking, Way] = {
    "plain": Way(), "oars": Way(tries=10), "blinding": Way(copies=4), "sources": Way(sources=100),
    "slow": Way(between=99),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Assault:
    """An attack by asking: its `method`, the `threat` that it keeps to, its `way` to ask, and its budget of `queries`.

    `refuses`: whether what is flagged is refused, or answered all the same.
    """

    method: Attack
    threat: Threat
    way: Way
    queries: int
    refuses: bool

    def told(self) -> dict[str, Any]:
        """Return all of it, as JSON."""
        way = dataclasses.asdict(self.way)
        return {"attack": self.method.describe(), "way": way, "queries": self.queries, "refuses": self.refuses}


def assaults(method: Attack, threat: Threat, way: Asking, queries: int) -> tuple[Assault, Assault]:
    """Return an attack where flags only mark, and where what is flagged is refused.

    Where nothing is refused, who would draw anew what was, or asks from many sources, asks as anybody does.
    """
    own = WAYS[way]
    plain = dataclasses.replace(own, tries=1, sources=1)
    common: dict[str, Any] = {"method": method, "threat": threat, "queries": queries}
    return Assault(way=plain, refuses=False, **common), Assault(way=own, refuses=True, **common)


def askers(threat: Threat, queries: int) -> dict[str, Attack]:
    """Return the attacks under a threat that spend about so many queries on each image, or a little more."""
    common: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "bounds": threat.bounds, "seed": threat.seed}
    found: dict[str, Attack] = {"nes": attacks.NES(step=threat.eps / 4, queries=queries, **common)}
    if threat.norm in (attacks.Square.norms or NORMS):
        found["square"] = attacks.Square(queries=queries, **common)
    if threat.norm in (attacks.HopSkipJump.norms or NORMS):
        # Iterations of 100 times their root, and about 40 for steps and lines.
        iterations = max(1, round((queries / 90) ** (2 / 3)))
        found["hop-skip-jump"] = attacks.HopSkipJump(iterations=iterations, **common)
    return dict(sorted(found.items()))


class Won(Exception):
    """Ends an attack that has what it wants."""


class Guarded(Refusing):
    """A model behind a sentinel, as one attacker meets it who attacks an image `x` `(1, *S)` labelled `y` `(1,)`.

    It answers as many queries as the assault has, and nothing after them. `Won` is raised where an answer was wrong
    within the threat. `traffic` `(n, D)`: signatures of others' queries. `scores`: those of its own, so far.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], sentinel: Sentinel, x: Tensor, y: Tensor, assault: Assault,
        traffic: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.sentinel, self.x, self.y, self.traffic = model, sentinel, x, y, traffic
        self.threat, self.way, self.refuses, self.left = assault.threat, assault.way, assault.refuses, assault.queries
        self.asked = self.flags = 0
        # The numbers of the first query that was flagged, and of the first that won.
        self.flagged: int | None = None
        self.won: int | None = None
        self.scores: list[float] = []
        self._classes = 2

    def heard(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return answers to queries `(B, *S)`, and which there are."""
        answered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        kept = x[: self.left]
        flagged = self._flags(kept)
        answered[: len(kept)] = ~flagged if self.refuses else True
        rows = answered.nonzero()[:, 0]
        found = models.logits(self.model, x[rows]) if len(rows) else x.new_zeros(0, self._classes)
        self._classes = found.shape[1]
        logits = found.new_zeros(len(x), self._classes).index_copy(0, rows, found)
        near = NORMS[self.threat.norm].size(x[rows] - self.x) <= self.threat.eps * (1 + 1e-4) + 1e-6
        wins = rows[near & (found.argmax(1) != self.y)]
        if self.flagged is None and bool(flagged.any()):
            self.flagged = self.asked + 1 + int(flagged.nonzero()[0])
        if len(wins):
            self.won = self.asked + 1 + int(wins[0])
        self.flags += int(flagged.sum())
        self.asked, self.left = self.asked + len(kept), self.left - len(kept)
        if self.won is not None:
            raise Won
        return logits, answered

    def _flags(self, x: Tensor) -> Tensor:
        signatures = self.sentinel.signatures(x)
        if not (self.way.between or self.way.sources > 1):
            return self._judged(signatures)
        flags = []
        for i, one in enumerate(signatures.split(1)):
            number = self.asked + i
            if self.way.between and len(self.traffic):
                start = number * self.way.between + torch.arange(self.way.between, device=x.device)
                self.sentinel.take(self.traffic[start % len(self.traffic)])
            flags.append(self._judged(one, f"source {number % self.way.sources}"))
        return torch.cat([*flags, torch.zeros(0, dtype=torch.bool, device=x.device)])

    def _judged(self, signatures: Tensor, source: str = "unknown") -> Tensor:
        watched = self.sentinel.judge(signatures, source)
        self.scores += watched.score.tolist()
        return watched.flagged


def attacked(
    model: Callable[[Tensor], Tensor], sentinel: Sentinel, x: Tensor, y: Tensor, assault: Assault, traffic: Tensor
) -> dict[str, Any]:
    """Return what an attack on one image `x` `(1, *S)` came to: the queries `asked`, how many were flagged, and the
    number of the first that was `flagged` and of the first that `won`, or None.
    """
    guarded, way, threat = Guarded(model, sentinel.twin(), x, y, assault, traffic), assault.way, assault.threat
    target: Refusing = guarded
    if way.copies:
        target = attacks.Blinded(guarded, draws=way.copies, bounds=threat.bounds, seed=threat.seed)
    try:
        found = assault.method.persistent(way.tries)(target, x, y).adversarials
        # Who asked by disguised copies alone has not asked about what he found.
        if way.copies and not torch.equal(found, x):
            guarded.left = max(guarded.left, 1)
            guarded.heard(found)
    except Won:
        pass
    return {"asked": guarded.asked, "flags": guarded.flags, "flagged": guarded.flagged, "won": guarded.won}


def told(marked: list[dict[str, Any]], refused: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of one attack: outcomes per image where flags only mark, and where what is flagged is refused.

    `fell`: images that fall without a sentinel, or where it only marks. Of these, `stopped` stand where it refuses, and
    `flagged_first` were flagged before they fell. `fell_behind`: of all, those that fall where it refuses.
    """
    fell = [i for i, one in enumerate(marked) if one["won"] is not None]
    stands = [refused[i]["won"] is None for i in fell]
    first = [(marked[i]["flagged"] or math.inf) <= marked[i]["won"] for i in fell]
    flagged = [one["flagged"] for one in marked if one["flagged"] is not None]
    return {
        "n": len(marked), "fell": len(fell), "stopped": sum(stands), "flagged_first": sum(first),
        "fell_behind": sum(one["won"] is not None for one in refused),
        "stopped_share": sum(stands) / len(fell) if fell else None,
        "ci95": list(wilson(sum(stands), len(fell))) if fell else None,
        "never_flagged": len(marked) - len(flagged),
        "queries_until_flagged": statistics.median(flagged) if flagged else None,
        "queries_until_won": statistics.median([marked[i]["won"] for i in fell]) if fell else None,
        "queries": sum(one["asked"] for one in marked) / max(len(marked), 1),
    }  # fmt: skip


def honest(x: Tensor, bounds: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return what honest users send of clean images `(n, *S)` in a row, by name, `(n * COPIES, *S)` each.

    Near copies of each image, turned, moved or with the noise of a camera, and a film of it, of images that move by a
    pixel each. Inputs that are no images have noisy copies alone.
    """
    generator = torch.Generator().manual_seed(seed)
    many = x.repeat_interleave(COPIES, 0)
    disguise = functools.partial(attacks.Blinded, torch.nn.Identity(), draws=1, bounds=bounds, seed=seed)
    found = {"noise": disguise(degrees=0, zoom=0, shift=0, noise=0.02).disguised(many)}
    if x.ndim == 4:
        found["turned"] = disguise(degrees=TURNED, zoom=0, shift=0, noise=0).disguised(many)
        far = torch.randint(-int(MOVED), int(MOVED) + 1, (len(many), 2), generator=generator).tolist()
        found["moved"] = torch.stack([one.roll(tuple(by), (1, 2)) for one, by in zip(many, far, strict=True)])
        film = torch.arange(COPIES).repeat(len(x)).tolist()
        found["film"] = torch.stack([one.roll(by, 2) for one, by in zip(many, film, strict=True)])
    return found


def alarms(sentinel: Sentinel, streams: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return a row per stream of honest queries `(n, *S)`: how many were flagged, by a sentinel that begins anew each
    time from what it remembers.
    """
    rows = []
    for name, x in streams.items():
        flagged = int(sentinel.twin().watch(x).flagged.sum())
        rows.append(
            {
                "stream": name,
                "n": len(x),
                "flagged": flagged,
                "share": flagged / len(x),
                "ci95": list(wilson(flagged, len(x))),
            }
        )
    return rows


def identity(sentinel: Sentinel) -> list[Any]:
    """Return all that a sentinel's flags depend on, besides its model."""
    return [sentinel.settings(), _store.digest([sentinel.held()])]


def record(campaign: Campaign) -> dict[str, Any]:
    """Return what a campaign's sentinel does: a row per attack and way to ask, and one per stream of honest queries.

    The attacks are those that only ask, on the defence's light twin, one image at a time, each behind a sentinel that
    goes on from what it remembers now; the first images that are right.
    """
    scene, budget, bounds = campaign.scene, campaign.budget, campaign.claim.threats[0].bounds
    assert scene.sentinel is not None
    images = campaign.once("images of the sentinel", _standing, budget.black_box)
    rows = []
    for threat in campaign.claim.threats:
        for name, method in askers(threat, budget.queries).items():
            for way in WAYS:
                told_as = campaign.claim.titled(name, threat)
                parts = [
                    Part(
                        key=f"{campaign.key} sentinel {_store.fingerprint([told_as, assault.told(), image])}",
                        run=_attacked, args=(assault, image), about=f"sentinel {told_as} {way}",
                    )
                    for assault in assaults(method, threat, way, budget.queries)
                    for image in images
                ]  # fmt: skip
                values = campaign.bench.get(parts)
                marked, refused = values[: len(images)], values[len(images) :]
                row = {"attack": name, "way": way, "norm": threat.norm, "eps": threat.eps}
                rows.append(row | {"most": budget.queries} | told(marked, refused))
                campaign.say(f"{told_as}, {way}: {rows[-1]['stopped']} of {rows[-1]['fell']} stopped by the sentinel")
    streams = campaign.once("honest queries", _honest, bounds)
    return {"settings": scene.sentinel.settings(), "attacks": rows, "false_alarms": streams}


def _standing(scene: Scene, most: int) -> Value:
    labels = light(scene.subject).labels(scene.x)[0][0]
    return (labels == scene.y.cpu()).nonzero()[:most, 0].tolist()


def _attacked(scene: Scene, assault: Assault, image: int) -> Value:
    sentinel, one = scene.sentinel, slice(image, image + 1)
    assert sentinel is not None
    traffic = sentinel.signatures(torch.cat([scene.x[:image], scene.x[image + 1 :]]))
    return attacked(light(scene.subject), sentinel, scene.x[one], scene.y[one], assault, traffic)


def _honest(scene: Scene, bounds: Any) -> Value:
    assert scene.sentinel is not None
    return alarms(scene.sentinel, {"clean": scene.x} | honest(scene.x, bounds))
