"""Thirty-odd ways to give the same examples, and as many to give wrong ones."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

UNIT, BYTES, WIDE = (0.0, 1.0), (0.0, 255.0), (-1e10, 1e10)
ACTIONS = ("fit", "predict", "attack", "ask")

Pair = tuple[Any, ...]


class Reused(Dataset[Any]):
    """Gives the same memory for every example."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.buffer = x.numpy(), y.tolist(), np.zeros(x.shape[1:], np.float32)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.buffer[:] = self.x[i]
        return self.buffer, self.y[i]


class Stream(IterableDataset[Any]):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def generated(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(7), y.split(7), strict=True)


def read_only(x: Tensor) -> Any:
    found = x.numpy().copy()
    found.flags.writeable = False
    return found


def mapped(x: Tensor) -> Any:
    with tempfile.NamedTemporaryFile() as file:
        found = np.memmap(file.name, np.float32, "w+", shape=tuple(x.shape))
        found[:] = x.numpy()
        found.flush()
        return np.memmap(file.name, np.float32, "r", shape=tuple(x.shape))


def strided(x: Tensor) -> Tensor:
    """Every other row and column of a larger tensor, the rest of which is NaN."""
    found = torch.full((2 * len(x), 2 * x.shape[1]), torch.nan)
    found[::2, 1::2] = x
    return found[::2, 1::2]


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 1


def with_value(x: Tensor, value: float) -> Tensor:
    found = x.clone()
    found[1, 2] = value
    return found


def masked(x: Tensor, hidden: bool) -> Any:
    mask = np.zeros(tuple(x.shape), bool)
    mask[1, 2] = hidden
    return np.ma.masked_array(x.numpy().copy(), mask)


def objects(x: Tensor) -> Any:
    return x.numpy().astype(object)


def with_names(x: Tensor) -> Any:
    return pd.DataFrame(x.numpy()).assign(name="a")


def quantised(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 1 / 64, 0, torch.quint8)


def as_pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x, y, strict=True))


def as_dicts(x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    return [{"image": a, "label": int(b), "path": "a.png"} for a, b in zip(x, y, strict=True)]


@dataclass(frozen=True)
class Source:
    """Examples made of plain ones: inputs in sixty-fourths `(n, 36)` and labels, as one value or two.

    `fails`: what the error says, of every action or by action. `times`: what the plain inputs are multiplied by, and
    `plus` what is added, before. `holds`: whether it holds labels too, so that only `fit` takes it, and `predict` says
    so. `labels`: whether it is only about the labels, which `predict` does not take. `evaluated`: whether `evaluate`
    is tried as well.
    """

    make: Callable[[Tensor, Tensor], Pair]
    fails: str | dict[str, str] | None = None
    bounds: tuple[float, float] = UNIT
    times: float = 1.0
    plus: float = 0.0
    holds: bool = False
    labels: bool = False
    evaluated: bool = False

    def failure(self, action: str) -> str | None:
        """What the error of an action says, if there is one."""
        return self.fails.get(action) if isinstance(self.fails, dict) else self.fails


def inputs(change: Callable[[Tensor], Any], fails: str | dict[str, str] | None = None, **settings: Any) -> Source:
    return Source(lambda x, y: (change(x), y), fails, **settings)


def answers(change: Callable[[Tensor], Any], fails: str | dict[str, str] | None = None, **settings: Any) -> Source:
    return Source(lambda x, y: (x, change(y)), fails, labels=True, **settings)


def held(make: Callable[[Tensor, Tensor], Any]) -> Source:
    return Source(lambda x, y: (make(x, y),), {"predict": r"^x(\[0\])? must "}, holds=True)


NUMBERS = "(x|x_cal) must be a tensor or an array of numbers, got"
SOURCES: dict[str, Source] = {
    # Right
    "float32 tensors": inputs(lambda x: x),
    "float64 tensors": inputs(lambda x: x.double()),
    "float16 tensors": inputs(lambda x: x.half()),
    "bfloat16 tensors": inputs(lambda x: x.bfloat16()),
    "tensors that need a gradient": inputs(lambda x: x.clone().requires_grad_() * 1),
    "parameters": inputs(lambda x: nn.Parameter(x.clone())),
    "every other row": inputs(strided),
    "transposed": inputs(lambda x: x.T.contiguous().T),
    "of inference mode": inputs(inferred),
    "float64 arrays": Source(lambda x, y: (x.double().numpy(), y.numpy())),
    "float16 arrays": inputs(lambda x: x.half().numpy()),
    "long doubles": inputs(lambda x: x.numpy().astype(np.longdouble)),
    "the other byte order": Source(lambda x, y: (x.numpy().astype(">f4"), y.numpy().astype(">i4")), evaluated=True),
    "backwards": Source(lambda x, y: (x.numpy()[::-1].copy()[::-1], y.numpy()[::-1].copy()[::-1])),
    "columns first": inputs(lambda x: np.asfortranarray(x.numpy())),
    "read-only": inputs(read_only),
    "memory-mapped": inputs(mapped),
    "masked nowhere": inputs(lambda x: masked(x, False)),
    "lists of floats": Source(lambda x, y: (x.tolist(), y.tolist())),
    "lists of arrays": inputs(lambda x: list(x.numpy())),
    "tuples of tensors": inputs(tuple),
    "frames": Source(lambda x, y: (pd.DataFrame(x.numpy(), index=range(len(x), 0, -1)), pd.Series(y.numpy()))),
    "frames of several dtypes": inputs(lambda x: pd.DataFrame(x.numpy()).astype({0: "float64", 1: "Float64"})),
    "bytes in wide bounds": inputs(lambda x: x.to(torch.uint8), bounds=BYTES, times=64),
    "int16 arrays of the other byte order": inputs(lambda x: x.numpy().astype(">i2"), bounds=BYTES, times=64),
    "a small offset": inputs(lambda x: x.double(), bounds=BYTES, plus=100),
    "labels of one byte": answers(lambda y: y.to(torch.uint8)),
    "labels as objects of NumPy": answers(lambda y: [np.int16(label) for label in y]),
    "labels as categories": answers(lambda y: pd.Series(y.numpy(), dtype="category")),
    "a data set": held(TensorDataset),
    "a data set that reuses its memory": held(Reused),
    "a loader": held(lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7)),
    "a loader without batches": held(lambda x, y: DataLoader(Reused(x, y), batch_size=None)),
    "a stream": held(lambda x, y: Stream(as_pairs(x, y))),
    "a stream of batches": held(generated),
    "a list of pairs": held(as_pairs),
    "a list of dicts": held(as_dicts),
    # Wrong
    "NaN": inputs(lambda x: with_value(x, torch.nan), "x must be finite, got 1 NaN or infinite", evaluated=True),
    "infinite": inputs(lambda x: with_value(x, torch.inf), "x must be finite, got 1"),
    "too large for float32": inputs(lambda x: with_value(x.double(), 1e300), "x must be finite, got 1 too large"),
    "out of range": inputs(lambda x: with_value(x, 1.01), "x must lie within bounds", evaluated=True),
    "bytes in narrow bounds": inputs(lambda x: x.mul(64).to(torch.uint8), "x must have a floating dtype.*/ 255"),
    "truth values": inputs(lambda x: x > 0.5, "x must have a floating dtype, got torch.bool"),
    "complex": inputs(lambda x: x.to(torch.complex64), NUMBERS),
    "sparse": inputs(lambda x: x.to_sparse(), "x must be dense"),
    "quantised": inputs(quantised, "x must hold numbers as they are"),
    "without values": inputs(lambda x: x.to("meta"), "x must hold values"),
    "masked": inputs(lambda x: masked(x, True), "x must have no masked values, got 1"),
    "objects": inputs(objects, NUMBERS),
    "text": inputs(lambda x: x.numpy().astype(str), NUMBERS),
    "a frame with names": inputs(with_names, "x must have numeric columns only, got 'name'"),
    "a frame with gaps": inputs(
        lambda x: pd.DataFrame(with_value(x, torch.nan).numpy()).astype("Float64"), "x must be finite, got 1 NaN"
    ),
    "a large offset": inputs(
        lambda x: x.double() + 1.7e9, {"fit": "x is computed with in float32.*subtract the offset"}, bounds=WIDE
    ),
    "no examples": Source(
        lambda x, y: (x[:0], y[:0]),
        {"fit": "x must hold at least one example", "predict": "x must hold at least one input", "evaluate": "x must"},
        evaluated=True,
    ),
    "one axis": inputs(lambda x: x[:, 0], r"x must have shape \(B, "),
    "ragged": inputs(lambda x: [row[: 30 + i % 2] for i, row in enumerate(x)], "x must be of one size"),
    "fewer labels": answers(lambda y: y[1:], r"y must have shape \(\d+,\), one label per input", evaluated=True),
    "negative labels": answers(lambda y: y - 1, r"y must be in 0 (to 2|or more)"),
    "labels of more classes": answers(lambda y: y + 1, "y must be in 0 to 2"),
    "one-hot labels": answers(lambda y: nn.functional.one_hot(y, 3), r"y must have shape .* give y.argmax\(1\)"),
    "labels in a column": answers(lambda y: y[:, None], r"y must have shape .* give y.squeeze\(1\)"),
    "float labels": answers(lambda y: y.float(), "y must have an integer dtype"),
    "labels that are true or not": answers(lambda y: y > 0, "y must have an integer dtype"),
    "names": answers(lambda y: ["abc"[label] for label in y], "y must be a tensor or an array of numbers"),
    "no labels": Source(lambda x, y: (x, None), {"fit": "y is missing", "attack": "y must be", "ask": "y must be"}),
    "one class missing": answers(lambda y: y.clamp(max=1), {"fit": "class 2"}),
    "one example of a class": answers(lambda y: torch.where(torch.arange(len(y)) > 2, y % 2, y), {"fit": "class 2"}),
}
"""By name; the first ones are right, and must come out as plain tensors do."""


def bits(value: Any) -> Any:
    """Return all of what a caller gave that must be as before; None for what is used up when it is read."""
    if isinstance(value, Tensor):
        dense = value.device.type != "meta" and not value.is_quantized and value.layout == torch.strided
        content = value.detach().clone().contiguous().flatten().view(torch.uint8).numpy().tobytes() if dense else None
        return value.dtype, tuple(value.shape), value.requires_grad, content
    if isinstance(value, np.ndarray):
        return value.dtype, value.strides, value.flags.writeable, value.tobytes()
    if isinstance(value, pd.DataFrame | pd.Series):
        return value.to_json(), list(value.index)
    if isinstance(value, list | tuple):
        return [bits(item) for item in itertools.islice(value, 3)]
    return repr(value) if isinstance(value, int | float | str) else None
