"""What callers give, made into tensors: arrays, frames, lists, Datasets, loaders. No other module does that."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from immunonet._check import Bounds

TOLERANCE = 1e-6
# The largest rounding error that is let pass, as a share of a feature's standard deviation.
ROUNDING = 1e-3
INPUT_KEYS = ("image", "img", "pixel_values", "x", "inputs")
LABEL_KEYS = ("label", "labels", "y", "target")
# No value of these dtypes is changed by float32.
_EXACT = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)
_ADVICE = {
    "O": "give numbers of one type, as x.astype(float)",
    "U": "give numbers; for names, their places in a list of classes: [classes.index(name) for name in names]",
    "c": "give real numbers, such as the real and the imaginary parts as features of their own",
    "M": "give numbers, such as days since a date near the data",
    "m": "give numbers, such as x / np.timedelta64(1, 's')",
}


def inputs(
    name: str,
    value: Any,
    *,
    bounds: Bounds,
    shape: Sequence[int] | None = None,
    own: bool = False,
    fitted: bool = False,
) -> Tensor:
    """Return a batch of inputs `(B, *S)` as contiguous float32; raise unless finite, in `bounds` and of sample `shape`.

    Whole numbers are taken where every pair of bounds is wider than 1; within [0, 1], images of 0 to 255 are the usual
    reason for them, and they are refused. With `own` the result shares no memory with the caller. With `fitted` it is
    a ValueError if float32 rounds a feature (the first axis of a sample; not one that is constant) by more than
    a thousandth of its standard deviation, as it does with large offsets: seconds since 1970, map coordinates.
    """
    given = tensor(name, value)
    if not given.is_floating_point() and (given.dtype == torch.bool or not _wide(bounds)):
        raise TypeError(
            f"{name} must have a floating dtype, got {given.dtype}; scale images to [0, 1], as x.float() / 255, "
            "or give bounds=(0, 255) where the model takes them as they are; convert other whole numbers by x.float()"
        )
    if given.ndim < 2 or 0 in given.shape[1:]:
        raise ValueError(f"{name} must have shape (B, *S) with no empty axis, got {tuple(given.shape)}")
    if shape is not None and tuple(given.shape[1:]) != tuple(shape):
        raise ValueError(f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(given.shape)}")
    x = given.float()
    if not bool(torch.isfinite(x).all()):
        wrong = int((~torch.isfinite(x)).sum())
        why = "too large for float32" if bool(torch.isfinite(given).all()) else "NaN or infinite"
        raise ValueError(f"{name} must be finite, got {wrong} {why} values")
    low, high = bounds.tensors(x, x.shape[1:])
    if bool(((x < low - TOLERANCE) | (x > high + TOLERANCE)).any()):
        raise ValueError(
            f"{name} must lie within bounds={_short(bounds)}, got values in [{x.min():.4g}, {x.max():.4g}]. "
            "Give inputs in their raw range; if the model wants normalised inputs, wrap it: "
            "immunonet.Normalised(model, mean, std)"
        )
    if fitted:
        _check_rounding(name, given, x)
    return _owned(x, given) if own else x


def labels(name: str, value: Any, *, n: int, classes: int | None = None, own: bool = False) -> Tensor:
    """Return labels `(n,)` as int64; raise unless they are whole numbers in [0, classes), one per input.

    With `own` the result shares no memory with the caller.
    """
    given = tensor(name, value)
    if tuple(given.shape) != (n,):
        advice = ""
        if given.ndim == 2 and len(given) == n:
            advice = f"; give {name}.squeeze(1)" if given.shape[1] == 1 else f"; of one-hot rows give {name}.argmax(1)"
        raise ValueError(f"{name} must have shape ({n},), one label per input, got {tuple(given.shape)}{advice}")
    if given.dtype == torch.bool:
        raise TypeError(
            f"{name} must have an integer dtype, got torch.bool; for two classes give {name}.long(): "
            "class 0 for False, class 1 for True"
        )
    if given.is_floating_point():
        raise TypeError(
            f"{name} must have an integer dtype, got {given.dtype}; "
            f"if these are class numbers give {name}.long(), or {name}.astype(int) of an array"
        )
    y = given.long()
    outside = (y < 0) if classes is None else (y < 0) | (y >= classes)
    if bool(outside.any()):
        upper = " or more" if classes is None else f" to {classes - 1}, the model's {classes} classes"
        first = int(outside.nonzero()[0])
        advice = "Leave out examples without a label" if int(y.min()) < 0 else "Number the classes from 0"
        raise ValueError(
            f"{name} must be in 0{upper}, got values in [{int(y.min())}, {int(y.max())}]: {int(outside.sum())} of {n} "
            f"are outside, the first at index {first} ({int(y[first])}). {advice}"
        )
    return _owned(y, given) if own else y


def examples(x: Any, y: Any = None, *, name: str = "x") -> tuple[Any, Any]:
    """Return inputs and labels, from both as they are, or from a Dataset, a loader or a list of `(x, y)` as `x` alone.

    What holds examples is any map-style Dataset (also of Hugging Face), IterableDataset, DataLoader, iterable, or
    list of tuples. It yields pairs, or mappings with one of `INPUT_KEYS` and one of `LABEL_KEYS`. A loader, or
    another iterable, may yield batches too: its items are single examples where their label has no dimension.
    ValueError or TypeError names the place of what cannot be taken.
    """
    if not (isinstance(x, Dataset | DataLoader) or (y is None and holds_examples(x))):
        if y is None:
            raise TypeError(f"y is missing: give labels, or a Dataset or DataLoader of (x, y) as {name}")
        return x, y
    if y is not None:
        raise TypeError(f"y must be left out when {name} is a {type(x).__name__}, which holds the labels")
    xs, ys, places = [], [], []
    single = has_index(x)
    for place, item in _items(name, x):
        one_x, one_y = pair(name, place, item)
        # Copies: what yields them may use the same memory for the next.
        found_x = tensor(f"the input of {place}", one_x).clone()
        found_y = tensor(f"the label of {place}", one_y).clone()
        if single or not found_y.ndim:
            found_x, found_y = found_x[None], found_y[None]
        elif not found_x.ndim or len(found_x) != len(found_y):
            raise ValueError(
                f"{place} must hold as many inputs as labels, got shapes {tuple(found_x.shape)} and "
                f"{tuple(found_y.shape)}; the label of a single example is one number"
            )
        xs.append(found_x)
        ys.append(found_y)
        places.append(place)
    if not xs:
        raise ValueError(f"{name} is empty: it must hold examples of every class")
    return _joined(f"the inputs of {name}", xs, places), _joined(f"the labels of {name}", ys, places)


def calibration(value: Any) -> tuple[Any, Any]:
    """Return inputs and labels from `(x_cal, y_cal)`, or from whatever `examples` reads them of."""
    if holds_examples(value):
        return examples(value, name="calibration")
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"calibration must be a fraction or a pair (x_cal, y_cal), got {value!r}; "
            "a Dataset or DataLoader of (x, y) is taken too"
        )
    if len(value) != 2:
        raise ValueError(f"calibration must be a fraction or (x_cal, y_cal), got {len(value)} items")
    return value[0], value[1]


def bounds(name: str, value: Any) -> Bounds:
    """Return Bounds as they are, or read `(low, high)` or a sequence (or `(F, 2)` array) of such pairs.

    TypeError or ValueError that names it unless all are finite with low < high.
    """
    if isinstance(value, Bounds):
        return value
    if type(value) is tuple and [*map(type, value)] == [float, float] and -math.inf < value[0] < value[1] < math.inf:
        return Bounds(value[:1], value[1:])  # as most are, and often: by way of a tensor it takes 50 times as long
    try:
        table = tensor(name, value).double()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be (low, high) or one such pair per channel, got {value!r}") from error
    table = table.reshape(1, 2) if table.shape == (2,) else table
    if table.ndim != 2 or table.shape[1] != 2 or not len(table):
        raise ValueError(f"{name} must be (low, high) or one such pair per channel, got {value!r}")
    if not bool(torch.isfinite(table).all()) or bool((table[:, 0] >= table[:, 1]).any()):
        raise ValueError(f"{name} must be finite with low < high, got {value!r}")
    return Bounds(tuple(table[:, 0].tolist()), tuple(table[:, 1].tolist()))


def tensor(name: str, value: Any) -> Tensor:
    """Return what a caller gave as a contiguous tensor of real numbers, off the graph; it may share the memory.

    Taken: tensors, NumPy arrays of any strides and byte order, whatever has `to_numpy` (pandas, polars; by position) or
    `__array__`, and lists of numbers or of arrays of one shape. The dtype stays (integers that torch cannot
    compute with become int64, long doubles float64; lists of floats are float64 whatever torch's default is).
    TypeError for anything else, also for values that are masked, missing, text, dates or complex; ValueError for
    arrays of several shapes.
    """
    if isinstance(value, Tensor):
        return _dense(name, value)
    if isinstance(value, Sequence) and not isinstance(value, list | tuple | str | bytes):
        value = list(value)
    if isinstance(value, list | tuple) and _nests_arrays(value):
        parts = [tensor(f"{name}[{i}]", item)[None] for i, item in enumerate(value)]
        return _joined(name, parts, [f"{name}[{i}]" for i in range(len(parts))])
    array = _array(name, value)
    if array.dtype.kind not in "biuf":
        advice = _ADVICE.get("U" if array.dtype.kind in "ST" else array.dtype.kind, "give numbers")
        raise TypeError(f"{_numbers(name, value)} of dtype {array.dtype}{_culprit(array)}; {advice}")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.float64 if array.size and int(array.max()) > 2**63 - 1 else np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Torch takes no negative strides, and warns of arrays that are read-only.
    return torch.from_numpy(np.require(array, requirements=["C", "A", "W"]))


def _dense(name: str, value: Tensor) -> Tensor:
    if isinstance(value, torch.masked.MaskedTensor):
        raise TypeError(f"{name} must have no masked values, got a MaskedTensor; give .to_tensor(fill) of it")
    if value.is_nested:
        raise TypeError(f"{name} must be of one size, got a nested tensor; give .to_padded_tensor(fill) of it")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {value.layout}; call .to_dense()")
    if value.is_quantized:
        raise TypeError(f"{name} must hold numbers as they are, got {value.dtype}; call .dequantize()")
    if value.is_meta:
        raise TypeError(f"{name} must hold values, got a tensor on the meta device")
    if value.is_complex():
        raise TypeError(f"{_numbers(name, value)} of dtype {value.dtype}; {_ADVICE['c']}")
    plain = value.detach().as_subclass(Tensor)
    unsigned = plain.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return (plain.long() if unsigned else plain).contiguous()


def _array(name: str, value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "getbands"):
        raise TypeError(
            f"{name} must be a tensor or an array of numbers, got a PIL image ({type(value).__name__}); "
            "convert it with a transform of the Dataset, such as torchvision's ToTensor()"
        )
    if isinstance(value, np.ma.MaskedArray) and (masked := int(np.ma.getmaskarray(value).sum())):
        raise TypeError(f"{name} must have no masked values, got {masked}; fill them, or leave these examples out")
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} must be dense, got {type(value).__name__}; call .toarray()")
    known = any(hasattr(value, method) for method in ("to_numpy", "__array__"))
    if not known and not isinstance(value, list | tuple | numbers.Number | memoryview | str):
        raise TypeError(_numbers(name, value))
    try:
        array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
    except Exception as error:
        raise TypeError(f"{_numbers(name, value)} ({error})") from error
    return array if array.dtype.kind in "biuf" or not hasattr(value, "columns") else _columns(name, value)


def _columns(name: str, frame: Any) -> np.ndarray[Any, Any]:
    """Return a frame's columns of several dtypes side by side; TypeError names those that hold no numbers."""
    columns = {column: np.asarray(frame[column].to_numpy()) for column in frame.columns}
    wrong = [f"{c!r} ({frame[c].dtype})" for c, found in columns.items() if found.dtype.kind not in "biuf"]
    if wrong:
        raise TypeError(
            f"{name} must have numeric columns only, got {', '.join(wrong)}; leave these out, or turn them into numbers"
        )
    return np.column_stack(list(columns.values()))


def _numbers(name: str, value: Any) -> str:
    return f"{name} must be a tensor or an array of numbers, got {type(value).__name__}"


def _culprit(array: np.ndarray[Any, Any]) -> str:
    """Return what is no number in an array of objects, and where it stands."""
    if array.dtype.kind != "O":
        return ""
    wrong = ((i, item) for i, item in enumerate(array.flat) if not isinstance(item, numbers.Real))
    return next((f" ({type(item).__name__} at index {i})" for i, item in wrong), "")


def is_array(value: Any) -> bool:
    """Return whether a value is a tensor, or what can be made into an array at once."""
    if isinstance(value, np.generic):
        return False
    return isinstance(value, Tensor) or any(hasattr(value, m) for m in ("__array__", "to_numpy", "getbands"))


def _nests_arrays(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return is_array(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (isinstance(value, Tensor | np.ndarray) and not value.ndim)


def holds_examples(value: Any) -> bool:
    """Return whether a value yields examples, inputs with their labels, rather than being inputs itself."""
    if isinstance(value, Dataset | DataLoader):
        return True
    if isinstance(value, list | tuple):
        return bool(value) and all(
            isinstance(item, Mapping) or (isinstance(item, tuple) and len(item) == 2 and not _is_number(item[0]))
            for item in value
        )
    if is_array(value) or isinstance(value, Sequence | Mapping | np.generic):
        return False
    return isinstance(value, Iterable) or has_index(value)


def has_index(value: Any) -> bool:
    """Return whether examples are had by their index."""
    streams = isinstance(value, DataLoader | IterableDataset)
    return not streams and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _items(name: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Give the place and the content of all that `data` yields."""
    if has_index(data):
        for i in range(len(data)):
            try:
                item = data[i]
            except Exception as error:
                raise ValueError(f"{name}[{i}] cannot be read: {type(error).__name__}: {error}") from error
            yield f"{name}[{i}]", item
        return
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"{name} must have a length, got a {type(data).__name__} without __len__; add one, or make it an "
            "IterableDataset with __iter__"
        )
    count, iterator = 0, iter(data)
    while True:
        place = f"item {count} of {name}"
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{place} cannot be read: {type(error).__name__}: {error}") from error
        yield place, item
        count += 1


def pair(name: str, place: str, item: Any) -> tuple[Any, Any]:
    """Return the input and the label of an item of `name`; TypeError names its place if it holds no such two."""
    if isinstance(item, Mapping):
        found = [[key for key in keys if key in item] for keys in (INPUT_KEYS, LABEL_KEYS)]
        if any(len(keys) != 1 for keys in found):
            raise TypeError(
                f"{place} must have exactly one of the keys {', '.join(INPUT_KEYS)} and one of "
                f"{', '.join(LABEL_KEYS)}, got {', '.join(map(str, item))}; rename or leave out the others"
            )
        return item[found[0][0]], item[found[1][0]]
    if isinstance(item, list | tuple) and len(item) == 2:
        return item[0], item[1]
    size = f" of {len(item)}" if isinstance(item, list | tuple) else ""
    raise TypeError(f"{name} must yield pairs (x, y), got {type(item).__name__}{size} ({place})")


def _joined(what: str, parts: list[Tensor], places: list[str]) -> Tensor:
    """Return the parts' rows; ValueError names two places whose rows are of different sizes."""
    for part, place in zip(parts, places, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{what} must be of one size, got {tuple(parts[0].shape[1:])} in {places[0]} and "
                f"{tuple(part.shape[1:])} in {place}"
            )
    return torch.cat(parts)


def _owned(found: Tensor, given: Tensor) -> Tensor:
    shared = found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return found.clone() if shared else found


def _wide(bounds: Bounds) -> bool:
    return all(high - low > 1 for low, high in zip(bounds.low, bounds.high, strict=True))


def _check_rounding(name: str, given: Tensor, x: Tensor) -> None:
    """Raise ValueError where rounding moves a feature by much of what tells the examples apart."""
    if given.dtype in _EXACT or not len(x):
        return
    exact = given.double().transpose(0, 1).flatten(1)
    error = (exact - x.transpose(0, 1).flatten(1)).abs().amax(1)
    spread = exact.std(1, correction=0)
    lost = (error > ROUNDING * spread) & (exact.amin(1) < exact.amax(1))
    if not bool(lost.any()):
        return
    feature = int(lost.nonzero()[0])
    others = f" (and {int(lost.sum()) - 1} other features)" if lost.sum() > 1 else ""
    raise ValueError(
        f"{name} is computed with in float32, which rounds feature {feature}{others} by up to {error[feature]:.3g}, at "
        f"an offset of {exact[feature].mean():.6g} and a standard deviation of {spread[feature]:.3g}: "
        "subtract the offset, from the data and from the feature's bounds"
    )


def _short(bounds: Bounds) -> str:
    pairs = list(zip(bounds.low, bounds.high, strict=True))
    return str(pairs[0]) if len(pairs) == 1 else f"{len(pairs)} pairs {pairs[:3]}..."
