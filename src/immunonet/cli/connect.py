"""`immunonet connect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from immunonet import _check, _store, data, zoo
from immunonet.cli import common
from immunonet.defences.path import FILE, ModePath
from immunonet.evaluation.records import envelope
from immunonet.zoo.adversarial import COMBINED


def connect(
    networks: Annotated[
        list[Path], typer.Argument(metavar="A B [C ...]", help="Weights of two or more networks of one architecture.")
    ],
    dataset: common.DatasetOption,
    threat: common.ThreatOption = None,
    combine: Annotated[str, typer.Option(help=f"How several threats make one loss: {', '.join(COMBINED)}.")] = "msd",
    model: common.ModelOption = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="The highest learning rate of the schedule.")] = 1e-3,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of the attacks.")] = 10,
    weight_decay: Annotated[float, typer.Option(help="Half of it times the squared length of the weights.")] = 0.0,
    ema: Annotated[
        float | None, typer.Option(help="Keep a running mean of the bend, the older ones times this at every step.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Places, from 0 to 1, that are measured on validation.")] = 21,
    validation: common.ValidationOption = None,
    augment: Annotated[bool, typer.Option("--augment", help="Flip and shift the training images.")] = False,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute in bfloat16.")] = False,
    image: common.ImageOption = None,
    label: common.LabelOption = None,
    size: common.SizeOption = None,
    background: common.BackgroundOption = "white",
    seed: common.SeedOption = 0,
    device: common.DeviceOption = "cpu",
    data_dir: common.DataOption = None,
    out: common.OutOption = Path("path"),
    json: common.JsonOption = None,
) -> None:
    """Join networks by a path of weights whose points withstand every --threat, and write it to DIR.

    Two networks are joined by a curve with one bend, more by the chain through them; the ends stay as they are.
    Afterwards the places of the path are measured on validation images, and the best one is told: as a defence,
    alone or with others, it is --defence "path path=DIR points=0.4,0.5,0.6". The run leaves a checkpoint after every
    epoch, and the same command continues from it.
    """
    if len(networks) < 2:
        raise ValueError(f"A B: give the weights of two or more networks, got {len(networks)}")
    radii = common.threats(threat)
    if radii is None:
        raise ValueError("--threat must be given, such as --threat linf=8/255 --threat l1=12")
    _check.choice("--combine", combine, COMBINED)
    target = common.resolve_device(device)
    common.prepare(out, json)
    how: dict[str, Any] = {"image": image, "label": label, "size": size, "background": background}
    images = common.resolve_dataset(dataset, "train", data_dir, **how)
    training, held_out = (images[chosen] for chosen in data.split(len(images), validation))
    name, first = common.network(model, networks[0], target, images)
    nets = [first, *(common.load_model(name, one, target, classes=len(images.classes)) for one in networks[1:])]
    path = ModePath(*nets)
    settings: dict[str, Any] = {
        "threats": radii, "combine": combine, "iterations": iterations, "batch_size": batch_size,
        "lr": lr, "weight_decay": weight_decay, "ema": ema, "augment": augment, "bfloat16": bfloat16, "seed": seed,
    }  # fmt: skip
    checkpoint = out / "path.checkpoint.safetensors"
    history = common.trained("connecting", checkpoint, epochs, zoo.connect, path, training, held_out, **settings)
    rows = zoo.profile(path, held_out, threats=radii, points=points)
    best = zoo.best_of(rows)
    path.settings |= {"ends": [str(one.name) for one in networks], "dataset": dataset, "model": name, "best": best["t"]}
    path.save(out)
    results = [{"dataset": dataset, "split": "validation", "model": name, "settings": settings, **row} for row in rows]
    _store.write_json(out / "connect.json", envelope(results) | {"history": history})
    common.write_results(json, results)
    checkpoint.unlink()
    for row in rows:
        told = ", ".join(f"{norm} {row[norm]:.3f}" for norm in (*radii, "union"))
        typer.echo(f"t {row['t']:.3f}: clean {row['clean']:.3f}, {told}{'  <- best' if row is best else ''}")
    typer.echo(f"path: {out / FILE}")
