"""`immunonet reproduce`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from torch import nn

from immunonet import _store, data, studies, zoo
from immunonet.cli import common
from immunonet.evaluation.journal import Journal
from immunonet.evaluation.records import VERSION, envelope
from immunonet.studies import behaviour, experiments, runner, search
from immunonet.studies.lab import Lab, digest
from immunonet.studies.settings import Study
from immunonet.studies.tables import Section, markdown, sections
from immunonet.studies.tasks import Task, missing


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="STUDY", help=f"One of {', '.join(studies.NAMES)}.")] = None,
    study_file: Annotated[
        Path | None, typer.Option("--study", metavar="FILE.toml", help="A study of your own, instead of STUDY.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Run the study on other data, such as svhn-sample; its networks are trained."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="I/N", help="Do every N-th part from the I-th on (0/2, 1/2); then --merge."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put the shards in DIR together and report.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write an HTML page and figures as well.")] = False,
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of finished parts and networks. Default: runs/STUDY."),
    ] = None,
    json: common.JsonOption = None,
) -> None:
    """Run a study of the papers from raw data to tables and figures.

    Finished parts, adversarial examples and trained networks are kept in DIR, and the same command continues from
    them. The tables are written to DIR/table.md. With --json FILE, which images were right is written beside it
    (.safetensors), a README.md of all studies in that folder, and with --report the page and figures; without it,
    they go to DIR.
    """
    if (name is None) == (study_file is None):
        raise ValueError(f"give STUDY, one of {', '.join(studies.NAMES)}, or --study FILE.toml, and not both")
    if name is not None and name not in studies.NAMES:
        raise ValueError(f"STUDY must be one of {', '.join(studies.NAMES)}, got {name!r}")
    if merge and shard is not None:
        raise ValueError("--merge puts finished shards together: give it without --shard")
    if shard is not None and (json is not None or report):
        raise ValueError("--shard leaves results to --merge: give --json and --report with that")
    part = None if shard is None else runner.read_shard(shard)
    study = studies.load(name or study_file or "")
    title = name or (study_file.stem if study_file else "")
    own_weights = dataset is None or dataset == study.dataset
    if dataset is not None:  # files of one's own may be in the order of their classes
        study = dataclasses.replace(study, order="random" if Path(dataset).exists() else study.order)
    study = dataclasses.replace(study, dataset=dataset or study.dataset)
    out = out or Path("runs") / title
    target = common.resolve_device(device)
    common.prepare(out, json)
    images = _images(study.dataset, "train", data_dir, given=dataset is not None)
    test = _images(study.dataset, "test", data_dir, given=dataset is not None, classes=images.classes)
    training, held_out = (images[chosen] for chosen in data.split(len(images), study.validation))
    strangers = {source for entry in study.sensing for source in entry.strangers} - {"noise", *study.attacks}
    others = {source: _images(source, "test", data_dir) for source in sorted(strangers)}
    models = {base: common.model_name(found.model, images) for base, found in study.bases.items()}
    nets = {base: _network(study, base, models, training, held_out, target, out, own_weights) for base in study.bases}
    for base, net in nets.items():
        common.check_model(models[base], net, images)
    settings = study.identity() | {
        "seed": seed,
        "device": target.type,
        "weights": {base: digest(net) for base, net in nets.items()},
        "sizes": [len(training), len(held_out), len(test)],
        "images": [_store.digest([part.x, part.y]) for part in (training, held_out, test)],
        "version": VERSION,
    }
    journal = Journal(runner.journal_path(out, part), settings)
    lab = Lab(
        study,
        nets=nets,
        training=training,
        held_out=held_out,
        test=test,
        others=others,
        layer=common.resolve_layer,
        folder=out,
        journal=journal,
    )
    for entry in (*study.main, *study.curves):
        for base in entry.bases:
            for layers in entry.layers:
                _check_layers(lab, base, layers)
    for wanted in study.search:
        _check_layers(lab, wanted.base, wanted.layers)
    searches = search.tasks(study, lab, seed)
    work = experiments.tasks(study, lab, seed) + behaviour.tasks(study, lab, seed) + searches
    if merge:
        lab.journal = runner.merge(out, settings, work)
    else:
        index, count = part or (0, 1)
        mine = [task for task in work[index::count] if task in searches]
        if missing(mine, journal):  # told now, not after the hours that other parts take
            data.require("optuna", "search")
        _run(work, journal, part)
    if part is not None:
        typer.echo(f"shard {shard} is finished: when all are, run --merge")
        return
    found = experiments.measured(study, lab, seed, models)
    from immunonet.studies import report as pages

    result = pages.record(study, title, lab, seed, found, drawn=report)
    folder, stem = (out, title) if json is None else (json.parent, json.stem)
    if report:
        pages.draw(result, folder, stem)
    pages.write_correctness(folder / f"{stem}.safetensors", found)
    _store.write_text(out / "table.md", markdown(result))
    if json is not None:
        _store.write_json(json, result)
        if pages.write_readme(json.parent) is None:
            typer.echo(f"{json.parent / 'README.md'} is not one of these reports, and was left as it is")
    console = Console(width=None if sys.stdout.isatty() else 160)
    for section in sections(result):
        if section.title in ("Main table", "Targets"):
            _print(console, section)


def _run(work: list[Task], journal: Journal, part: runner.Shard | None) -> None:
    """Run the tasks with a bar of progress and time left; without a terminal, a line per finished experiment."""
    index, count = part or (0, 1)
    mine = work[index::count]
    left = missing(mine, journal)
    if len(left) < len(mine):
        common.console.print(f"continuing: {len(mine) - len(left)} of {len(mine)} parts are done", highlight=False)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=common.console,
        transient=True,
        disable=not common.console.is_terminal,
    ) as bar:
        shown = bar.add_task("", total=sum(task.cost for task in left))
        last = {task.about: task.key for task in left}
        keys = {task.key for task in left}
        done = 0

        def advance(task: Task) -> None:
            nonlocal done
            if task.key not in keys:
                return
            done += 1
            bar.update(shown, advance=task.cost, description=task.about)
            if last[task.about] == task.key:
                bar.console.print(f"{done} of {len(left)} parts: {task.about}", markup=False, highlight=False)

        runner.run(work, journal, shard=part, advance=advance)


def _images(
    name: str, split: str, directory: Path | None, *, given: bool = False, classes: tuple[str, ...] | None = None
) -> data.Images:
    """Return a split of a dataset; what a study means by a built-in name is no folder that happens to be there."""
    if name in data.DATASETS and not given:
        return data.load(name, split, directory=directory, classes=classes)
    return common.resolve_dataset(name, split, directory, classes=classes)


def _network(
    study: Study,
    name: str,
    models: dict[str, str],
    training: data.Images,
    held_out: data.Images,
    device: torch.device,
    out: Path,
    own_weights: bool,
) -> nn.Module:
    """Return a base network with its weights, or else those of its recipe, trained if they are not in `out` yet."""
    base, classes = study.bases[name], len(training.classes)
    if own_weights and base.weights is not None:
        path = Path(base.weights)
        if path.exists() or path.with_suffix(".json").exists():
            return common.load_model(models[name], path, device, classes=classes)
    arguments = base.arguments()
    net = common.build_model(models[name], classes=classes, seed=arguments.get("seed", 0)).to(device)
    if base.start is not None:
        first = _network(study, base.start, models, training, held_out, device, out, own_weights)
        net.load_state_dict(first.state_dict())
    made_of = {
        "model": models[name],
        "training": base.training,
        "first": digest(net),
        "images": _store.digest([training.x, training.y]),
    }
    path = out / "weights" / f"{name}-{_store.fingerprint(made_of)[:12]}.safetensors"
    if not path.with_suffix(".json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = path.with_suffix(".checkpoint.safetensors")
        with common.progress() as bar:
            task = bar.add_task(f"training {name}")

            def show(step: int, steps: int, history: list[zoo.Epoch]) -> None:
                bar.update(task, completed=step, total=steps)

            history = zoo.train(net, training, held_out, **arguments, checkpoint=checkpoint, on_progress=show)
        zoo.save_weights(net, path, recipe={**envelope([]), **made_of, "history": history})
        checkpoint.unlink()
        common.console.print(f"trained {name}: {path}", markup=False, soft_wrap=True)
    zoo.load_weights(net, path)
    return net.eval()


def _check_layers(lab: Lab, base: str, layers: tuple[str, ...]) -> None:
    """Raise ValueError for a layer that the network lacks, before any work is done."""
    from immunonet import DkNN

    DkNN(lab.nets[base], lab.maps(base, layers))


def _print(console: Console, section: Section) -> None:
    head, *body = section.table
    table = Table(*(Column(name) for name in head), title=section.title)
    for line in body:
        table.add_row(*line)
    console.print(table)
