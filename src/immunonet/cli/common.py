"""What the commands share: option types, and how data and models are found and results written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from immunonet import _check, _store, data, models, zoo
from immunonet._check import nearest
from immunonet._estimates import LOG
from immunonet._imports import blame, called
from immunonet._seeds import seeded
from immunonet.attacks.norms import NORMS
from immunonet.evaluation.records import Row, envelope
from immunonet.features.names import Layer, layer_parts

JsonOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results to this file.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder that the files are written to.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
_DATA_HELP = "Folder of NAME-train.parquet and NAME-test.parquet; else they come from the Hugging Face hub."
DataOption = Annotated[Path | None, typer.Option("--data", metavar="DIR", envvar="IMMUNONET_DATA", help=_DATA_HELP)]
# What DATASET may be; a path that exists comes before a name.
SOURCES = (
    f"{', '.join(data.DATASETS)}, a Parquet file, a folder of class folders or of Parquet files, or hf:OWNER/NAME "
    "of the Hugging Face hub"
)
_DATASET_HELP = f"{SOURCES}. A file or folder that is there goes before a name."
DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help=_DATASET_HELP)]
DatasetOption = Annotated[str, typer.Option(help=_DATASET_HELP)]
ImageOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help=f"Of images. Default: {', '.join(data.IMAGE_COLUMNS)}.")
]
LabelOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help=f"Of labels. Default: {', '.join(data.LABEL_COLUMNS)}.")
]
SizeOption = Annotated[
    int | None, typer.Option(min=1, help="Resize images' shorter side to this, and keep the centre square.")
]
BackgroundOption = Annotated[str, typer.Option(help=f"Behind what is transparent: {' or '.join(data.BACKGROUNDS)}.")]
ValidationOption = Annotated[int | None, typer.Option(min=1, help="Size of the validation split, as given to train.")]
ChunkOption = Annotated[int, typer.Option(min=1, help="Images per part that is kept.")]
RayOption = Annotated[
    str | None, typer.Option(metavar="auto|HOST:PORT", help="Do the parts on a Ray cluster, not only here.")
]
ThreatOption = Annotated[
    list[str] | None, typer.Option(metavar="NORM=EPS", help="A radius to withstand, such as l2=0.5; repeat it.")
]
ModelOption = Annotated[
    str | None, typer.Option(help=f"{', '.join(zoo.NAMES)}, package.module:factory. Default: by image size.")
]
WeightsOption = Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help="The model's weights.")]

console = Console(stderr=True)
_BY_SHAPE: dict[tuple[int, ...], str] = {(1, 28, 28): "mnist", (1, 8, 8): "digits", (3, 32, 32): "residual"}


def note(text: str, *, style: str | None = None) -> None:
    """Print a text on stderr as it is, above a progress bar if there is one."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class _Estimates(logging.Handler):
    """Prints what long work takes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        note(record.getMessage())


def listen() -> None:
    """Let estimates of long work be printed on stderr."""
    LOG.setLevel(logging.INFO)
    LOG.handlers = [_Estimates()]


def progress() -> Progress:
    """Return a progress bar on stderr, to be used in a `with` block; without a terminal it draws nothing."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


def threats(texts: Sequence[str] | None) -> dict[str, float] | None:
    """Return the radii by norm that texts such as "l2=0.5" or "linf=8/255" say; None where there are none."""
    found: dict[str, float] = {}
    for text in texts or ():
        name, equals, radius = text.partition("=")
        if not equals or name not in NORMS:
            near = nearest(name, tuple(NORMS)) if equals else ""
            raise ValueError(f"--threat must be NORM=EPS, such as l2=0.5, got {text!r}{near}")
        if name in found:
            raise ValueError(f"--threat {name} must be given once, got {text!r} as well: one radius for each norm")
        found[name] = _check.fraction(f"--threat {name}", radius)
    return found or None


def trained(
    what: str, checkpoint: Path, epochs: int, train: Callable[..., list[zoo.Epoch]], *args: Any, **settings: Any
) -> list[zoo.Epoch]:
    """Return the epochs of a training under a bar of progress; each is told. The checkpoint stays for the caller."""
    if checkpoint.exists():
        note(f"continuing from {checkpoint}")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task(what)
        reported: list[zoo.Epoch] = []

        def show(step: int, steps: int, history: list[zoo.Epoch]) -> None:
            bar.update(task, completed=step, total=steps)
            for row in history[len(reported) :]:
                text = f"loss {row['loss']:.4f}, validation accuracy {row['validation_accuracy']:.4f}"
                if (robust := row.get("validation_robust_accuracy")) is not None:
                    text += f", {robust:.4f} under attack"
                note(f"epoch {row['epoch']} of {epochs}: {text}")
                reported.append(row)

        return train(*args, **settings, epochs=epochs, checkpoint=checkpoint, on_progress=show)


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; ValueError if this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        has = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(f"--device must be one of {', '.join(has)} on this machine, got {name!r}") from error
    return device


def is_path(dataset: str) -> bool:
    """Return whether there is a file or folder of that name, and say so where a built-in dataset has it too."""
    path = Path(dataset)
    if dataset in data.DATASETS and path.exists():
        note(f"{dataset}: taking what lies in {path.resolve()}, not the built-in dataset")
    return path.exists()


def resolve_dataset(
    dataset: str, split: str, directory: Path | None = None, *, classes: Sequence[str] | None = None, **options: Any
) -> data.Images:
    """Return the images of a path that exists, or else of a dataset's name, or of the hub.

    `split` is "train" or "test". A folder with a folder or files for each split has its own, and its "validation" is
    the test split where there is no other; from other files and folders a fixed fifth is the test split and the rest
    the training split. The labels of "test" are those of the training split's classes, or of `classes` if they are
    given. `options` are those of `data.read`.
    """
    there = is_path(dataset)
    if dataset in data.DATASETS and not there:
        return data.load(dataset, split, directory=directory, classes=classes, **options)
    if not there and not dataset.startswith("hf:"):
        raise FileNotFoundError(f"DATASET must be {SOURCES}; there is no {dataset!r}")
    splits = data.splits(dataset)
    if "train" in splits and classes is None and split != "train":
        classes = data.classes_of(dataset, "train", label=options.get("label"))
    tests = [name for name in ("test", "validation") if name in splits]
    if tests:
        own = split if split == "train" else tests[0]
        if own != split:
            note(f"{dataset} has no test split: its validation split is taken as test")
        return data.read(dataset, own, classes=classes, **options)
    images = data.read(dataset, "train" if splits else None, classes=classes, **options)
    if len(images) < 2:
        if split == "test":
            raise ValueError(f"{dataset} has one image and no test split: there is nothing to test on")
        return images
    train, test = data.split(len(images), max(1, len(images) // 5))
    return images[train if split == "train" else test]


def told(how: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record holds of how images were read: the options that are not as they are by default."""
    return {k: v for k, v in how.items() if v is not None and (k, v) != ("background", data.BACKGROUNDS[0])}


def network(
    model: str | None, weights: Path | None, device: torch.device, images: data.Images
) -> tuple[str, nn.Module]:
    """Return the name of a trained network (None: the zoo's for images of that size) and itself, `check_model`ed."""
    name = model_name(model, images)
    net = load_model(name, weights, device, classes=len(images.classes))
    check_model(name, net, images)
    return name, net


def model_name(model: str | None, images: data.Images) -> str:
    """Return `model`, or the zoo's network for images of that size; ValueError if it has none."""
    shape = tuple(images.x.shape[1:])
    if model is None and shape not in _BY_SHAPE:
        raise ValueError(f"no network of the zoo takes images of shape {shape}: give --model package.module:factory")
    return model or _BY_SHAPE[shape]


def build_model(model: str, *, classes: int, seed: int = 0) -> nn.Module:
    """Return the network of a zoo name or of `package.module:factory` (called bare), in eval mode."""
    if ":" not in model:
        if model not in zoo.NAMES:
            raise ValueError(f"--model must be {', '.join(zoo.NAMES)} or package.module:factory, got {model!r}")
        return zoo.build(model, classes=classes, seed=seed)
    with seeded(seed):
        net = called("--model", model)
    if not isinstance(net, nn.Module):
        raise TypeError(f"--model {model} must return a torch.nn.Module, got {type(net).__name__}")
    return net.eval()


def resolve_layer(name: str, net: nn.Module) -> Layer:
    """Return a layer that a command line names.

    "mnist_affine" and `package.module:factory` (called with `net`) give the feature map that they make; "input" and
    a submodule's name, with or without the side of a grid, stay as they are.
    """
    if name == "mnist_affine":
        return zoo.mnist_affine(cast(zoo.MnistNet, net))
    if ":" not in name or layer_parts(name)[1] is not None:
        return name
    layer = called("layer", name, net)
    if not callable(layer):
        raise TypeError(f"layer {name} must return a feature map, got {type(layer).__name__}")
    return cast(Layer, layer)


def load_model(model: str, weights: Path | None, device: str | torch.device = "cpu", *, classes: int = 10) -> nn.Module:
    """Return a trained network in eval mode on `device`: `build_model`, then `weights` loaded.

    ValueError without weights for a network of the zoo; those of a user's factory may come with it.
    """
    net = build_model(model, classes=classes)
    if weights is not None:
        zoo.load_weights(net, weights)
    elif ":" not in model:
        raise ValueError(f"--model {model} needs --weights FILE.safetensors; immunonet train makes them")
    return net.to(device)


@torch.no_grad()
def check_model(model: str, net: nn.Module, images: data.Images) -> None:
    """Raise ValueError unless `net` turns these images into one row of logits each, one per class.

    Of images without names of classes the network may know more classes than occur.
    """
    if next(net.parameters(), None) is None:
        raise ValueError(
            f"--model {model} has no parameters: keep its layers as attributes of the module or in a ModuleList, as a "
            "plain list hides them"
        )
    x = images.x[:2]
    try:
        logits = models.ask(net, x)
    except Exception as error:  # whatever a user's network raises
        message = f"--model {model} does not take images of shape {tuple(x.shape[1:])} ({blame(error)})"
        raise ValueError(message) from error
    shape, n, classes = tuple(logits.shape), len(x), len(images.classes)
    more = not images.named and len(shape) == 2 and shape[0] == n and shape[1] > classes
    if shape != (n, classes) and not more:
        wanted = f"{(n, classes)} for {n} images of {classes} classes"
        raise ValueError(f"--model {model} must return logits of shape {wanted}, got {shape}")


def prepare(out: Path | None, json: Path | None) -> None:
    """Make the folders that will be written to, so that a wrong path fails before any work is done."""
    for option, folder in (("--out", out), ("--json", json and json.parent)):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{option}: {folder} cannot be written to")
    if json is not None and json.is_dir():
        raise IsADirectoryError(f"--json must be a file, {json} is a folder")


def table(rows: Sequence[Row]) -> list[Sequence[str]]:
    """Return result rows as a table, its head first."""
    head = ("layer", "defence", "attack", "eps", "knows", "accuracy", "95 % interval", "ms/image", "foreign")
    lines: list[Sequence[str]] = [head]
    for row in rows:
        figures = f"{row.accuracy:.4f}", "{:.3f} to {:.3f}".format(*row.ci95), f"{1000 * row.seconds_per_image:.2f}"
        eps, knows = ("", "") if row.attack == "none" else (f"{row.norm} {row.eps:.3g}", row.knows)
        foreign = "" if row.foreign is None else f"{row.foreign:.3f}"
        lines.append((", ".join(row.settings["layers"]), row.defence, row.attack, eps, knows, *figures, foreign))
    return lines


def write_results(path: Path | None, results: list[dict[str, Any]]) -> None:
    """Write `envelope(results)` to `path` if there is one."""
    if path is not None:
        _store.write_json(path, envelope(results))
