"""Intervals and tests for shares of images: Wilson, bootstrap over images and seeds, McNemar."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from immunonet import _check

# Images of as many draws of a bootstrap are counted at once.
_BLOCK = 2**20


def wilson(correct: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share `correct / n` (Wilson 1927), within [0, 1].

    `correct` in [0, n] may be a mean over runs. ValueError for n < 1 or a confidence not in (0, 1).
    """
    n = _check.integer("n", n)
    correct = _check.number("correct", correct, least=0.0, most=n)
    share = correct / n
    z = NormalDist().inv_cdf((1 + _confidence(confidence)) / 2)
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low, high = (centre - half) / scale, (centre + half) / scale
    return (0.0 if correct == 0 else max(0.0, low)), (1.0 if correct == n else min(1.0, high))


def bootstrap(correct: Tensor, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean of `correct` `(R, n)` over R runs of n images.

    Images and runs are each drawn with replacement (Owen 2007, the pigeonhole bootstrap), because responses
    to the images of one run share that run's randomness. ValueError for an empty or non-matrix `correct`.
    """
    if correct.ndim != 2 or not correct.numel():
        raise ValueError(f"correct must have shape (runs, images), neither empty, got {tuple(correct.shape)}")
    draws = _check.integer("draws", draws)
    runs, n = correct.shape
    table = correct.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    # A multiple of both numbers of choices, whose remainders are even draws among either.
    most = math.lcm(runs, n)
    for block in torch.arange(draws).split(max(1, _BLOCK // n)):
        drawn = torch.randint(most, (len(block), runs + n), generator=generator)
        own, images = drawn[:, :runs] % runs, drawn[:, runs:] % n
        weights = torch.zeros(len(own), runs, dtype=torch.float64).scatter_add_(1, own, torch.ones_like(own).double())
        means.append((weights @ table).gather(1, images).mean(1) / runs)
    tail = (1 - _confidence(confidence)) / 2
    low, high = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def interval(correct: Tensor, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the interval of an accuracy from `correct` `(R, n)` bool, R runs of the same n images.

    One run: Wilson. Several: the bootstrap over images and runs, widened to Wilson's ends for the mean, since
    resampling alone gives no width where all or no images are correct. ValueError as for `bootstrap`.
    """
    if correct.ndim != 2 or not correct.numel():
        raise ValueError(f"correct must have shape (runs, images), neither empty, got {tuple(correct.shape)}")
    runs, n = correct.shape
    low, high = wilson(float(correct.double().sum()) / runs, n, confidence=confidence)
    if runs > 1:
        other = bootstrap(correct, confidence=confidence, seed=seed)
        low, high = min(low, other[0]), max(high, other[1])
    return low, high


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Return the exact two-sided p-value that two classifiers are right equally often (McNemar 1947).

    `a`, `b` `(n,)` bool: which of the same images each got right. Only images that one alone got right
    count; under the null hypothesis each falls to either side with probability one half.
    """
    for name, value in (("a", a), ("b", b)):
        if value.dtype != torch.bool or value.ndim != 1 or value.shape != a.shape:
            raise ValueError(
                f"{name} must be bool of shape ({len(a)},), one per image, got {value.dtype} {tuple(value.shape)}"
            )
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    total = only_a + only_b
    tail: int = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**total))


def _confidence(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"confidence must be in (0, 1), got {value!r}")
    return value
