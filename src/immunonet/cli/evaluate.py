"""`immunonet evaluate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from immunonet import _check, _store, data, zoo
from immunonet._check import nearest
from immunonet.attacks import FGSM, PGD
from immunonet.attacks.norms import NORMS
from immunonet.cli import common, watch
from immunonet.defences.spec import GRAMMAR, Spec, parse_all
from immunonet.evaluation import cluster
from immunonet.evaluation import protocol as protocols
from immunonet.evaluation.bench import Bench
from immunonet.evaluation.lab import Lab, Measured, Measurement, Tables, Tuning
from immunonet.evaluation.outcome import Evaluation
from immunonet.evaluation.records import envelope
from immunonet.evaluation.suite import PROTOCOLS
from immunonet.report import tables
from immunonet.statistics import mcnemar

DEFAULT = ("cnn", "dknn input", "rails input")
# Attacks on the network alone; all others are surrogates of a defence, PGD through which knows it.
ON_BASE = ("none", "fgsm", "pgd")
THROUGH = ("soft-knn", "soft-clones")
# Validation images that settings are chosen on.
TUNING = 300
# Keys of an evaluation's own file that stand once in that of several.
OUTER = ("results", "environment", "command")

# What gives a spec with its settings, chosen if they are tuned, and what rows say of the choice.
Choose = Callable[[Spec], tuple[Spec, dict[str, Any]]]


def evaluate(
    dataset: common.DatasetOption,
    model: common.ModelOption = None,
    weights: common.WeightsOption = None,
    defence: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help=f"{GRAMMAR}; repeat it. Default: {', '.join(DEFAULT)}.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(ON_BASE)} (on the network), or a surrogate of the defence, such as {', '.join(THROUGH)}; "
            "repeat it. Default: all of these."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PROTOCOLS)}: attack by all that is known to work, with sanity checks, and the worst case "
            "as verdict. Default: only the attacks named by --attack."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="With --protocol: what each defence may take; the plan is cut to it.")
    ] = None,
    black_box: Annotated[
        int | None, typer.Option(min=1, help="With --protocol: images for attacks that only ask. Default: 20 to 1000.")
    ] = None,
    transfer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL=]FILE",
            help="With --protocol: weights of another network to attack from, of the same model unless named.",
        ),
    ] = None,
    sentinel: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE [KEY=VALUE ...]",
            help="With --protocol: what watches the defences, as 'pooled window=2000 false_alarm=.01' (and neighbours; "
            "SPACE is pooled, spectrum, input or a layer), fitted on the training images; and what it stops.",
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(min=1, help="So many images, a fixed random sample. Default: 1000; with --protocol 100 to 1000."),
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
        typer.Option(help="test, or validation: settings are chosen there. Its other images then calibrate and tune."),
    ] = "test",
    eps: Annotated[
        str | None, typer.Option(help="Size of the perturbation, such as 0.1 or 60/255. Default: 8/255.")
    ] = None,
    step: Annotated[str | None, typer.Option(help="Step of PGD. Default: a quarter of eps.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Steps of PGD. Default: 20.")] = None,
    norm: Annotated[str | None, typer.Option(help=f"{', '.join(NORMS)}. Default: linf.")] = None,
    threat: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NORM=EPS",
            help="With --protocol, instead of --eps and --norm: a threat such as linf=8/255; repeat it, as with l2=0.5 "
            "and l1=12. All attacks are made under each, and the verdict is the worst of all threats on every image.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of a randomised defence, from --seed on. Default: 5.")
    ] = None,
    validation: common.ValidationOption = None,
    chunk: common.ChunkOption = 100,
    ray: common.RayOption = None,
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
    """Attack defences of a classifier, and print how often they are right.

    The repertoire is the training set less the validation split, on which defences are calibrated, and tuned where
    their description says so. Attacks: FGSM and PGD (no random start) on the classifier, and PGD through surrogates
    that know a defence.
    Finished parts and adversarial examples are kept in DIR, and the same command continues from them. The table
    is also written to DIR/table.md. With --protocol one page per defence is written instead, DIR/NAME.html.
    """
    plain = {"--attack": attack, "--step": step, "--iterations": iterations, "--seeds": seeds}
    further: dict[str, Any] = {
        "--minutes": minutes, "--black-box": black_box, "--transfer": transfer, "--threat": threat,
        "--sentinel": sentinel,
    }  # fmt: skip
    for option, value in (further if protocol is None else plain).items():
        if value:
            why = "needs --protocol" if protocol is None else "does not go with --protocol, which sets its own"
            raise ValueError(f"{option} {why}")
    budget = PROTOCOLS[_check.choice("--protocol", protocol, tuple(PROTOCOLS))] if protocol else None
    target, specs = common.resolve_device(device), parse_all(defence or DEFAULT)
    _check.choice("--split", split, ("test", "validation"))
    if sentinel is not None:
        watch.parse(sentinel)
    threats = _threats(threat, eps, norm)
    pgds = {
        name: PGD(
            eps=radius, step=radius / 4 if step is None else _check.fraction("--step", step),
            iterations=iterations or 20, norm=name, random_start=False,
        )
        for name, radius in threats.items()
    }  # fmt: skip
    pgd = next(iter(pgds.values()))
    between = None if part is None else _between(part)
    if between is not None and n is not None:
        raise ValueError("--slice goes without --n: it says which images and how many")
    workers = cluster.workers(ray)
    common.prepare(out, json)
    how: dict[str, Any] = {"image": image, "label": label, "size": size, "background": background}
    images = common.resolve_dataset(dataset, "train", data_dir, **how)
    training, held_out = (images[chosen] for chosen in data.split(len(images), validation))
    count = n or (budget.images if budget else 1000)
    test = held_out
    if split == "test":
        test = common.resolve_dataset(dataset, "test", data_dir, **how, classes=images.classes)
    chosen, where, rest = _chosen(len(test), count, between)
    if split == "validation" and not len(rest):
        option, given = ("--n", count) if part is None else ("--slice", part)
        raise ValueError(f"{option} must leave some of the {len(test)} validation images, got {given}")
    # In random order, so that tuning, which takes the first few, has some of every class.
    test, held_out = test[chosen], held_out[rest if split == "validation" else data.sample(len(held_out))]
    name, net = common.network(model, weights, target, images)
    guard = None if sentinel is None else watch.fitted(sentinel, net, training)
    others = [_other(text, name, target, len(images.classes)) for text in transfer or ()]
    base = weights.stem if weights else name
    told = {
        "dataset": dataset, "model": name, "net": base, "calibration": len(held_out),
        "order": "random" if between is None else f"file, from {between[0]}", "device": target.type,
    } | common.told(how)  # fmt: skip
    lab = Lab(
        {base: net}, {"training": training, "validation": held_out, "test": test},
        resolve=common.resolve_layer, told=told, senses=True,
        where=lambda named, count: where if named == "test" else {"sample": [count, len(held_out)], "seed": 0},
    )  # fmt: skip
    lab.folder = out / "fitted"
    for spec in specs:
        lab.made(spec, base)  # a wrong name is told before any work
    few = min(TUNING, len(test)) if budget else TUNING
    known = {"pgd" if one is pgd else f"pgd {name}": one for name, one in pgds.items()}
    tuning = Tuning(images=few, attacks={"none": None, **known}, knowing=bool(budget))
    with common.progress() as bar:
        task = bar.add_task("evaluating", total=None)
        left: dict[str, float] = {}
        bench = Bench(lab, out, workers=workers, advance=lambda part: bar.advance(task, left.pop(part.key, 0)))
        measuring = Tables(bench, chunk)

        def choose(spec: Spec) -> tuple[Spec, dict[str, Any]]:
            settled = measuring.settled(Measurement(spec=spec, base=base), tuning)
            if spec.tuned:
                common.note(f"{spec.label}: {settled.spec.untuned.text}")
            return settled.spec, settled.tuning

        if protocol is not None:
            bar.update(task, visible=False)
            evaluations = []
            for spec, (best, notes) in zip(specs, map(choose, specs), strict=True):
                settings = told | {
                    "base": base, "weights": lab.weights[base], "split": split, "slice": where,
                    "layers": list(spec.layers), "repertoire": len(training),
                } | _own(spec) | ({"tuning": notes} if notes else {})  # fmt: skip
                evaluations.append(protocols.evaluate(
                    lab.fitted(best, base), *lab.images("test", slice(None)), base=net, transfer=others,
                    name=spec.name, base_name="cnn", dataset=dataset, settings=settings, folder=out,
                    protocol=protocol, minutes=minutes, black_box=black_box, threats=threats, seed=seed,
                    sentinel=guard, workers=workers, on_progress=common.note,
                ))  # fmt: skip
            _tell(evaluations, specs, out, json)
            return

        measurements = _measurements(lab, specs, attack, pgd, range(seed, seed + (seeds or 5)), split, choose)
        parts = [part for m in measurements for part in measuring.parts(m)]
        left |= {part.key: part.cost for part in parts}
        bar.update(task, total=sum(left.values()))
        bench.ahead(parts)
        outcomes = []
        for m in measurements:
            outcomes += measuring.measure([m])
            common.note(f"{m.spec.label} {m.attack}: {outcomes[-1].row.accuracy:.4f}")

    table, pairs = common.table([one.row for one in outcomes]), "".join(f"{line}\n" for line in _pairs(outcomes))
    tables.console(tables.Section("", table=table))
    _store.write_text(out / "table.md", f"{tables.grid(table)}\n\n{pairs}")
    typer.echo(pairs, nl=False)
    common.write_results(json, [one.row.to_json() | {"foreign": one.row.foreign} for one in outcomes])


def _threats(threat: list[str] | None, eps: str | None, norm: str | None) -> dict[str, float]:
    """Return the radii by norm that --threat tells, or --eps and --norm; ValueError for both, or for no such threat."""
    if not threat:
        name = _check.choice("--norm", "linf" if norm is None else norm, tuple(NORMS))
        return {name: _check.fraction("--eps", "8/255" if eps is None else eps)}
    for option, value in {"--eps": eps, "--norm": norm}.items():
        if value is not None:
            raise ValueError(f"{option} does not go with --threat, which tells both, as in --threat linf=8/255")
    return common.threats(threat) or {}


def _between(text: str) -> tuple[int, int]:
    """Read FROM:TO; ValueError for anything else."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ValueError(f"--slice must be FROM:TO, two numbers such as 0:1000, got {text!r}")
    return int(start), int(stop)


def _chosen(n: int, count: int, part: tuple[int, int] | None) -> tuple[Tensor, dict[str, Any] | list[int], Tensor]:
    """Return the places of the images to evaluate on, what a row says about them, and the others in random order."""
    order = data.sample(n)
    if part is None:
        few = min(count, n)
        return order[:few], {"sample": [few, n], "seed": 0}, order[few:]
    start, stop = part
    if stop > n:
        raise ValueError(f"--slice must end at {n}, the number of images, or before, got {start}:{stop}")
    return torch.arange(start, stop), [start, stop], order[(order < start) | (order >= stop)]


def _own(spec: Spec) -> dict[str, Any]:
    """Return what a row must say of settings that the defence itself does not know of."""
    return {"given": spec.settings} if spec.foreign else {}


def _measurements(
    lab: Lab, specs: list[Spec], attack: list[str] | None, pgd: PGD, seeds: range, split: str, choose: Choose
) -> list[Measurement]:
    """Return what is measured: every defence under every attack that there is for it, its settings chosen if tuned."""
    (base,) = lab.nets
    offered = {spec.text: list(lab.made(spec, base).surrogates()) for spec in specs}
    known = [*ON_BASE, *dict.fromkeys(name for names in offered.values() for name in names)]
    for name in attack or ():
        if name not in known:
            raise ValueError(f"--attack {name!r} is neither on the network nor a surrogate{nearest(name, known)}")
    methods = {"none": None, "fgsm": FGSM(eps=pgd.eps, norm=pgd.norm, bounds=pgd.bounds)}
    measurements: list[Measurement] = []
    for spec in specs:
        best, notes = choose(spec)
        drawn = tuple(seeds) if lab.made(best, base).randomised else ()
        measurements += [
            Measurement(
                spec=best, base=base, attack=name, method=methods.get(name, pgd), norm=pgd.norm,
                through="" if name in ON_BASE else name, images=len(lab.splits["test"]), tuning=notes,
                told={"split": split} | _own(spec), seeds=drawn,
            )
            for name in dict.fromkeys(attack or (*ON_BASE, *THROUGH))
            if name in (*ON_BASE, *offered[spec.text])
        ]  # fmt: skip
    return measurements


def _tell(evaluations: list[Evaluation], specs: list[Spec], out: Path, json: Path | None) -> None:
    """Print the verdicts, and write the pages and the JSON."""
    table: list[Sequence[str]] = []
    results: list[dict[str, Any]] = []
    records = []
    for one, spec in zip(evaluations, specs, strict=True):
        verdict, verdicts = one.verdict, list(one.verdicts.values())
        # Where the base is the defence its rows are there twice.
        own = {(row.norm, row.attack): row for row in one.rows if row.defence == verdict.defence}
        # Attacks that only ask cover fewer images, which would not compare.
        on_base = [row for row in own.values() if row.knows == "base" and row.attack != "none"]
        transfer = min(row.accuracy for row in on_base if row.n == max(row.n for row in on_base))
        clean = own[verdict.norm, "none"].accuracy
        cells = [f"{share:.4f}" for share in (clean, transfer, *(row.accuracy for row in verdicts))]
        cells += ["{:.3f} to {:.3f}".format(*verdict.ci95), "no" if one.unreliable else "yes"]
        table.append((", ".join(spec.layers), spec.name, *cells))
        results += [row.to_json() for row in (*own.values(), *verdicts)]
        one.to_html(out / f"{_store.slug(spec.text.replace(' ', '-'))}.html")
        told = {key: verdict.settings[key] for key in ("layers", "weights")} | {"defence": verdict.defence}
        records.append({k: v for k, v in one.to_dict().items() if k not in OUTER} | told)
    threats = [f"{row.norm} {row.eps:.4g}" for row in verdicts[:-1]]
    worst = "union" if threats else f"worst case, {verdict.norm} {verdict.eps:.3g}"
    head = ("layer", "defence", "clean", "transfer", *threats, worst, "95 % interval")
    tables.console(tables.Section("", table=[(*head, "reliable"), *table]))
    watched = [
        (one.record["sentinel"], spec) for one, spec in zip(evaluations, specs, strict=True) if "sentinel" in one.record
    ]
    for found, spec in watched:
        tables.console(tables.Section(f"{spec.label} behind the sentinel", table=tables.watched(found["attacks"])))
    for found, _ in watched[:1]:  # it is the same for all of them
        tables.console(tables.Section("Honest queries", table=tables.honest(found["false_alarms"])))
    if json is not None:
        _store.write_json(json, envelope(results) | {"evaluations": records})


def _other(text: str, model: str, device: torch.device, classes: int) -> nn.Module:
    """Return the network of `FILE` (weights of `model`) or `MODEL=FILE`; a file's own name may hold "=" as well."""
    named, equals, file = text.partition("=")
    if not equals or Path(text).is_file() or not (named in zoo.NAMES or ":" in named):
        named, file = model, text
    return common.load_model(named, Path(file), device, classes=classes)


def _pairs(outcomes: list[Measured]) -> list[str]:
    """Compare each randomised defence (its first seed) with each other one at its layers, on the same inputs."""
    lines = []
    for one, other in itertools.product(outcomes, repeat=2):
        a, b, at = one.row, other.row, one.row.settings["layers"]
        same = at == b.settings["layers"] and a.attack == b.attack
        if same and a.seeds and not b.seeds and not one.measurement.through:
            right, also = one.correct[0], other.correct[0]
            lines.append(
                f"{', '.join((*at, a.attack))}: {a.defence} alone is right on {int((right & ~also).sum())}, "
                f"{b.defence} alone on {int((also & ~right).sum())} of {a.n} images, "
                f"p = {mcnemar(right, also):.2g} (McNemar, seed {a.seeds[0]})"
            )
    return lines
