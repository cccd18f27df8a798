"""`immunonet fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from immunonet import RAILS, DkNN, Maturation, _check, _store, data
from immunonet.cli import common
from immunonet.defences.neighbours import NeighbourDefence
from immunonet.evaluation.asking import describe
from immunonet.features.names import Layer

RECORD = "fit.json"
DEFENCES: dict[str, type[RAILS] | type[DkNN]] = {"rails": RAILS, "dknn": DkNN}


def fit(
    dataset: common.DatasetOption,
    model: common.ModelOption = None,
    weights: common.WeightsOption = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            help="input, a submodule's name, mnist_affine, or package.module:factory, called with the model. "
            "Repeat it for several, over which votes are averaged. Default: input.",
        ),
    ] = None,
    defence: Annotated[str, typer.Option("--defence", help="rails or dknn.")] = "rails",
    population: Annotated[int, typer.Option(min=1, help="RAILS: cells that evolve.")] = 1000,
    generations: Annotated[int, typer.Option(min=0, help="RAILS: rounds of evolution at most.")] = 10,
    neighbours: Annotated[
        int | None, typer.Option(min=1, help="RAILS: naive cells per class (10). DkNN: neighbours in all (75).")
    ] = None,
    voice: Annotated[float, typer.Option(help="RAILS: weight of the model's softmax in the votes, in [0, 1).")] = 0.0,
    metric: Annotated[str, typer.Option(help="DkNN: cosine or euclidean.")] = "cosine",
    false_alarm: Annotated[float, typer.Option(help="Share of clean images that may be flagged foreign.")] = 0.05,
    validation: Annotated[
        int | None, typer.Option("--validation", min=1, help="Size of the validation split, as given to train.")
    ] = None,
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
    _check.choice("--defence", defence, tuple(DEFENCES))
    _check.number("--voice", voice, least=0, most=1, below=True)
    layers = layer or ["input"]
    common.prepare(out, json)
    images = common.resolve_dataset(
        dataset, "train", data_dir, image=image, label=label, size=size, background=background
    )
    name = common.model_name(model, images)
    net = common.load_model(name, weights, target, classes=len(images.classes))
    common.check_model(name, net, images)
    maps = [common.resolve_layer(one, net) for one in layers]
    built: NeighbourDefence
    if defence == "rails":
        maturation = Maturation(population=population, neighbours=neighbours or 10, generations=generations)
        built = RAILS(net, maps, maturation=maturation, false_alarm=false_alarm, seed=seed, voice=voice)
    else:
        built = DkNN(
            net,
            maps,
            neighbours=neighbours or 75,
            metric=_check.choice("--metric", metric, ("cosine", "euclidean")),
            false_alarm=false_alarm,
        )
    training, held_out = data.split(len(images), validation)
    record: dict[str, Any] = {
        "defence": defence,
        "dataset": dataset,
        "model": name,
        "weights": _store.digest(net.state_dict().values()),
        "images": _store.digest([images.x, images.y]),
        "classes": list(images.classes),
        "size": size,
        "background": background,
        "repertoire": len(training),
        "calibration": len(held_out),
        "settings": describe(built) | {"layers": layers},
    }
    if already(out, record, net, maps):
        typer.echo(f"{out} holds this defence already")
    else:
        # While the record is missing, what lies in the folder counts as unfinished.
        (out / RECORD).unlink(missing_ok=True)
        with common.console.status(f"fitting {defence} on {len(training):,} images"):
            repertoire, calibration = images[training], images[held_out]
            built.fit(repertoire.x, repertoire.y, calibration=(calibration.x, calibration.y)).save(out)
        _store.write_json(out / RECORD, record)
        typer.echo(f"{defence} on {len(training):,} images, calibrated on {len(held_out):,}: {out}")
    common.write_results(json, [record])


def already(out: Path, record: dict[str, Any], net: nn.Module, layers: list[Layer]) -> bool:
    """Return whether `out` holds a whole and readable defence of this record."""
    try:
        if _store.fingerprint(_store.read_json(out / RECORD)) != _store.fingerprint(record):
            return False
        DEFENCES[record["defence"]].load(out, net, layers)
    except (OSError, ValueError):
        return False
    return True
