"""Where images lie: class folders, Parquet files, and what the `datasets` library finds in a folder or on the hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from immunonet._imports import require
from immunonet._pictures import first_line

IMAGE_COLUMNS = ("image", "img", "pixel_values", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class", "y")

# What people call the folders of a split.
_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# Left by operating systems in folders of images.
_JUNK = {"Thumbs.db", "desktop.ini", "__MACOSX"}
_BATCH = 1000


@dataclass(frozen=True)
class Folder:
    """Class folders: image files with the place of their class, and the names of the classes."""

    files: list[tuple[Path, int]]
    classes: tuple[str, ...]

    def pictures(self, column: str | None) -> Iterator[tuple[str, Any]]:
        """Yield a name and a file for each image."""
        self._no_columns("image", column)
        return ((str(file), file) for file, _ in self.files)

    def labels(self, column: str | None) -> tuple[list[Any], tuple[str, ...]]:
        """Return the label of each image, and the names of the classes."""
        self._no_columns("label", column)
        return [label for _, label in self.files], self.classes

    def _no_columns(self, option: str, column: str | None) -> None:
        if column is not None:
            raise ValueError(f"{option}={column!r} must be left out with class folders, which have no columns")


@dataclass(frozen=True)
class Table:
    """Rows with columns: `parts`, each a name and a Parquet file or a dataset of the `datasets` library.

    `declared`: the names of classes by column that stand beside the files, as in a hub dataset's card.
    """

    name: str
    parts: list[tuple[str, Any]]
    declared: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def pictures(self, column: str | None) -> Iterator[tuple[str, Any]]:
        """Yield a name and the encoded bytes (a Path, or None where there are none) of each image."""
        column = self._column("image", column, IMAGE_COLUMNS)
        for name, part in self.parts:
            kind = _schema(part).field(column).type
            is_struct = require("pyarrow", "data").types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            if not (is_struct or "binary" in str(kind)):
                raise ValueError(f"{name}: {column} must be binary or a struct with bytes, got {kind}")
            for row, cell in enumerate(_cells(name, part, column)):
                yield f"{name}, row {row}", _encoded(cell) if is_struct else cell

    def labels(self, column: str | None) -> tuple[list[Any], tuple[str, ...] | None]:
        """Return the label of each image, a number, a string or None, and the names of the classes if there are any."""
        column = self._column("label", column, LABEL_COLUMNS)
        types = require("pyarrow", "data").types
        labels: list[Any] = []
        for name, part in self.parts:
            kind = _schema(part).field(column).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind) or "string" in str(kind)):
                raise ValueError(f"{name}: {column} must be integers or strings, got {kind}")
            labels += _cells(name, part, column)
        if len({isinstance(value, str) for value in labels if value is not None}) > 1:
            raise ValueError(f"{self.name}: {column} must be all integers or all strings, and its files hold both")
        names = {_class_names(name, _schema(part), column) for name, part in self.parts}
        if len(names) > 1:
            raise ValueError(f"{self.name}: its files name different classes in {column}: read them one by one")
        return labels, names.pop() or self.declared.get(column)

    def _column(self, option: str, given: str | None, known: tuple[str, ...]) -> str:
        there = _schema(self.parts[0][1]).names
        found = next((name for name in ((given,) if given else known) if name in there), None)
        if found is None:
            wanted = f"the column {given}" if given else f"a column of {option}s, such as {' or '.join(known[:2])}"
            raise ValueError(f"{self.name} must have {wanted}, found {there}: name yours by {option}= (--{option})")
        for name, part in self.parts:
            if found not in _schema(part).names:
                raise ValueError(f"{name} must have the column {found} as the files before it, found {there}")
        return found


def open_source(source: str | Path, split: str | None) -> Folder | Table:
    """Return what `source` holds in `split`; the errors are those of `data.read`."""
    path = Path(source)
    if path.is_file():
        _check_split(source, split, ())
        return Table(str(path), [(str(path), _parquet(path))])
    if path.is_dir() and not _holds_parquet(path):
        folders = split_folders(path)
        _check_split(source, split, tuple(folders))
        return _class_folders(folders[split] if split else path)
    if path.is_dir():
        files, declared = _snapshot(path)
        _check_split(source, split, tuple(files))
        return Table(str(path), [(file, _parquet(Path(file))) for file in files[str(split)]], declared)
    return Table(str(source), [(f"{source}, {split}", _from_hub(source, split))])


def splits(source: str | Path) -> tuple[str, ...]:
    """Return the names of a source's splits; see `data.splits`."""
    path = Path(source)
    if path.is_file():
        return ()
    if path.is_dir():
        return tuple(_snapshot(path)[0] if _holds_parquet(path) else split_folders(path))
    return _splits_of(_hub_builder(source))


def split_folders(path: Path) -> dict[str, Path]:
    """Return the folders of class folders in `path` that are called as a split is: "train", "validation", "test"."""
    found: dict[str, Path] = {}
    for folder in _visible(path):
        name = next((name for name, words in _FOLDERS.items() if folder.name.lower() in words), None)
        # A class may be called "train" as well: its folder holds images and no folders.
        if name is None or not folder.is_dir() or not any(inner.is_dir() for inner in _visible(folder)):
            continue
        if name in found:
            raise ValueError(f"{path} has two folders for {name}, {found[name].name} and {folder.name}: move one away")
        found[name] = folder
    return {name: found[name] for name in _FOLDERS if name in found}


def _class_folders(path: Path) -> Folder:
    folders = [folder for folder in _visible(path) if folder.is_dir()]
    if not folders:
        raise ValueError(f"{path} has no class folders: put the images of each class in {path}/<class name>/")
    files: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        here = [(file, label) for file in _visible(folder)]
        if not here:
            raise ValueError(f"{folder} has no images: add some, or remove this class folder")
        if inner := next((file for file, _ in here if file.is_dir()), None):
            raise ValueError(
                f"{inner} is a folder in a class folder: put the images of {folder.name} in {folder} itself"
            )
        files += here
    return Folder(files, tuple(folder.name for folder in folders))


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name not in _JUNK)


def _holds_parquet(path: Path) -> bool:
    return any(next(path.glob(f"{deep}*.parquet"), None) is not None for deep in ("", "*/", "*/*/"))


def _check_split(source: str | Path, split: str | None, there: tuple[str, ...]) -> None:
    if split is None and there:
        raise ValueError(f"{source} has the splits {', '.join(there)}: name one of them")
    if split is not None and split not in there:
        raise ValueError(f"{source} has no split {split!r}, it has {', '.join(there) or 'none'}")


def _snapshot(path: Path) -> tuple[dict[str, list[str]], dict[str, tuple[str, ...]]]:
    """Return the Parquet files of each split of a folder, and the names of classes that its card gives by column.

    Which files make a split is a rule of the `datasets` library and the folder's card. It is asked about empty files of
    the same names, so that it looks into no others, takes no folder's name for a pattern, and caches nothing.
    """
    library = require("datasets", "data")
    names = [file.relative_to(path) for file in sorted(path.rglob("*.parquet"))]
    names = [name for name in names if not any(part[0] in "._" for part in name.parts)]
    card = path / "README.md"
    bars = library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            mirror = Path(cache).resolve() / "folder"
            for name in names:
                (mirror / name).parent.mkdir(parents=True, exist_ok=True)
                (mirror / name).touch()
            if card.is_file():
                shutil.copy(card, mirror)
            builder = library.load_dataset_builder(str(mirror), cache_dir=cache)
            found = {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}
            files = {split: [str(path / file.relative_to(mirror)) for file in found[split]] for split in found}
    except Exception as error:  # whatever the library raises for what people put in folders
        raise ValueError(f"{path} cannot be read as a dataset ({first_line(error)})") from error
    finally:
        if not bars:
            library.enable_progress_bars()
    left = {str(path / name) for name in names} - {file for some in files.values() for file in some}
    if left and not card.is_file():  # a card may leave out files on purpose
        raise ValueError(
            f"{path}: {len(left)} Parquet files are called after no split, such as {min(left)}, but others are: "
            "call all of them train-, validation- or test-, or give one of the files"
        )
    kinds = (builder.info.features or {}).items()
    return files, {name: tuple(kind.names) for name, kind in kinds if hasattr(kind, "names")}


def _hub_builder(source: str | Path) -> Any:
    """Return the builder of "hf:owner/name" or "hf:owner/name:config"; code in a dataset is never run by it."""
    start, _, name = str(source).partition("hf:")
    if start or not name:
        raise FileNotFoundError(f"there is no {str(source)!r}; a dataset of the Hugging Face hub is hf:OWNER/NAME")
    repository, _, config = name.partition(":")
    if Path(repository).exists():
        raise ValueError(f"{source} is of the hub, but {repository} lies here too: give that path, or run elsewhere")
    library = require("datasets", "data")
    with _reached(source):
        return library.load_dataset_builder(repository, config or None)


def _from_hub(source: str | Path, split: str | None) -> Any:
    """Return a split of a dataset of the hub; it stays in the user's cache, as for everyone who loads it."""
    builder = _hub_builder(source)
    _check_split(source, split, _splits_of(builder))
    with _reached(source):
        builder.download_and_prepare()
        return builder.as_dataset(split).with_format("arrow")


def _splits_of(builder: Any) -> tuple[str, ...]:
    return tuple(map(str, builder.config.data_files or builder.info.splits or ()))


@contextmanager
def _reached(source: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it uses
        name = str(source).removeprefix("hf:").partition(":")[0]
        raise FileNotFoundError(
            f"{name} could not be fetched from the Hugging Face hub ({type(error).__name__}: {first_line(error)})"
        ) from error


def _parquet(path: Path) -> Any:
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file ({first_line(error)})") from error


def _schema(part: Any) -> Any:
    """Return the schema, with its metadata, of a Parquet file or of a dataset of the `datasets` library."""
    return part.schema_arrow if hasattr(part, "schema_arrow") else part.features.arrow_schema


def _cells(name: str, part: Any, column: str) -> Iterator[Any]:
    pa = require("pyarrow", "data")
    try:
        if hasattr(part, "iter_batches"):
            batches = part.iter_batches(batch_size=_BATCH, columns=[column])
        else:
            batches = part.select_columns([column]).iter(batch_size=_BATCH)
        for batch in batches:
            yield from batch.column(column).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is not a readable Parquet file ({first_line(error)})") from error


def _encoded(cell: dict[str, Any] | None) -> Any:
    """Return the bytes of an image, or the Path of a file that is there, or None."""
    if cell is None or cell["bytes"] is not None:
        return cell and cell["bytes"]
    path = cell.get("path")
    return Path(path) if path and Path(path).is_file() else None


def _class_names(name: str, schema: Any, column: str) -> tuple[str, ...] | None:
    """Return the names of a column's classes from a schema's metadata, as the hub writes them or as `classes`."""
    metadata = schema.metadata or {}
    try:
        hub, own = (json.loads(metadata.get(key, b"null")) for key in (b"huggingface", b"classes"))
    except ValueError as error:
        raise ValueError(f"{name}: the class names in its metadata cannot be read ({error!r})") from error
    try:
        names = hub["info"]["features"][column]["names"] or own
    except (KeyError, TypeError):  # other columns, or other information
        names = own
    if names is not None and not (isinstance(names, list) and names):
        raise ValueError(f"{name}: the class names in its metadata must be a list of names, got {names!r}")
    return None if names is None else tuple(map(str, names))
