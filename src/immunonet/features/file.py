"""Features of all examples in a file, where they are too many for memory."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from immunonet import _store
from immunonet.features.search import ROWS, Progress, Rows

# Examples by which a file is recognised.
PROBES = 8

_log = logging.getLogger("immunonet")


class FeatureFile:
    """The features of all examples as float16 in a memory-mapped file, with a record beside it that is checked."""

    def __init__(self, path: str | Path, rows: Rows, n: int, *, on_progress: Progress | None = None) -> None:
        """Open the file, or write it from `rows` where there is none.

        Raises ValueError if the file is not of these examples and this model, was truncated, or float16 cannot
        hold the features; OSError, before anything is written, if the disk has too little room.
        """
        self._path = path = Path(path)
        probes = torch.linspace(0, n - 1, min(PROBES, n)).long()
        features = rows(probes).cpu()
        record = {"format": 1, "shape": [n, features.shape[1]], "dtype": "float16"}
        self._size = 2 * n * features.shape[1]
        beside = path.with_name(path.name + ".json")
        if not path.exists():
            self._write(rows, n, on_progress, beside, record)
        elif not beside.exists():
            raise ValueError(f"{path} has no {beside.name} beside it; delete it or give another path")
        elif _store.read_json(beside) != record:
            raise ValueError(f"{path} holds features of another repertoire or layer; delete it or give another path")
        self._check_size()
        self._values: np.ndarray[Any, np.dtype[np.float16]] = np.memmap(
            path, np.float16, "r", shape=(n, features.shape[1])
        )
        if not torch.allclose(self(probes), features, rtol=2e-2, atol=2e-3 * float(features.abs().max())):
            raise ValueError(
                f"{path} holds features of other examples or of a model with other weights; "
                "delete it or give another path"
            )

    def __call__(self, examples: Tensor) -> Tensor:
        """Return the features `(n, D)` of examples `(n,)`; ValueError if the file shrank."""
        self._check_size()
        return torch.from_numpy(self._values[examples.cpu().numpy()]).float().to(examples.device)

    def _check_size(self) -> None:
        # Reading past the end of a mapped file ends the process.
        if (found := self._path.stat().st_size) != self._size:
            raise ValueError(
                f"{self._path} was truncated: {found:,} bytes, {self._size:,} expected; delete it and fit again"
            )

    def _write(self, rows: Rows, n: int, on_progress: Progress | None, beside: Path, record: dict[str, Any]) -> None:
        path, size = self._path, self._size
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(f"{path} needs {size:,} bytes, more than the disk has left")
        _log.info("writing %s: %s bytes of features", path, f"{size:,}")
        with _store.replacing(path) as temporary, open(temporary, "wb") as file:
            for start in range(0, n, ROWS):
                half = rows(torch.arange(start, min(start + ROWS, n))).half()
                if not bool(torch.isfinite(half).all()):
                    raise ValueError(f"{path}: features are too large for float16; fit without a feature file")
                file.write(half.cpu().numpy().tobytes())
                if on_progress is not None:
                    on_progress(min(start + ROWS, n), n)
            # The record comes first, so that there is never a file without one.
            _store.write_json(beside, record)
