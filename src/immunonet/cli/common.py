"""What the commands share: option types, and how data and models are found and results written."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from immunonet import _store, data, models, zoo
from immunonet.evaluation.records import envelope
from immunonet.features.names import Layer, layer_parts

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results to this file.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that the files are written to.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        envvar="IMMUNONET_DATA",
        help="Folder of NAME-train.parquet and NAME-test.parquet; else they come from the Hugging Face hub.",
    ),
]
# What DATASET may be; a path that exists comes before a name.
SOURCES = (
    f"{', '.join(data.DATASETS)}, a Parquet file, a folder of class folders or of Parquet files, or hf:OWNER/NAME "
    "of the Hugging Face hub"
)
_DATASET_HELP = f"{SOURCES}. A file or folder that is there goes before a name."
DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help=_DATASET_HELP)]
DatasetOption = Annotated[str, typer.Option("--dataset", help=_DATASET_HELP)]
ImageOption = Annotated[
    str | None,
    typer.Option("--image", metavar="COLUMN", help=f"Column of images. Default: {', '.join(data.IMAGE_COLUMNS)}."),
]
LabelOption = Annotated[
    str | None,
    typer.Option("--label", metavar="COLUMN", help=f"Column of labels. Default: {', '.join(data.LABEL_COLUMNS)}."),
]
SizeOption = Annotated[
    int | None,
    typer.Option("--size", min=1, help="Resize the shorter side of images to this and keep the centre square."),
]
BackgroundOption = Annotated[
    str, typer.Option("--background", help=f"Behind what is transparent: {' or '.join(data.BACKGROUNDS)}.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help=f"{', '.join(zoo.NAMES)}, or package.module:factory. Default: by image size."),
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE.safetensors", help="The model's weights.")
]

console = Console(stderr=True)

# Where code lies that is not the user's own.
_LIBRARIES = (Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))
_BY_SHAPE: dict[tuple[int, ...], str] = {(1, 28, 28): "mnist", (1, 8, 8): "digits", (3, 32, 32): "residual"}


def progress() -> Progress:
    """Return a progress bar on stderr, to be used in a `with` block; without a terminal it draws nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


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
        _note(f"{dataset}: taking what lies in {path.resolve()}, not the built-in dataset")
    return path.exists()


def resolve_dataset(
    dataset: str,
    split: str | None,
    directory: Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    label: str | None = None,
    **options: Any,
) -> data.Images:
    """Return the images of a path that exists, or else of a dataset's name, or of the hub.

    `split` is "train" or "test". A folder with a folder or files for each split has its own, and its "validation" is
    the test split where there is no other; from other files and folders a fixed fifth is the test split and the rest
    the training split, or with `split=None` all is returned. The labels of "test" are those of the training split's
    classes, or of `classes` if they are given. `label` and `options` are those of `data.read`.
    """
    options["label"] = label
    there = is_path(dataset)
    if dataset in data.DATASETS and not there:
        if split is None:
            raise ValueError(f"{dataset} has two splits: name one, as train or test")
        return data.load(dataset, split, directory=directory, classes=classes, **options)
    if not there and not dataset.startswith("hf:"):
        raise FileNotFoundError(f"DATASET must be {SOURCES}; there is no {dataset!r}")
    splits = data.splits(dataset)
    if split is None:
        return data.read(dataset, classes=classes, **options)
    if "train" in splits and classes is None and split != "train":
        classes = data.classes_of(dataset, "train", label=label)
    tests = [name for name in ("test", "validation") if name in splits]
    if split == "train" and tests:
        return data.read(dataset, "train", classes=classes, **options)
    if tests:
        if tests[0] != split:
            _note(f"{dataset} has no test split: its validation split is taken as test")
        return data.read(dataset, tests[0], classes=classes, **options)
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


def _note(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


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
    make = _imported("--model", model)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = make()
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"--model {model} failed (it is called without arguments): {_blame(error, make)}") from error
    if not isinstance(net, nn.Module):
        raise TypeError(f"--model {model} must return a torch.nn.Module, got {type(net).__name__}")
    return net.eval()


def resolve_layers(text: str, net: nn.Module) -> Layer | list[Layer]:
    """Return what a command line names: one layer, or "fc1+fc2", a list of those that one defence votes over."""
    found = [resolve_layer(name, net) for name in text.split("+")]
    return found[0] if len(found) == 1 else found


def resolve_layer(name: str, net: nn.Module) -> Layer:
    """Return a layer that a command line names.

    "mnist_affine" and `package.module:factory` (called with `net`) give the feature map that they make; "input" and
    a submodule's name, with or without the side of a grid, stay as they are.
    """
    if name == "mnist_affine":
        return zoo.mnist_affine(cast(zoo.MnistNet, net))
    if ":" not in name or layer_parts(name)[1] is not None:
        return name
    make = _imported("--layer", name)
    try:
        layer = make(net)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"--layer {name} failed: {_blame(error, make)}") from error
    if not callable(layer):
        raise TypeError(f"--layer {name} must return a feature map, got {type(layer).__name__}")
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
    return net.to(resolve_device(device) if isinstance(device, str) else device)


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
        raise ValueError(
            f"--model {model} does not take images of shape {tuple(x.shape[1:])} ({_blame(error)})"
        ) from error
    found, wanted = tuple(logits.shape), (len(x), len(images.classes))
    more = not images.named and len(found) == 2 and found[0] == wanted[0] and found[1] > wanted[1]
    if found != wanted and not more:
        raise ValueError(
            f"--model {model} must return logits of shape {wanted} "
            f"for {len(x)} images of {len(images.classes)} classes, got {found}"
        )


def prepare(out: Path | None, json: Path | None) -> None:
    """Make the folders that will be written to, so that a wrong path fails before any work is done."""
    for option, folder in (("--out", out), ("--json", json and json.parent)):
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{option}: {folder} cannot be written to")
    if json is not None and json.is_dir():
        raise IsADirectoryError(f"--json must be a file, {json} is a folder")


def write_results(path: Path | None, results: list[dict[str, Any]]) -> None:
    """Write `envelope(results)` to `path` if there is one."""
    if path is not None:
        _store.write_json(path, envelope(results))


def _imported(option: str, name: str) -> Callable[..., Any]:
    """Return what `package.module:factory` names; ValueError that names the option if it cannot be imported."""
    module, _, factory = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: the user's own module lies in the working directory
    try:
        found = getattr(importlib.import_module(module), factory)
    except Exception as error:  # a module runs when it is imported, and may raise anything
        raise ValueError(
            f"{option} {name} cannot be imported ({_blame(error)}): give package.module:factory"
        ) from error
    return cast(Callable[..., Any], found)


def _blame(error: Exception, called: Callable[..., Any] | None = None) -> str:
    """Return an error's kind and message on one line, and the file of the user's code that raised it or was called."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    theirs = [frame for frame in frames if not any(Path(frame.filename).is_relative_to(own) for own in _LIBRARIES)]
    code = getattr(called, "__code__", None)
    place = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
    if theirs:
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
