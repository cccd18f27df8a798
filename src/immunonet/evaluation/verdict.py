"""The worst case: per image the candidate that fared best, chosen on some draws and counted on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from immunonet.evaluation.runner import Tested


def choose(tests: Sequence[Tested], select: slice) -> Tensor:
    """Return per image `(N,)` the place of the test with the fewest right answers in the selection draws.

    A tie goes to the attack that was strongest over all its images, then to the later one. The first test must cover
    all images; where a test did not attempt an image, it is not chosen.
    """
    shares = torch.full((len(tests), tests[0].n), torch.inf, dtype=torch.float64)
    for row, test in zip(shares, tests, strict=True):
        mean = test.correct[select].double().mean(0)
        # Less than any difference of shares over draws.
        row[: test.n] = torch.where(test.attempted, mean + 1e-6 * mean.mean(), torch.inf)
    best: Tensor = shares.flip(0).sort(dim=0, stable=True).indices[0]
    return len(tests) - 1 - best


def worst(tests: Sequence[Tested], chosen: Tensor) -> Tensor:
    """Return `(R, N)` bool, whether the defence was right under the test `chosen` `(N,)` for each image."""
    found = tests[0].correct.clone()
    for i, test in enumerate(tests):
        mine = (chosen == i).nonzero()[:, 0]
        found[:, mine] = test.correct[:, mine]
    return found


def candidates(tests: Sequence[Tested], chosen: Tensor) -> Tensor:
    """Return `(N, *S)`, the adversarial example of the test `chosen` `(N,)` for each image."""
    found = tests[0].adversarials.clone()
    for i, test in enumerate(tests):
        mine = (chosen == i).nonzero()[:, 0].to(found.device)
        found[mine] = test.adversarials[mine]
    return found


def standing(tests: Sequence[Tested], select: slice) -> Tensor:
    """Return `(N,)` bool: the images that no test has broken in all selection draws."""
    alive = torch.ones(tests[0].n, dtype=torch.bool)
    for test in tests:
        alive[: test.n] &= test.correct[select].any(0)
    return alive


def completed(test: Tested, before: Sequence[Tested], select: slice) -> Tested:
    """Return a test whose images that were passed over count as under the worst of the tests `before`."""
    known = worst(before, choose(before, select))[:, : test.n]
    return dataclasses.replace(test, correct=torch.where(test.attempted, test.correct, known))


def summary(correct: Tensor) -> dict[str, float]:
    """Return the three readings of runs `(R, n)`: `mean`, right by `majority`, and `always` right: no run broke it."""
    return {
        "mean": float(correct.double().mean()),
        "majority": float((correct.double().mean(0) > 0.5).double().mean()),
        "always": float(correct.all(0).double().mean()),
    }


def per_example(tests: Sequence[Tested], chosen: Tensor, y: Tensor, report: slice) -> list[dict[str, Any]]:
    """Return per image its label, the share of right answers without an attack and in the worst case, and by what."""
    clean = tests[0].correct[report].double().mean(0)
    found = worst(tests, chosen)[report].double().mean(0)
    return [
        {
            "label": int(y[i]),
            "clean": float(clean[i]),
            "worst": float(found[i]),
            "attack": tests[int(chosen[i])].attack.name,
        }
        for i in range(len(chosen))
    ]
