"""`immunonet demo`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from immunonet import RAILS, Maturation, Sentinel, _check, data, report, zoo
from immunonet._imports import require
from immunonet.attacks import PGD
from immunonet.cli import common
from immunonet.defences.base import Defence
from immunonet.defences.spec import Spec
from immunonet.evaluation import records
from immunonet.evaluation.bench import Bench
from immunonet.evaluation.lab import Lab, Measurement, Tables, asked
from immunonet.report import tables

VALIDATION = 400
TRAINING: dict[str, Any] = {"epochs": 20, "batch_size": 64}
RUNS = 3
# Of the antigens that fool the CNN, the gallery shows the first so many that RAILS gets right, and wrong.
SHOWN = (3, 2)
BASE = "digits"
# What the explorer's sentinel can learn from so few images.
WATCH: dict[str, Any] = {"window": 200, "neighbours": 5, "false_alarm": 0.01}

# The papers' number of generations: by default there are none, and the pictures would have nothing to tell.
EVOLVED = 10

# What is tried on validation images; the first of equals is taken.
CANDIDATES = {
    "dknn": [
        f"dknn {layers} metric={metric} neighbours={neighbours}"
        for layers in ("input", "pool", "input+conv1", "conv1+pool+fc1")
        for metric in ("cosine", "euclidean")
        for neighbours in (5, 20, 75)
    ],
    "rails": [
        f"rails {layer} neighbours={neighbours} generations={EVOLVED}"
        for layer in ("input", "conv1")
        for neighbours in (5, 10, 20)
    ],
}
SOFTER = (3.0, 1.0, 0.3)

MEANING = (
    "PGD moves every pixel by at most {eps:.3g} of the range, knows the CNN alone, and takes it from {clean:.1f} % to "
    "{attacked:.1f} %; soft-knn is PGD through a soft vote of a defence's own neighbours, and knows the defence, its "
    "layers and its training images. Both are first measurements on small images; a stronger attacker may do better."
)


def demo(
    eps: Annotated[float, typer.Option(help="How far attacks may move a pixel, of a range of 1.")] = 0.15,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    out: common.OutOption = Path("demo"),
    json: common.JsonOption = None,
    explore: Annotated[bool, typer.Option("--explore", help="Open the explorer instead of measuring.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the explorer; 0: one that is free.")] = 7860,
) -> None:
    """Train a small network on scikit-learn's 8x8 digits, attack it, defend it by DkNN and RAILS, and report.

    Prints one table and writes DIR/report.html. Settings are chosen on a validation split, never on test images. The
    same command uses the network that DIR holds already. With --explore, a page on this machine alone where you draw
    digits, attack them, and watch RAILS answer (pip install 'immunonet[serve]').
    """
    target = common.resolve_device(device)
    pgd = PGD(eps=_check.number("--eps", eps, least=0, most=1), step=eps / 8, iterations=20, seed=seed)
    common.prepare(out, json)
    one_thread()
    images, test = (data.load("digits", split) for split in data.SPLITS)
    training, held_out = (images[part] for part in data.split(len(images), VALIDATION))
    if explore:
        return explored(
            lambda: network(training, held_out, out / "digits.safetensors", seed).to(target), training, held_out, test,
            seed=seed, port=port,
        )  # fmt: skip
    with common.progress() as bar:
        task = bar.add_task("", total=6)

        def step(name: str) -> None:
            bar.update(task, description=name, advance=1)
            if not common.console.is_terminal:
                common.console.print(name)

        step("training a small network on 8x8 digits")
        net = network(training, held_out, out / "digits.safetensors", seed).to(target)
        # The held-out images are a random choice in their original order: every other one is a random half.
        lab = Lab(
            {BASE: net},
            {"training": training, "tuning": held_out[::2], "validation": held_out[1::2], "test": test},
            resolve=common.resolve_layer, told={"dataset": BASE, "model": BASE, "calibration": len(held_out) // 2},
            where=lambda split, n: [0, n], senses=True,
        )  # fmt: skip
        bench = Tables(Bench(lab, None), chunk=len(images))
        chosen = {"cnn": Measurement(spec=Spec(kind="cnn"), base=BASE)}
        for kind, candidates in CANDIDATES.items():
            step(f"choosing the settings of {kind} on validation images")
            chosen[kind] = best(bench, [Spec.parse(text) for text in candidates], pgd, seed)
        step("measuring on test images")
        asking = [
            dataclasses.replace(
                m, split="test", images=len(test), attack=attack, method=method, through=through,
                seeds=tuple(range(seed, seed + RUNS)) if m.seeds else (),
            )
            for m in chosen.values()
            for attack, method, through in (("none", None, ""), ("pgd", pgd, ""), ("soft-knn", pgd, "soft-knn"))
            if not through or m.spec.layers
        ]  # fmt: skip
        measured = bench.measure(asking)
        rows = [one.row.to_json() | {"foreign": one.row.foreign} for one in measured]
        step("drawing the report")
        attacked = bench.attacked(asking[1], slice(0, len(test)))
        assert attacked is not None
        percent = {(row["defence"], row["attack"]): 100 * row["accuracy"] for row in rows}
        meaning = MEANING.format(eps=eps, clean=percent["cnn", "none"], attacked=percent["cnn", "pgd"])
        defences = {kind: lab.fitted(m.spec, BASE) for kind, m in chosen.items()}
        shown = pictures(defences, lab.images("test", slice(None)), bench.bench.get([attacked])[0]["x"], seed)
        report.write(
            out / "report.html", title="An immune response to attacked digits", rows=rows, meaning=meaning, **shown,
            environment=records.environment(), command=records.command(),
        )  # fmt: skip
    tables.console(tables.Section("", table=common.table([one.row for one in measured])))
    typer.echo(meaning)
    typer.echo(f"report: {out / 'report.html'}")
    common.write_results(json, rows)


def explored(
    trained: Callable[[], nn.Module], training: data.Images, held_out: data.Images, test: data.Images, *, seed: int,
    port: int,
) -> None:  # fmt: skip
    """Show the explorer of RAILS around the network `trained` on this machine alone, until it is interrupted."""
    require("gradio", "serve")
    from immunonet import explorer

    common.note("training a small network on 8x8 digits, unless it is there already")
    net = trained()
    rails = RAILS(net, "input", maturation=Maturation(generations=EVOLVED), seed=seed)
    rails.fit(training.x, training.y, calibration=(held_out.x, held_out.y))
    sentinel = Sentinel(rails, "input", **WATCH).fit(training.x)
    page = explorer.build(rails, base=net, images=test, sentinel=sentinel, seed=seed)
    explorer.launch(page, port=port, ready=lambda address: typer.echo(f"explorer: {address} (Ctrl-C ends it)"))


def one_thread() -> None:
    """Use one thread: on work this small several wait for each other longer than they compute."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import numba

        numba.set_num_threads(1)


def network(training: data.Images, validation: data.Images, path: Path, seed: int) -> nn.Module:
    """Return the network trained with these settings: the one at `path` if it was, or else a new one, kept there."""
    settings = TRAINING | {"seed": seed, "images": [len(training), len(validation)]}
    net = zoo.build("digits", classes=len(training.classes), seed=seed)
    with contextlib.suppress(FileNotFoundError, ValueError):  # none there yet, or a damaged one: train anew
        if zoo.load_weights(net, path).get("training") == settings:
            return net
    net = zoo.build("digits", classes=len(training.classes), seed=seed)
    history = zoo.train(net, training, validation, **TRAINING, seed=seed)
    zoo.save_weights(net, path, half=False, recipe={"training": settings, "history": history})
    return net


def best(bench: Tables, candidates: Sequence[Spec], pgd: PGD, seed: int) -> Measurement:
    """Return a measurement of the candidate most often right on clean and attacked images of the tuning split.

    It is attacked through a soft vote with the temperature, of several, through which PGD hurts it most.
    """
    n = len(bench.lab.splits["tuning"])

    def share(m: Measurement) -> float:
        return bench.measure([m])[0].row.accuracy

    scores = []
    for spec in candidates:
        seeds = (seed,) if bench.lab.made(spec, BASE).randomised else ()
        m = Measurement(spec=spec, base=BASE, split="tuning", images=n, seeds=seeds)
        attacked = dataclasses.replace(m, attack="pgd", method=pgd)
        scores.append(((share(m) + share(attacked)) / 2, attacked))
    score, chosen = max(scores, key=lambda pair: pair[0])
    soft = [dataclasses.replace(chosen, attack="soft-knn", through="soft-knn", softer=factor) for factor in SOFTER]
    tuning = {"images": n, "candidates": len(scores), "accuracy": score}
    return dataclasses.replace(chosen, softer=min(soft, key=share).softer, tuning=tuning)


def pictures(
    defences: Mapping[str, Defence], examples: tuple[Tensor, Tensor], adversarials: Tensor, seed: int
) -> dict[str, Any]:
    """Return the gallery and the learning curves of the report, for the attack that knows the CNN alone."""
    x, y = examples
    adversarials, rails = adversarials.to(x), defences["rails"]
    assert isinstance(rails, RAILS)
    clean, attacked = (rails.respond(version, seed=seed, trace=True) for version in (x, adversarials))
    assert clean.trace is not None
    assert attacked.trace is not None
    others = {kind: defence for kind, defence in defences.items() if defence is not rails}
    labels = {kind: (asked(other, x)[0][0], asked(other, adversarials)[0][0]) for kind, other in others.items()}
    labels["rails"] = clean.labels, attacked.labels
    fooled, right = labels["cnn"][1] != y.cpu(), (attacked.labels == y).cpu()
    groups = zip((fooled & right, fooled & ~right), SHOWN, strict=True)
    chosen = [i for group, most in groups for i in group.nonzero()[:most, 0].tolist()]
    with torch.no_grad():
        wrong = defences["cnn"](adversarials).scatter(1, y[:, None], -torch.inf).argmax(1)
    return {
        "choice": f"Shown are the first antigens that fool the CNN: {SHOWN[0]} that RAILS gets right, {SHOWN[1]} not.",
        "gallery": report.exhibits(rails, x, adversarials, y, attacked, labels, indices=chosen),
        "curves": report.learning_curves(clean.trace[0], attacked.trace[0], y, wrong),
    }
