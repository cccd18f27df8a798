"""Trials, campaigns and a problem small enough to work out by hand."""

import dataclasses
from collections import Counter

import torch
from torch import nn

from immunonet import incoming
from immunonet.defences.undefended import Undefended
from immunonet.evaluation.asking import Subject
from immunonet.evaluation.bench import Bench
from immunonet.evaluation.campaign import Campaign, Claim, Scene, Trial
from immunonet.evaluation.draws import Draws
from immunonet.evaluation.suite import PROTOCOLS, Planned
from immunonet.evaluation.threats import Threat

BOUNDS = incoming.bounds("bounds", (0.0, 1.0))
THREAT = Threat(eps=0.2, norm="linf", bounds=BOUNDS, seed=0)


def bands(n):
    """Two bands of the unit square, apart by .2, and a network that separates them exactly in the middle."""
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 2
    x[:, 0] = torch.where(y == 0, 0.4 * x[:, 0], 0.6 + 0.4 * x[:, 0])
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-20.0, 0.0], [20.0, 0.0]]))
        net.bias.copy_(torch.tensor([10.0, -10.0]))
    return net, x, y


def trial(name, correct, *, role="adaptive", attempted=None, familiarity=None):
    """A trial of attack `name`, each of whose candidates is the length of that name; labels are 1 where right."""
    correct = torch.tensor(correct, dtype=torch.bool)
    n = correct.shape[1]
    roles = {"joint", role} if name == "stealthy" else {role} - {None}
    return Trial(
        attack=Planned(name=name, roles=frozenset(roles), n=n),
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
        faults=Counter(),
        seconds=0.0,
        base_seconds=0.0,
    )


def campaign(defence, x, y, *, base=None, classes=2, draws=None, attacks=(), folder=None, threats=(THREAT,), **budget):
    """A campaign against `defence` on images `x` labelled `y`, by planned attacks; `budget`: changes of "quick"."""
    draws = draws or Draws()
    subject = Subject(defence, classes=classes)
    claim = Claim(
        name="d", base_name="base", dataset="toy", protocol="quick", threats=threats, told={},
        order=tuple(range(len(y))),
    )  # fmt: skip
    scene = Scene(
        subject=subject, base=Subject(Undefended(base or nn.Identity()), classes=classes), x=x, y=y,
        plan={attack.name: attack for attack in attacks}, seeds=draws.seeds,
    )  # fmt: skip
    spent = dataclasses.replace(PROTOCOLS["quick"], **budget)
    known = {"images": "i", "networks": ["n"], "defence": "d"}
    return Campaign(claim, Bench(scene, folder), known, spent, draws, lambda text: None)
