"""What the commands share: option types, and how data and models are found and results written."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from immunonet import _store, data, zoo
from immunonet.evaluation.records import envelope
from immunonet.features import Layer
from immunonet.maps import layer_parts

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
DatasetArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help=f"{', '.join(data.DATASETS)}, a Parquet file, or a folder of class folders."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help=f"{', '.join(zoo.NAMES)}, or package.module:factory. Default: by image size."),
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE.safetensors", help="The model's weights.")
]

console = Console(stderr=True)

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


def resolve_dataset(dataset: str, split: str | None, directory: Path | None = None) -> data.Images:
    """Return the images of a dataset's name, a Parquet file, or a folder of class folders.

    `split` is "train" or "test". A folder with the subfolders `train` and `test` has its own split; from
    other files and folders a fixed fifth is the test split and the rest the training split, or with
    `split=None` all is returned.
    """
    if dataset in data.DATASETS:
        if split is None:
            raise ValueError(f"{dataset} has two splits: name one, as train or test")
        return data.load(dataset, split, directory=directory)
    path = Path(dataset)
    if path.is_dir() and split is not None and all((path / name).is_dir() for name in data.SPLITS):
        return data.read_folder(path / split)
    if path.is_dir():
        images = data.read_folder(path)
    elif path.is_file():
        images = data.read_parquet(path)
    else:
        raise FileNotFoundError(
            f"DATASET must be {', '.join(data.DATASETS)}, a Parquet file, or a folder of class folders; "
            f"there is no {dataset!r}"
        )
    if split is None:
        return images
    train, test = data.split(len(images), max(1, len(images) // 5))
    return images[train if split == "train" else test]


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
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
    layer = _imported("--layer", name)(net)
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
    """Raise ValueError unless `net` turns these images into one row of logits each, one per class."""
    x = images.x[:2].to(next(net.parameters()).device)
    try:
        logits = net(x)
    except RuntimeError as error:
        raise ValueError(f"--model {model} does not take images of shape {tuple(x.shape[1:])} ({error})") from error
    found = tuple(getattr(logits, "shape", ())) or type(logits).__name__
    if found != (len(x), len(images.classes)):
        raise ValueError(
            f"--model {model} must return logits of shape {(len(x), len(images.classes))} "
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
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {name} cannot be imported ({error}): give package.module:factory") from error
    return cast(Callable[..., Any], found)
