"""What a memory costs and gives: writes, look-ups, recalled answers, steered ones, kills, hardening and poison.

python benchmarks/memory.py --data DIR --threads 1 --json benchmarks/out/memory.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Row, Setting, mnist, parser, run, seconds, use_threads
from immunonet import RAILS, Cells, DkNN, ImmuneResponse, Maturation, Memory, data, statistics
from immunonet.attacks import FGSM, PGD
from immunonet.memory.index import Lookup
from immunonet.memory.space import Space

WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import memory
memory.write(sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--examples", type=int, default=60_000, help="of MNIST, as repertoire")
    p.add_argument("--images", type=int, default=500, help="test images that are remembered")
    p.add_argument("--entries", type=int, default=1_000_000, help="signatures that are searched")
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--writes", type=int, default=10_000, help="of four processes together, each time")
    p.add_argument(
        "--light", action="store_true", help="drift: at most 200 cells and 3 generations, and FGSM where images are met"
    )
    p.add_argument("--drift", type=int, default=10_000, help="writes through a fifth as much capacity")
    options = p.parse_args()
    use_threads(options.threads)
    jobs = {
        "writes": writes, "lookup": lookup, "recall": recall, "steering": steering, "kills": kills,
        "latency": latency, "hardening": hardening, "joining": joining, "poisoning": poisoning, "drift": drift,
    }  # fmt: skip
    run(options, {name: lambda job=job: job(options) for name, job in jobs.items()})


def defended(options: argparse.Namespace, n: int) -> tuple[RAILS, Any]:
    found = mnist(options, options.examples, n)
    evolving = Maturation(generations=10)
    rails = RAILS(found.net, "input", maturation=evolving, seed=0, memory=Memory(None)).fit(found.x, found.y)
    return rails, found


# Writes of one entry that are timed; of more at once fewer are, but three.
WRITES = 200


def writes(options: argparse.Namespace) -> list[Row]:
    """Time of one durable write, alone and with others."""
    rows = []
    for together in (1, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            memory = opened(folder)
            times = []
            for i in range(max(3, WRITES // together)):
                remember = functools.partial(memory.remember, response(together, i))
                times.append(seconds(remember, 1)[0])
            rows.append({"together": together, "median_s": float(np.median(times)), "p99_s": quantile(times, 99)})
    return rows


def lookup(options: argparse.Namespace) -> list[Row]:
    """Time and memory of look-ups, batch 1: signatures of MNIST, moved at random until there are enough."""
    rails, found = defended(options, min(200, options.images))
    rails.predict(found.clean[:1])
    space = rails.memory.space
    assert space is not None
    own = torch.cat([space.sign([part.flatten(1)]) for part in found.x.split(2000)]).numpy()
    rng, spread = np.random.default_rng(options.seed), own.std(0)
    index = Lookup(space.spread.numpy())
    while len(index) < options.entries:
        part = (own + 0.3 * spread * rng.normal(size=own.shape))[: options.entries - len(index)].astype(np.float32)
        n = len(part)
        index.add(
            {
                "signature": part, "id": np.zeros(n, "S32"), "label": np.zeros(n, np.int32),
                "votes": np.zeros((n, 10), np.float32), "credibility": np.zeros(n, np.float32),
                "foreign": np.zeros(n, bool), "far": np.zeros((n, 1), np.float32), "trusted": np.zeros(n, bool),
            }
        )  # fmt: skip
    rows = []
    for name, images in (("clean", found.clean), ("attacked", found.attacked)):
        asked = space.sign([images.flatten(1)]).numpy()
        times = [seconds(lambda one=one: index.within(one, space.radius), 1)[0] for one in asked]
        rows.append(
            {
                "entries": len(index), "queries": name, "radius": space.radius, "median_ms": 1e3 * quantile(times, 50),
                "p99_ms": 1e3 * quantile(times, 99), "MiB": index.nbytes / 2**20,
            }
        )  # fmt: skip
    return rows


def recall(options: argparse.Namespace) -> list[Row]:
    """Recalled answers against full ones, of test images remembered before and of near copies of them."""
    rails, found = defended(options, options.images)
    plain = rails.with_settings(memory=None)
    x, draw = found.clean, torch.Generator().manual_seed(options.seed)
    rails.memory.remember(rails.respond(x), x)
    shifted = torch.roll(x, 1, -1)
    moved = {
        "the same": x,
        "noise .01": (x + 0.01 * torch.randn(x.shape, generator=draw)).clamp(0, 1),
        "noise .05": (x + 0.05 * torch.randn(x.shape, generator=draw)).clamp(0, 1),
        "noise .1": (x + 0.1 * torch.randn(x.shape, generator=draw)).clamp(0, 1),
        "8 bits": (x * 255).round() / 255,
        "a pixel to the right": shifted,
        "attacked, 60/255": found.attacked,
    }
    rows = []
    for name, images in moved.items():
        again, full = rails.respond(images), plain.predict(images)
        hit = again.recalled
        rows.append(
            {
                "queries": name, "n": len(images), "recalled": hit.float().mean().item(),
                "equal_to_full": (again.labels == full)[hit].float().mean().item() if hit.any() else None,
                "accuracy": (again.labels == found.labels).float().mean().item(),
                "accuracy_full": (full == found.labels).float().mean().item(),
            }
        )  # fmt: skip
    new = data.load("mnist", "test", directory=options.data).x[options.images : 2 * options.images]
    hit = rails.respond(new).recalled
    rows.append({"queries": "other images", "n": len(new), "recalled": hit.float().mean().item()})
    return rows


def latency(options: argparse.Namespace) -> list[Row]:
    """Time per recalled answer and per full response, by turns, one at a time and 100 together."""
    rails, found = defended(options, options.images)
    plain, response = rails.with_settings(memory=None), rails.respond(found.clean)
    rails.memory.remember(response, found.clean)
    known = found.clean[rails.respond(found.clean).recalled]
    rows = []
    for batch in (1, 100):
        parts = [part for part in known.split(batch) if len(part) == min(batch, len(known))]
        times = {"recalled": [], "full": []}
        for part in parts * options.repeats:
            # What takes less is timed more often.
            for name, defence in [("recalled", rails)] * 10 + [("full", plain)]:
                times[name].append(seconds(lambda part=part, defence=defence: defence.predict(part), 1)[0] / len(part))
        row: Row = {"queries": f"batch {batch}"}
        for name, own in times.items():
            row |= {
                f"{name}_n": len(own),
                f"{name}_ms": 1e3 * quantile(own, 50),
                f"{name}_p99_ms": 1e3 * quantile(own, 99),
            }
        rows.append(row | {"times": row["full_ms"] / row["recalled_ms"]})
    return rows


def steering(options: argparse.Namespace) -> list[Row]:
    """How often an input can be steered, within eps (linf), to within the radius of an entry of another label.

    The attacker knows the signatures of all entries, and descends the distance to the nearest of another label.
    """
    rails, found = defended(options, options.images)
    rails.memory.remember(rails.respond(found.clean), found.clean)
    space = rails.memory.space
    assert space is not None
    x, y = found.clean[:100], found.labels[:100]
    entries, labels = space.sign([found.clean.flatten(1)]), found.labels
    rows = []
    for eps in (0.05, 0.1, 60 / 255, 0.3):
        moved = steered(space, x, y, entries, labels, eps)
        again = rails.respond(moved)
        full = rails.with_settings(memory=None).predict(moved)
        wrong = again.recalled & (again.labels != y)
        rows.append({"eps": eps, "n": len(x), "recalled": again.recalled.float().mean().item(),
                     "recalled_wrong": wrong.float().mean().item(),
                     "full_wrong": (full != y).float().mean().item()})  # fmt: skip
    return rows


def steered(
    space: Space, x: torch.Tensor, y: torch.Tensor, entries: torch.Tensor, labels: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return inputs brought near the nearest entry of another label."""
    own = space.sign([x.flatten(1)])
    far = torch.cdist(own, entries).masked_fill(labels[None] == y[:, None], torch.inf)
    goal, moved = entries[far.argmin(1)], x.clone()
    for i in range(100):
        moved.requires_grad_(True)
        distance = (space.sign([moved.flatten(1)]) - goal).norm(dim=1).sum()
        (slope,) = torch.autograd.grad(distance, moved)
        step = eps * (0.2 if i < 50 else 0.02)
        moved = (moved.detach() - step * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return moved


def kills(options: argparse.Namespace) -> list[Row]:
    """Kill four writers at a random moment; whatever they were told is written must be there."""
    rows = []
    here, draw = str(Path(__file__).parent), random.Random(options.seed)
    for i in range(options.kills):
        with tempfile.TemporaryDirectory() as folder:
            each = options.writes // 4
            writers = [
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, here, folder, str(j), str(each)], stdout=subprocess.PIPE, text=True
                )
                for j in range(4)
            ]
            for one in writers:
                assert one.stdout is not None
                one.stdout.readline()
            time.sleep(draw.uniform(0.1, 20))
            acknowledged = []
            for one in writers:
                one.kill()
                with one:
                    assert one.stdout is not None
                    text = one.stdout.read()
                acknowledged += text[: text.rfind("\n") + 1].split()
            memory = Memory(folder)
            backend = memory._required()
            held = backend.read(["id"])["id"].to_pylist()
            rows.append(
                {
                    "kill": i + 1, "acknowledged": len(acknowledged), "held": len(held), "versions": memory.version,
                    "lost": len(set(acknowledged) - set(held)), "twice": len(held) - len(set(held)),
                }
            )  # fmt: skip
    return rows


def hardening(options: argparse.Namespace) -> list[Row]:
    """Right answers before and after cells of the first half of the attacked images joined, on the other half.

    At most so many plasma and as many memory cells of an image are `kept`. DkNN is fitted on the same repertoire.
    """
    rails, found = defended(options, options.images)
    half = len(found.labels) // 2
    plain, images = rails.with_settings(memory=None), others(found, half)
    own, held = plain.repertoire, (plain.held.x, plain.held.y)
    truth = found.labels[half:]
    before = {"RAILS": plain, "DkNN": DkNN(found.net, "input").fit(own.x, own.y, calibration=held)}
    right = {(kind, name): one.predict(x) == truth for kind, one in before.items() for name, x in images.items()}
    rows = [{"defence": kind, "kept": 0, "images": name, **counted(one)} for (kind, name), one in right.items()]
    for kept in (1, 16):
        asking, memory = hardenable(plain, cells=kept)
        met(asking, found.attacked[:half], found.labels[:half])
        hardened = plain.with_settings().harden(memory)
        more = hardened.repertoire
        dknn = DkNN(found.net, "input").fit(torch.cat([more.x, more.cells]), more.y, calibration=held)
        for kind, after in (("RAILS", hardened), ("DkNN", dknn)):
            for name, x in images.items():
                now = after.predict(x) == truth
                rows.append(
                    {"defence": kind, "kept": kept, "cells": len(more.cells), "images": name, **counted(now),
                     "p": statistics.mcnemar(right[kind, name], now)}
                )  # fmt: skip
    return rows


def joining(options: argparse.Namespace) -> list[Row]:
    """What joins a repertoire and what that does, on validation images: half of them are met, the other half is asked.

    By RAILS of at most 200 cells and 3 generations. `true_near`, `other_near`: the share of the naive cells of the true
    class, and of the others, that joined; `gap`: how much farther those of the nearest other class lie in the mean.
    """
    net, train = mnist(options, 1, 1).net, data.load("mnist", "train", directory=options.data)
    first, held = data.split(len(train))
    x, y = train.x[first[: options.examples]], train.y[first[: options.examples]]
    clean, truth = train.x[held[: options.images]], train.y[held[: options.images]]
    calibration = (train.x[held[options.images :]], train.y[held[options.images :]])
    attacked = PGD(eps=60 / 255, step=20 / 255, iterations=20, random_start=False)(net, clean, truth).adversarials
    half, none = options.images // 2, torch.zeros(0, dtype=torch.long)

    def fitted(more: torch.Tensor, labels: torch.Tensor) -> RAILS:
        known = torch.cat([x, more]), torch.cat([y, labels])
        light = RAILS(net, "input", maturation=Maturation(generations=3), seed=0).light()
        return light.fit(*known, calibration=calibration)

    plain = fitted(x[:0], none)
    met = {"attacked": plain.respond(attacked[:half]), "clean": plain.respond(clean[:half])}
    joined = {
        "nothing": (x[:0], none),
        "attacked antigens": (attacked[:half], truth[:half]),
        "clean antigens": (clean[:half], truth[:half]),
        "cells of attacked": of_label(met["attacked"].plasma, met["attacked"].memory, labels=truth[:half]),
        "their plasma cells": of_label(met["attacked"].plasma, labels=truth[:half]),
        "their memory cells": of_label(met["attacked"].memory, labels=truth[:half]),
        "cells of clean": of_label(met["clean"].plasma, met["clean"].memory, labels=truth[:half]),
    }
    asked, own, rows, before = truth[half:], torch.eye(10).bool()[truth[half:]], [], {}
    for what, (cells, labels) in joined.items():
        rails = fitted(cells, labels)
        for name, images in (("clean", clean[half:]), ("attacked", attacked[half:])):
            right = rails.predict(images) == asked
            members, distances = rails.naive(images)
            near, far = (members >= len(x)).float().mean(2), distances.mean(2)
            gap = far.masked_fill(own, torch.inf).amin(1) - far[own]
            rows.append(
                {
                    "joined": what, "cells": len(cells), "images": name, **counted(right),
                    "p": statistics.mcnemar(before.setdefault(name, right), right),
                    "true_near": near[own].mean().item(), "other_near": near[~own].mean().item(),
                    "gap": gap.mean().item(), "nearest_right": (gap > 0).float().mean().item(),
                }
            )  # fmt: skip
    return rows


def of_label(*cells: Cells, labels: torch.Tensor, most: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `most` cells of each kind that carry the labels `(B,)` of their antigens, and these."""
    chosen = [(part.x[:, :most], part.label[:, :most] == labels[:, None]) for part in cells]
    return (
        torch.cat([x[right] for x, right in chosen]),
        torch.cat([labels[:, None].expand_as(right)[right] for _, right in chosen]),
    )


def others(found: Setting, half: int) -> dict[str, torch.Tensor]:
    """Return the second half of the images, clean and under attacks on the network."""
    x, y = found.clean[half:], found.labels[half:]
    attacked = {"clean": x, "PGD 60/255": found.attacked[half:]}
    attacked["FGSM 60/255"] = FGSM(eps=60 / 255)(found.net, x, y).adversarials
    for eps in (40, 80):
        attack = PGD(eps=eps / 255, step=eps / 3 / 255, iterations=20, random_start=False)
        attacked[f"PGD {eps}/255"] = attack(found.net, x, y).adversarials
    return attacked


def poisoning(options: argparse.Namespace) -> list[Row]:
    """What wrong confirmations do to a hardened RAILS, what shows of them, and what is left once they are gone.

    Half of the images are met, attacked; the other half is asked. Labels that are "chosen" are those that have the most
    kept cells among the wrong ones: of a label without cells, nothing joins.
    """
    rails, found = defended(options, options.images)
    plain = rails.with_settings(memory=None)
    rows = [{"case": "not hardened", **asked(plain, found)}]
    rows += [poisoned(plain, found, 0, "random", options.seed)]
    rows += [poisoned(plain, found, share, how, options.seed) for how in ("random", "chosen") for share in SHARES]
    rows += [arrived(plain, found, first, now, options.seed) for now in (True, False) for first in (True, False)]
    return rows


SHARES = (0.01, 0.05, 0.2)


def poisoned(plain: RAILS, found: Setting, share: float, how: str, seed: int) -> Row:
    """Return what a source does whose share of the entries is confirmed wrongly, and that all of it can be undone."""
    half = len(found.labels) // 2
    x, y, n = found.attacked[:half], found.labels[:half], math.ceil(share * half)
    rails, memory = hardenable(plain)
    met(rails, x[n:], y[n:])
    memory.tag("clean")
    before = plain.with_settings().harden(memory).predict_proba(found.attacked[half:])
    if n:
        met(rails, x[:n], wrong(y[:n], how, seed), source="hostile")
    told = memory.stats()
    hardened = plain.with_settings().harden(memory)
    row = {
        "case": f"{how} labels", "share": share, "wrong": n, **asked(hardened, found),
        "contradicted": told["contradicted"],
        "of_hostile": told["sources"].get("hostile", {}).get("contradicted", 0),
    }  # fmt: skip
    poison = memory.version
    for undo in (lambda: memory.forget(source="hostile"), lambda: memory.rollback("clean")):
        memory.rollback(poison)
        undo()
        hardened.harden(memory)
        assert torch.equal(before, hardened.predict_proba(found.attacked[half:]))
    return row | {"undone": True}


def arrived(plain: RAILS, found: Setting, first: bool, at_once: bool, seed: int) -> Row:
    """Return what a fifth of wrong entries does that came first, or last, where only four fifths have room.

    Confirmed at once, or all that are still there at the end.
    """
    half = len(found.labels) // 2
    n = half // 5
    rails, memory = hardenable(plain, capacity=half - n)
    waiting: dict[str, int] = {}
    for i, part in enumerate(torch.arange(half).split(n)):
        hostile, labels = i == (0 if first else 4), found.labels[part]
        given = wrong(labels, "chosen", seed) if hostile else labels
        waiting |= remembered(rails, found.attacked[part], given, "hostile" if hostile else "caller")[1]
        if at_once or i == 4:
            there = list(waiting)[-len(memory) :]
            with contextlib.suppress(ValueError):  # where there was no room, nothing is there
                memory.confirm(there, [waiting[one] for one in there])
            waiting = {}
    told = memory.stats()
    order = f"wrong ones {'first' if first else 'last'}, confirmed {'at once' if at_once else 'at the end'}"
    return {
        "case": order, "share": 0.2, "wrong": n, **asked(plain.with_settings().harden(memory), found),
        "contradicted": told["contradicted"], "of_hostile": told["sources"].get("hostile", {}).get("contradicted", 0),
    }  # fmt: skip


def drift(options: argparse.Namespace) -> list[Row]:
    """Right answers of a RAILS that confirms its own answers, and is hardened by them five times.

    Each time it first forgets what it held, since what is confirmed makes no room by itself. It meets test images that
    are not asked later, every other one attacked, and the same again when all were met.
    """
    rails, found = defended(options, options.images)
    plain = rails.with_settings(memory=None)
    plain = plain.light() if options.light else plain
    test = data.load("mnist", "test", directory=options.data)
    x, y, capacity = test.x[options.images :], test.y[options.images :], options.drift // 5
    attack = (
        FGSM(eps=60 / 255) if options.light else PGD(eps=60 / 255, step=20 / 255, iterations=20, random_start=False)
    )
    hardened, memory = hardenable(plain, capacity=capacity, cells=2)
    before = plain.predict_proba(found.attacked)
    rows = [{"written": 0, "held": 0, **asked(plain, found)}]
    for start in range(0, options.drift, capacity):
        right = 0
        if start:
            memory.forget(until=time.time())
        for part in torch.arange(start, start + capacity).remainder(len(x)).split(200):
            images = x[part].clone()
            images[::2] = attack(found.net, images[::2], y[part][::2]).adversarials
            right += int((met(hardened, images, None).labels == y[part]).sum())
        hardened.harden(memory)
        told = memory.stats()
        rows.append(
            {"written": start + capacity, "held": told["entries"], "own_answers_right": right / capacity,
             "contradicted": told["contradicted"], **asked(hardened.with_settings(memory=None), found)}
        )  # fmt: skip
    assert torch.equal(before, hardened.with_settings(memory=None).harden(None).predict_proba(found.attacked))
    return rows


def hardenable(plain: RAILS, **how: Any) -> tuple[RAILS, Memory]:
    """Return a twin with a memory of its own, and it."""
    memory = Memory(None, **how)
    rails = plain.with_settings(memory=memory)
    rails.predict(plain.repertoire.x[:1])
    return rails, memory


def met(rails: RAILS, x: torch.Tensor, labels: Any, source: str = "caller") -> ImmuneResponse:
    """Return the response to images, which is remembered and confirmed."""
    assert rails.memory is not None
    response, given = remembered(rails, x, labels, source)
    rails.memory.confirm(list(given), list(given.values()))
    return response


def remembered(rails: RAILS, x: torch.Tensor, labels: Any, source: str) -> tuple[ImmuneResponse, dict[str, int]]:
    """Return the response to images, which is remembered, and labels of the new entries.

    `labels`: given ones, what gives them to the response, or None: its own.
    """
    assert rails.memory is not None
    response = rails.respond(x)
    given = response.labels if labels is None else labels(response) if callable(labels) else labels
    ids = rails.memory.remember(response, x, source=source)
    rows = zip(ids, given.tolist(), response.recalled.tolist(), strict=True)
    return response, {one: label for one, label, recalled in rows if not recalled}


def wrong(labels: torch.Tensor, how: str, seed: int) -> Any:
    """Return wrong labels: drawn, or of a response those that have the most of the kept cells."""
    if how == "random":
        draw = torch.Generator().manual_seed(seed)
        return (labels + torch.randint(1, 10, labels.shape, generator=draw)) % 10

    def chosen(response: ImmuneResponse) -> torch.Tensor:
        kept = torch.cat([response.plasma.label[:, :16], response.memory.label[:, :16]], 1)
        counts = torch.nn.functional.one_hot(kept, 10).sum(1)
        return counts.scatter(1, labels[:, None], -1).argmax(1)

    return chosen


def asked(rails: RAILS, found: Setting) -> Row:
    """Return the right answers to the second half of the images, clean and attacked, and how many cells joined."""
    half = len(found.labels) // 2
    row: Row = {"cells": len(rails.repertoire.cells)}
    for name, images in (("clean", found.clean), ("attacked", found.attacked)):
        told = counted(rails.predict(images[half:]) == found.labels[half:])
        row |= {name if key == "correct" else f"{name}_{key}": value for key, value in told.items() if key != "n"}
    return row | {"n": len(found.labels) - half}


def counted(right: torch.Tensor) -> Row:
    """Return how many of n answers are right, with the interval of their share."""
    low, high = statistics.interval(right[None])
    return {"n": len(right), "correct": int(right.sum()), "low": low, "high": high}


def write(folder: str, name: str, n: int) -> None:
    """Write n entries one by one, each told when it is there."""
    memory = opened(folder)
    print(flush=True)
    for i in range(n):
        print(*memory.remember(response(1, i), source=name), flush=True)


def opened(folder: str) -> Memory:
    """Return a memory of signatures of 64 values, which no model made."""
    space = Space(
        mean=torch.zeros(63), directions=torch.eye(63), scales=torch.ones(1), spread=torch.ones(64),
        probes=torch.zeros(1, 64), radius=1.0, fingerprint="none", classes=10, shape=(1,), cell_shape=(1,),
    )  # fmt: skip
    memory = Memory(folder, keep="signatures")
    memory.bind("none", [torch.zeros(1, 63)], lambda: space)
    return memory


def response(n: int, seed: int) -> ImmuneResponse:
    """Return a response to n antigens with random signatures."""
    from immunonet import Cells
    from immunonet.response import Imprint

    draw = torch.Generator().manual_seed(seed)
    labels, none = torch.randint(10, (n,), generator=draw), torch.zeros(n, 0, dtype=torch.long)
    cells = Cells(torch.zeros(n, 0, 1), none, none.float(), none)
    return ImmuneResponse(
        labels=labels, votes=torch.eye(10)[labels], credibility=torch.ones(n), foreign=torch.zeros(n).bool(),
        innate=torch.zeros(n).bool(), recalled=torch.zeros(n).bool(), generations=torch.ones(n).long(),
        plasma=cells, memory=cells,
        imprint=Imprint(torch.randn(n, 64, generator=draw), torch.ones(n, 1), (None,) * n, "none"),
    )  # fmt: skip


def quantile(times: list[float], q: float) -> float:
    return float(np.percentile(times, q))


if __name__ == "__main__":
    main()
