"""Files: atomic writes, JSON, safetensors with checksums. No pickle is ever loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # Temporary files are private; what a user finds in the end should follow their umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as JSON (no NaN), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; ValueError names the file if it is not JSON, FileNotFoundError if it is not there."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): truncated or another kind of file") from error


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors as safetensors, whole or not at all; return the file's sha256."""
    with replacing(path) as temporary:
        try:
            save_file(_apart({k: v.detach().cpu().contiguous() for k, v in tensors.items()}), temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error})") from error
        return sha256(temporary)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which none shares memory with another, as tied weights do: the format refuses them."""
    seen, found = set[int](), dict[str, Tensor]()
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        found[key] = value.clone() if place in seen else value
        seen.add(place)
    return found


def read_tensors(path: str | Path, *, checksum: str | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Read safetensors; ValueError names a file that is truncated, foreign, or not of `checksum` (sha256)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if checksum is not None and (found := sha256(path)) != checksum:
        raise ValueError(f"{path} was truncated or edited: its sha256 is {found[:12]}..., recorded {checksum[:12]}...")
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; ValueError names the file if it is truncated or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error


def slug(name: str) -> str:
    """Return a name as that of a file: other characters are replaced, and a short digest keeps such names apart."""
    found = re.sub(r"[^\w.+-]+", "-", name)
    return found if found == name else f"{found}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def fingerprint(value: Any) -> str:
    """Return the hexadecimal sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the hexadecimal sha256 of tensors' values, such as a network's weights, to tell whether they changed."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
