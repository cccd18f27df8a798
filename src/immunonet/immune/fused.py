"""The operators and the distances of affine maps as numba loops: the same numbers as the torch path, in one pass."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from immunonet.immune.noise import FIRST, GOLDEN, SECOND
from immunonet.immune.operators import Family, Mutation

_FIRST, _SECOND, _GOLDEN = np.uint32(FIRST), np.uint32(SECOND), np.uint32(GOLDEN)
_8, _15, _16 = np.uint32(8), np.uint32(15), np.uint32(16)
_ONE, _TWO, _UNIT = np.float32(1), np.float32(2), np.float32(2.0**-24)

SERIAL_VALUES = 2**18
"""Values of cells up to which one thread is used: several would wait for each other longer than they work."""
REGISTER_WORK = 8
"""Passes over the values of a cell that take as long as its registration."""

_HOME = os.getpid()
_turn = threading.Lock()


def offspring(
    cells: Tensor,
    family: Family,
    parents: Tensor,
    share: Tensor,
    cross_keys: Tensor,
    mutate_keys: Tensor,
    mutation: Mutation,
) -> None:
    """Do what `operators.offspring` does, on contiguous float32 CPU tensors."""
    _run(
        _offspring,
        _offspring_parts,
        len(share),
        share.numel() * cells[0, 0, 0].numel(),
        _flat(cells),
        *(_contiguous(part) for part in family),
        _contiguous(parents),
        _contiguous(share),
        _contiguous(cross_keys).astype(np.uint32),
        _contiguous(mutate_keys).astype(np.uint32),
        _contiguous(mutation.rate),
        _contiguous(mutation.least),
        _contiguous(mutation.most),
        _contiguous(mutation.low.flatten()),
        _contiguous(mutation.high.flatten()),
    )


def band_distances(cells: Tensor, family: Family, antigens: Tensor, offsets: Tensor, band: Tensor) -> Tensor:
    """Return distances `(F, P)` of families of `cells` `(B, C, P, *S)` to their antigens `(B, *S)`.

    The squared distance of a difference q is the sum over diagonals of `band[t, j] q[j] q[j + offsets[t]]`:
    `offsets` `(t,)` >= 0, `band` `(t, d)`.
    """
    missing = -len(offsets) % 7  # `_quadratic` adds seven in one pass
    offsets, band = F.pad(offsets, (0, missing)), F.pad(band, (0, 0, 0, missing))
    out = cells.new_empty(len(family[0]), cells.shape[2])
    _run(
        _band_distances,
        _band_distances_parts,
        len(out),
        len(out) * cells[0, 0].numel(),
        _flat(cells),
        *(_contiguous(part) for part in family),
        _contiguous(antigens.flatten(1)),
        _contiguous(offsets),
        _contiguous(band),
        out.numpy(),
    )
    return out


def register(images: Tensor, goals: Tensor, reach: float, steps: int = 2) -> Tensor:
    """Do what `operators.register` does, on float32 CPU tensors."""
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    _run(
        _register,
        _register_parts,
        len(images),
        images.numel() * REGISTER_WORK,
        _contiguous(images),
        _contiguous(goals.expand_as(images).float()),
        float(reach),
        steps,
        out.numpy(),
    )
    return out


def _run(loop: Callable[..., None], parts: Callable[..., None], count: int, values: int, *arguments: Any) -> None:
    """Run `loop` on all of `range(count)`, or its `parts` in as many threads as torch uses.

    Numba's threads end a process that was forked from theirs (OpenMP), or in which two threads call them (workqueue).
    There, and where they would wait for each other longer than they work, the loop runs in this thread alone.
    """
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, count) if values > SERIAL_VALUES else 1
    if threads <= 1 or os.getpid() != _HOME or not _turn.acquire(blocking=False):
        return loop(0, count, *arguments)
    try:
        if not _started():
            return loop(0, count, *arguments)
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            parts(threads, count, *arguments)
        finally:
            numba.set_num_threads(before)
    finally:
        _turn.release()


@functools.cache
def _started() -> bool:
    """Return whether numba's threads could be started."""
    # OpenMP changes the threads of torch in the thread that starts numba's.
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(numba.get_num_threads).exception()
    if error is not None:
        logging.getLogger("immunonet").warning("the fused loops run in one thread: numba has no other: %s", error)
    return error is None


def _flat(cells: Tensor) -> Any:
    return cells.view(*cells.shape[:3], -1).numpy()


def _contiguous(tensor: Tensor) -> Any:
    return tensor.contiguous().numpy()


@njit(inline="always")
def _uniform(place: Any, key0: Any, key1: Any) -> Any:
    x = np.uint32(place ^ key0)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> _16)) * _FIRST)
    x = np.uint32(np.uint32(np.uint32(x ^ np.uint32(x >> _15)) + key1) * _SECOND)
    x = np.uint32(x ^ np.uint32(x >> _16))
    return np.float32(np.int32(np.uint32(x >> _8))) * _UNIT


@njit(cache=True)
def _child(
    out: Any, first: Any, second: Any, share: Any, start: Any, steps: Any, kc: Any, km: Any,
    rate: Any, least: Any, most: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    inverse = _ONE / max(rate, np.float32(1e-30))
    kc0, kc1, km0, km1 = kc[0], kc[1], km[0], km[1]
    begin = np.uint32(start * _GOLDEN)
    for j in range(out.shape[0]):
        place = np.uint32(begin + steps[j])
        # Only without loads inside its conditions can the loop work on several values at once.
        a, b, least_value, most_value = first[j], second[j], low[j], high[j]
        value = a if _uniform(place, kc0, kc1) < share else b
        u = _uniform(place, km0, km1)
        signed = _TWO * u * inverse - _ONE
        amount = (least + abs(signed) * (most - least)) * (most_value - least_value)
        moved = value + amount if signed >= 0 else value - amount
        value = moved if u < rate else value
        out[j] = min(max(value, least_value), most_value)


@njit(nogil=True, cache=True)
def _offspring(
    start: Any, stop: Any, cells: Any, antigen: Any, label: Any, parents: Any, share: Any, cross_keys: Any,
    mutate_keys: Any, rate: Any, least: Any, most: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    size, values = cells.shape[2], cells.shape[3]
    steps = np.arange(values).astype(np.uint32) * _GOLDEN
    for f in range(start, stop):
        b, c = antigen[f], label[f]
        family = cells[b, c]
        children = np.empty((size, values), np.float32)
        for i in range(size):
            _child(
                children[i], family[parents[f, i]], family[parents[f, size + i]], share[f, i],
                np.uint32((c * size + i) * values), steps, cross_keys[b], mutate_keys[b],
                rate[b], least[b], most[b], low, high,
            )  # fmt: skip
        family[:] = children


@njit(parallel=True, nogil=True, cache=True)
def _offspring_parts(
    parts: Any, count: Any, cells: Any, antigen: Any, label: Any, parents: Any, share: Any, cross_keys: Any,
    mutate_keys: Any, rate: Any, least: Any, most: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    for part in prange(parts):
        _offspring(
            count * part // parts, count * (part + 1) // parts, cells, antigen, label, parents, share, cross_keys,
            mutate_keys, rate, least, most, low, high,
        )  # fmt: skip


@njit(fastmath=True, cache=True)
def _quadratic(q: Any, offsets: Any, band: Any, partial: Any) -> Any:
    values = partial.shape[0]
    partial[:] = 0
    for t in range(0, len(offsets), 7):
        c0, c1, c2, c3, c4, c5, c6 = (
            band[t], band[t + 1], band[t + 2], band[t + 3], band[t + 4], band[t + 5], band[t + 6],
        )  # fmt: skip
        q0, q1, q2, q3 = q[offsets[t] :], q[offsets[t + 1] :], q[offsets[t + 2] :], q[offsets[t + 3] :]
        q4, q5, q6 = q[offsets[t + 4] :], q[offsets[t + 5] :], q[offsets[t + 6] :]
        for j in range(values):
            partial[j] += (
                c0[j] * q0[j] + c1[j] * q1[j] + c2[j] * q2[j] + c3[j] * q3[j]
                + c4[j] * q4[j] + c5[j] * q5[j] + c6[j] * q6[j]
            )  # fmt: skip
    total = np.float32(0)
    for j in range(values):
        total += partial[j] * q[j]
    return total


@njit(nogil=True, cache=True)
def _band_distances(
    start: Any, stop: Any, cells: Any, antigen: Any, label: Any, antigens: Any, offsets: Any, band: Any, out: Any
) -> None:  # fmt: skip
    values = cells.shape[3]
    pad = offsets.max()
    for f in range(start, stop):
        family = cells[antigen[f], label[f]]
        goal = antigens[antigen[f]]
        q = np.zeros(values + pad, np.float32)
        partial = np.empty(values, np.float32)
        for i in range(family.shape[0]):
            for j in range(values):
                q[j] = family[i, j] - goal[j]
            out[f, i] = np.sqrt(max(_quadratic(q, offsets, band, partial), np.float32(0)))


@njit(parallel=True, nogil=True, cache=True)
def _band_distances_parts(
    parts: Any, count: Any, cells: Any, antigen: Any, label: Any, antigens: Any, offsets: Any, band: Any, out: Any
) -> None:  # fmt: skip
    for part in prange(parts):
        _band_distances(
            count * part // parts, count * (part + 1) // parts, cells, antigen, label, antigens, offsets, band, out
        )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def _register(start: Any, stop: Any, images: Any, goals: Any, reach: Any, steps: Any, out: Any) -> None:
    channels, height, width = images.shape[1:]
    x = ((2 * np.arange(width) + 1) / width - 1).astype(np.float32)
    y = ((2 * np.arange(height) + 1) / height - 1).astype(np.float32)
    for n in range(start, stop):
        image = np.empty((channels, height + 2, width + 2), np.float32)
        image[:, 1:-1, 1:-1] = images[n]
        _repeat_border(image)
        moved = image.copy()
        tangents = np.empty((7, height * width), np.float32)
        system = np.empty((6, 7))
        maps = np.zeros(6)
        for _ in range(steps):
            _normal_equations(moved, goals[n], x, y, tangents, system)
            _solve(system)
            for a in range(6):
                maps[a] = min(max(maps[a] + system[a, 6], -2 * reach), 2 * reach)
            _resample(image, maps.astype(np.float32), x, y, moved)
            _repeat_border(moved)
        out[n] = moved[:, 1:-1, 1:-1]


@njit(parallel=True, nogil=True, cache=True)
def _register_parts(parts: Any, count: Any, images: Any, goals: Any, reach: Any, steps: Any, out: Any) -> None:
    for part in prange(parts):
        _register(count * part // parts, count * (part + 1) // parts, images, goals, reach, steps, out)


@njit(cache=True)
def _repeat_border(framed: Any) -> None:
    framed[:, 0], framed[:, -1] = framed[:, 1], framed[:, -2]
    framed[:, :, 0], framed[:, :, -1] = framed[:, :, 1], framed[:, :, -2]


@njit(cache=True)
def _resample(image: Any, maps: Any, x: Any, y: Any, moved: Any) -> None:
    channels, width, height, stride = len(image), len(x), len(y), image.shape[2]
    flat = image.reshape(channels, -1)
    corner, to_right, down = np.empty(width, np.uint32), np.empty(width, np.float32), np.empty(width, np.float32)
    half_width, half_height = np.float32(width / 2), np.float32(height / 2)
    for i in range(height):
        # Two loops, because only without the channels can the first one work on several pixels at once.
        for j in range(width):
            # Distances from the own pixel, so that the identity changes no value.
            column = _within(np.float32(j) + half_width * (maps[0] * x[j] + maps[1] * y[i] + maps[2]), width)
            row = _within(np.float32(i) + half_height * (maps[3] * x[j] + maps[4] * y[i] + maps[5]), height)
            left, above = np.int32(column), np.int32(row)
            corner[j] = (above + 1) * stride + left + 1
            to_right[j], down[j] = column - np.float32(left), row - np.float32(above)
        for k in range(channels):
            upper_left, upper_right = flat[k], flat[k, 1:]
            lower_left, lower_right = flat[k, stride:], flat[k, stride + 1 :]
            for j in range(width):
                at, right = corner[j], to_right[j]
                upper = upper_left[at] * (_ONE - right) + upper_right[at] * right
                lower = lower_left[at] * (_ONE - right) + lower_right[at] * right
                moved[k, i + 1, j + 1] = upper * (_ONE - down[j]) + lower * down[j]


@njit(inline="always")
def _within(place: Any, size: Any) -> Any:
    # NaN, from images that are not finite, must not become an index.
    place = place if place > 0 else np.float32(0)
    return min(place, np.float32(size - 1))


@njit(fastmath=True, cache=True)
def _normal_equations(framed: Any, goal: Any, x: Any, y: Any, tangents: Any, system: Any) -> None:
    channels, height, width = goal.shape
    per_column, per_row = np.float32(width / 4), np.float32(height / 4)
    system[:] = 0
    for k in range(channels):
        for i in range(height):
            above, row, below = framed[k, i], framed[k, i + 1], framed[k, i + 2]
            part = tangents[:, i * width : (i + 1) * width]
            for j in range(width):
                along_x = (row[j + 2] - row[j]) * per_column
                along_y = (below[j + 1] - above[j + 1]) * per_row
                part[0, j] = along_x * x[j]
                part[1, j] = along_x * y[i]
                part[2, j] = along_x
                part[3, j] = along_y * x[j]
                part[4, j] = along_y * y[i]
                part[5, j] = along_y
                part[6, j] = goal[k, i, j] - row[j + 1]
        for a in range(6):
            for b in range(a, 7):
                total = np.float32(0)
                for j in range(height * width):
                    total += tangents[a, j] * tangents[b, j]
                system[a, b] += total


@njit(cache=True, error_model="numpy")
def _solve(system: Any) -> None:
    # With its ridge the matrix, of which the upper half is given, is so well conditioned that no pivot need be sought.
    ridge = 0.0
    for a in range(6):
        ridge += 1e-2 / 6 * system[a, a]
    for a in range(6):
        system[a, a] += max(ridge, 1e-14)
    for a in range(6):
        for b in range(a + 1, 6):
            system[b, b:] -= system[a, b] / system[a, a] * system[a, b:]
    for a in range(5, -1, -1):
        for b in range(a + 1, 6):
            system[a, 6] -= system[a, b] * system[b, 6]
        system[a, 6] /= system[a, a]
