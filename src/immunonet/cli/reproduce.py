"""`immunonet reproduce`."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from immunonet import _store, data, studies
from immunonet.cli import common
from immunonet.cli.networks import Nursery
from immunonet.evaluation import cluster
from immunonet.evaluation.bench import Bench, Part
from immunonet.evaluation.lab import Lab, Tables
from immunonet.report import studies as reports
from immunonet.report import tables
from immunonet.studies import Study, connectivity, experiments, outcomes
from immunonet.studies import contests as contesting


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="STUDY", help=f"One of {', '.join(studies.NAMES)}.")] = None,
    study_file: Annotated[
        Path | None, typer.Option("--study", metavar="FILE.toml", help="A study of your own, instead of STUDY.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="Run the study on other data, such as svhn-sample; its networks are trained."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write an HTML page and figures as well.")] = False,
    ray: common.RayOption = None,
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

    Finished parts, adversarial examples and trained networks are kept in DIR by all that they depend on, and the same
    command continues from them. The tables are written to DIR/table.md. With --json FILE, which images were right is
    written beside it (.safetensors), a README.md of all studies in that folder, and with --report the page and
    figures; without it, they go to DIR.
    """
    if (name is None) == (study_file is None):
        raise ValueError(f"give STUDY, one of {', '.join(studies.NAMES)}, or --study FILE.toml, and not both")
    if name is not None and name not in studies.NAMES:
        raise ValueError(f"STUDY must be one of {', '.join(studies.NAMES)}, got {name!r}")
    study = studies.load(name or study_file or "")
    title = name or (study_file.stem if study_file else "")
    own_weights = dataset is None or dataset == study.dataset
    if dataset is not None:  # files of one's own may be in the order of their classes
        order = "random" if Path(dataset).exists() else study.order
        study = study.model_copy(update={"dataset": dataset, "order": order})
    out = out or Path("runs") / title
    target, workers = common.resolve_device(device), cluster.workers(ray)
    common.prepare(out, json)
    lab, nursery = _lab(study, target, data_dir, out, given=dataset is not None, own=own_weights)
    run = experiments.Run(study, Tables(Bench(lab, out, workers=workers), study.chunk), seed, nursery.models)
    paths = connectivity.joined(run, nursery.path)
    wanted = experiments.wanted(run)
    with _watched(run.tables.bench, itertools.chain(outcomes.parts(run, wanted), connectivity.parts(paths))):
        found = experiments.measured(run, wanted)
        result = outcomes.record(run, title, found, drawn=report)
        measured = connectivity.told(paths)
    contests = {contest: contesting.contested(paths, contest, common.note) for contest in study.contests}
    contesting.complete(result, study, measured, contests)
    folder, stem = (out, title) if json is None else (json.parent, json.stem)
    if report:
        reports.draw(result, folder, stem)
    unions = {f"{contest.name} {one.name}": one.right for contest, several in contests.items() for one in several}
    outcomes.write_correctness(folder / f"{stem}.safetensors", found, unions)
    _store.write_text(out / "table.md", reports.markdown(result))
    if json is not None:
        _store.write_json(json, result)
        if reports.write_readme(json.parent) is None:
            typer.echo(f"{json.parent / 'README.md'} is not one of these reports, and was left as it is")
    printed = {"Main table", "Targets", *(contest["title"] for contest in result["contests"])}
    for section in reports.sections(result):
        if section.title in printed:
            tables.console(section, 160)


def _lab(
    study: Study, device: torch.device, data_dir: Path | None, out: Path, *, given: bool, own: bool
) -> tuple[Lab, Nursery]:
    """Return the images and networks of a study, with their `own` weights or trained, and what makes them."""
    images = _images(study.dataset, "train", data_dir, given=given)
    test = _images(study.dataset, "test", data_dir, given=given, classes=images.classes)
    training, validation = (images[chosen] for chosen in data.split(len(images), study.validation))
    strangers = {source for entry in study.sensing for source in entry.strangers} - {"noise", *study.attacks}
    splits = {source: _images(source, "test", data_dir) for source in sorted(strangers)} | {"test": test}
    if study.order == "random":
        splits = {name: split[data.sample(len(split))] for name, split in splits.items()}
    splits["validation"] = validation[data.sample(len(validation))]
    models = {name: common.model_name(base.model, images) for name, base in study.bases.items()}
    learnt = training if study.training is None else training[data.sample(len(training), study.training)]
    nursery = Nursery(study=study, models=models, images=(learnt, validation), device=device, out=out, own=own)
    nets = {name: nursery.built(name) for name in study.bases}
    for name, net in nets.items():
        common.check_model(models[name], net, images)

    def where(split: str, n: int) -> list[int] | dict[str, Any]:
        ordered = split != "validation" and study.order == "file"
        return [0, n] if ordered else {"sample": [n, len(splits[split])], "seed": 0}

    told = {"dataset": study.dataset, "device": device.type}
    lab = Lab(
        nets,
        splits | {"training": training},
        resolve=common.resolve_layer,
        told=told,
        where=where,
    )
    lab.folder = out / "fitted"
    return lab, nursery


@contextlib.contextmanager
def _watched(bench: Bench, parts: Iterable[Part]) -> Iterator[None]:
    """Show a bar of progress and time left; without a terminal, a line per finished experiment."""
    work = {(part.key, part.about): part for part in parts}
    seen = {name for name, part in work.items() if bench.kept(part) is not None}
    left = Counter(about for key, about in work if (key, about) not in seen)
    total = left.total()
    if seen:
        common.console.print(f"continuing: {len(seen)} of {len(work)} parts are done", highlight=False)
    with common.progress() as bar:
        task = bar.add_task("", total=sum(part.cost for name, part in work.items() if name not in seen))

        def advance(part: Part) -> None:
            if (part.key, part.about) in seen or not left[part.about]:
                return
            seen.add((part.key, part.about))
            left[part.about] -= 1
            bar.update(task, advance=part.cost, description=part.about)
            if not left[part.about]:
                done = f"{total - left.total()} of {total} parts: {part.about}"
                bar.console.print(done, markup=False, highlight=False)

        bench.advance = advance
        yield


def _images(
    name: str, split: str, directory: Path | None, *, given: bool = False, classes: tuple[str, ...] | None = None
) -> data.Images:
    """Return a split of a dataset; what a study means by a built-in name is no folder that happens to be there."""
    if name in data.DATASETS and not given:
        return data.load(name, split, directory=directory, classes=classes)
    return common.resolve_dataset(name, split, directory, classes=classes)
