"""Weights on disk: safetensors, in parts where they are large, beside a JSON recipe with their checksums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from immunonet import _store

PART_BYTES = 15 * 2**20
_FORMAT = 1
# What DataParallel and torch.compile put before the keys of the network that they wrap.
_PREFIXES = ("module.", "_orig_mod.")


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

    With a recipe, the files it lists (one, or the parts) must be there with their checksums; a JSON file of the user's
    own beside the weights is left alone. Keys may have the prefix of `DataParallel` or `torch.compile`.
    FileNotFoundError names a missing file; ValueError one that was truncated, edited, of another format or of
    another network.
    """
    path = _checked(path)
    beside = path.with_suffix(".json")
    recipe = _recipe(beside) if beside.is_file() else {}
    if recipe:
        tensors: dict[str, Tensor] = {}
        for entry in recipe["files"]:
            tensors |= _store.read_tensors(path.with_name(Path(entry["file"]).name), checksum=entry["sha256"])
    else:
        tensors = _store.read_tensors(path)
    tensors = _unwrapped(tensors, net.state_dict())
    if difference := _difference(tensors, net.state_dict()):
        raise ValueError(f"{path} does not fit {type(net).__name__}: {difference}")
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit {type(net).__name__}: {reason}") from error
    return recipe


def _recipe(path: Path) -> dict[str, Any]:
    """Return the recipe in a JSON file; {} for a file of the user's own, which names no files of weights."""
    try:
        found = _store.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a recipe of weights ({error}): mend it, or move it away") from error
    if not isinstance(found, dict) or "files" not in found:
        return {}
    try:
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']}, this version reads {_FORMAT}")
        for entry in found["files"]:
            entry["file"], entry["sha256"] = str(entry["file"]), str(entry["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recipe of weights ({error})") from error
    return dict(found)


def _unwrapped(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what `DataParallel` and `torch.compile` put before every key, unless the network's keys have it too."""
    while prefix := next((p for p in _PREFIXES if tensors and all(key.startswith(p) for key in tensors)), None):
        if any(key.startswith(prefix) for key in wanted):
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _difference(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return which keys and shapes differ, the first three of each kind and how many there are; "" for none."""
    shapes = [key for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape]
    kinds = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted],
        "of another shape": [f"{key} {tuple(tensors[key].shape)} for {tuple(wanted[key].shape)}" for key in shapes],
    }
    return "; ".join(
        f"{len(keys)} of {len(wanted)} keys {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for kind, keys in kinds.items()
        if keys
    )


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
