"""What it gives and costs that the network answers where neighbours agree: curves, one row on test images, attackers.

python benchmarks/innate.py --data DIR --threads 1 --json results/innate.json
python benchmarks/innate.py --json results/innate.json --draw results/figures
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import common
from common import Row
from immunonet import RAILS, Maturation, _store, attacks, data, zoo
from immunonet.report import figures, study_figures
from immunonet.statistics import mcnemar, wilson

LEVELS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
TRAFFIC = (0.01, 0.1, 0.5)
# Validation images that calibrate, after those that are measured.
CALIBRATION = 2000
# Below every p-value, so that the network answers all.
EVERYTHING = 1e-9


class Place(NamedTuple):
    """A network, where its RAILS looks, the attack on the network, and how far clean accuracy may fall."""

    dataset: str
    model: str
    weights: str
    layer: str
    settings: dict[str, Any]
    attack: attacks.PGD
    slack: float


def attack(eps: float, iterations: int) -> attacks.PGD:
    return attacks.PGD(eps=eps, step=eps / 4, iterations=iterations, random_start=False)


# With generations: without them there is little work to spare.
EVOLVING = Maturation(generations=10)
HIDDEN = Maturation(neighbours=50, recombination=0.5, alignment=0, generations=3)
MNIST = ("mnist", "mnist", "weights/mnist.safetensors")
PLACES = {
    "MNIST, input": Place(*MNIST, "input", {"maturation": EVOLVING}, attack(60 / 255, 20), 0.005),
    "MNIST, pool1:4, T 200": Place(
        *MNIST, "pool1:4", {"maturation": Maturation(population=200, generations=10)}, attack(60 / 255, 20), 0.005
    ),
    "CIFAR-10, block2:4, cells there": Place(
        "cifar10", "residual", "weights/cifar10-hardened.safetensors", "block2:4",
        {"space": "block2:4", "maturation": HIDDEN}, attack(8 / 255, 10), 0.015,
    ),
}  # fmt: skip


class Subject(NamedTuple):
    """A fitted place: the network, RAILS that may be innate, and RAILS always."""

    place: Place
    net: nn.Module
    gated: RAILS
    always: RAILS
    validation: data.Images
    test: data.Images


class Asked(NamedTuple):
    """What images came to: p-values of the network's labels, whether it and RAILS are right, seconds of RAILS."""

    support: Tensor
    own: Tensor
    rails: Tensor
    seconds: float


def fitted(options: argparse.Namespace, name: str) -> Subject:
    """Return a place, fitted on the first training images and calibrated on those that the network did not see."""
    place = PLACES[name]
    net = zoo.build(place.model)
    zoo.load_weights(net, Path(place.weights) if options.weights is None else options.weights)
    train = data.load(place.dataset, "train", directory=options.data)
    test = data.load(place.dataset, "test", directory=options.data)
    test = test[data.sample(len(test.x), options.images)]
    keep, held = data.split(len(train.x))
    validation = train[held]
    few = train[keep[: options.examples]]
    held_out = validation[max(options.images, options.attacked) :][:CALIBRATION]
    gated = RAILS(net, place.layer, innate=0.05, seed=options.seed, **place.settings)
    gated.fit(few.x, few.y, calibration=(held_out.x, held_out.y))
    gated.predict(test.x[:2])  # compiles what is compiled
    return Subject(place, net, gated, gated.with_settings(innate=None), validation, test)


def core_seconds(ask: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """Return the processor's seconds per image, which other programs change little, and answers, by the hundred."""
    start = time.process_time()
    found = torch.cat([ask(part) for part in x.split(100)])
    return (time.process_time() - start) / len(x), found


def asked(subject: Subject, x: Tensor, y: Tensor) -> Asked:
    """Ask all about images."""
    seconds, labels = core_seconds(subject.always.predict, x)
    with torch.no_grad():
        own = torch.cat([subject.net(part).argmax(1) for part in x.split(100)])
    return Asked(subject.gated.support(x), own == y, labels == y, seconds)


def share(hits: Tensor, name: str) -> Row:
    """Return a share of images with its interval."""
    return {name: int(hits.sum()) / len(hits), f"{name}_ci95": list(wilson(float(hits.sum()), len(hits)))}


def level(clean: Asked, attacked: Asked, gate: float, alpha: float | None) -> Row:
    """Return the row of one p-value, None: RAILS always; seconds of traffic from those of its parts."""
    rows: Row = {}
    evolved = []
    for name, found in (("clean", clean), ("pgd", attacked)):
        innate = torch.zeros_like(found.own) if alpha is None else found.support > alpha
        rows |= share(torch.where(innate, found.own, found.rails), name) | share(innate, f"innate_{name}")
        evolved.append((1 - innate.float().mean().item()) * found.seconds)
    looked = 0.0 if alpha is None else gate
    costs = {f"seconds_{part:g}": looked + (1 - part) * evolved[0] + part * evolved[1] for part in TRAFFIC}
    return {"innate": "none" if alpha is None else alpha} | rows | costs


def chosen(rows: Sequence[Row], slack: float) -> Row:
    """Return the row of the p-value to use: of those with clean accuracy within `slack` of RAILS always and a tenth of
    its cost on 1 % attacked, as far as there are any, the most accurate under PGD, and of equals the cheapest.
    """
    always, *others = rows

    def worth(row: Row) -> tuple[bool, bool, float, float]:
        cheap = row["seconds_0.01"] <= 0.1 * always["seconds_0.01"]
        return row["clean"] >= always["clean"] - slack, cheap, row["pgd"], -row["seconds_0.01"]

    return max(others, key=worth)


def measured(options: argparse.Namespace, name: str, subject: Subject) -> list[Row]:
    """Return the curve of a place on validation images, then one row of test images at the p-value chosen on it."""
    place, few = subject.place, subject.validation[: options.images]
    clean, attacked = (asked(subject, x, few.y) for x in (few.x, place.attack(subject.net, few.x, few.y).adversarials))
    instant = subject.gated.with_settings(innate=EVERYTHING)
    gate, _ = core_seconds(instant.predict, few.x)
    rows = [level(clean, attacked, gate, alpha) for alpha in (None, *LEVELS)]
    best = chosen(rows, place.slack)
    about = {"place": name, "split": "validation", "n": len(few.x), "seconds_gate": gate}
    return [about | row | {"chosen": row is best} for row in rows] + tested(options, name, subject, best["innate"])


def tested(options: argparse.Namespace, name: str, subject: Subject, alpha: float) -> list[Row]:
    """Return rows of test images, RAILS always and at `alpha`; the seconds are those of traffic, 1 % of it attacked."""
    x, y = subject.test.x, subject.test.y
    found = subject.place.attack(subject.net, x, y).adversarials
    few = max(1, len(x) // 100)
    traffic = torch.cat([found[:few], x[few:]])
    rows: list[Row] = []
    for rails in (subject.always, subject.gated.with_settings(innate=alpha)):
        seconds, _ = core_seconds(rails.predict, traffic)
        row: Row = {"place": name, "split": "test", "n": len(x), "innate": rails.innate or "none"}
        for kind, images in (("clean", x), ("pgd", found)):
            labels = rails.predict(images)
            innate = torch.zeros_like(labels) > 0 if rails.innate is None else rails.support(images) > rails.innate
            row |= share(labels == y, kind) | share(innate, f"innate_{kind}")
        rows.append(row | {"seconds_0.01": seconds})
    return rows


def attackers(options: argparse.Namespace, name: str, subject: Subject, alpha: float) -> list[Row]:
    """Return what attackers leave of RAILS always and at `alpha`, each attack tested on both; the worst case last."""
    place, few = subject.place, subject.validation[: options.attacked]
    gated = subject.gated.with_settings(innate=alpha)
    strong: dict[str, Any] = {"eps": place.attack.eps, "iterations": place.attack.iterations, "seed": options.seed}
    ce, dlr = (attacks.APGD(loss=loss, **strong) for loss in ("ce", "dlr"))
    credible, soft = attacks.Credible(gated), attacks.SoftClones(gated)
    behind = attacks.Gated(gated, soft)
    tries: dict[str, tuple[Any, nn.Module]] = {
        "PGD on the network": (place.attack, subject.net),
        "PGD, credible": (place.attack, credible),
        "APGD, credible": (ce, credible),
        "APGD, soft clones": (ce, soft),
        "APGD, gated": (ce, behind),
        "APGD (dlr), gated": (dlr, behind),
    }
    rows, worst = [], [torch.ones(len(few.x)) > 0 for _ in range(2)]
    for told, (method, target) in {"none": (None, None), **tries}.items():
        x = few.x if method is None else method(target, few.x, few.y).adversarials
        right = [rails.predict(x) == few.y for rails in (subject.always, gated)]
        worst = [a & b for a, b in zip(worst, right, strict=True)]
        rows.append((told, right, share(gated.support(x) > alpha, "innate_share")))
    rows.append(("worst case", worst, {}))
    return [
        {"place": name, "split": "validation", "innate": alpha, "n": len(few.x), "attack": told}
        | share(right[0], "always") | share(right[1], "gated") | {"mcnemar_p": mcnemar(*right)} | more
        for told, right, more in rows
    ]  # fmt: skip


def draw(tables: Mapping[str, Any], folder: Path) -> None:
    """Write the figure of all curves."""
    panels = {}
    for table in tables.values():
        rows = [row for row in table["rows"] if row["split"] == "validation" and "clean" in row]
        if not rows:
            continue
        always, *rest = rows
        lines = {
            told: {"values": [row[key] for row in rest], "ci95": [row[f"{key}_ci95"] for row in rest]}
            for told, key in {
                "accuracy, clean": "clean", "accuracy, PGD on the network": "pgd",
                "answered by the network, clean": "innate_clean", "answered by the network, PGD": "innate_pgd",
            }.items()
        }  # fmt: skip
        costs = {
            f"cost, {100 * part:g} % attacked": {
                "values": [row[f"seconds_{part:g}"] / always[f"seconds_{part:g}"] for row in rest]
            }
            for part in TRAFFIC
        }
        panels[rows[0]["place"]] = (lines, costs)
    figures.save({"curves": study_figures.innate_curves(LEVELS, panels)}, folder, "innate")


def main() -> None:
    """Run the parts that are asked for, or draw what was measured."""
    p = common.parser(__doc__)
    p.set_defaults(weights=None)
    p.add_argument("--examples", type=int, default=20_000, help="of the repertoire")
    p.add_argument("--images", type=int, default=200, help="of validation, and of test")
    p.add_argument("--attacked", type=int, default=50, help="validation images for those who know the gate")
    p.add_argument("--level", type=float, help="the p-value that those attack; default: that chosen before")
    p.add_argument("--draw", type=Path, help="only draw the JSON file's figure into this folder")
    options = p.parse_args()
    if options.draw is not None:
        draw(_store.read_json(options.json)["tables"], options.draw)
        return
    common.use_threads(options.threads)
    subject = functools.cache(functools.partial(fitted, options))
    picked: dict[str, float] = {}

    def curve(name: str) -> list[Row]:
        rows = measured(options, name, subject(name))
        picked[name] = cast(float, rows[-1]["innate"])
        return rows

    first = next(iter(PLACES))
    jobs: dict[str, Callable[[], list[Row]]] = {name: functools.partial(curve, name) for name in PLACES}
    jobs["attackers"] = lambda: attackers(options, first, subject(first), options.level or picked[first])
    common.run(options, jobs)


if __name__ == "__main__":
    main()
