"""The worst case: per image the candidate that fared best, chosen on some draws and counted on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from immunonet.evaluation.runner import Trial


def choose(trials: Sequence[Trial], select: slice) -> Tensor:
    """Return per image `(N,)` the place of the trial with the fewest right answers in the selection draws.

    A tie goes to the attack that was strongest over all its images, then to the later one. The first trial must cover
    all images; where a trial did not attempt an image, it is not chosen.
    """
    shares = torch.full((len(trials), trials[0].n), torch.inf, dtype=torch.float64)
    for row, trial in zip(shares, trials, strict=True):
        mean = trial.correct[select].double().mean(0)
        # Less than any difference of shares over draws.
        row[: trial.n] = torch.where(trial.attempted, mean + 1e-6 * mean.mean(), torch.inf)
    best: Tensor = shares.flip(0).sort(dim=0, stable=True).indices[0]
    return len(trials) - 1 - best


def worst(trials: Sequence[Trial], chosen: Tensor) -> Tensor:
    """Return `(R, N)` bool, whether the defence was right under the trial `chosen` `(N,)` for each image."""
    found = trials[0].correct.clone()
    for i, trial in enumerate(trials):
        mine = (chosen == i).nonzero()[:, 0]
        found[:, mine] = trial.correct[:, mine]
    return found


def candidates(trials: Sequence[Trial], chosen: Tensor) -> Tensor:
    """Return `(N, *S)`, the adversarial example of the trial `chosen` `(N,)` for each image."""
    found = trials[0].adversarials.clone()
    for i, trial in enumerate(trials):
        mine = (chosen == i).nonzero()[:, 0].to(found.device)
        found[mine] = trial.adversarials[mine]
    return found


def standing(trials: Sequence[Trial], select: slice) -> Tensor:
    """Return `(N,)` bool: the images that no trial has broken in all selection draws."""
    alive = torch.ones(trials[0].n, dtype=torch.bool)
    for trial in trials:
        alive[: trial.n] &= trial.correct[select].any(0)
    return alive


def completed(trial: Trial, before: Sequence[Trial], select: slice) -> Trial:
    """Return a trial whose images that were passed over count as under the worst of the trials `before`."""
    known = worst(before, choose(before, select))[:, : trial.n]
    return dataclasses.replace(trial, correct=torch.where(trial.attempted, trial.correct, known))


def summary(correct: Tensor) -> dict[str, float]:
    """Return the three readings of runs `(R, n)`: `mean`, right by `majority`, and `always` right: no run broke it."""
    return {
        "mean": float(correct.double().mean()),
        "majority": float((correct.double().mean(0) > 0.5).double().mean()),
        "always": float(correct.all(0).double().mean()),
    }


def per_example(trials: Sequence[Trial], chosen: Tensor, y: Tensor, report: slice) -> list[dict[str, Any]]:
    """Return per image its label, the share of right answers without an attack and in the worst case, and by what."""
    clean = trials[0].correct[report].double().mean(0)
    found = worst(trials, chosen)[report].double().mean(0)
    return [
        {
            "label": int(y[i]),
            "clean": float(clean[i]),
            "worst": float(found[i]),
            "attack": trials[int(chosen[i])].attack.name,
        }
        for i in range(len(chosen))
    ]
