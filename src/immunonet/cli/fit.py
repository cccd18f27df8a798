"""`immunonet fit`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from immunonet import _store, data
from immunonet.cli import common, watch
from immunonet.defences.base import REGISTRY, Defence, load
from immunonet.defences.spec import GRAMMAR, Spec
from immunonet.evaluation.asking import describe

RECORD, SENTINEL = "fit.json", "sentinel.json"


def fit(
    dataset: common.DatasetOption,
    model: common.ModelOption = None,
    weights: common.WeightsOption = None,
    defence: Annotated[str, typer.Option(metavar="SPEC", help=f"{GRAMMAR}.")] = "rails input",
    sentinel: Annotated[
        str | None,
        typer.Option(
            metavar=watch.GRAMMAR.partition(",")[0], help="Also fit a sentinel, which immunonet serve watches by."
        ),
    ] = None,
    validation: common.ValidationOption = None,
    image: common.ImageOption = None,
    label: common.LabelOption = None,
    size: common.SizeOption = None,
    background: common.BackgroundOption = "white",
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("defence"),
    json: common.JsonOption = None,
) -> None:
    """Fit a defence around a trained model and save it to DIR, for `immunonet predict`.

    The repertoire is the training set less the validation split, which calibrates the defence. If DIR holds the same
    already, nothing is done again.
    """
    target = common.resolve_device(device)
    spec = Spec.parse(defence)
    if sentinel is not None:
        watch.parse(sentinel)
    if spec.tuned:
        raise ValueError("--defence: tuned settings are chosen by immunonet evaluate; give those that it prints")
    common.prepare(out, json)
    how: dict[str, Any] = {"image": image, "label": label, "size": size, "background": background}
    images = common.resolve_dataset(dataset, "train", data_dir, **how)
    name, net = common.network(model, weights, target, images)
    training, held_out = data.split(len(images), validation)
    if "seed" in spec.options():
        spec = spec.changed(seed=spec.settings.get("seed", seed))
    model_of: Any = net
    chain = spec.chain
    for before in chain[:-1]:
        model_of = before.made(model_of, common.resolve_layer, len(training))
    built = spec.made(model_of, common.resolve_layer, len(training))
    if REGISTRY.get(built.kind) is not type(built):
        raise ValueError(f"--defence {spec.kind} gives no kind that is registered: immunonet.register makes it one")
    record: dict[str, Any] = {
        "defence": spec.kind, "dataset": dataset, "model": name, "weights": _store.digest(net.state_dict().values()),
        "images": _store.digest([images.x, images.y]), "classes": list(images.classes), "size": size,
        "background": background, "shape": list(images.x.shape[1:]), "sentinel": sentinel,
        "repertoire": len(training), "calibration": len(held_out),
        "settings": describe(built) | {"layers": list(spec.layers)},
    }  # fmt: skip
    if _already(out, record, lambda: load(out, net, built._layers or None)):
        typer.echo(f"{out} holds this defence already")
    else:
        # While the record is missing, what lies in the folder counts as unfinished.
        (out / RECORD).unlink(missing_ok=True)
        (out / SENTINEL).unlink(missing_ok=True)
        if sentinel is not None:
            watch.fitted(sentinel, net, images).save(out / SENTINEL)
        repertoire, calibration = images[training], images[held_out]
        for one in [*_behind(built), built]:
            _fit(one, repertoire, calibration, out / "training")
        built.save(out)
        shutil.rmtree(out / "training", ignore_errors=True)
        _store.write_json(out / RECORD, record)
        typer.echo(f"{spec.name} on {len(training):,} images, calibrated on {len(held_out):,}: {out}")
    common.write_results(json, [record])


def _fit(defence: Defence, repertoire: data.Images, calibration: data.Images, folder: Path) -> None:
    """Fit a defence; where that takes long, under a bar, and from where it was interrupted."""
    fit: Callable[..., Defence] = defence.fit
    known: dict[str, Any] = {"calibration": (calibration.x, calibration.y)}
    if not defence.costly:
        with common.console.status(f"fitting {defence.kind} on {len(repertoire):,} images"):
            fit(repertoire.x, repertoire.y, **known)
        return
    with common.progress() as bar:
        task = bar.add_task(f"fitting {defence.kind}")

        def show(step: int, steps: int, _: Any) -> None:
            bar.update(task, completed=step, total=steps)

        fit(repertoire.x, repertoire.y, **known, checkpoint=folder, on_progress=show)


def _behind(defence: Defence) -> list[Defence]:
    """Return the defences that are the models of this one and of each other, the innermost first."""
    model = defence.model
    return [*_behind(model), model] if isinstance(model, Defence) else []


def _already(out: Path, record: dict[str, Any], read: Callable[[], Defence]) -> bool:
    """Return whether `out` holds a whole and readable defence of this record."""
    try:
        same = _store.fingerprint(_store.read_json(out / RECORD)) == _store.fingerprint(record)
        return same and read() is not None
    except (OSError, ValueError):
        return False
