"""What `immunonet fit` wrote to a folder, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from immunonet import _store
from immunonet._imports import imported
from immunonet.cli import common
from immunonet.cli.fit import RECORD
from immunonet.defences.base import Defence, load


def opened(
    folder: Path, model: str | None, weights: Path | None, device: torch.device, **how: Any
) -> tuple[Defence, dict[str, Any]]:
    """Return the defence of a folder around its network (None: as given to fit), and what fit wrote about both.

    `how` is handed on to `load`. ValueError for weights that are not those it was fitted with.
    """
    record = read(folder)
    net = common.load_model(model or record["model"], weights, device, classes=len(record["classes"]))
    if _store.digest(net.state_dict().values()) != record["weights"]:
        raise ValueError(f"--weights {weights} are not those that {folder} was fitted with")
    if ":" in record["defence"]:
        imported("--defence", record["defence"])  # which registers its kind
    layers = [common.resolve_layer(name, net) for name in record["settings"]["layers"]]
    return load(folder, net, layers or None, **how), record


def read(folder: Path) -> dict[str, Any]:
    """Return what fit wrote about the defence; the error names the folder if it did not, or not wholly."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"--defence {folder} has no {RECORD}: give the folder that immunonet fit wrote")
    record = _store.read_json(path)
    try:
        record["settings"]["layers"], record["defence"], record["model"], record["weights"], record["classes"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was edited: it lacks {error}. Run immunonet fit again") from error
    return dict(record)
