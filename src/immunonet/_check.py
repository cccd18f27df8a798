"""Validation of settings: every error names the argument, what was found and what would be valid.

Numbers of NumPy and torch (scalars, arrays and tensors of no dimension) are taken as settings, and become Python's own.
What a caller gives as arrays, bounds among them, is read in `incoming`.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor


def keep(settings: Any, check: Callable[..., Any], *names: str, optional: bool = False, **limits: Any) -> None:
    """Replace fields of a frozen dataclass by what `check(name, value, **limits)` returns; None stays if `optional`."""
    for name in names:
        value = getattr(settings, name)
        if not (optional and value is None):
            object.__setattr__(settings, name, check(name, value, **limits))


def integer(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """Return `value` as an int if it is one in [least, most]; raise TypeError or ValueError otherwise."""
    found = _plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    found = int(found)
    if found < least or (most is not None and found > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be at least {least}{upper}, got {found}")
    return found


def number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return `value` as a float if it lies in [least, most], without `least` if `above`, without `most` if `below`."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        found = float(_plain(value))  # type: ignore[arg-type]
    except OverflowError:
        found = math.inf
    outside = not least <= found <= most or (above and found == least) or (below and found == most)
    if outside or math.isinf(found):
        left, right = "(" if above else "[", ")" if below else "]"
        raise ValueError(f"{name} must be a finite number in {left}{least:g}, {most:g}{right}, got {found:g}")
    return found


def is_number(value: object) -> bool:
    """Return whether `number` would take `value`, but for its limits."""
    found = _plain(value)
    return isinstance(found, numbers.Real) and not isinstance(found, bool)


def fraction(name: str, value: object) -> float:
    """Return a number, or what a text such as "60/255" says; ValueError or TypeError names it."""
    if not isinstance(value, str):
        return number(name, value)
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{name} must be a number such as 0.1 or 60/255, got {value!r}") from error


def choice(name: str, value: Any, options: Sequence[Any]) -> Any:
    """Return the one of `options` (strings, or None) that equals `value`; raise ValueError otherwise."""
    if not isinstance(value, str | None) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return options[options.index(value)]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that names what of `known` is nearest to `name`, or all of it if it is short."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    shown = close or sorted(known)
    return f"; nearest: {', '.join(shown)}" if close else f"; there are {', '.join(shown) or 'none'}"


def among(name: Any, known: Iterable[str], what: str) -> None:
    """Raise ValueError, naming the nearest, for the name of something that is not known."""
    if name not in (names := list(known)):
        raise ValueError(f"there is no {what} {name!r}{nearest(str(name), names)}")


def class_names(names: Sequence[str] | None, classes: int) -> list[str]:
    """Return one name per class, by default its number; raise ValueError unless there are `classes`."""
    if names is not None and len(names) != classes:
        raise ValueError(f"names must hold one name per class, {classes}, got {len(names)}")
    return [str(name) for name in (range(classes) if names is None else names)]


def boolean(name: str, value: object) -> bool:
    """Return `value` as a bool if it is one; raise TypeError otherwise."""
    found = _plain(value)
    if not isinstance(found, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return found


def seed(name: str, value: object) -> int | None:
    """Return `value` if it is None or an int in [0, 2**63); raise otherwise."""
    return None if value is None else integer(name, value, least=0, most=2**63 - 1)


def _plain(value: object) -> object:
    """Return numbers and truth values of NumPy and torch as Python's own, and anything else as it is.

    None for times and for what is masked: NumPy takes a span of time for an integer, and gives 0 for a masked number.
    """
    if not isinstance(value, np.generic | np.ndarray | Tensor) or value.ndim:
        return value
    if isinstance(value, np.ma.MaskedArray) or (not isinstance(value, Tensor) and value.dtype.kind in "mM"):
        return None
    found: object = value.item()
    return found


@dataclass(frozen=True)
class Bounds:
    """Valid range of a tensor: scalars, or one pair per channel or feature (the first axis of a sample)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def tensors(self, like: Tensor, shape: Sequence[int], name: str = "bounds") -> tuple[Tensor, Tensor]:
        """Return low and high, on `like`'s device and dtype, shaped to broadcast against samples of `shape`."""
        if len(self.low) == 1:
            size: tuple[int, ...] = (1,) * len(shape)
        elif not shape or len(self.low) != shape[0]:
            raise ValueError(
                f"{name} has {len(self.low)} pairs, but samples have shape {tuple(shape)}: "
                f"give one pair in all, or {shape[0] if shape else 1} pairs"
            )
        else:
            size = (len(self.low),) + (1,) * (len(shape) - 1)
        return (
            torch.tensor(self.low, dtype=like.dtype, device=like.device).reshape(size),
            torch.tensor(self.high, dtype=like.dtype, device=like.device).reshape(size),
        )

    def pairs(self) -> list[list[float]]:
        """Return `[[low, high], ...]`, the form that JSON keeps and `incoming.bounds` reads."""
        return [list(pair) for pair in zip(self.low, self.high, strict=True)]
