"""`immunonet evaluate`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from immunonet import RAILS, DkNN, Maturation, _check, _store, data, zoo
from immunonet.attacks import PGD
from immunonet.cli import common, places
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.evaluation import protocol as protocols
from immunonet.evaluation.asking import LogProbabilities
from immunonet.evaluation.benchmark import KNOWS, METRICS, NEIGHBOURS, Benchmark, Outcome
from immunonet.evaluation.outcome import Evaluation
from immunonet.evaluation.records import envelope
from immunonet.evaluation.statistics import mcnemar
from immunonet.evaluation.suite import PROTOCOLS
from immunonet.features.names import Layer

PRESETS: dict[str, Callable[..., Maturation]] = {
    "default": Maturation,
    "paper": Maturation.paper,
    "authors": lambda **overrides: cast(Maturation, Maturation.authors("mnist", **overrides)),
}

DEFENCES = ("cnn", "dknn", "rails")
# Keys of an evaluation's own file that stand once in that of several.
OUTER = ("results", "environment", "command")
COLUMNS = ("layer", "defence", "attack", "knows", "accuracy", "95 % interval", "ms/image", "foreign")


def evaluate(
    dataset: common.DatasetOption,
    model: common.ModelOption = None,
    weights: common.WeightsOption = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            help="input, a submodule's name, mnist_affine, or package.module:factory, which is called with the "
            "model. fc1+fc2: one defence that votes over both. Repeat it for several defences. Default: input.",
        ),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help=f"One of {', '.join(KNOWS)}; repeat it. Default: all.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help=f"{', '.join(PROTOCOLS)}: attack by all that is known to work, with sanity checks, and the worst case "
            "as verdict. Default: only the attacks named by --attack.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="With --protocol: what each defence may take; the plan is cut to it."),
    ] = None,
    black_box: Annotated[
        int | None,
        typer.Option(
            "--black-box", min=1, help="With --protocol: images for attacks that only ask. Default: 20 to 1000."
        ),
    ] = None,
    defence: Annotated[
        list[str] | None,
        typer.Option("--defence", help=f"With --protocol: one of {', '.join(DEFENCES)}; repeat it. Default: all."),
    ] = None,
    transfer: Annotated[
        list[str] | None,
        typer.Option(
            "--transfer",
            metavar="[MODEL=]FILE",
            help="With --protocol: weights of another network to attack from, of the same model unless named.",
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            help="So many images, a fixed random sample. Default: 1000; with --protocol 100 to 1000.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--slice",
            metavar="FROM:TO",
            help="Instead of --n: the images at these places in the order of the file, as 0:1000 for the first 1,000.",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            "--split", help="test, or validation: settings are chosen there. Its other images then calibrate and tune."
        ),
    ] = "test",
    eps: Annotated[str, typer.Option("--eps", help="Size of the perturbation, such as 0.1 or 60/255.")] = "8/255",
    step: Annotated[str | None, typer.Option("--step", help="Step of PGD. Default: a quarter of eps.")] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", min=1, help="Steps of PGD. Default: 20.")] = None,
    norm: Annotated[str, typer.Option("--norm", help="linf or l2.")] = "linf",
    preset: Annotated[str, typer.Option("--preset", help=f"Settings of RAILS: {', '.join(PRESETS)}.")] = "default",
    population: Annotated[
        list[str] | None,
        typer.Option(
            "--population", help="Cells of RAILS, as 1000, or at one layer, as pool1=200; repeat it. Default: 1000."
        ),
    ] = None,
    maturation: Annotated[
        list[str] | None,
        typer.Option(
            "--maturation", metavar="KEY=VALUE", help="Another setting of RAILS, as neighbours=50; repeat it."
        ),
    ] = None,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Cells of RAILS live in the layer itself. Default: they are images.")
    ] = False,
    voice: Annotated[
        float, typer.Option("--voice", help="Weight of the network's own softmax in RAILS' votes, in [0, 1).")
    ] = 0.0,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Runs of RAILS, from --seed on. Default: 5.")
    ] = None,
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
    image: common.ImageOption = None,
    label: common.LabelOption = None,
    size: common.SizeOption = None,
    background: common.BackgroundOption = "white",
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("evaluation"),
    json: common.JsonOption = None,
) -> None:
    """Attack a classifier, DkNN and RAILS at each layer, and print how often they are right.

    The repertoire is the training set less the validation split, on which both are calibrated. Attacks: FGSM and
    PGD (no random start) on the classifier, and PGD on a soft vote of each defence's own neighbours (soft-knn), or of
    RAILS' clones (soft-clones).
    Finished parts and adversarial examples are kept in DIR, and the same command continues from them. The table
    is also written to DIR/table.md. With --protocol one page per defence is written instead, DIR/NAME.html.
    """
    plain = {"--attack": attack, "--step": step, "--iterations": iterations, "--seeds": seeds}
    asked = {"--minutes": minutes, "--black-box": black_box, "--defence": defence, "--transfer": transfer}
    if protocol is not None and (wrong := [option for option, value in plain.items() if value]):
        raise ValueError(f"{wrong[0]} does not go with --protocol, which sets its own")
    if protocol is None and (wrong := [option for option, value in asked.items() if value]):
        raise ValueError(f"{wrong[0]} needs --protocol")
    budget = PROTOCOLS[_check.choice("--protocol", protocol, tuple(PROTOCOLS))] if protocol else None
    kinds = [_check.choice("--defence", name, DEFENCES) for name in dict.fromkeys(defence or DEFENCES)]
    target = common.resolve_device(device)
    layers = list(dict.fromkeys(layer or ["input"]))
    attacks = [_check.choice("--attack", name, tuple(KNOWS)) for name in dict.fromkeys(attack or KNOWS)]
    populations = _populations(population or [], layers)
    make = PRESETS[_check.choice("--preset", preset, tuple(PRESETS))]
    changed = dict(_setting(text) for text in maturation or ())
    maturations = {
        at: make(**changed | ({} if populations[at] is None else {"population": populations[at]})) for at in layers
    }
    _check.choice("--split", split, ("test", "validation"))
    _check.number("--voice", voice, least=0, most=1, below=True)
    radius = _check.fraction("--eps", eps)
    step_size = radius / 4 if step is None else _check.fraction("--step", step)
    pgd = PGD(eps=radius, step=step_size, iterations=iterations or 20, norm=norm, random_start=False)
    between = None if part is None else places.between(part)
    if between is not None and n is not None:
        raise ValueError("--slice goes without --n: it says which images and how many")
    common.prepare(out, json)
    how: dict[str, Any] = {"image": image, "label": label, "size": size, "background": background}
    images = common.resolve_dataset(dataset, "train", data_dir, **how)
    training, held_out = (images[chosen] for chosen in data.split(len(images), validation))
    count = n or (budget.images if budget else 1000)
    if split == "validation":
        chosen, where, rest = places.chosen(len(held_out), count, between)
        if not len(rest):
            option, given = ("--n", count) if part is None else ("--slice", part)
            raise ValueError(f"{option} must leave some of the {len(held_out)} validation images, got {given}")
        test, held_out = held_out[chosen], held_out[rest]
    else:
        test = common.resolve_dataset(dataset, "test", data_dir, **how, classes=images.classes)
        chosen, where, _ = places.chosen(len(test), count, between)
        # In random order, so that tuning, which takes the first few, has some of every class.
        test, held_out = test[chosen], held_out[data.sample(len(held_out))]
    name = common.model_name(model, images)
    net = common.load_model(name, weights, target, classes=len(images.classes))
    common.check_model(name, net, images)
    maps = {at: common.resolve_layers(at, net) for at in layers}
    for at in layers:
        DkNN(net, maps[at])  # a wrong name is told before any work
    spaces = {at: at if hidden and at != "input" else None for at in layers}
    if wrong := [at for at, space in spaces.items() if space and not isinstance(maps[at], str)]:
        raise ValueError(f"--hidden needs submodules as layers, got --layer {wrong[0]}")
    others = [_other(text, name, target, len(images.classes)) for text in transfer or ()]
    on_base = [attack for attack in attacks if KNOWS[attack] != "defence"]
    on_dknn = [attack for attack in attacks if attack != "soft-clones"]
    of_dknn = (2 if tune_dknn else 1) * len(on_dknn)
    steps = len(test) * (len(on_base) + len(layers) * (of_dknn + len(attacks)))
    steps += len(METRICS) * len(NEIGHBOURS) * len(layers) if tune_dknn else 0
    outcomes: list[Outcome] = []
    with common.progress() as bar:
        task = bar.add_task("evaluating", total=steps)
        shared = {
            "dataset": dataset,
            "model": name,
            "net": weights.stem if weights else name,
            "weights": _store.digest(net.state_dict().values()),
            "repertoire": len(training),
            "calibration": len(held_out),
            "split": split,
            "order": "random" if between is None else f"file, from {between[0]}",
            "device": target.type,
        } | common.told(how)
        bench = Benchmark(
            out,
            shared,
            base=net,
            repertoire=(training.x, training.y),
            calibration=(held_out.x, held_out.y),
            test=(test.x.to(target), test.y.to(target)),
            pgd=pgd,
            seeds=range(seed, seed + (seeds or 5)),
            chunk=chunk,
            advance=lambda images: bar.advance(task, images),
        )

        if protocol is not None:
            bar.update(task, visible=False)
            found = _by_protocol(
                bench, shared, where, maps, maturations, spaces, voice, kinds, tune_dknn,
                defend={
                    "minutes": minutes, "black_box": black_box, "protocol": protocol,
                    "eps": radius, "norm": norm, "seed": seed,
                },
                transfer=others,
                say=lambda text: bar.console.print(text, markup=False, highlight=False),
            )  # fmt: skip
            _tell(found, out, json)
            return

        def measure(kind: str, at: str | None, defence: nn.Module, chosen: list[str], **extra: Any) -> None:
            for found in bench.run(kind, at, defence, chosen, **extra).values():
                row = dataclasses.replace(found.row, settings=found.row.settings | {"slice": where})
                outcomes.append(dataclasses.replace(found, row=row))
                done = " ".join(filter(None, (kind, at, found.row.attack)))
                bar.console.print(f"{done}: {found.row.accuracy:.4f}", markup=False, highlight=False)

        measure("cnn", None, net, on_base)
        for at in layers:
            measure("dknn", at, DkNN(net, maps[at], neighbours=min(75, len(training))), on_dknn)
            if tune_dknn:
                best = bench.tune_dknn(at, maps[at])
                tuned = DkNN(net, maps[at], neighbours=best["neighbours"], metric=best["metric"])
                measure("dknn-tuned", at, tuned, on_dknn, tuning=best)
            rails = RAILS(net, maps[at], maturation=maturations[at], space=spaces[at], voice=voice)
            measure("rails", at, rails, attacks)

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


def _by_protocol(
    bench: Benchmark,
    shared: dict[str, Any],
    where: dict[str, Any] | list[int],
    maps: dict[str, Layer | list[Layer]],
    maturations: dict[str, Maturation],
    spaces: dict[str, str | None],
    voice: float,
    kinds: list[str],
    tune_dknn: bool,
    *,
    defend: dict[str, Any],
    transfer: list[nn.Module],
    say: Callable[[str], None],
) -> list[Evaluation]:
    """Evaluate the network and both defences at each layer by the protocol; `defend`: its keyword arguments."""
    x, y = bench.test
    net = bench.base
    work: list[tuple[str, str | None, Callable[[], nn.Module], dict[str, Any]]] = []
    if "cnn" in kinds:
        work.append(("cnn", None, lambda: LogProbabilities(net), {}))
    for at in maps:
        if "dknn" in kinds:
            tuned = bench.tune_dknn(at, maps[at], knowing=True) if tune_dknn else {}
            chosen = {key: tuned[key] for key in ("neighbours", "metric") if tuned}
            settings = chosen or {"neighbours": min(75, len(bench.repertoire[1]))}
            work.append(("dknn", at, partial(DkNN, net, maps[at], **settings), {"tuning": tuned} if tuned else {}))
        if "rails" in kinds:
            of_rails: dict[str, Any] = {"maturation": maturations[at], "space": spaces[at], "voice": voice}
            work.append(("rails", at, partial(RAILS, net, maps[at], **of_rails), {}))
    found = []
    for kind, layer, make, extra in work:
        defence = make()
        if isinstance(defence, NeighbourDefence):
            defence.fit(*bench.repertoire, calibration=bench.calibration)
        layers = {} if layer is None else {"layers": layer.split("+")}
        found.append(
            protocols.evaluate(
                defence,
                x,
                y,
                base=net,
                transfer=transfer,
                name=kind,
                base_name="cnn",
                folder=bench.folder,
                settings=shared | {"slice": where} | layers | extra,
                dataset=shared["dataset"],
                on_progress=say,
                **defend,
            )
        )
    return found


def _tell(found: list[Evaluation], out: Path, json: Path | None) -> None:
    """Print the verdicts, and write the pages and the JSON."""
    table = Table("layer", "defence", "clean", "transfer", "worst case", "95 % interval", "reliable")
    results: list[dict[str, Any]] = []
    for one in found:
        verdict = one.verdict
        layer = ", ".join(verdict.settings["layers"])
        own = [row for row in one.rows if row.defence == verdict.defence]
        if verdict.defence == "cnn":  # the base is the defence: its rows are there once
            own = list({row.attack: row for row in own}.values())
        right = {row.attack: row.accuracy for row in own}
        # Attacks that only ask cover fewer images, which would not compare.
        on_base = [row for row in own if row.knows == "base" and row.attack not in ("none", "worst-case")]
        transfer = [row.accuracy for row in on_base if row.n == max(row.n for row in on_base)]
        low, high = verdict.ci95
        cells = (f"{right['none']:.4f}", f"{min(transfer):.4f}", f"{verdict.accuracy:.4f}", f"{low:.3f} to {high:.3f}")
        table.add_row(layer, verdict.defence, *cells, "no" if one.unreliable else "yes")
        results += [row.to_json() for row in (*own, verdict)]
        page = _store.slug("-".join(filter(None, (verdict.defence, "+".join(verdict.settings["layers"])))))
        one.to_html(out / f"{page}.html")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if json is not None:
        records = [{k: v for k, v in one.to_dict().items() if k not in OUTER} for one in found]
        for one, record in zip(found, records, strict=True):
            record |= {key: one.verdict.settings[key] for key in ("layers", "weights")} | {
                "defence": one.verdict.defence
            }
        _store.write_json(json, envelope(results) | {"evaluations": records})


def _other(text: str, model: str, device: torch.device, classes: int) -> nn.Module:
    """Return the network of `FILE` (weights of `model`) or `MODEL=FILE`; a file's own name may hold "=" as well."""
    named, found, file = text.partition("=")
    if not found or Path(text).is_file() or not (named in zoo.NAMES or ":" in named):
        named, file = model, text
    return common.load_model(named, Path(file), device, classes=classes)


def _setting(text: str) -> tuple[str, Any]:
    """Read a setting of `Maturation`: a number, "none", or a word."""
    key, found, value = text.partition("=")
    known = [field.name for field in dataclasses.fields(Maturation)]
    if not found or key not in known:
        raise ValueError(f"--maturation must be KEY=VALUE with a KEY of {', '.join(known)}, got {text!r}")
    if value == "none":
        return key, None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return key, kind(value)
    return key, value


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
                    f"{', '.join(rails.row.settings['layers'])}, {rails.row.attack}: rails alone is right on "
                    f"{int((a & ~b).sum())}, {dknn.row.defence} alone on {int((b & ~a).sum())} of {len(a)} images, "
                    f"p = {mcnemar(a, b):.2g} (McNemar, seed {rails.row.seeds[0]})"
                )
    return lines
