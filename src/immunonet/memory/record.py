"""What a memory's folder says of itself: `memory.json`, and the space of its signatures."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from immunonet import _store
from immunonet.memory.space import Space

FORMAT = 1
FILE = "memory.json"


@dataclass(frozen=True)
class Told:
    """The space of a memory's signatures, what is kept of antigens, and the name of its table."""

    space: Space
    keep: str
    table: str


def check_folder(folder: Path) -> None:
    """Raise where a memory is not, and cannot be made, in a folder."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a folder, got the file {folder}")
    if (folder / FILE).exists() or not folder.exists():
        return
    # What a process left that died while it made one stands in nobody's way.
    if others := [p.name for p in folder.iterdir() if not p.name.startswith((".", "space-", "entries-"))]:
        raise ValueError(
            f"folder {folder} is no memory: it has no {FILE}, but holds {sorted(others)[0]!r}; give a memory's, an "
            "empty or a new one"
        )


def read(folder: Path) -> Told | None:
    """Return what a folder says; None where no memory is in it, ValueError where one is that cannot be read."""
    path = folder / FILE
    if not path.exists():
        return None
    told = _store.read_json(path)
    if not isinstance(told, dict) or "format" not in told or told.get("kind") != "memory":
        raise ValueError(f"{path} does not describe a memory; give the folder that Memory() made")
    if told["format"] != FORMAT:
        raise ValueError(f"{path} has format {told['format']}; this version reads format {FORMAT}")
    if told.pop("checksum", None) != _store.fingerprint(told):
        raise ValueError(f"{path} was edited: its content does not match its checksum")
    tensors = _store.read_tensors(folder / told["tensors"]["file"], checksum=told["tensors"]["sha256"])
    return Told(Space.made(tensors, told["space"]), told["keep"], told["table"])


def create(folder: Path, space: Space, keep: str, make_table: Callable[[str], None]) -> None:
    """Make a memory in a folder; where another process was faster, its memory stays."""
    # Of this call alone: threads and processes may be at the same.
    spare = folder / f".{uuid.uuid4().hex}"
    try:
        checksum = _store.write_tensors(spare, space.tensors())
        file = f"space-{checksum[:12]}.safetensors"
        spare.replace(folder / file)
        told = {
            "format": FORMAT, "kind": "memory", "keep": keep, "space": space.record(),
            "tensors": {"file": file, "sha256": checksum},
        }  # fmt: skip
        # Named by what it holds: those of two models that meet here do not mix.
        told["table"] = f"entries-{_store.fingerprint(told)[:12]}"
        make_table(str(told["table"]))
        _store.write_json(spare, told | {"checksum": _store.fingerprint(told)})
        # Unlike a rename, a link never replaces what is there.
        with contextlib.suppress(FileExistsError):
            os.link(spare, folder / FILE)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise PermissionError(f"memory {folder} cannot be made: the folder is read-only ({error})") from error
    finally:
        spare.unlink(missing_ok=True)
