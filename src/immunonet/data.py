"""Labelled images: benchmark datasets, Parquet files, class folders, datasets of the Hugging Face hub.

`read` is the one door: every file of images that the package takes comes in through it or its short forms.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunonet import _check, _sources
from immunonet._imports import require
from immunonet._pictures import BACKGROUNDS, decode
from immunonet._sources import IMAGE_COLUMNS, LABEL_COLUMNS

__all__ = [
    "BACKGROUNDS",
    "DATASETS",
    "IMAGE_COLUMNS",
    "LABEL_COLUMNS",
    "SPLITS",
    "Images",
    "classes_of",
    "decode",
    "load",
    "read",
    "read_folder",
    "read_images",
    "read_parquet",
    "require",
    "sample",
    "shaped",
    "split",
    "splits",
]

_HUB = {
    "mnist": "hf:ylecun/mnist:mnist",
    "cifar10": "hf:uoft-cs/cifar10:plain_text",
    "cifar100": "hf:uoft-cs/cifar100:cifar100",
    "fashion_mnist": "hf:zalando-datasets/fashion_mnist:fashion_mnist",
    "svhn": "hf:ufldl-stanford/svhn:cropped_digits",
}
DATASETS = (*_HUB, "svhn-sample", "digits")
SPLITS = ("train", "test")

# More classes than this are no classes, but numbers of some other kind.
_MOST = 1_000_000


@dataclass(frozen=True, repr=False)
class Images:
    """Labelled images.

    x: float32 (N, C, H, W) in [0, 1], C = 1 (grey) or 3 (red, green, blue); y: int64 (N,) in [0,
    len(classes)); classes: the name of each label. named: False where the source names no classes, so that they are
    the numbers up to the highest label that occurs, and there may be more.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    named: bool = True

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.x.shape[1:]))
        return f"Images({len(self):,} of ({shape}), {len(self.classes):,} classes)"

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Images:
        """Return the images at `index` (a slice, indices or a mask)."""
        return Images(self.x[index], self.y[index], self.classes, self.named)


def load(
    name: str,
    split: str,
    *,
    directory: str | Path | None = None,
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
    background: str = "white",
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> Images:
    """Return the "train" or "test" split of a benchmark dataset, one of `DATASETS`, in its original order.

    "digits" comes with scikit-learn (8x8, grey). The others are read from
    `<directory>/<name>-<split>.parquet`; `directory` defaults to $IMMUNONET_DATA. Without that file they come from
    the Hugging Face hub, which has no "svhn-sample", and stay in its cache. The further arguments are those of `read`.
    FileNotFoundError says what to do when it can be had from neither; ValueError names a file that is corrupt,
    truncated or of another kind.
    """
    _check.choice("name", name, DATASETS)
    _check.choice("split", split, SPLITS)
    if name == "digits":
        given = {"image": image, "label": label, "size": size}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"{wrong[0]} must be left out with digits, which are 8x8 numbers and no picture files")
        return _digits(split)
    options: dict[str, Any] = {"image": image, "label": label, "size": size, "background": background}
    options |= {"classes": classes, "labelled": labelled}
    directory = directory or os.environ.get("IMMUNONET_DATA") or None
    file = f"{name}-{split}.parquet"
    if directory is not None and (path := Path(directory) / file).is_file():
        return read_parquet(path, **options)
    looked = f"{file} is not in {directory}" if directory is not None else f"no folder was given for {file}"
    advice = "put the file in a folder and give that folder by --data DIR or $IMMUNONET_DATA"
    if name not in _HUB:
        raise FileNotFoundError(f"{looked}, and it is not on the Hugging Face hub: {advice}")
    try:
        return read(_HUB[name], split, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{looked}, and {error}. Check the network, or {advice}") from error


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


def sample(n: int, count: int | None = None) -> Tensor:
    """Return the indices, int64, of a fixed random sample of `count` of n examples (all if None or more than n).

    They are in random order, and smaller samples are the first part of larger ones: where data are in the order of
    their classes, the first few of a sample are still of every class, as the first few examples are not.
    """
    _check.integer("n", n)
    if count is not None:
        _check.integer("count", count)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]


def read(
    source: str | Path,
    split: str | None = None,
    *,
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
    background: str = "white",
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> Images:
    """Return the images of a Parquet file, a folder of class folders, or a dataset of the Hugging Face hub.

    `source` is a Parquet file of any writer; a folder `<source>/<class name>/<image file>`, also one such folder per
    split; a folder that holds Parquet files, such as a copy of a hub dataset; or "hf:owner/name" or
    "hf:owner/name:config" of the hub. `split`: one of `splits(source)`, None for a source without splits.

    `image` and `label` name the columns (default: the first there is of `IMAGE_COLUMNS` and `LABEL_COLUMNS`). Images
    are encoded files; they are turned as their EXIF orientation says, what is transparent shows `background` ("white"
    or "black"), and with a `size` they are resized and cropped to that square. Labels are numbers or names.

    `classes`: those of the training set, which then rule. Labels that have names are matched by name; numbers without
    names are places in `classes`, unless these are numbers themselves. Without it classes are the source's own
    names, else the strings that occur, sorted, else the numbers up to the highest. `labelled=False`: labels
    are not looked at; every y is -1 and there are no classes.

    FileNotFoundError if there is no such source; ValueError names the file or the row that cannot be read, the
    label that is missing or of no known class, the split or the column that is not there.
    """
    found = _sources.open_source(source, split)
    where = str(source) if split is None else f"{source}, {split}"
    y, names, named = torch.empty(0, dtype=torch.int64), tuple[str, ...](), False
    if labelled:
        labels, own = found.labels(label)
        y, names, named = _numbered(labels, own, classes, where)
    x = decode(found.pictures(image), where, size=size, background=background)
    return Images(x, y if labelled else torch.full((len(x),), -1), names, named)


def classes_of(source: str | Path, split: str | None = None, *, label: str | None = None) -> tuple[str, ...]:
    """Return the names of a source's classes, as `read` finds them, without reading its images."""
    labels, names = _sources.open_source(source, split).labels(label)
    return names or _numbered(labels, None, None, str(source))[1]


def splits(source: str | Path) -> tuple[str, ...]:
    """Return the names of the splits of a source, such as "train" and "test"; () for one without splits.

    Folders and files are known by the usual words: "val" and "dev" are "validation". FileNotFoundError if there is no
    such source.
    """
    return _sources.splits(source)


def read_parquet(path: str | Path, **options: Any) -> Images:
    """Return the images of one Parquet file; `options` are those of `read`. FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return read(path, **options)


def read_folder(path: str | Path, **options: Any) -> Images:
    """Return the images of a folder of class folders, `<path>/<class name>/<image file>`, in alphabetical order.

    Hidden files are left out; every other file must be an image. `options` are those of `read`. FileNotFoundError
    if there is no such folder; ValueError names the folder without images, or the file that cannot be read.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    return read(path, **options)


def read_images(files: Sequence[Path], *, size: int | None = None, background: str = "white") -> Tensor:
    """Return image files as (N, C, H, W) in [0, 1], read as by `read`; ValueError names the one that cannot be."""
    return decode(((str(file), file) for file in files), str(files[0].parent), size=size, background=background)


def shaped(x: Tensor, shape: tuple[int, ...] | None, name: str) -> Tensor:
    """Return images `(N, C, H, W)`, in colour where images of `shape` are; ValueError where they have another shape."""
    if shape is not None and shape[0] == 3 and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"{name} has images of shape {tuple(x.shape[1:])}, but the defence takes {tuple(shape)}")
    return x


def _numbered(
    labels: Sequence[Any], names: tuple[str, ...] | None, classes: Sequence[str] | None, where: str
) -> tuple[Tensor, tuple[str, ...], bool]:
    """Return labels `(N,)` as places in the classes, their names, and whether these are names."""
    missing = [row for row, value in enumerate(labels) if value is None or (not isinstance(value, str) and value < 0)]
    if missing:
        raise ValueError(
            f"{where}: label is missing (-1 or null) in {len(missing)} of {len(labels)} rows, first in row "
            f"{missing[0]}: leave these rows out, or name another column by label= (--label)"
        )
    if labels and isinstance(labels[0], str):
        strings = [str(value) for value in labels]
        names = names or tuple(sorted(set(strings)))
        if classes is None and (unknown := sorted(set(strings) - set(names))):
            raise ValueError(f"{where}: label {unknown[0]!r} is not among the classes that it names, {_few(names)}")
    else:
        numbers = [int(value) for value in labels]
        low, high = (min(numbers), max(numbers)) if numbers else (0, 0)
        if names is not None and high >= len(names):
            raise ValueError(f"{where}: labels must be in 0 to {len(names) - 1}, got values in [{low}, {high}]")
        if names is None and high >= _MOST:
            raise ValueError(f"{where}: label {high} is no class: name the column of labels by label= (--label)")
        if names is None and classes is not None and not all(name.isdecimal() for name in classes):
            if high >= len(classes):
                raise ValueError(f"{where}: label {high} is not among the {len(classes)} training classes, from 0 on")
            return torch.tensor(numbers, dtype=torch.int64), tuple(classes), True
        if names is None and classes is None:
            return torch.tensor(numbers, dtype=torch.int64), tuple(map(str, range(high + 1))), False
        strings = [str(value) if names is None else names[value] for value in numbers]
    known = tuple(classes or names or ())
    places = {name: place for place, name in enumerate(known)}
    if unknown := sorted(set(strings) - places.keys()):
        raise ValueError(
            f"{where} has the class {unknown[0]!r}, which is not among the training classes, {_few(known)}: "
            "leave its images out, or train with it"
        )
    return torch.tensor([places[value] for value in strings], dtype=torch.int64), known, True


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@functools.cache
def _digits_table() -> np.ndarray:
    """Return scikit-learn's digits: in each row 64 values from 0 to 16 and the label.

    They are read from its file where that is found, since to import what else it has takes seconds.
    """
    found = importlib.util.find_spec("sklearn")
    file = Path(found.origin).parent / "datasets/data/digits.csv.gz" if found and found.origin else Path()
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    bunch = require("sklearn.datasets", "cli").load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _digits(split: str) -> Images:
    table = torch.from_numpy(_digits_table())
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    own = table[order[360:] if split == "train" else order[:360]]
    return Images(own[:, :-1].float().div_(16).reshape(-1, 1, 8, 8), own[:, -1].long(), tuple("0123456789"))
