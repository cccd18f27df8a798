"""Validation of arguments: every error names the argument, what was found and what would be valid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-6


def integer(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """Return `value` if it is an int in [least, most]; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be at least {least}{upper}, got {value}")
    return value


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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    outside = not least <= value <= most or (above and value == least) or (below and value == most)
    if outside or math.isinf(value):
        left, right = "(" if above else "[", ")" if below else "]"
        raise ValueError(f"{name} must be a finite number in {left}{least:g}, {most:g}{right}, got {value:g}")
    return value


def fraction(name: str, value: object) -> float:
    """Return a number, or what a text such as "60/255" says; ValueError or TypeError names it."""
    if not isinstance(value, str):
        return number(name, value)
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{name} must be a number such as 0.1 or 60/255, got {value!r}") from error


def choice(name: str, value: Any, options: Sequence[Any]) -> Any:
    """Return `value` if it is one of `options`; raise ValueError otherwise."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def boolean(name: str, value: object) -> bool:
    """Return `value` if it is a bool; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def seed(name: str, value: object) -> int | None:
    """Return `value` if it is None or an int in [0, 2**63); raise otherwise."""
    return None if value is None else integer(name, value, least=0, most=2**63 - 1)


@dataclass(frozen=True)
class Bounds:
    """Valid range of a tensor: scalars, or one pair per channel or feature (the first axis of a sample)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, name: str, value: Any) -> Bounds:
        """Read `(low, high)` or a sequence (or `(F, 2)` array) of such pairs; raise if not low < high."""
        try:
            table = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be (low, high) or one such pair per channel, got {value!r}") from error
        table = table.reshape(1, 2) if table.shape == (2,) else table
        if table.ndim != 2 or table.shape[1] != 2 or not len(table):
            raise ValueError(f"{name} must be (low, high) or one such pair per channel, got {value!r}")
        if not bool(torch.isfinite(table).all()) or bool((table[:, 0] >= table[:, 1]).any()):
            raise ValueError(f"{name} must be finite with low < high, got {value!r}")
        return cls(tuple(table[:, 0].tolist()), tuple(table[:, 1].tolist()))

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
        """Return `[[low, high], ...]`, the form that JSON keeps and `of` reads."""
        return [list(pair) for pair in zip(self.low, self.high, strict=True)]


def inputs(name: str, value: Any, *, bounds: Bounds, shape: Sequence[int] | None = None) -> Tensor:
    """Return a batch of inputs `(B, *S)` as float32; raise unless finite, within `bounds` and of sample `shape`.

    Floating tensors and arrays are taken; integers are refused, because 0..255 images are the usual reason.
    """
    x = _tensor(name, value)
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}; scale images to [0, 1], as x.float() / 255")
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have shape (B, *S) with no empty axis, got {tuple(x.shape)}")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"{name} must have shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite values")
    low, high = bounds.tensors(x, x.shape[1:])
    if bool(((x < low - TOLERANCE) | (x > high + TOLERANCE)).any()):
        raise ValueError(
            f"{name} must lie within bounds={_short(bounds)}, got values in [{x.min():.4g}, {x.max():.4g}]. "
            "Give inputs in their raw range; if the model wants normalised inputs, wrap it: "
            "immunonet.Normalised(model, mean, std)"
        )
    return x


def labels(name: str, value: Any, *, n: int, classes: int | None = None) -> Tensor:
    """Return labels `(n,)` as int64; raise unless they are whole numbers in [0, classes), one per input."""
    y = _tensor(name, value)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {y.dtype}")
    if tuple(y.shape) != (n,):
        raise ValueError(f"{name} must have shape ({n},), one label per input, got {tuple(y.shape)}")
    y = y.detach().long()
    if n and (int(y.min()) < 0 or (classes is not None and int(y.max()) >= classes)):
        upper = "" if classes is None else f" to {classes - 1}, the model's {classes} classes"
        raise ValueError(f"{name} must be in 0{upper}, got values in [{int(y.min())}, {int(y.max())}]")
    return y


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {type(value).__name__}") from error


def _short(bounds: Bounds) -> str:
    pairs = list(zip(bounds.low, bounds.high, strict=True))
    return str(pairs[0]) if len(pairs) == 1 else f"{len(pairs)} pairs {pairs[:3]}..."
