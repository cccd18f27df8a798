"""What a defence keeps if it may decline to answer what looks foreign: coverage against robustness."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from immunonet import statistics
from immunonet.evaluation.campaign import Trial, worst
from immunonet.evaluation.draws import Draws, share

# An input is declined whose p-value is at most this: about the share of clean inputs that are.
LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def abstention(trials: list[Trial], draws: Draws) -> list[dict[str, Any]]:
    """Return, for growing levels of rejection, what is left on clean images and in the worst case over `trials`.

    The first trial is the clean images; the attacks that tried all of them count. An attack succeeds on an image if
    its candidate is accepted and answered wrongly, so that the worst case is chosen anew at every level, on the draws
    that choose. Per level: `accepted` and `right`, the shares of clean images that are answered, and answered rightly;
    `held`, the share of images on which no attack succeeded, with its `ci95`, counted on the rows' own draws; `joint`,
    what is held under joint attacks alone, or None. Empty for a defence that senses nothing.
    """
    whole = [trial for trial in trials if trial.n == trials[0].n and bool(trial.attempted.all())]
    return [] if whole[0].familiarity is None else [_level(level, whole, draws) for level in LEVELS]


def _level(level: float, trials: list[Trial], draws: Draws) -> dict[str, Any]:
    # What is not answered counts as right.
    held = [dataclasses.replace(trial, correct=trial.correct | ~_accepted(trial, level)) for trial in trials]
    left, accepted = draws.counted(worst(held, draws)), _accepted(trials[0], level)
    joint = [trial for trial in held if "joint" in trial.attack.roles]
    return {
        "level": level,
        "accepted": share(accepted),
        "right": share(draws.counted(trials[0].correct & accepted)),
        "held": share(left),
        "ci95": list(statistics.interval(left)),
        "joint": share(draws.counted(worst(joint, draws))) if joint else None,
    }


def _accepted(trial: Trial, level: float) -> Tensor:
    assert trial.familiarity is not None
    return trial.familiarity > level
