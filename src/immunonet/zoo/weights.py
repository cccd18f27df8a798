"""Weights on disk: safetensors, in parts where they are large, beside a JSON recipe with their checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _store

PART_BYTES = 15 * 2**20
_FORMAT = 1


def save_weights(net: nn.Module, path: str | Path, *, half: bool = True, recipe: dict[str, Any] | None = None) -> Path:
    """Write `net`'s weights to `path` (.safetensors) and their recipe to the same name with .json.

    `half` stores floating tensors as float16 (ValueError if one does not fit its range). Weights beyond 15
    MiB are split into `<stem>-1-of-2.safetensors` and so on, one tensor never being cut. `recipe` is any JSON
    object about how they were made; the format version and every file's name and sha256 are added to it.
    Returns the recipe's path.
    """
    path = _checked(path)
    tensors = {key: _stored(key, value, half) for key, value in net.state_dict().items()}
    parts = _parts(tensors)
    names = (
        [path.name]
        if len(parts) == 1
        else [f"{path.stem}-{i}-of-{len(parts)}.safetensors" for i in range(1, len(parts) + 1)]
    )
    files = [
        {"file": name, "sha256": _store.write_tensors(path.with_name(name), part)}
        for name, part in zip(names, parts, strict=True)
    ]
    _store.write_json(path.with_suffix(".json"), {**(recipe or {}), "format": _FORMAT, "files": files})
    return path.with_suffix(".json")


def load_weights(net: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load `path` (.safetensors) into `net` in its own dtype; return the recipe beside it, or {}.

    With a recipe, the files it lists (one, or the parts) must be there with their checksums.
    FileNotFoundError names a missing file; ValueError one that was truncated, edited, of another format or of
    another network.
    """
    path = _checked(path)
    recipe: dict[str, Any] = {}
    if path.with_suffix(".json").is_file():
        recipe = _store.read_json(path.with_suffix(".json"))
        try:
            if recipe["format"] != _FORMAT:
                raise ValueError(f"format {recipe['format']}, this version reads {_FORMAT}")
            listed = [(str(entry["file"]), str(entry["sha256"])) for entry in recipe["files"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.with_suffix('.json')} is not a recipe of weights ({error})") from error
        tensors: dict[str, Tensor] = {}
        for name, checksum in listed:
            tensors |= _store.read_tensors(path.with_name(Path(name).name), checksum=checksum)
    else:
        tensors = _store.read_tensors(path)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {type(net).__name__}: {reason}") from error
    return recipe


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    return path


def _stored(key: str, value: Tensor, half: bool) -> Tensor:
    if not (half and value.is_floating_point()):
        return value
    stored = value.half()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"{key} does not fit float16: save with half=False")
    return stored


def _parts(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in tensors.items():
        if parts[-1] and size + value.nbytes > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = value
        size += value.nbytes
    return parts
