"""Trials small enough to work out by hand."""

import torch

from immunonet.evaluation.runner import Trial
from immunonet.evaluation.suite import Planned


def trial(name, correct, *, kind="adaptive", attempted=None, familiarity=None):
    """A trial of attack `name`, each of whose candidates is the length of that name; labels are 1 where right."""
    correct = torch.tensor(correct, dtype=torch.bool)
    n = correct.shape[1]
    return Trial(
        attack=Planned(name=name, knows="base", kind=kind, n=n),
        adversarials=torch.full((n, 1), float(len(name))),
        attempted=torch.tensor([True] * n if attempted is None else attempted),
        labels=correct.long(),
        correct=correct,
        base_labels=correct[:1].long(),
        base_correct=correct[:1],
        familiarity=None if familiarity is None else torch.tensor(familiarity),
        foreign=None,
        outside=0,
        losses=[],
        faults=None,
        seconds=0.0,
        base_seconds=0.0,
    )
