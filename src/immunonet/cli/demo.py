"""`immunonet demo`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from immunonet import RAILS, DkNN, Maturation, _check, data, report, zoo
from immunonet.attacks import PGD, SoftNeighbours
from immunonet.cli import common
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.evaluation import Row, records
from immunonet.evaluation.asking import answers, describe, describe_attack, is_randomised

VALIDATION = 400
TRAINING: dict[str, Any] = {"epochs": 20, "batch_size": 64}
RUNS = 3
# Of the antigens that fool the CNN, the gallery shows the first so many that RAILS gets right, and wrong.
SHOWN = (3, 2)

# What is tried on validation images; the first of equals is taken.
DKNN_LAYERS = ("input", "conv1", "pool", "fc1", ["input", "conv1"], ["conv1", "pool", "fc1"])
DKNN_NEIGHBOURS = (5, 10, 25, 75)
METRICS: tuple[Literal["cosine", "euclidean"], ...] = ("cosine", "euclidean")
RAILS_LAYERS = ("input", "conv1")
RAILS_NEIGHBOURS = (5, 10, 20)
SOFT_TEMPERATURES = (3.0, 1.0, 0.3)

COLUMNS = ("defence", "attack", "knows", "accuracy", "95 % interval", "ms/image", "foreign")
MEANING = (
    "PGD moves every pixel by at most {eps:.3g} of the range, knows the CNN alone, and takes it from {clean:.1f} % to "
    "{attacked:.1f} %; soft-knn is PGD through a soft vote of a defence's own neighbours, and knows the defence, its "
    "layers and its training images. Both are first measurements on small images; a stronger attacker may do better."
)

Examples = tuple[Tensor, Tensor]


def demo(
    eps: Annotated[float, typer.Option("--eps", help="How far attacks may move a pixel, of a range of 1.")] = 0.15,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    out: common.OutOption = Path("demo"),
    json: common.JsonOption = None,
) -> None:
    """Train a small network on scikit-learn's 8x8 digits, attack it, defend it by DkNN and RAILS, and report.

    Prints one table and writes DIR/report.html. Settings are chosen on a validation split, never on test images. The
    same command uses the network that DIR holds already.
    """
    target = common.resolve_device(device)
    pgd = PGD(eps=_check.number("--eps", eps, least=0, most=1), step=eps / 8, iterations=20, seed=seed)
    common.prepare(out, json)
    one_thread()
    images, test = (data.load("digits", split) for split in data.SPLITS)
    training, held_out = (images[part] for part in data.split(len(images), VALIDATION))
    # The held-out images are a random choice in their original order: every other one is a random half.
    tuning, calibration, asked = (
        (part.x.to(target), part.y.to(target)) for part in (held_out[::2], held_out[1::2], test)
    )

    with common.progress() as bar:
        task = bar.add_task("", total=7)

        def step(name: str) -> None:
            bar.update(task, description=name, advance=1)
            if not common.console.is_terminal:
                common.console.print(name)

        step("training a small network on 8x8 digits")
        net = network(training, held_out, out / "digits.safetensors", seed).to(target)
        step("attacking it")
        versions = [tuning[0], pgd(net, *tuning).adversarials]
        transferred = pgd(net, *asked).adversarials
        defences: dict[str, nn.Module] = {"cnn": net}
        notes: dict[str, dict[str, Any]] = {"cnn": {}}
        surrogates: dict[str, SoftNeighbours] = {}
        for kind, candidates in (("dknn", dknn_candidates(net)), ("rails", rails_candidates(net, seed))):
            step(f"choosing the settings of {kind} on validation images")
            fitted = (defence.fit(training.x, training.y, calibration=calibration) for defence in candidates)
            defence, notes[kind] = best(fitted, versions, tuning[1], seed)
            surrogates[kind], notes[kind]["surrogate"] = strongest(defence, pgd, tuning, seed)
            defences[kind] = defence

        step("measuring on test images")
        rows = []
        for kind, model in defences.items():
            attacks = [("none", "base", asked[0]), ("pgd", "base", transferred)]
            if kind in surrogates:
                attacks.append(("soft-knn", "defence", pgd(surrogates[kind], *asked).adversarials))
            for attack, knows, x in attacks:
                seeds = range(seed, seed + RUNS) if is_randomised(model) else ()
                labels, seconds = answers(model, x, seeds)
                row = Row.of(
                    labels == test.y,
                    dataset="digits",
                    defence=kind,
                    attack=attack,
                    knows=knows,
                    eps=0.0 if attack == "none" else eps,
                    norm=pgd.norm,
                    seconds_per_image=seconds / len(test),
                    seeds=seeds,
                    settings={
                        "model": "digits",
                        "slice": [0, len(test)],
                        "repertoire": len(training),
                        "calibration": len(calibration[1]),
                    }
                    | describe(model)
                    | notes[kind]
                    | describe_attack(None if attack == "none" else pgd),
                )
                rows.append(row.to_json() | {"foreign": foreign(model, x, seed)})

        step("drawing the report")
        percent = {(row["defence"], row["attack"]): 100 * row["accuracy"] for row in rows}
        meaning = MEANING.format(eps=eps, clean=percent["cnn", "none"], attacked=percent["cnn", "pgd"])
        report.write(
            out / "report.html",
            title="An immune response to attacked digits",
            rows=rows,
            meaning=meaning,
            **pictures(defences, asked, transferred, seed),
            environment=records.environment(),
            command=records.command(),
        )
    Console().print(table(rows))
    typer.echo(meaning)
    typer.echo(f"report: {out / 'report.html'}")
    common.write_results(json, rows)


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
    try:
        if zoo.load_weights(net, path).get("training") == settings:
            return net
    except (FileNotFoundError, ValueError):
        pass  # none there yet, or a damaged one: train anew
    net = zoo.build("digits", classes=len(training.classes), seed=seed)
    history = zoo.train(net, training, validation, **TRAINING, seed=seed)
    zoo.save_weights(net, path, half=False, recipe={"training": settings, "history": history})
    return net


def dknn_candidates(net: nn.Module) -> Iterator[NeighbourDefence]:
    """Yield the DkNNs to choose from."""
    for layers in DKNN_LAYERS:
        for metric in METRICS:
            for neighbours in DKNN_NEIGHBOURS:
                yield DkNN(net, layers, neighbours=neighbours, metric=metric)


def rails_candidates(net: nn.Module, seed: int) -> Iterator[NeighbourDefence]:
    """Yield the RAILS to choose from."""
    for layer in RAILS_LAYERS:
        for neighbours in RAILS_NEIGHBOURS:
            yield RAILS(net, layer, maturation=Maturation(neighbours=neighbours), seed=seed)


def best(
    candidates: Iterable[NeighbourDefence], versions: Sequence[Tensor], y: Tensor, seed: int
) -> tuple[NeighbourDefence, dict[str, Any]]:
    """Return the candidate most often right on all versions of images labelled `y`, and how it was chosen."""
    scores = [(accuracy(candidate, versions, y, seed), candidate) for candidate in candidates]
    score, chosen = max(scores, key=lambda pair: pair[0])
    return chosen, {"tuning": {"images": len(y), "candidates": len(scores), "accuracy": score}}


def strongest(
    defence: NeighbourDefence, pgd: PGD, examples: Examples, seed: int
) -> tuple[SoftNeighbours, dict[str, Any]]:
    """Return the surrogate through which PGD hurts the defence most, and its settings.

    The surrogates differ in temperature, a share of the one that `SoftNeighbours` finds.
    """
    found = []
    for share in SOFT_TEMPERATURES:
        soft = SoftNeighbours(defence)
        soft.temperatures = [share * temperature for temperature in soft.temperatures]
        score = accuracy(defence, [pgd(soft, *examples).adversarials], examples[1], seed)
        found.append((score, soft))
    score, soft = min(found, key=lambda pair: pair[0])
    return soft, {"neighbours": soft.neighbours, "temperatures": soft.temperatures, "accuracy": score}


def accuracy(defence: NeighbourDefence, versions: Sequence[Tensor], y: Tensor, seed: int) -> float:
    """Return the share of right answers over all versions of images labelled `y`."""
    seeds = (seed,) if is_randomised(defence) else ()
    labels = torch.stack([answers(defence, x, seeds)[0][0] for x in versions])
    return float((labels == y.cpu()).float().mean())


def foreign(model: nn.Module, x: Tensor, seed: int) -> float | None:
    """Return the share of `x` that looks foreign to a defence."""
    if isinstance(model, RAILS):
        return float(model.respond(x, seed=seed).foreign.float().mean())
    return float(model.foreign(x).float().mean()) if isinstance(model, DkNN) else None


def pictures(defences: Mapping[str, nn.Module], examples: Examples, adversarials: Tensor, seed: int) -> dict[str, Any]:
    """Return the gallery and the learning curves of the report, for the attack that knows the CNN alone."""
    x, y = examples
    rails = defences["rails"]
    assert isinstance(rails, RAILS)
    clean, attacked = (rails.respond(version, seed=seed, trace=True) for version in (x, adversarials))
    assert clean.trace is not None
    assert attacked.trace is not None
    labels = {
        kind: (answers(model, x)[0][0], answers(model, adversarials)[0][0])
        for kind, model in defences.items()
        if kind != "rails"
    } | {"rails": (clean.labels, attacked.labels)}
    fooled, right = labels["cnn"][1] != y.cpu(), (attacked.labels == y).cpu()
    chosen = [
        i
        for group, most in zip((fooled & right, fooled & ~right), SHOWN, strict=True)
        for i in group.nonzero()[:most, 0].tolist()
    ]
    with torch.no_grad():
        wrong = defences["cnn"](adversarials).scatter(1, y[:, None], -torch.inf).argmax(1)
    return {
        "choice": f"Shown are the first antigens that fool the CNN: {SHOWN[0]} that RAILS gets right, {SHOWN[1]} not.",
        "gallery": report.specimens(rails, x, adversarials, y, attacked, labels, indices=chosen),
        "curves": report.learning_curves(clean.trace[0], attacked.trace[0], y, wrong),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the result rows as a table to print, a section per defence."""
    found = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(COLUMNS):
        found.add_column(column, no_wrap=True, justify="left" if i < 3 else "right")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["defence"] != row["defence"]
        found.add_row(
            row["defence"],
            row["attack"],
            row["knows"] if row["attack"] != "none" else "",
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * row['ci95'][0]:.1f} to {100 * row['ci95'][1]:.1f}",
            f"{1000 * row['seconds_per_image']:.2g}",
            "" if row["foreign"] is None else f"{100 * row['foreign']:.1f} %",
            end_section=last,
        )
    return found
