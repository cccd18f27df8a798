"""Labelled images: benchmark datasets, Parquet files of the Hugging Face convention, class folders."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunonet import _check

_HUB = {
    "mnist": ("ylecun/mnist", "mnist"),
    "cifar10": ("uoft-cs/cifar10", "plain_text"),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits"),
}
DATASETS = ("mnist", "cifar10", "svhn", "svhn-sample", "digits")
SPLITS = ("train", "test")
_GREY = {"1", "L"}
_COLOUR = {"P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"}


@dataclass(frozen=True)
class Images:
    """Labelled images.

    x: float32 (N, C, H, W) in [0, 1], C = 1 (grey) or 3 (red, green, blue); y: int64 (N,) in [0,
    len(classes)); classes: the name of each label.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Images:
        """Return the images at `index` (a slice, indices or a mask)."""
        return Images(self.x[index], self.y[index], self.classes)


def require(module: str, extra: str) -> Any:
    """Import an optional dependency; ImportError says which extra of the package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module.partition('.')[0]}: pip install 'immunonet[{extra}]'") from error


def load(name: str, split: str, *, directory: str | Path | None = None) -> Images:
    """Return the "train" or "test" split of a benchmark dataset, one of `DATASETS`, in its original order.

    "digits" comes with scikit-learn (8x8, grey). The others are read from
    `<directory>/<name>-<split>.parquet`; `directory` defaults to $IMMUNONET_DATA. Without that file it is
    fetched from the Hugging Face hub, which has no "svhn-sample". FileNotFoundError says what to do when it
    can be had from neither; ValueError names a file that is corrupt, truncated or of another kind.
    """
    _check.choice("name", name, DATASETS)
    _check.choice("split", split, SPLITS)
    return _digits(split) if name == "digits" else read_parquet(_find(name, split, directory))


def split(n: int, validation: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the fixed split of n training examples into (training, validation) indices, int64, in order.

    The last `validation` of one permutation (the same for every run) are held out: calibration and tuning use
    them, training never sees them. Default: 3,000, or a tenth of a dataset with fewer than 30,000 examples.
    """
    n = _check.integer("n", n, least=2)
    held = max(1, min(3000, n // 10)) if validation is None else validation
    held = _check.integer("validation", held, least=1, most=n - 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[:-held].sort().values, order[-held:].sort().values


def read_parquet(path: str | Path) -> Images:
    """Read a Parquet file of the Hugging Face image convention.

    Columns: `image` or `img` (a struct of `bytes` and `path`, or the encoded file as binary) and `label` (an
    integer). Class names come from the schema's metadata (`huggingface` or `classes`), else they are the
    numbers. FileNotFoundError if there is no such file; ValueError names the file, and the row, that cannot
    be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({_first_line(error)})") from error
    image = next((c for c in ("image", "img") if c in table.column_names), None)
    if image is None or "label" not in table.column_names:
        raise ValueError(f"{path} must have the columns image (or img) and label, found {table.column_names}")
    label, column = table.column("label"), table.column(image)
    if not pa.types.is_integer(label.type) or label.null_count:
        raise ValueError(f"{path}: label must be integers without nulls, got {label.type}, {label.null_count} nulls")
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], pa.binary())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{path}: {image} must be binary or a struct with bytes, got {column.type}")
    x = _decode(((f"{path}, row {i}", cell.as_buffer()) for i, cell in enumerate(column)), path)
    y = torch.from_numpy(label.to_numpy().astype(np.int64))
    classes = _class_names(table.schema.metadata or {}, path) or tuple(map(str, range(int(y.max()) + 1)))
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= len(classes):
        raise ValueError(f"{path}: labels must be in 0 to {len(classes) - 1}, got values in [{low}, {high}]")
    return Images(x, y, classes)


def read_folder(path: str | Path) -> Images:
    """Read a folder of class folders: `<path>/<class name>/<image file>`, both in alphabetical order.

    Hidden files are left out; every other file must be an image. FileNotFoundError if there is no such
    folder; ValueError names the folder without images, the file that cannot be read, or the first of another
    size.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    folders = [folder for folder in _visible(path) if folder.is_dir()]
    if not folders:
        raise ValueError(f"{path} has no class folders: put the images of each class in {path}/<class name>/")
    files = [(file, label) for label, folder in enumerate(folders) for file in _visible(folder)]
    counts = np.bincount([label for _, label in files], minlength=len(folders))
    if not counts.all():
        raise ValueError(f"{folders[int(counts.argmin())]} has no images: add some, or remove this class folder")
    x = _decode(((str(file), file) for file, _ in files), path)
    return Images(x, torch.tensor([label for _, label in files]), tuple(folder.name for folder in folders))


def read_images(files: Sequence[Path]) -> Tensor:
    """Return image files of one size as (N, C, H, W) in [0, 1]; ValueError names the file that cannot be read."""
    return _decode(((str(file), file) for file in files), files[0].parent)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _decode(sources: Iterable[tuple[str, Any]], origin: Path) -> Tensor:
    """Return (N, C, H, W) in [0, 1]; grey images become colour if any image is in colour."""
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for name, pixels in _pixels(sources):
        if images and pixels.shape[:2] != images[0].shape[:2]:
            (h, w), (h0, w0) = pixels.shape[:2], images[0].shape[:2]
            raise ValueError(f"{name} is {w}x{h}, but the images before it are {w0}x{h0}: make all of one size")
        images.append(pixels)
    if not images:
        raise ValueError(f"{origin} has no images")
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images]
    stacked = torch.from_numpy(np.stack(images))
    stacked = stacked.permute(0, 3, 1, 2) if stacked.ndim == 4 else stacked[:, None]
    return stacked.contiguous().float().div_(255)


def _pixels(sources: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]]:
    image_module = require("PIL.Image", "data")
    for name, source in sources:
        if source is None:
            raise ValueError(f"{name} has no image bytes")
        try:
            with image_module.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                if image.mode not in _GREY | _COLOUR:
                    raise ValueError(f"mode {image.mode} is neither 8-bit grey nor colour")
                yield name, np.array(image.convert("L" if image.mode in _GREY else "RGB"))
        except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
            raise ValueError(f"{name} is not a readable image ({_first_line(error)})") from error


def _class_names(metadata: dict[bytes, bytes], path: Path) -> tuple[str, ...] | None:
    try:
        if b"huggingface" in metadata:
            names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"].get("names")
            if names:
                return tuple(map(str, names))
        if b"classes" in metadata:
            return tuple(map(str, json.loads(metadata[b"classes"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the class names in its metadata cannot be read ({error!r})") from error
    return None


def _find(name: str, split: str, directory: str | Path | None) -> Path:
    directory = directory or os.environ.get("IMMUNONET_DATA") or None
    file = f"{name}-{split}.parquet"
    if directory is not None and (path := Path(directory) / file).is_file():
        return path
    looked = f"{file} is not in {directory}" if directory is not None else f"no folder was given for {file}"
    advice = "put the file in a folder and give that folder by --data DIR or $IMMUNONET_DATA"
    if name not in _HUB:
        raise FileNotFoundError(f"{looked}, and it is not on the Hugging Face hub: {advice}")
    repository, config = _HUB[name]
    hub = require("huggingface_hub", "data")
    try:
        return Path(hub.hf_hub_download(repository, f"{config}/{split}-00000-of-00001.parquet", repo_type="dataset"))
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it uses
        raise FileNotFoundError(
            f"{looked}, and {repository} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}). Check the network, or {advice}"
        ) from error


def _digits(split: str) -> Images:
    bunch = require("sklearn.datasets", "cli").load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    chosen = order[360:] if split == "train" else order[:360]
    x = torch.from_numpy(bunch.images).float().div_(16)[:, None]
    return Images(x[chosen], torch.from_numpy(bunch.target).long()[chosen], tuple(map(str, bunch.target_names)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
