"""What a defence keeps if it may decline to answer what looks foreign: coverage against robustness."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from immunonet.evaluation import statistics
from immunonet.evaluation.runner import Trial
from immunonet.evaluation.verdict import choose, worst

# An input is declined whose p-value is at most this: about the share of clean inputs that are.
LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# The attack that also avoids looking foreign.
JOINT = "stealthy"


def abstention(trials: Sequence[Trial], select: slice, report: slice) -> list[dict[str, Any]]:
    """Return, for growing levels of rejection, what is left on clean images and in the worst case over `trials`.

    The first trial is the clean images; the attacks that tried all of them count. An attack succeeds on an image if
    its candidate is accepted and answered wrongly, so that the worst case is chosen anew at every level, on the draws
    `select`. Per level: `accepted` and `right`, the shares of clean images that are answered, and answered rightly;
    `held`, the share of images on which no attack succeeded, with its `ci95`, counted on the rows' own draws; `joint`,
    what is held under the joint attack alone, or None. Empty for a defence that senses nothing.
    """
    whole = [trial for trial in trials if trial.n == trials[0].n and bool(trial.attempted.all())]
    return [] if whole[0].familiarity is None else [_level(level, whole, select, report) for level in LEVELS]


def _level(level: float, trials: Sequence[Trial], select: slice, report: slice) -> dict[str, Any]:
    held = [_held(trial, level) for trial in trials]
    left = worst(held, choose(held, select))[report]
    joint = [trial for trial in held if trial.attack.name == JOINT]
    accepted = _accepted(trials[0], level)
    return {
        "level": level,
        "accepted": _mean(accepted),
        "right": _mean((trials[0].correct & accepted)[report]),
        "held": _mean(left),
        "ci95": list(statistics.interval(left)),
        "joint": _mean(joint[0].correct[report]) if joint else None,
    }


def _held(trial: Trial, level: float) -> Trial:
    """Return a trial in which what is not answered counts as right."""
    return dataclasses.replace(trial, correct=trial.correct | ~_accepted(trial, level))


def _accepted(trial: Trial, level: float) -> Tensor:
    assert trial.familiarity is not None
    return trial.familiarity > level


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
