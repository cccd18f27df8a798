"""The worst case: per image the candidate that fared best, chosen on some draws and counted on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunonet.evaluation.runner import Runner, Trial


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """What is left when every image meets the trial that did best against it.

    `chosen` `(N,)`: the place of that trial. `adversarials` `(N, *S)`: its candidates. `labels` `(R, N)`: the defence's
    answers to them in the draws of the report, one run per seed in `seeds` (none for one without randomness);
    `correct` `(R, N)`: whether they were right. `selected_on`: the seeds it was chosen on.
    """

    chosen: Tensor
    adversarials: Tensor
    labels: Tensor
    correct: Tensor
    seeds: tuple[int, ...]
    selected_on: tuple[int, ...]


def worst_case(
    runner: Runner,
    trials: Sequence[Trial],
    select: slice,
    *,
    finalists: int,
    selection: Sequence[int],
    report: Sequence[int],
) -> WorstCase:
    """Return the worst case of `trials`, of which the first covers all images.

    Without randomness (no seeds) it is the trials' own. Else the best `finalists` of every image on the draws `select`
    of the trials are compared on the seeds `selection`, and the one with the fewest right answers is asked under
    the seeds `report`, on which nothing was chosen.
    """
    n = trials[0].n
    y = runner.y[:n].cpu()
    places = ranked(trials, select)[:finalists]
    chosen = places[0]
    if selection and len(places) > 1:
        shares = torch.stack(
            [
                (runner.labels(f"finalist {i}", candidates(trials, place), selection) == y).double().mean(0)
                for i, place in enumerate(places)
            ]
        )
        chosen = places.gather(0, shares.sort(dim=0, stable=True).indices[:1])[0]
    found = candidates(trials, chosen)
    labels = (
        runner.labels("worst case", found, report) if report else picked([trial.labels for trial in trials], chosen)
    )
    return WorstCase(
        chosen=chosen,
        adversarials=found,
        labels=labels,
        correct=labels == y,
        seeds=tuple(report),
        selected_on=tuple(selection),
    )


def ranked(trials: Sequence[Trial], select: slice) -> Tensor:
    """Return per image `(T, N)` the places of the trials, the one with the fewest right answers in `select` first.

    A tie goes to the attack that was strongest over all its images, then to the later one. The first trial must cover
    all images; a trial that did not attempt an image comes last.
    """
    shares = torch.full((len(trials), trials[0].n), torch.inf, dtype=torch.float64)
    for row, trial in zip(shares, trials, strict=True):
        mean = trial.correct[select].double().mean(0)
        # Less than any difference of shares over draws.
        row[: trial.n] = torch.where(trial.attempted, mean + 1e-6 * mean.mean(), torch.inf)
    found, order = shares.flip(0).sort(dim=0, stable=True)
    # Where few attacks attempted an image, the best of them stands in for those that did not.
    order = torch.where(found.isinf(), order[:1], order)
    return len(trials) - 1 - order


def choose(trials: Sequence[Trial], select: slice) -> Tensor:
    """Return per image `(N,)` the place of the trial with the fewest right answers, see `ranked`."""
    return ranked(trials, select)[0]


def worst(trials: Sequence[Trial], chosen: Tensor) -> Tensor:
    """Return `(R, N)` bool, whether the defence was right under the trial `chosen` `(N,)` for each image."""
    return picked([trial.correct for trial in trials], chosen)


def picked(values: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Return `(R, N)` from `values`, each `(R, n)`: column i is that of `values[chosen[i]]`."""
    found = values[0].clone()
    for i, value in enumerate(values):
        mine = (chosen == i).nonzero()[:, 0]
        found[:, mine] = value[:, mine]
    return found


def candidates(trials: Sequence[Trial], chosen: Tensor) -> Tensor:
    """Return `(N, *S)`, the adversarial example of the trial `chosen` `(N,)` for each image."""
    found = trials[0].adversarials.clone()
    for i, trial in enumerate(trials):
        mine = (chosen == i).nonzero()[:, 0].to(found.device)
        found[mine] = trial.adversarials[mine]
    return found


def standing(runner: Runner, trials: Sequence[Trial], select: slice, selection: Sequence[int]) -> Tensor:
    """Return `(N,)` bool: the images that no trial has broken in all draws of the seeds `selection`.

    Only those that fell in all of the trials' own draws `select` are asked about again.
    """
    alive = torch.ones(trials[0].n, dtype=torch.bool)
    for trial in trials:
        alive[: trial.n] &= trial.correct[select].any(0)
    fallen = (~alive).nonzero()[:, 0]
    if selection and len(fallen):
        found = candidates(trials, choose(trials, select))[fallen.to(runner.x.device)]
        labels = runner.labels("fallen", found, selection)
        alive[fallen] = (labels == runner.y[fallen.to(runner.y.device)].cpu()).any(0)
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


def per_example(clean: Trial, found: WorstCase, names: Sequence[str], y: Tensor, report: slice) -> list[dict[str, Any]]:
    """Return per image its label, the share of right answers without an attack and in the worst case, and by what."""
    before, after = clean.correct[report].double().mean(0), found.correct.double().mean(0)
    return [
        {"label": int(y[i]), "clean": float(before[i]), "worst": float(after[i]), "attack": names[int(place)]}
        for i, place in enumerate(found.chosen)
    ]
