"""`immunonet evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from immunonet import RAILS, DkNN, Maturation, _check, _store, data
from immunonet.attacks import PGD
from immunonet.cli import common
from immunonet.evaluation.benchmark import KNOWS, METRICS, NEIGHBOURS, Benchmark, Outcome
from immunonet.evaluation.statistics import mcnemar

PRESETS: dict[str, Callable[..., Maturation]] = {
    "default": Maturation,
    "paper": Maturation.paper,
    "authors": lambda **overrides: cast(Maturation, Maturation.authors("mnist", **overrides)),
}

COLUMNS = ("layer", "defence", "attack", "knows", "accuracy", "95 % interval", "ms/image", "foreign")


def evaluate(
    dataset: Annotated[
        str,
        typer.Option("--dataset", help=f"{', '.join(data.DATASETS)}, a Parquet file, or a folder of class folders."),
    ],
    model: common.ModelOption = None,
    weights: common.WeightsOption = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            help="input, a submodule's name, mnist_affine, or package.module:factory, which is called with the "
            "model. Repeat it for several; each is evaluated by itself. Default: input.",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help=f"One of {', '.join(KNOWS)}; repeat it. Default: all.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="The first so many test images.")] = 1000,
    eps: Annotated[str, typer.Option("--eps", help="Size of the perturbation, such as 0.1 or 60/255.")] = "8/255",
    step: Annotated[str | None, typer.Option("--step", help="Step of PGD. Default: a quarter of eps.")] = None,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Steps of PGD.")] = 20,
    norm: Annotated[str, typer.Option("--norm", help="linf or l2.")] = "linf",
    preset: Annotated[str, typer.Option("--preset", help=f"Settings of RAILS: {', '.join(PRESETS)}.")] = "default",
    population: Annotated[
        list[str] | None,
        typer.Option(
            "--population", help="Cells of RAILS, as 1000, or at one layer, as pool1=200; repeat it. Default: 1000."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of RAILS, from --seed on.")] = 5,
    tune_dknn: Annotated[
        bool,
        typer.Option(
            "--tune-dknn", help="Evaluate DkNN also with neighbours and metric chosen on the validation split."
        ),
    ] = False,
    validation: Annotated[
        int | None, typer.Option("--validation", min=1, help="Size of the validation split, as given to train.")
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Images per part that is kept.")] = 100,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("evaluation"),
    json: common.JsonOption = None,
) -> None:
    """Attack a classifier, DkNN and RAILS at each layer, and print how often they are right.

    The repertoire is the training set less the validation split, on which both are calibrated. Attacks: FGSM and
    PGD (no random start) on the classifier, and PGD on a soft vote of each defence's own neighbours (soft-knn).
    Finished parts and adversarial examples are kept in DIR, and the same command continues from them. The table
    is also written to DIR/table.md.
    """
    target = common.resolve_device(device)
    layers = list(dict.fromkeys(layer or ["input"]))
    attacks = [_check.choice("--attack", name, tuple(KNOWS)) for name in dict.fromkeys(attack or KNOWS)]
    populations = _populations(population or [], layers)
    make = PRESETS[_check.choice("--preset", preset, tuple(PRESETS))]
    maturations = {at: make(**({} if populations[at] is None else {"population": populations[at]})) for at in layers}
    size = _number("--eps", eps)
    step_size = size / 4 if step is None else _number("--step", step)
    pgd = PGD(eps=size, step=step_size, iterations=iterations, norm=norm, random_start=False)
    common.prepare(out, json)
    images = common.resolve_dataset(dataset, "train", data_dir)
    test = common.resolve_dataset(dataset, "test", data_dir)[:n]
    training, held_out = (images[part] for part in data.split(len(images), validation))
    name = common.model_name(model, images)
    net = common.load_model(name, weights, target, classes=len(images.classes))
    common.check_model(name, net, images)
    maps = {at: common.resolve_layer(at, net) for at in layers}
    for at in layers:
        DkNN(net, maps[at])  # a wrong name is told before any work
    on_base = [attack for attack in attacks if KNOWS[attack] != "defence"]
    kinds = 3 if tune_dknn else 2
    steps = len(test) * (len(on_base) + kinds * len(layers) * len(attacks))
    steps += len(METRICS) * len(NEIGHBOURS) * len(layers) if tune_dknn else 0
    outcomes: list[Outcome] = []
    with common.progress() as bar:
        task = bar.add_task("evaluating", total=steps)
        bench = Benchmark(
            out,
            {
                "dataset": dataset,
                "model": name,
                "weights": common.digest(net.state_dict().values()),
                "repertoire": len(training),
                "calibration": len(held_out),
                "device": target.type,
            },
            base=net,
            repertoire=(training.x, training.y),
            calibration=(held_out.x, held_out.y),
            test=(test.x.to(target), test.y.to(target)),
            pgd=pgd,
            seeds=range(seed, seed + seeds),
            chunk=chunk,
            advance=lambda images: bar.advance(task, images),
        )

        def measure(kind: str, at: str | None, defence: nn.Module, **extra: Any) -> None:
            for found in bench.run(kind, at, defence, attacks if at else on_base, **extra).values():
                outcomes.append(found)
                done = " ".join(filter(None, (kind, at, found.row.attack)))
                bar.console.print(f"{done}: {found.row.accuracy:.4f}", markup=False, highlight=False)

        measure("cnn", None, net)
        for at in layers:
            measure("dknn", at, DkNN(net, maps[at], neighbours=min(75, len(training))))
            if tune_dknn:
                best = bench.tune_dknn(at, maps[at])
                chosen = {key: best[key] for key in ("neighbours", "metric")}
                measure("dknn-tuned", at, DkNN(net, maps[at], **chosen), tuning=best)
            measure("rails", at, RAILS(net, maps[at], maturation=maturations[at]))

    rows = [_cells(found) for found in outcomes]
    table = Table(*(Column(name, no_wrap=True) for name in COLUMNS))
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    _store.write_text(out / "table.md", "\n".join([*lines, "", *_pairs(outcomes)]) + "\n")
    for line in _pairs(outcomes):
        typer.echo(line)
    common.write_results(json, [found.row.to_json() | {"foreign": _share(found)} for found in outcomes])


def _populations(values: list[str], layers: list[str]) -> dict[str, int | None]:
    """Read `1000` (for all layers) and `pool1=200` (for one); ValueError for anything else."""
    found: dict[str, int | None] = dict.fromkeys(layers)
    for value in sorted(values, key=lambda value: "=" in value):
        layer, _, number = value.rpartition("=")
        if not number.isdecimal() or (layer and layer not in layers):
            raise ValueError(
                f"--population must be a number, or LAYER=NUMBER for one of {', '.join(layers)}, got {value!r}"
            )
        found |= {name: int(number) for name in ([layer] if layer else layers)}
    return found


def _number(option: str, text: str) -> float:
    """Read `0.1` or `60/255`."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{option} must be a number such as 0.1 or 60/255, got {text!r}") from error


def _share(found: Outcome) -> float | None:
    """Return the share flagged foreign, None for a network that flags nothing."""
    return None if found.foreign is None else float(found.foreign.float().mean())


def _cells(found: Outcome) -> list[str]:
    row, share = found.row, _share(found)
    return [
        ", ".join(row.settings["layers"]),
        row.defence,
        row.attack,
        row.knows if row.attack != "none" else "",
        f"{row.accuracy:.4f}",
        f"{row.ci95[0]:.3f} to {row.ci95[1]:.3f}",
        f"{1000 * row.seconds_per_image:.2f}",
        "" if share is None else f"{share:.3f}",
    ]


def _pairs(outcomes: list[Outcome]) -> list[str]:
    """Compare RAILS (its first seed) with each DkNN at the same layer, on the same inputs, in pairs."""
    lines = []
    for rails in outcomes:
        for dknn in outcomes:
            at = [(found.row.settings["layers"], found.row.attack) for found in (rails, dknn)]
            kinds = rails.row.defence == "rails" and dknn.row.defence.startswith("dknn")
            if kinds and at[0] == at[1] and rails.row.knows != "defence":
                a, b = rails.correct[0], dknn.correct[0]
                lines.append(
                    f"{rails.row.settings['layers'][0]}, {rails.row.attack}: rails alone is right on "
                    f"{int((a & ~b).sum())}, {dknn.row.defence} alone on {int((b & ~a).sum())} of {len(a)} images, "
                    f"p = {mcnemar(a, b):.2g} (McNemar, seed {rails.row.seeds[0]})"
                )
    return lines
